"""Lists become tables for FlashAttention 4: a program copies a row, whose own blocks are computed, not read."""

import torch
import triton
import triton.language as tl

from ...block_index import BlockIndex
from ..flash import Tables, empty


@triton.jit(do_not_specialize=["rows", "columns", "listed_rows", "off", "q_len"])
def _tables(
    own_count, own, other_count, other, row_ptr, col, rows, columns, listed_rows, off, q_len,
    LISTS_SHARE: tl.constexpr, OWN_FIRST: tl.constexpr, OWN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i, bh = tl.program_id(0), tl.program_id(1)
    to = bh.to(tl.int64) * rows + i
    row = (bh // LISTS_SHARE).to(tl.int64) * listed_rows + i
    first = (off + i * BM) // BN
    count = (off + tl.minimum((i + 1) * BM, q_len) - 1) // BN - first + 1
    start = tl.load(row_ptr + row)
    others = (tl.load(row_ptr + row + 1) - start).to(tl.int32) - count
    tl.store(own_count + to, count)
    tl.store(other_count + to, others)
    x = tl.arange(0, OWN)
    tl.store(own + to * OWN + x, first + x)
    if OWN_FIRST:
        start += count
    for n in range(0, others, BP):
        j = n + tl.arange(0, BP)
        tl.store(other + to * columns + j, tl.load(col + start + j, j < others, 0).to(tl.int32), j < others)


def flash_tables(index: BlockIndex, heads: int) -> Tables:
    """As the reference; without a wait for the device."""
    tables = empty(index, heads)
    batch, _, rows, columns = tables.other.shape
    with torch.cuda.device_of(index.col):
        _tables[(rows, batch * heads)](
            *tables, index.row_ptr, index.col, rows, columns, index.shape[2], index.off[0], index.q_len[0],
            LISTS_SHARE=heads // index.shape[1], OWN_FIRST=index.order == "priority", OWN=tables.own.shape[-1], BM=index.block_m, BN=index.block_n,
            BP=256, num_warps=2,
        )  # fmt: skip
    return tables
