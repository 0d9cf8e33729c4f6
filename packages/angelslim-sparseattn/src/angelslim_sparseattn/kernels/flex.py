"""FlexAttention over an index: blocks that hold a query's own position are masked, all others are whole.

Source: torch.nn.attention.flex_attention, whose backend in Triton it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from ..block_index import BlockIndex

# every length is compiled for; past this many FlexAttention would run unfused, which is an error here
LENGTHS = 256

_masks: WeakKeyDictionary[BlockIndex, BlockMask] = WeakKeyDictionary()


def attend(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """As the reference; compiled at a shape's first use, as FlexAttention ignores an index's lists where it is not."""
    mask = _masks.get(index)
    if mask is None:
        mask = _masks[index] = block_mask(index, q.shape[1])
    with torch._dynamo.config.patch(recompile_limit=LENGTHS, accumulated_recompile_limit=2 * LENGTHS), torch.cuda.device_of(q):
        out, aux = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True), kernel_options={"BACKEND": "TRITON"})
    return out, aux.lse


def block_mask(index: BlockIndex, heads: int) -> BlockMask:
    """FlexAttention's form of an index of blocks, of sequences of one length, with lists for `heads` query heads."""
    cells = index.to_bool().repeat_interleave(heads // index.shape[1], 1)
    first, last = (of[:, None, :, None] for of in index.own())
    j = torch.arange(index.shape[3], device=cells.device)
    counts_own = (last - first + 1).expand(*cells.shape[:3], 1)[..., 0].int().contiguous()
    own = ((first + j) % index.shape[3]).expand(cells.shape).int().contiguous()
    whole = cells & ((j < first) | (j > last))
    return BlockMask.from_kv_blocks(
        counts_own, own, whole.sum(-1, dtype=torch.int32), whole.int().argsort(dim=-1, descending=True, stable=True).int(),
        BLOCK_SIZE=(index.block_m, index.block_n), mask_mod=_causal(index.off[0]), seq_lengths=(index.q_len[0], index.kv_len[0]), compute_q_blocks=False,
    )  # fmt: skip


@cache
def _causal(off: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + off

    return mask


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, fullgraph=True)


def has_backends() -> tuple[bool, str]:
    """Whether this torch lets a call name FlexAttention's backend."""
    return "BACKEND" in FlexKernelOptions.__annotations__, "torch 2.10 or later"


def fits(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex) -> tuple[bool, str]:
    """Whether FlexAttention can express the call."""
    if index.tokens is not None:
        return False, "single keys beside blocks have no form in FlexAttention"
    if index.skip_below() is not None:
        return False, "FlexAttention skips no blocks while it runs"
    if {*index.q_len} != {q.shape[2]} or {*index.kv_len} != {k.shape[2]}:
        return False, "sequences of one length, without padding"
    if max(q.shape[-1], v.shape[-1]) > 256 or min(q.shape[-1], v.shape[-1]) < 16:
        return False, "heads 16 to 256 wide"
    return True, ""
