"""A target: a transformers causal language model, unpatched, as drafts and decoding see it.

Shapes: B rows, T tokens, n tapped layers, H hidden, V vocabulary, K proposed tokens.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from angelslim_core.errors import ModelError, UsageError
from angelslim_core.model import decoder_layers

from .attention import Coupling, Visible
from .cache import SlotCache
from .dcut import Line
from .drafts.base import Heads, TargetShape
from .fused import Fused
from .kernels.tree import ANCESTORS_OF
from .narrow import Narrow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# of a config, what makes a target another one
_IDENTITY = (
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
)

# tokens between which a model thinks
THOUGHT = ("<think>", "</think>")


@dataclass
class Step:
    """What a target says to tokens.

    Args:
        logits: [B, T, V], or of each prompt's last token only: [B, 1, V].
        aux: [B, T, n H]: outputs of the tapped layers, side by side; None: none is tapped.
        final: [B, T, H]: what the head reads.
    """

    logits: Tensor
    aux: Tensor | None
    final: Tensor


class Target:
    """Runs a model with slots instead of a growing cache, and reads what its layers put out.

    Args:
        model: stays as it is; other callers may use it in between.
        fused: run modules in fewer launches where that gives the same (`Fused`); None: on GPUs.
        tokenizer: where the special tokens are listed.

    Raises:
        ModelError: it has layers without keys and values, no embedding or no head, or attends in a way of its own.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, fused: bool | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config: Any = model.config.get_text_config()
        _, self.layers = decoder_layers(model, self.config.num_hidden_layers)
        self._couple = Coupling(model, self.config.num_hidden_layers)
        self._narrow, self._fuses = Narrow(model), fused
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for module, what in ((embedding, "embedding"), (head, "head")):
            if not isinstance(getattr(module, "weight", None), Tensor):
                raise ModelError(708, type(model).__name__, f"has no {what} of plain weights, which a draft would share")
        self._embedding, self._head = embedding, head
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"

    @property
    def device(self) -> torch.device:
        return self._embedding.weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.weight.dtype  # type: ignore[no-any-return]

    @cached_property
    def shape(self) -> TargetShape:
        """What a draft must know of it."""
        values = sizes_of(self.config, self._head.weight.shape[0])
        special = {i for i in (self.tokenizer.all_special_ids if self.tokenizer is not None else []) if isinstance(i, int)}
        thought_end = self.tokenizer.get_vocab().get(THOUGHT[1], -1) if self.tokenizer is not None else -1
        return TargetShape(**values, fingerprint=self._fingerprint(values), special_ids=sorted(special | set(self.stop_ids)), thought_end_id=thought_end)

    def _fingerprint(self, values: Mapping[str, Any]) -> str:
        """sha256 of what the config says and of some rows of the embedding, which quantization leaves as they are and fine-tuning does not."""
        rows = torch.linspace(0, values["vocab_size"] - 1, 64).long().to(self.device)
        content = self._embedding.weight.detach()[rows].to(torch.bfloat16).cpu().view(torch.uint8).numpy().tobytes()
        sizes = {key: values[key] for key in _IDENTITY}
        known = json.dumps({**sizes, "rope": values["rope_parameters"], "config": type(self.config).__name__}, sort_keys=True, default=str)
        return hashlib.sha256(known.encode() + content).hexdigest()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, of the generation config."""
        found = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        return () if found is None else tuple(found) if isinstance(found, list | tuple) else (int(found),)

    @property
    def pad_id(self) -> int:
        """What fills rows that ended early, as transformers' `generate` has it."""
        found = self.model.generation_config.pad_token_id if self.model.generation_config is not None else None
        return int(found) if found is not None else next(iter(self.stop_ids), 0)

    @cached_property
    def _fused(self) -> Fused | None:
        return Fused(self.model) if (self.device.type == "cuda" if self._fuses is None else self._fuses) else None

    @property
    def fused(self) -> dict[str, int]:
        """How many modules run in fewer launches, by kind, and how many that looked alike do not; empty: none was tried."""
        return {} if self._fused is None else dict(self._fused.counts)

    def heads(self) -> Heads:
        """Embedding and head, shared with the model."""
        scale = getattr(self._embedding, "scalar_embed_scale", None)
        if scale is None:
            scale = getattr(self.config, "embedding_multiplier", None)
        return Heads(self._embedding.weight, self._head.weight, 1.0 if scale is None else float(scale))

    def new_cache(self, batch: int, capacity: int, *, static: bool | None = None) -> SlotCache:
        """Empty slots.

        Args:
            static: as for `SlotCache`; None: on GPUs, where the host should not wait for lengths.
        """
        return SlotCache(batch, capacity, self.device, static=self.device.type != "cpu" if static is None else static)

    @torch.no_grad()
    def features(
        self, ids: Tensor, layer_ids: Sequence[int], positions: Tensor | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What training reads, without a cache.

        Args:
            ids: [B, T], int64.
            layer_ids: layers whose outputs are wanted, from 0.
            positions: [B, T], int64; None: from 0.
            documents: [B, T], int64: tokens see their own document only; None: a row is one document.

        Returns:
            aux [B, T, n H] (n may be 0) and final [B, T, H], in the model's dtype.
        """
        number = torch.arange(ids.shape[1], device=ids.device)
        visible = Visible(None, number, documents=documents)
        positions = number[None].expand_as(ids) if positions is None else positions
        step = self._run(ids, visible, positions, layer_ids, lambda hidden: hidden[:, :1])
        return ids.new_empty((*ids.shape, 0), dtype=step.final.dtype) if step.aux is None else step.aux, step.final

    @torch.no_grad()
    def prefill(self, ids: Tensor, lengths: Tensor, cache: SlotCache, layer_ids: Sequence[int] = (), rows: Tensor | None = None) -> Step:
        """Read whole prompts into rows of the cache, whatever these held; they count as confirmed.

        Args:
            ids: [G, P], int64, left-aligned; what follows a prompt is not read.
            lengths: [G], int64, at least 1.
            rows: [G], int64: rows of the cache; None: all.

        Returns:
            logits [G, 1, V] of the last tokens, aux [G, P, n H].
        """
        rows = torch.arange(len(ids), device=ids.device) if rows is None else rows
        cache.begin(ids.shape[1], rows)
        number = torch.arange(ids.shape[1], device=ids.device)
        own = torch.arange(len(ids), device=ids.device)
        positions = number[None].expand_as(ids)
        step = self._run(ids, Visible(None, number), positions, layer_ids, lambda hidden: hidden[own, lengths - 1][:, None], cache)
        cache.fill(lengths, rows)
        return step

    @torch.no_grad()
    def forward(
        self, ids: Tensor, cache: SlotCache, layer_ids: Sequence[int] = (), parents: Tensor | None = None, line: Line | None = None
    ) -> Step:  # fmt: skip
        """Tokens behind what each row has confirmed; `cache.commit` says afterwards which of them stay.

        Args:
            ids: [B, T], int64: the last confirmed token, which the cache does not hold yet, then those to verify.
            parents: [B, T - 1], int64: which of those to verify each one follows, from 0, -1 being the first token; None: a chain.
            line: which tokens of the chains are run at all; None: all.

        Returns:
            logits [B, T, V] of what follows each token; anything where a token was not run.
        """
        number = torch.arange(ids.shape[1], device=ids.device)
        if parents is None:
            visible = Visible(cache.lengths, number, line=line)
        else:
            ancestors, depths = ANCESTORS_OF(parents)
            visible = Visible(cache.lengths, depths, ancestors)
        cache.begin(ids.shape[1], line=line)
        positions = cache.lengths[:, None] + visible.depths
        if line is None:
            return self._run(ids, visible, positions, layer_ids, None, cache)
        step = self._run(line.line(ids), visible, line.line(positions), layer_ids, None, cache)
        return Step(line.rows(step.logits), None if step.aux is None else line.rows(step.aux), line.rows(step.final))

    def _run(
        self, ids: Tensor, visible: Visible, positions: Tensor, layer_ids: Sequence[int], pick: Callable[[Tensor], Tensor] | None, cache: SlotCache | None = None
    ) -> Step:  # fmt: skip
        held = {} if cache is None else {self._cache_name: cache}
        with self._tapped(layer_ids, pick) as taps, self._couple(visible), self._narrow(ids.numel()), self._fused() if self._fused else nullcontext():
            logits = self.model(input_ids=ids, position_ids=positions, use_cache=cache is not None, **held).logits
        aux = [taps[layer] for layer in layer_ids]
        return Step(logits, aux[0] if len(aux) == 1 else torch.cat(aux, -1) if aux else None, taps["final"])

    @contextmanager
    def _tapped(self, layer_ids: Sequence[int], pick: Callable[[Tensor], Tensor] | None) -> Iterator[dict[Any, Tensor]]:
        """Inside, layers leave their outputs, and the head what it reads, of which it then gets what `pick` takes."""
        if bad := [i for i in layer_ids if not 0 <= i < len(self.layers)]:
            raise UsageError(709, "layer ids", f"{bad} are not layers of this target, which has {len(self.layers)}", "they count from 0")
        found: dict[Any, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                found[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        def before_head(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            found["final"] = args[0]
            return None if pick is None else (pick(args[0]), *args[1:])

        with ExitStack() as stack:
            for layer in set(layer_ids):
                stack.callback(self.layers[layer].register_forward_hook(keep(layer)).remove)
            stack.callback(self._head.register_forward_pre_hook(before_head).remove)
            yield found


@torch.no_grad()
def recast(model: nn.Module, dtype: torch.dtype) -> None:
    """Move a model's weights to another dtype; what is not of theirs stays, such as the frequencies of RoPE, which 16 bits would round."""
    was = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.dtype == was:
            tensor.data = tensor.data.to(dtype)


def sizes_of(config: Any, vocab_size: int) -> dict[str, Any]:
    """Fields of a `TargetShape` that a text config of transformers tells."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope and all(isinstance(value, Mapping) for value in rope.values()):  # one for each kind of layer
        rope = rope.get("full_attention") or next(iter(rope.values()))
    return {
        "hidden_size": config.hidden_size, "intermediate_size": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "num_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "vocab_size": vocab_size, "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "rope_parameters": dict(rope), "max_position_embeddings": config.max_position_embeddings,
    }  # fmt: skip
