"""FlashAttention 4's block-sparse kernel over an index: own blocks are masked, all others are whole.

Source: the flash-attn-4 package, `flash_attn.cute`, whose kernel for Hopper takes tables of blocks; one compilation serves all lengths.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..block_index import BlockIndex
from ..timing import has_fa4

BLOCK = 128


class Tables(NamedTuple):
    """An index of sequences of one length as FlashAttention 4 takes it: P blocks of queries, H query heads.

    Attributes:
        own_count, other_count: int32 [B, H, P].
        own: own blocks, ascending, int32 [B, H, P, 2], or 1 where there is one block of keys; what comes after the count means nothing.
        other: the blocks before them, in the index's order, int32 [B, H, P, blocks of keys], likewise.
    """

    own_count: Tensor
    own: Tensor
    other_count: Tensor
    other: Tensor


_made: WeakKeyDictionary[BlockIndex, Tables] = WeakKeyDictionary()


def empty(index: BlockIndex, heads: int) -> Tables:
    """Tables without contents."""
    rows, columns = -(-index.q_len[0] // index.block_m), -(-index.kv_len[0] // index.block_n)
    counts, device = (index.shape[0], heads, rows), index.col.device
    sizes = (counts, (*counts, min(columns, 2)), counts, (*counts, columns))
    return Tables(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))


def reference(index: BlockIndex, heads: int) -> Tables:
    """Tables for so many query heads, which share the lists of an index evenly."""
    tables = empty(index, heads)
    _, _, rows, columns = tables.other.shape
    share = heads // index.shape[1]
    start, length = (x.view(index.shape[:3])[:, :, :rows].repeat_interleave(share, 1) for x in (index.row_ptr[:-1], index.row_ptr.diff()))
    first, last = (of[:, None, :rows] for of in index.own())
    tables.own_count.copy_(last - first + 1)
    tables.own.copy_((first[..., None] + torch.arange(tables.own.shape[-1], device=first.device)).expand(tables.own.shape))
    tables.other_count.copy_(length - tables.own_count)
    start = start + (tables.own_count if index.order == "priority" else 0)
    at = start[..., None] + torch.arange(columns, device=start.device)
    tables.other.copy_(index.col[at.clamp(max=len(index.col) - 1)])
    return tables


def _triton(index: BlockIndex, heads: int) -> Tables:
    from .triton.flash_tables import flash_tables

    return flash_tables(index, heads)


def _on_cpu(index: BlockIndex, heads: int) -> tuple[bool, str]:
    return not index.col.is_cuda, "tensors on the CPU"


def _on_gpu(index: BlockIndex, heads: int) -> tuple[bool, str]:
    from .block_sparse import triton_interprets

    return index.col.is_cuda or triton_interprets(), "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"


TABLES = Kernel("sparseattn.flash_tables", reference, (Implementation("torch", reference, _on_cpu), Implementation("triton", _triton, _on_gpu, triton_runs)))


def attend(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """As the reference; an index's tables are made at its first use and kept as long as it is."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    from .flash_mask import causal

    tables = _made.get(index)
    if tables is None or tables.own_count.shape[1] != q.shape[1]:
        tables = _made[index] = TABLES(index, q.shape[1])
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    with torch.cuda.device_of(q):
        # tiles of one head each, as rows of the tables are; the LSE is natural
        _, lse, *_ = _flash_attn_fwd(
            *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, mask_mod=causal, pack_gqa=False, return_lse=True, out=out.transpose(1, 2),
            block_sparse_tensors=BlockSparseTensorsTorch(*tables, block_size=(BLOCK, BLOCK)),
        )  # fmt: skip
    return out, lse


def runs() -> tuple[bool, str]:
    """Whether FlashAttention 4 is installed."""
    found = has_fa4()
    return found, "" if found else "flash-attn-4 (flash_attn.cute) is not installed"


def fits(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex) -> tuple[bool, str]:
    """Whether FlashAttention 4's kernel for Hopper takes the call."""
    if q.dtype not in (torch.float16, torch.bfloat16) or (index.block_m, index.block_n) != (BLOCK, BLOCK):
        return False, f"fp16 or bf16, and blocks of {BLOCK}"
    if index.tokens is not None:
        return False, "single keys beside blocks have no form in FlashAttention 4"
    if index.skip_below() is not None:
        return False, "FlashAttention 4 skips no blocks while it runs"
    if {*index.q_len} != {q.shape[2]} or {*index.kv_len} != {k.shape[2]}:
        return False, "sequences of one length, without padding"
    widths = q.shape[-1], v.shape[-1]
    # past these widths its tiles are of fewer than 128 keys
    if any(width % 8 or width < 16 for width in widths) or widths[0] > 192 or widths[1] > 128:
        return False, "heads 16 to 192 wide, values to 128, in eights"
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return False, "tensors on a Hopper GPU"
    return True, ""
