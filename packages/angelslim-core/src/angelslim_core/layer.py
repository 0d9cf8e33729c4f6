"""A decoder layer as a layer pass sees it: its weights as the steps before left them, and the inputs captured for it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .activations import Stored
from .adapters.base import Site
from .kv_cache import Attend, round_cache, tapped
from .products import products
from .schemes import CACHE_SCALES, Quantized
from .transforms import transforms_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .context import Context


class _States:
    """An attribute that holds a tensor, or one in a file, which each access reads."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, batch: LayerBatch, owner: type | None = None) -> Any:
        value = batch.__dict__[self._name]
        return value.read() if isinstance(value, Stored) else value

    def __set__(self, batch: LayerBatch, value: Tensor | Stored | None) -> None:
        batch.__dict__[self._name] = value


class LayerBatch:
    """One captured batch: what a layer is called with.

    Attributes:
        hidden: [B, T, H], stored dtype, on the CPU between calls.
        mask: [B, T] bool, False on padding.
        kwargs: the layer's other arguments (masks, position embeddings).
        reference: [B, T, H], what the unchanged model feeds the layer, or None if no step needs it.
        target: [B, T, H], what the unchanged layer makes of `reference`, or None.
        number: which batch of the calibration samples it is.
    """

    hidden, reference, target = _States(), _States(), _States()
    _hidden: Tensor | Stored | None

    def __init__(self, hidden: Tensor | None, mask: Tensor, kwargs: dict[str, Any] | None = None, number: int = 0) -> None:
        self.hidden, self.mask, self.kwargs, self.number = hidden, mask, kwargs or {}, number
        self.reference = self.target = None

    def fork(self) -> None:
        """The unchanged model feeds the layer what the changed one does."""
        self.reference = self._hidden

    def rows(self) -> list[tuple[LayerBatch, int | None]]:
        """Its samples, to be `joined` with others; itself as a whole where an argument of the layer is not the same for all."""
        if all(t.dim() < 2 or t.shape[0] == 1 for t in _tensors(self.kwargs)):
            return [(self, row) for row in range(self.mask.shape[0])]
        return [(self, None)]


def joined(rows: Iterable[tuple[LayerBatch, int | None]], device: str) -> list[LayerBatch]:
    """Samples of any batches as few batches on a device: those of one length and with one set of arguments are run at once."""
    import torch

    sets: dict[tuple[int, ...], list[tuple[LayerBatch, slice]]] = {}
    for number, (batch, row) in enumerate(rows):  # a batch that is whole may come twice
        key = (id(batch), number) if row is None else (batch.mask.shape[1], *map(id, _tensors(batch.kwargs)))
        sets.setdefault(key, []).append((batch, slice(None) if row is None else slice(row, row + 1)))
    found = []
    for parts in sets.values():
        first = parts[0][0]
        made = LayerBatch(None, torch.cat([b.mask[some] for b, some in parts]), first.kwargs, first.number)
        for name in ("hidden", "reference", "target"):
            if getattr(first, f"_{name}") is not None:
                setattr(made, name, torch.cat([getattr(b, name)[some].to(device, non_blocking=True) for b, some in parts]))
        found.append(made)
    return found


class _SeenError(Exception):
    """Every linear to be observed has been."""


class Fold(NamedTuple):
    """A feed as it occurs in a layer: module names inside the layer (see `adapters.base.Feed`)."""

    source: str
    readers: tuple[str, ...]
    block: str


