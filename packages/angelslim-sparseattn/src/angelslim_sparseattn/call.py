"""One call of attention in a model: as SDPA, as a model's own eager attention, or over packed real tokens.

Shapes: B sequences, Hq query heads, Hkv KV heads, L queries, which are the last of N keys; D and Dv wide; B' sequences with queries.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from angelslim_core.errors import ModelError

from .attention import Lengths


class Packing(NamedTuple):
    """Where real tokens of a padded batch are; sequences without queries are left out.

    Attributes:
        sequences: int64 [B'], numbers of the others.
        queries, keys: int64 [B', most], places of real tokens, in order, and after them those of padding.
        lengths: real queries and keys of each.
    """

    sequences: Tensor
    queries: Tensor
    keys: Tensor
    lengths: Lengths


def packing(mask: Tensor, queries: int) -> Packing | None:
    """Of a mask [B, N] that is true for real keys, of which the last are the queries; None: all are real. Reads from the device."""
    asks = mask[:, mask.shape[1] - queries :]
    lengths = torch.stack([asks.sum(1), mask.sum(1)], 1).tolist()
    if all(pair == [queries, mask.shape[1]] for pair in lengths):
        return None
    live = [b for b, (q, _) in enumerate(lengths) if q]
    sequences = torch.tensor(live, dtype=torch.int64, device=mask.device)
    found = Lengths(tuple(lengths[b][0] for b in live), tuple(lengths[b][1] for b in live))
    queries_first, keys_first = ((~real[sequences]).byte().argsort(dim=1, stable=True) for real in (asks, mask))
    most = [max(of, default=0) for of in found]
    return Packing(sequences, queries_first[:, : most[0]], keys_first[:, : most[1]], found)


@dataclass
class Call:
    """What a model hands to attention.

    Args:
        q, k, v: [B, Hq, L, D], [B, Hkv, N, D], [B, Hkv, N, Dv].
        mask: of real keys, bool [B, N]; as SDPA takes it, [B, 1, L, N]; or None.
        packs: whether a mask that is None, or [B, N], means causal attention of the last queries; otherwise it is SDPA's None.
        options: what else the model gives, for instance `scaling`, `dropout` and `is_causal`.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    packs: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.packs and self.mask is not None:  # a static cache is longer than what is real
            real = self.mask.shape[1]
            self.k, self.v = self.k[:, :, :real], self.v[:, :, :real]

    @property
    def scale(self) -> float:
        found = self.options.get("scaling")
        return float(self.q.shape[-1] ** -0.5 if found is None else found)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches where the current device is, which is another one under a device map."""
        return torch.cuda.device(self.q.device) if self.q.is_cuda else contextlib.nullcontext()

    def sdpa(self) -> Tensor:
        """Everything, [B, L, Hq, Dv]; the mask is SDPA's."""
        return self._sdpa(self.q, self.k, self.v, self.mask)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: Tensor = sdpa_attention_forward(self.module, q, k, v, mask, **self.options)[0]
        return out

    def with_mask(self) -> Any:
        """The mask as SDPA takes it, made if the model gave none or one of keys: bool [B, 1, L, N]."""
        if not self.packs:
            return self.mask
        queries, keys = self.q.shape[2], self.k.shape[2]
        causal = torch.ones(queries, keys, dtype=torch.bool, device=self.q.device).tril(keys - queries)
        return causal[None, None] if self.mask is None else causal & self.mask[:, None, None]

    def biased(self) -> Tensor:
        """Everything, [B, L, Hq, Dv], with the position bias that the model gives."""
        return self._sdpa(self.q, self.k, self.v, self.with_mask())

    def eager(self) -> Tensor:
        """Everything, [B, L, Hq, Dv], as the model's own file computes it.

        Raises:
            ModelError: the file has no such function.
        """
        function: Callable[..., Any] | None = getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)
        if function is None:
            raise ModelError(551, type(self.module).__name__, "has sinks or caps its scores, and no eager attention that could compute it")
        mask, queries, keys = self.with_mask(), self.q.shape[2], self.k.shape[2]
        if mask is None and queries > 1:  # SDPA's None is causal from the first key on
            mask = torch.ones(queries, keys, dtype=torch.bool, device=self.q.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=self.q.dtype, device=mask.device).masked_fill(~mask, torch.finfo(self.q.dtype).min)
            mask = mask.expand(1, 1, -1, -1) if mask.dim() == 2 else mask
        out: Tensor = function(self.module, self.q, self.k, self.v, mask, **self.options)[0]
        return out

    def packed(self, found: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of B' sequences padded on the right."""
        if found is None:
            return self.q, self.k, self.v
        each = found.sequences[:, None]
        return tuple(x[each, :, places].transpose(1, 2) for x, places in zip((self.q, self.k, self.v), (found.queries, found.keys, found.keys), strict=True))  # type: ignore[return-value]

    def unpacked(self, out: Tensor, found: Packing | None) -> Tensor:
        """[B, L, Hq, Dv] of [B', Hq, most, Dv]; padding is 0."""
        if found is None:
            return out.transpose(1, 2).contiguous()
        whole = out.new_zeros(len(self.q), self.q.shape[2], out.shape[1], out.shape[3])
        whole[found.sequences[:, None], found.queries] = out.transpose(1, 2)
        return whole

    def dense(self, found: Packing | None) -> Tensor:
        """Everything, [B, L, Hq, Dv], a padded sequence at a time, so that no mask [L, N] is needed."""
        from torch.nn.attention.bias import causal_lower_right

        q, k, v = self.packed(found)
        if found is None:
            queries, keys = q.shape[2], k.shape[2]
            return self._sdpa(q, k, v, None if queries == keys else causal_lower_right(queries, keys))
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        for b, (queries, keys) in enumerate(zip(*found.lengths, strict=True)):
            mask = None if queries == keys else causal_lower_right(queries, keys)
            own = self._sdpa(q[b : b + 1, :, :queries], k[b : b + 1, :, :keys], v[b : b + 1, :, :keys], mask)
            out[b, :, :queries] = own[0].transpose(0, 1)
        return self.unpacked(out, found)
