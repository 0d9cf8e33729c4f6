"""Which blocks of keys each block of queries attends to: one format between every policy and every executor.

Shapes: B sequences, H lists a sequence (query heads or KV heads), Pq and Pk blocks of queries and keys. Query block i of a
sequence ends in the key block that holds its last position; its own blocks are those that hold any of its positions (two
where queries do not begin on a block).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

# blocks that are moved at a time
PIECE = 2**24
# columns of more blocks than this, where lists are allocated for the worst case, are of two bytes
NARROW_ABOVE = 2**28


class Tokens(NamedTuple):
    """Single keys outside the kept blocks: `col[ptr[r] : ptr[r + 1]]`, int32 positions, of row r; ptr int64 [B * H * Pq + 1], col as of `BlockIndex`."""

    ptr: Tensor
    col: Tensor


class Lists(NamedTuple):
    """Lists of rows one after the other: `col[ptr[r] : ptr[r + 1]]` of row r.

    Attributes:
        ptr: int64 [rows + 1].
        col: int32, or int16; longer than ptr[-1] where that is known to the device only.
        exact: whether it is not longer.
        order: see `BlockIndex`.
    """

    ptr: Tensor
    col: Tensor
    exact: bool = True
    order: Literal["ascending", "priority"] = "ascending"


def to_cells(lists: Lists, rows: int, columns: int) -> Tensor:
    """Listed blocks as bool [H, rows, columns] of lists none of which is empty, without a look at the device."""
    length = lists.ptr.diff()
    cells = torch.zeros(len(length), columns, dtype=torch.bool, device=lists.col.device)
    place = torch.arange(columns, device=lists.col.device)
    listed = lists.col[(lists.ptr[:-1, None] + place).clamp(max=max(len(lists.col) - 1, 0))].long()
    # places past a row's end stand for its first block
    return cells.scatter_(-1, torch.where(place < length[:, None], listed, listed[:, :1]), True).view(-1, rows, columns)


def column_dtype(most: int, columns: int) -> torch.dtype:
    """Of lists of up to so many blocks, whose numbers are below `columns`."""
    return torch.int16 if most > NARROW_ABOVE and columns < 2**15 else torch.int32


def joined(lists: Sequence[Lists], rows: Sequence[int], most: int, columns: int) -> Lists:
    """Several lists as one, in their order, without a look at the device.

    Args:
        rows: rows of each head of each of the lists.
        most: rows that every head gets; what is missing is empty.
        columns: what is listed is below it.
    """
    if len(lists) == 1 and rows[0] == most:
        return lists[0]
    counts = [torch.nn.functional.pad(each.ptr.diff().view(-1, n), (0, most - n)).flatten() for each, n in zip(lists, rows, strict=True)]
    ptr = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    if all(each.exact for each in lists):
        return Lists(ptr, torch.cat([each.col for each in lists]), True, lists[0].order)
    length = sum(len(each.col) for each in lists)
    col = torch.empty(length, dtype=column_dtype(length, columns), device=ptr.device)
    start = ptr.new_zeros(())
    for each in lists:  # what is too long is written over by the next
        for piece in range(0, len(each.col), PIECE):
            part = each.col[piece : piece + PIECE].to(col.dtype)
            col.scatter_(0, start + torch.arange(piece, piece + len(part), device=col.device), part)
        start = start + each.ptr[-1]
    return Lists(ptr, col, False, lists[0].order)


def own_blocks(q_len: int, kv_len: int, block_m: int, block_n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """First and last own key block [ceil(q_len / block_m)] of every query block, int64."""
    start = torch.arange(0, q_len, block_m, device=device)
    last = (start + block_m).clamp(max=q_len) - 1
    off = kv_len - q_len
    return (start + off) // block_n, (last + off) // block_n


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Lists of key blocks in CSR: `col[row_ptr[r] : row_ptr[r + 1]]`, row r = (b * H + h) * Pq + i.

    Args:
        row_ptr: int64 [B * H * Pq + 1].
        col: int32 [nnz], or int16; what lies beyond row_ptr[-1] means nothing.
        shape: (B, H, Pq, Pk).
        q_len, kv_len: real queries and keys of each sequence, q_len <= kv_len; query 0 stands at position kv_len - q_len.
        block_m, block_n: queries and keys a block.
        heads: whether each query head has its list, or each KV head one for its group.
        order: "ascending", or "priority": own blocks first, then the most important ones.
        tokens: single keys beside the blocks, or None.
        delta: blocks are skipped while attention runs if no score comes within ln(delta / kv_len) of the running maximum;
            negative, or kv_len and above: none is. One a sequence; None: none is skipped.

    Raises:
        UsageError: sizes that do not fit together. What the lists hold is checked by `check`.
    """

    row_ptr: Tensor
    col: Tensor
    shape: tuple[int, int, int, int]
    q_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    block_m: int = 128
    block_n: int = 128
    heads: Literal["per_q", "per_kv"] = "per_q"
    order: Literal["ascending", "priority"] = "ascending"
    tokens: Tokens | None = None
    delta: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        batch, heads, rows, columns = self.shape
        if {len(self.q_len), len(self.kv_len), batch if self.delta is None else len(self.delta)} != {batch}:
            raise UsageError(500, "BlockIndex", f"lengths, or delta, are of another number of sequences than {batch}")
        if not all(0 < q <= n for q, n in zip(self.q_len, self.kv_len, strict=True)):
            raise UsageError(501, "BlockIndex", f"a sequence has at least one query and no more queries than keys: {self.q_len} and {self.kv_len}")
        if (max(self.q_len) - 1) // self.block_m >= rows or (max(self.kv_len) - 1) // self.block_n >= columns:
            raise UsageError(502, "BlockIndex", f"{rows} x {columns} blocks do not hold {max(self.q_len)} queries and {max(self.kv_len)} keys")
        for ptr in [self.row_ptr, *([] if self.tokens is None else [self.tokens.ptr])]:
            if ptr.shape != (batch * heads * rows + 1,):
                raise UsageError(503, "BlockIndex", f"{ptr.numel()} offsets for {batch * heads * rows} rows and the end")

    @classmethod
    def from_bool(
        cls, cells: Tensor, q_len: tuple[int, ...], kv_len: tuple[int, ...], block_m: int = 128, block_n: int = 128,
        heads: Literal["per_q", "per_kv"] = "per_q", rank: Tensor | None = None, tokens: Tokens | None = None, delta: tuple[float, ...] | None = None,
    ) -> BlockIndex:  # fmt: skip
        """From a mask [B, H, Pq, Pk]; `rank`, of the same shape, puts kept blocks in priority order, own blocks first and low ranks before high ones."""
        if cells.dim() != 4 or cells.dtype != torch.bool:
            raise UsageError(504, "BlockIndex.from_bool", f"cells are bool [B, H, Pq, Pk], not {cells.dtype} {list(cells.shape)}")
        counts = cells.sum(-1).flatten()
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if rank is None:
            col = cells.nonzero()[:, -1]
        else:
            rank = rank.to(torch.float32, copy=True)
            for b, lengths in enumerate(zip(q_len, kv_len, strict=True)):
                first, last = own_blocks(*lengths, block_m, block_n, cells.device)
                j = torch.arange(cells.shape[-1], device=cells.device)
                own = (j >= first[:, None]) & (j <= last[:, None])
                rank[b, :, : len(first)] = rank[b, :, : len(first)].masked_fill(own, -torch.inf)
            order = rank.masked_fill(~cells, torch.inf).argsort(dim=-1, stable=True)
            col = order[torch.arange(cells.shape[-1], device=cells.device) < cells.sum(-1, keepdim=True)]
        batch, lists, rows, columns = cells.shape
        found = "ascending" if rank is None else "priority"
        return cls(row_ptr, col.int(), (batch, lists, rows, columns), q_len, kv_len, block_m, block_n, heads, found, tokens, delta)  # type: ignore[arg-type]

    @property
    def off(self) -> tuple[int, ...]:
        """Position of each sequence's first query."""
        return tuple(n - q for q, n in zip(self.q_len, self.kv_len, strict=True))

    def own(self) -> tuple[Tensor, Tensor]:
        """First and last own block [B, Pq]; -1 and -2 where a sequence has no such query block."""
        first, last = self.row_ptr.new_full((self.shape[0], self.shape[2]), -1), self.row_ptr.new_full((self.shape[0], self.shape[2]), -2)
        for b, lengths in enumerate(zip(self.q_len, self.kv_len, strict=True)):
            ends = own_blocks(*lengths, self.block_m, self.block_n, self.row_ptr.device)
            first[b, : len(ends[0])], last[b, : len(ends[0])] = ends
        return first, last

    def skip_below(self) -> list[float] | None:
        """ln(delta / kv_len) of each sequence, -inf where nothing is skipped; None if that is so everywhere."""
        found = [math.log(d / n) if 0 < d < n else -math.inf for d, n in zip(self.delta or (), self.kv_len, strict=False)]
        return found if any(t > -math.inf for t in found) else None

    def _listed(self) -> tuple[Tensor, Tensor]:
        """The row of each listed block, and the blocks, int64 [nnz] both; waits for the device."""
        rows = torch.repeat_interleave(torch.arange(len(self.row_ptr) - 1, device=self.col.device), self.row_ptr.diff())
        return rows, self.col[: len(rows)].long()

    def _by_row(self, of_BP: Tensor) -> Tensor:
        return of_BP[:, None].expand(self.shape[:3]).flatten()

    def to_bool(self) -> Tensor:
        """Kept blocks as bool [B, H, Pq, Pk]; single keys are not in it."""
        cells = torch.zeros(len(self.row_ptr) - 1, self.shape[3], dtype=torch.bool, device=self.col.device)
        cells[self._listed()] = True
        return cells.view(self.shape)

    def density(self) -> float:
        """Kept blocks, a single key counting as its share of one, over the blocks of causal attention; waits for the device."""
        _, last = self.own()
        causal = (last + 1).clamp(min=0).sum().item() * self.shape[1]
        singles = 0 if self.tokens is None else int(self.tokens.ptr[-1])
        return (int(self.row_ptr[-1]) + singles / self.block_n) / causal

    def intersect_causal(self) -> BlockIndex:
        """Without blocks after a row's last own block."""
        rows, col = self._listed()
        keep = col <= self._by_row(self.own()[1])[rows]
        counts = torch.bincount(rows[keep], minlength=len(self.row_ptr) - 1)
        return replace(self, row_ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]), col=col[keep].int())

    def per_kv(self, kv_heads: int) -> BlockIndex:
        """One list a KV head: the union of its query heads' blocks, ascending. Single keys have no such form."""
        if self.heads == "per_kv" or self.tokens is not None or self.shape[1] % kv_heads:
            raise UsageError(505, "BlockIndex.per_kv", f"needs lists of blocks, one a query head, for a multiple of {kv_heads} heads")
        union = self.to_bool().unflatten(1, (kv_heads, -1)).any(2)
        return BlockIndex.from_bool(union, self.q_len, self.kv_len, self.block_m, self.block_n, "per_kv", delta=self.delta)

    def check(self) -> BlockIndex:
        """The index itself, once its lists are known to be sound; reads from the device.

        Raises:
            UsageError: offsets that are none, a block twice, after the diagonal or out of order, an own block missing, a
                list beyond a sequence's queries, or a single key that is in the future or in a kept block.
        """
        _check_ptr(self.row_ptr, self.col)
        rows, col = self._listed()
        first, last = (self._by_row(of) for of in self.own())
        if bool(((col < 0) | (col > last[rows])).any()):
            raise UsageError(506, "BlockIndex", "a row lists a block after its queries' last position", "intersect_causal() drops those")
        same = rows[1:] == rows[:-1]
        if bool(torch.unique(rows * self.shape[3] + col).numel() != len(col)):
            raise UsageError(507, "BlockIndex", "a row lists a block twice")
        is_own = (col >= first[rows]) & (col <= last[rows])
        if not torch.equal(torch.bincount(rows[is_own], minlength=len(last)), last - first + 1):
            raise UsageError(508, "BlockIndex", "a row misses a block that holds its own positions")
        falls = col[1:] < col[:-1] if self.order == "ascending" else is_own[1:] & ~is_own[:-1]
        if bool((falls & same).any()):
            raise UsageError(509, "BlockIndex", f"blocks are not in {self.order} order")
        if self.tokens is not None:
            self._check_tokens(self.tokens)
        return self

    def _check_tokens(self, tokens: Tokens) -> None:
        _check_ptr(*tokens)
        rows = torch.repeat_interleave(torch.arange(len(tokens.ptr) - 1, device=tokens.col.device), tokens.ptr.diff())
        col = tokens.col[: len(rows)].long()
        first = self._by_row(self.own()[0])[rows]
        if bool(((col < 0) | (col >= first * self.block_n)).any()):
            raise UsageError(510, "BlockIndex", "a single key does not lie before its row's own blocks")
        if bool(self.to_bool().flatten(0, 2)[rows, col // self.block_n].any()):
            raise UsageError(511, "BlockIndex", "a single key lies in a block that its row keeps: it would count twice")
        if torch.unique(rows * (max(self.kv_len) + 1) + col).numel() != len(col):
            raise UsageError(512, "BlockIndex", "a row lists a key twice")


def _check_ptr(ptr: Tensor, col: Tensor) -> None:
    if int(ptr[0]) != 0 or int(ptr[-1]) > len(col) or bool((ptr.diff() < 0).any()):
        raise UsageError(513, "BlockIndex", f"offsets must rise from 0 to no more than {len(col)}")