class Layer:
    """What a layer pass sees: a decoder layer with its weights as the earlier steps left them, and its inputs.

    Attributes:
        index: number of the layer.
        module: the decoder layer; routed experts are separate linears.
        sites: the linears that the running step treats.
        batches: captured inputs.
        layout: the architecture's table.
    """

    def __init__(self, index: int, module: nn.Module, prefix: str, captured: Sequence[LayerBatch], context: Context) -> None:
        self.index, self.module, self.batches, self.context = index, module, captured, context
        self.layout = context.description.layout
        self.sites: tuple[Site, ...] = ()
        self._prefix = prefix
        self.quantized: dict[Site, tuple[Quantized, Tensor]] = {}
        self.cache_scales: dict[str, Tensor] = {}

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return int(self.module.get_submodule("self_attn").head_dim)  # type: ignore[arg-type]

    def inner(self, site: Site) -> str:
        """Name of a site's module inside the layer."""
        return site.name.removeprefix(self._prefix)

    def linear(self, site: Site, module: nn.Module | None = None) -> nn.Linear:
        """The linear of a site, in the layer or in a copy of it."""
        return (module or self.module).get_submodule(self.inner(site))  # type: ignore[return-value]

    def forward(self, batch: LayerBatch, hidden: Tensor | None = None, module: nn.Module | None = None, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output [B, T, H] of the layer as it stands, on the run's device.

        Args:
            hidden: instead of the batch's own, for instance its `reference`.
            module: run this copy of the layer instead.
            weights: name inside the layer -> tensor to use instead of the layer's own; gradients reach them.
        """
        import torch

        device = self.context.device
        hidden = (batch.hidden if hidden is None else hidden).to(device, non_blocking=True)
        module, kwargs = module or self.module, _to(batch.kwargs, device)
        with products(device):
            out = module(hidden, **kwargs) if weights is None else torch.func.functional_call(module, dict(weights), (hidden,), kwargs)
        return out[0] if isinstance(out, tuple) else out

    def feeds(self) -> list[Fold]:
        """What can be scaled in this layer, as the architecture's table says."""
        present = {n for n, p in self.module.named_parameters() if p.dim() <= 2 and n.endswith(".weight")}
        experts = sorted({int(m[1]) for n in present if (m := re.search(r"experts\.(\d+)\.", n))})
        found = []
        for feed in self.layout.feeds:
            for expert in experts if "{e}" in feed.source else [None]:
                named = [expert] if expert is not None else experts
                source = feed.source.replace("{e}", str(expert))
                readers = [r.replace("{e}", str(e)) for r in feed.readers for e in (named if "{e}" in r else [0])]
                readers = [r for r in readers if f"{r}.weight" in present]
                # channels that are mixed on their way cannot be scaled one by one
                mixed = any(transforms_of(self.module.get_submodule(r)) for r in readers)
                if f"{source}.weight" in present and readers and not mixed:
                    found.append(Fold(source, tuple(readers), feed.block))
        return found

    def scale(self, fold: Fold, s_C: Tensor) -> None:
        """Divide the output channels of `fold.source` by `s_C` and multiply what reads them: the layer's function stays.

        Args:
            s_C: [channels of the source], positive; readers with more inputs (grouped-query attention: each key-value
                head feeds several heads) get it spread over their heads.
        """
        import torch

        source = self.module.get_submodule(fold.source)
        weight = source.weight
        assert isinstance(weight, torch.Tensor)
        with torch.no_grad():
            if weight.dim() == 1:
                offset = self.layout.norm_offset
                weight.copy_((weight.float() + offset) / s_C - offset)
            else:
                weight.copy_(weight.float() / s_C[:, None])
            if isinstance(bias := getattr(source, "bias", None), torch.Tensor):
                bias.copy_(bias.float() / s_C)
            for name in fold.readers:
                reader = self.module.get_submodule(name).weight
                assert isinstance(reader, torch.Tensor)
                reader.copy_(reader.float() * self.spread(s_C, reader.shape[1]))

    def spread(self, s_C: Tensor, columns: int) -> Tensor:
        """Channels of key-value heads as the inputs of all heads that read them; [columns]."""
        if s_C.numel() == columns:
            return s_C
        return s_C.view(-1, 1, self.head_dim).expand(-1, columns // s_C.numel(), -1).reshape(columns)

    def observe(
        self,
        see: Callable[[Site, Tensor], None],
        all_experts: bool = True,
        *,
        sites: Iterable[Site] | None = None,
        batches: Sequence[LayerBatch] | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        """Run all batches and show `see` the input rows [N, in] of every linear of the step, padding left out.

        Args:
            all_experts: send every token through every routed expert (the output stays as routed), so that each
                expert sees calibration data.
            sites: these linears only.
            batches: these batches only.
            reference: run this copy of the layer on the batches' reference inputs instead.
        """
        import torch

        running = reference or self.module
        experts = [m for m in running.modules() if type(m).__name__ == "LinearExperts"]
        mask: Tensor | None = None

        def hook(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                (x,) = args
                if mask is not None and x.shape[:2] == mask.shape:
                    x = x[mask]
                elif mask is not None and x.dim() == 2 and x.shape[0] == mask.numel():
                    x = x[mask.reshape(-1)]
                see(site, x.reshape(-1, x.shape[-1]))
                waiting.discard(site)
                if not waiting:
                    raise _SeenError

            return look

        wanted = tuple(self.sites if sites is None else sites)
        waiting: set[Site] = set()
        handles = [self.linear(s, running).register_forward_pre_hook(hook(s)) for s in wanted]
        try:
            with torch.no_grad():
                for batch in self.batches if batches is None else batches:
                    padded = not bool(batch.mask.all())
                    mask = batch.mask.to(self.context.device) if padded else None
                    for module in experts:
                        module.calibrate_all = all_experts  # type: ignore[assignment]
                        module.token_mask = mask.reshape(-1) if mask is not None else None  # type: ignore[assignment]
                    waiting.update(wanted)
                    with contextlib.suppress(_SeenError):  # what follows the last linear is not computed
                        self.forward(batch, batch.reference if reference is not None else None, reference)
        finally:
            for handle in handles:
                handle.remove()
            for module in experts:
                module.calibrate_all, module.token_mask = False, None  # type: ignore[assignment]

    def attention(self, site: Site) -> nn.Module:
        """The attention that a site is part of."""
        return self.module.get_submodule(self.inner(site).rpartition(".")[0])

    def observe_attention(
        self, site: Site, see: Callable[[LayerBatch, Tensor, Tensor, Tensor, Attend], None], batches: Sequence[LayerBatch] | None = None
    ) -> None:
        """Run batches and show `see` the batch and what attention is computed of: queries, keys (after RoPE), values.

        Args:
            site: a linear of the attention.
            see: called with the batch, queries [B, all heads, T, D], keys and values [B, H, T, D] and what computes
                attention; positions of padding are among them.
            batches: these batches only.
        """
        import torch

        def look(query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> tuple[Tensor, Any]:
            see(batch, query, key, value, attend)
            raise _SeenError

        with torch.no_grad(), tapped(self.attention(site), look):
            for batch in self.batches if batches is None else batches:
                with contextlib.suppress(_SeenError):
                    self.forward(batch)

    def store_cache(self, site: Site, k_scale: Tensor, v_scale: Tensor) -> None:
        """Give the attention of a site the fp32 scales of its KV cache; the layer goes on with a quantized one."""
        name = site.name.rpartition(".")[0]
        self.cache_scales.update(zip((f"{name}.{suffix}" for suffix in CACHE_SCALES), (k_scale, v_scale), strict=True))
        round_cache(self.attention(site), k_scale, v_scale)

    def store(self, site: Site, result: Quantized) -> None:
        """Give a linear its final form, or another one; the layer goes on with the dequantized weight."""
        import torch

        linear = self.linear(site)
        self.quantized[site] = (result, self.quantized[site][1] if site in self.quantized else linear.weight.data)
        with torch.no_grad():
            linear.weight = torch.nn.Parameter(result.dequantize().to(linear.weight.dtype), requires_grad=False)


def _tensors(value: Any) -> Iterator[Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _to(value: Any, device: str) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(v, device) for v in value)
    return {k: _to(v, device) for k, v in value.items()} if isinstance(value, dict) else value
