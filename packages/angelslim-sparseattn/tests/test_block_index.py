"""The index: what it says of itself, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from angelslim_core.errors import AngelslimError
from angelslim_sparseattn import BlockIndex
from angelslim_sparseattn.block_index import Tokens


def causal_index(queries=70, keys=70, heads=2, block=16):
    last = [(keys - queries + min((i + 1) * block, queries) - 1) // block for i in range(-(-queries // block))]
    cells = torch.stack([torch.arange(-(-keys // block)) <= p for p in last]).expand(1, heads, -1, -1)
    return BlockIndex.from_bool(cells, (queries,), (keys,), block, block)


def without(index, *cell):
    cells = index.to_bool()
    cells[cell] = False
    return BlockIndex.from_bool(cells, index.q_len, index.kv_len, 16, 16)


def test_to_bool_and_back():
    index = without(causal_index(), 0, 1, 4, 2).check()
    assert index.density() == 29 / 30 and index.off == (0,)
    assert index.to_bool().sum() == 29 and not index.to_bool()[0, 1, 4, 2]
    again = BlockIndex.from_bool(index.to_bool(), (70,), (70,), 16, 16)
    assert again.col.equal(index.col) and again.row_ptr.equal(index.row_ptr) and index.col.dtype == torch.int32


def test_columns_may_be_longer_than_the_lists():
    index = without(causal_index(), 0, 1, 4, 2)
    longer = replace(index, col=torch.cat([index.col, torch.tensor([99, -7]).int()])).check()
    assert longer.density() == index.density() and longer.to_bool().equal(index.to_bool())
    assert longer.intersect_causal().col.equal(index.col) and longer.per_kv(1).col.equal(index.per_kv(1).col)
    short = replace(index, col=index.col[:-1])
    with pytest.raises(AngelslimError, match="no more than 28"):
        short.check()


def test_offsets_move_the_diagonal():
    index = causal_index(queries=33, keys=70).check()
    assert index.off == (37,)
    assert index.own()[0].tolist() == [[2, 3, 4]] and index.own()[1].tolist() == [[3, 4, 4]]
    assert index.density() == 1 and index.to_bool()[0, 0].sum(-1).tolist() == [4, 5, 5]
    with pytest.raises(AngelslimError, match="own positions"):
        without(index, 0, 0, 0, 2).check()


def test_single_keys_count_towards_density():
    index = without(causal_index(heads=1), 0, 0, 4, slice(0, 4))
    ptr = torch.tensor([0, 0, 0, 0, 0, 8])
    assert replace(index, tokens=Tokens(ptr, torch.arange(0, 64, 8).int())).check().density() == (11 + 8 / 16) / 15


def test_intersect_causal():
    full = BlockIndex.from_bool(torch.ones(1, 2, 5, 5, dtype=torch.bool), (70,), (70,), 16, 16)
    with pytest.raises(AngelslimError, match="last position"):
        full.check()
    assert full.intersect_causal().check().to_bool().equal(causal_index().to_bool())


def test_per_kv_is_the_union():
    index = without(without(causal_index(heads=4), 0, 0, 4, 0), 0, slice(2, 4), 3, 1)
    union = index.per_kv(2).check()
    assert union.heads == "per_kv" and union.to_bool().shape == (1, 2, 5, 5)
    assert union.to_bool()[0, 0, 4, 0] and not union.to_bool()[0, 1, 3, 1]
    with pytest.raises(AngelslimError, match="multiple of 3"):
        index.per_kv(3)


def test_priority_puts_own_blocks_first():
    rank = torch.arange(5).flip(0).expand(1, 2, 5, 5).clone()
    index = BlockIndex.from_bool(causal_index(33, 70).to_bool(), (33,), (70,), 16, 16, rank=rank[:, :, :3]).check()
    assert index.order == "priority" and index.col[:4].tolist() == [2, 3, 1, 0] and index.col[4:9].tolist() == [3, 4, 2, 1, 0]
    assert rank.equal(torch.arange(5).flip(0).expand(1, 2, 5, 5))


def changed(index, **fields):
    return lambda: replace(index, **fields).check()


GOOD = causal_index(heads=1)
TWICE = GOOD.col.clone()
TWICE[2] = 1
SWAPPED = GOOD.col.clone()
SWAPPED[1:3] = torch.tensor([1, 0])
TOKEN_PTR = torch.tensor([0, 0, 0, 0, 0, 2])
GAP = without(GOOD, 0, 0, 4, 1)


@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("twice", changed(GOOD, col=torch.where(torch.arange(15) == 4, 0, GOOD.col).int())),
        ("not in ascending", changed(GOOD, col=SWAPPED)),
        ("not in priority", changed(GOOD, order="priority")),
        ("last position", changed(GOOD, col=torch.where(torch.arange(15) == 0, 3, GOOD.col).int())),
        ("last position", changed(GOOD, col=torch.where(torch.arange(15) == 14, -1, GOOD.col).int())),
        ("own positions", lambda: without(GOOD, 0, 0, 3, 3).check()),
        ("rise from 0", changed(GOOD, row_ptr=GOOD.row_ptr.flip(0))),
        ("5 rows", changed(GOOD, row_ptr=GOOD.row_ptr[1:])),
        ("another number", changed(GOOD, kv_len=(70, 70))),
        ("another number", changed(GOOD, delta=(1.0, 1.0))),
        ("no more queries", changed(GOOD, kv_len=(69,))),
        ("do not hold", changed(GOOD, kv_len=(90,))),
        ("bool", lambda: BlockIndex.from_bool(torch.ones(1, 1, 5, 5), (70,), (70,))),
        ("kept by", changed(GOOD, tokens=Tokens(TOKEN_PTR, torch.tensor([17, 18])))),
        ("a key twice", changed(GAP, tokens=Tokens(TOKEN_PTR, torch.tensor([17, 17])))),
        ("before", changed(GAP, tokens=Tokens(TOKEN_PTR, torch.tensor([17, 65])))),
        ("rise from 0", changed(GAP, tokens=Tokens(TOKEN_PTR, torch.tensor([17])))),
    ],
)
def test_unsound_indices_are_refused(what, make):
    with pytest.raises(AngelslimError, match=what if what != "kept by" else "row keeps"):
        make()


def test_ranks_that_are_given_stay_as_they_are():
    cells, rank = torch.ones(1, 1, 2, 2, dtype=torch.bool).tril(), torch.arange(4.0).view(1, 1, 2, 2)
    BlockIndex.from_bool(cells, (256,), (256,), rank=rank)
    assert rank.equal(torch.arange(4.0).view(1, 1, 2, 2))
