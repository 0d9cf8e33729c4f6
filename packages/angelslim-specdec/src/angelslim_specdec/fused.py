"""Modules of a target that do in many launches what a kernel of ours does in one; found by trying both, whatever they are called.

Shapes: B rows, T tokens, H hidden, h heads of queries, g of keys and values, D of a head.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from angelslim_core.kv_cache import attention_by, attention_of

from .attention import attend
from .cache import SlotCache
from .kernels import layer as kernels
from .kernels.layer import HeadNorms, Rounding

log = logging.getLogger(__name__)
_NAME = "specdec_probe"
_ROUNDINGS: tuple[Rounding, ...] = ("twice", "once", "plus_one")
_CACHES = ("cache", "past_key_values")
Forward = Callable[..., Any]


class Fused:
    """Lets a model's norms, gated activations and RoPE with the cache take one launch each for the time of a call.

    A module is replaced only if on random input it gives what the kernel gives, to a unit in the last place; others run as they are.

    Args:
        model: layers whose `forward` somebody else replaced are left alone.

    Attributes:
        counts: how many of each kind are replaced, and how many that looked alike were left alone.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self.counts: Counter[str] = Counter(norms=0, mlps=0, attentions=0, left_alone=0)
        self._forwards: list[tuple[nn.Module, Forward]] = []
        norms: dict[nn.Module, _Norm] = {}
        # of heads, or of the part of them that is turned
        turned = {2 * len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
        for kind, looks, make in (
            ("norms", _looks_norm, lambda m: _norm(m, norms)), ("mlps", _looks_mlp, _mlp), ("attentions", _looks_attention, lambda m: _attention(m, norms, turned))
        ):  # fmt: skip
            for module in model.modules():
                if "forward" in vars(module) or module.training or not looks(module):
                    continue
                try:
                    forward, why = make(module), "it computes something else"
                except Exception as error:  # whatever a module does not take: it stays as it is, and is counted
                    forward, why = None, str(error)
                if forward is None:
                    log.info("%s runs as it is: %.200s", type(module).__name__, why)
                    self.counts["left_alone"] += 1
                else:
                    self._forwards.append((module, forward))
                    self.counts[kind] += 1

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, modules take few launches."""
        changed = [(module, forward) for module, forward in self._forwards if "forward" not in vars(module)]
        try:
            for module, forward in changed:
                vars(module)["forward"] = forward
            yield
        finally:
            for module, _ in changed:
                vars(module).pop("forward", None)


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    eps: float
    rounding: Rounding

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = kernels.NORM(x, self.weight, self.eps, self.rounding)
        return out


def _looks_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor) and _eps(module) is not None


def _eps(module: nn.Module) -> float | None:
    found = [value for value in (getattr(module, name, None) for name in ("variance_epsilon", "eps")) if isinstance(value, float)]
    return found[0] if found else None


def _norm(module: Any, norms: dict[nn.Module, _Norm]) -> Forward | None:
    eps = _eps(module)
    assert eps is not None
    x = 3 * _random(module.weight, 16, len(module.weight))
    expected = module.forward(x)
    tried = [_Norm(module.weight, eps, rounding) for rounding in _ROUNDINGS]
    best = max(tried, key=lambda norm: int((norm(x) == expected).sum()))
    if not _alike(best(x), expected):
        return None
    norms[module] = best
    return best


def _looks_mlp(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")) and callable(
        getattr(module, "act_fn", None)
    )


def _mlp(module: Any) -> Forward | None:
    x = _random(_weight(module), 2, 3, module.gate_proj.in_features)
    gate, up = module.gate_proj(x), module.up_proj(x)
    wide = 4 * _random(gate, 2, 64, gate.shape[-1])
    structure = torch.equal(module.forward(x), module.down_proj(module.act_fn(gate) * up))
    if not structure or not _alike(kernels.GATED(wide, wide.flip(1)), module.act_fn(wide) * wide.flip(1)):
        return None
    own = type(module).forward

    def forward(x: Tensor) -> Tensor:
        out: Tensor = module.down_proj(kernels.GATED(module.gate_proj(x), module.up_proj(x))) if x.numel() else own(module, x)
        return out

    return forward


def _looks_attention(module: nn.Module) -> bool:
    projections = all(isinstance(getattr(module, name, None), nn.Module) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    return projections and isinstance(getattr(module, "layer_idx", None), int) and isinstance(getattr(module, "head_dim", None), int)


@dataclass
class _Seen:
    """Stands for the cache and for attention, and keeps what came to them."""

    stored: tuple[Tensor, Tensor] | None = None
    query: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.stored = key, value
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return 0


def _probe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *, specdec_seen: _Seen, **options: Any
) -> tuple[Tensor, None]:  # fmt: skip
    specdec_seen.query, specdec_seen.options = query, options
    return query.transpose(1, 2).contiguous(), None


def _attention(module: Any, norms: dict[nn.Module, _Norm], turned: set[int]) -> Forward | None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = inspect.signature(module.forward).parameters
    held = next((name for name in _CACHES if name in names), None)
    others = {name for name, child in module.named_children() if child is not None} - {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    of_heads = [norms.get(getattr(module, name)) for name in ("q_norm", "k_norm") if getattr(module, name, None) is not None]
    if held is None or "position_embeddings" not in names or others or module.head_dim not in turned or len(of_heads) == 1 or None in of_heads:
        return None
    head_norms = _head_norms([norm for norm in of_heads if norm is not None])
    if of_heads and (head_norms is None or len(head_norms[0]) != module.head_dim):
        return None
    weight, width = _weight(module), module.head_dim
    x = _random(weight, 2, 3, module.q_proj.in_features)
    cos, sin = (_random(weight, 2, 3, width, seed=seed) for seed in (1, 2))
    seen = _Seen()
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _probe)
    before = attention_of(module.config)
    try:
        attention_by(module.config, _NAME)
        made = module.forward(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None, specdec_seen=seen, **{held: seen})
    finally:
        attention_by(module.config, before)
    told = {name: value for name, value in seen.options.items() if value is not None}
    scaling, window, dropout = (told.pop(name, None) for name in ("scaling", "sliding_window", "dropout"))
    if told or dropout or seen.query is None or seen.stored is None or not isinstance(made, tuple) or len(made) != 2:
        return None
    q, k, v = (projection(x).view(2, 3, -1, width) for projection in (module.q_proj, module.k_proj, module.v_proj))
    ours = kernels.TURNED(q, k, cos, sin, head_norms)
    same = all(_alike(a, b, of=cos) for a, b in zip(ours, (seen.query, seen.stored[0]), strict=True)) and torch.equal(v.transpose(1, 2), seen.stored[1])
    if not same or not torch.equal(module.o_proj(seen.query.transpose(1, 2).reshape(2, 3, -1)), made[0]):
        return None
    own, layer = type(module).forward, module.layer_idx

    def forward(hidden_states: Tensor, *args: Any, position_embeddings: Any = None, attention_mask: Any = None, **options: Any) -> tuple[Tensor, Any]:
        cache = options.get(held)
        whole = position_embeddings is not None and position_embeddings[0].shape[-1] == width
        if args or not whole or not hidden_states.numel() or not isinstance(cache, SlotCache | None):
            return own(module, hidden_states, *args, position_embeddings=position_embeddings, attention_mask=attention_mask, **options)  # type: ignore[no-any-return]
        shape = (*hidden_states.shape[:-1], -1, width)
        q, k, v = (projection(hidden_states).view(shape) for projection in (module.q_proj, module.k_proj, module.v_proj))
        cos, sin = position_embeddings
        slots = None if cache is None else cache.slots_of(layer)
        if cache is None or slots is None:
            q, k = kernels.TURNED(q, k, cos, sin, head_norms)
            v = v.transpose(1, 2)
            k, v = (k, v) if cache is None else cache.update(k, v, layer)
        else:
            q = kernels.TURN_AND_STORE(q, k, v, cos, sin, *slots, cache.lengths, norms=head_norms)
            k, v = cache.seen(layer)
        rest = {name: value for name, value in options.items() if name != held}
        attended, weights = attend(module, q, k, v, attention_mask, scaling=scaling, sliding_window=window, **rest)
        return module.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), weights

    return forward


def _head_norms(of: list[_Norm]) -> HeadNorms | None:
    """As kernels take them; None: there are none, or of two kinds."""
    if not of or (of[0].eps, of[0].rounding, of[0].weight.shape) != (of[1].eps, of[1].rounding, of[1].weight.shape):
        return None
    return of[0].weight, of[1].weight, of[0].eps, of[0].rounding


def _weight(module: nn.Module) -> Tensor:
    """Of the dtype and on the device that its input has."""
    return next(p for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)


def _random(like: Tensor, *shape: int, seed: int = 0) -> Tensor:
    """Normal, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def _alike(found: Tensor, expected: Tensor, of: Tensor | None = None) -> bool:
    """To the last place of what is there, or of the greatest of what was added up: rounding on the way may have fallen otherwise in few."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    a, b = found.double(), expected.double()
    scale = torch.maximum(a.abs(), b.abs()) if of is None else b.abs().amax().expand_as(b)
    places = 8 if found.dtype == torch.float32 else 1  # in FP32 sums come in another order
    return bool(((a - b).abs() <= places * torch.finfo(found.dtype).eps * scale).all())
