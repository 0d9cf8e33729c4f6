"""FlashAttention 4's tables of an index, and its kernel against the reference where there is a Hopper GPU."""

import math
from dataclasses import replace

import pytest
import torch

from angelslim_core.errors import AngelslimError
from angelslim_sparseattn import BlockIndex, sparse_attention
from angelslim_sparseattn.block_index import Tokens
from angelslim_sparseattn.kernels import flash
from angelslim_sparseattn.kernels.block_sparse import BLOCK_SPARSE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def index_of(queries, keys, heads=2, block=128, share=0.4, batch=1, ordered=False, per_kv=False):
    """Random blocks before own ones."""
    generator = torch.Generator().manual_seed(queries + keys)
    shape = (batch, heads, math.ceil(queries / block), math.ceil(keys / block))
    cells, rank = torch.rand(shape, generator=generator) < share, torch.rand(shape, generator=generator)
    i, j, off = torch.arange(shape[2])[:, None], torch.arange(shape[3]), keys - queries
    first, last = (off + i * block) // block, (off + ((i + 1) * block).clamp(max=queries) - 1) // block
    cells = ((cells | (j >= first)) & (j <= last)).to(DEVICE)
    lengths = (queries,) * batch, (keys,) * batch
    return BlockIndex.from_bool(cells, *lengths, block, block, "per_kv" if per_kv else "per_q", rank.to(DEVICE) if ordered else None).check()


def cells_of(count, listed, columns):
    """Tables as bool [..., P, columns]; no block twice."""
    used = torch.arange(listed.shape[-1], device=listed.device) < count[..., None]
    cells = torch.zeros(*count.shape, columns + 1, dtype=torch.int32, device=listed.device)
    cells.scatter_add_(-1, torch.where(used, listed, columns).long(), torch.ones_like(listed))
    assert cells[..., :columns].max() <= 1
    return cells[..., :columns].bool()


SIZES = [(1, 1), (20, 97), (64, 64), (65, 65), (200, 200), (130, 207), (100, 500), (300, 1300)]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_tables_hold_the_index(queries, keys, ordered):
    index = index_of(queries, keys, block=16, batch=2, ordered=ordered)
    tables = flash.reference(index, 4)
    cells = index.to_bool().repeat_interleave(2, 1)
    first, last = (of[:, None, :, None] for of in index.own())
    j = torch.arange(index.shape[3], device=DEVICE)
    own = (j >= first) & (j <= last)
    assert all(table.dtype == torch.int32 and table.is_contiguous() and table.shape[:3] == cells.shape[:3] for table in tables)
    assert cells_of(tables.own_count, tables.own, index.shape[3]).equal(cells & own)
    assert cells_of(tables.other_count, tables.other, index.shape[3]).equal(cells & ~own)
    for row in ((0, 0, 0), (1, 3, index.shape[2] - 1)):  # the kernel masks a sequence's end in the last own block only
        assert tables.own[row][: tables.own_count[row]].tolist() == list(range(first[row[0], 0, row[2], 0], last[row[0], 0, row[2], 0] + 1))


@pytest.mark.parametrize("col", [torch.int32, torch.int16])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [*SIZES, (40, 5000)])
def test_the_kernel_makes_the_same_tables(queries, keys, ordered, col):
    pytest.importorskip("triton")
    index = index_of(queries, keys, block=16, batch=2, ordered=ordered)
    # longer than its lists, and with rows and columns that no sequence has
    index = replace(index, col=torch.cat([index.col, index.col.new_full((7,), 99)]).to(col))
    rows, columns = index.shape[2] + 1, index.shape[3] + 2
    length = torch.nn.functional.pad(index.row_ptr.diff().view(index.shape[:3]), (0, 1))
    roomy = replace(index, row_ptr=torch.nn.functional.pad(length.flatten().cumsum(0), (1, 0)), shape=(*index.shape[:2], rows, columns))
    for lists in (index, roomy):
        for heads in (2, 6):
            wanted, found = flash.reference(lists, heads), flash.TABLES(lists, heads, executor="triton")
            for count, table in ((0, 1), (2, 3)):
                assert found[count].equal(wanted[count]) and found[table].shape == wanted[table].shape
                used = torch.arange(wanted[table].shape[-1], device=DEVICE) < wanted[count][..., None]
                assert found[table].masked_fill(~used, -1).equal(wanted[table].masked_fill(~used, -1))


def test_what_it_cannot_take():
    index = index_of(300, 300)
    q, k, v = (torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))
    assert flash.fits(q, k, v, index) == ((True, "") if HOPPER else (False, "tensors on a Hopper GPU"))
    assert "bf16" in flash.fits(q.float(), k, v, index)[1]
    assert "blocks of 128" in flash.fits(q, k, v, index_of(300, 300, block=64))[1]
    assert "length" in flash.fits(q, k, v, index_of(290, 300))[1]
    single = Tokens(torch.zeros_like(index.row_ptr), index.col[:0])
    assert "single keys" in flash.fits(q, k, v, replace(index, tokens=single))[1]
    assert "skips" in flash.fits(q, k, v, replace(index, delta=(5.0,)))[1]
    for dim, v_dim in ((256, 128), (128, 192), (60, 64)):
        assert "wide" in flash.fits(q.new_zeros(1, 2, 300, dim), q.new_zeros(1, 2, 300, dim), q.new_zeros(1, 2, 300, v_dim), index)[1]
    if not flash.runs()[0]:
        with pytest.raises(AngelslimError, match="flash"):
            sparse_attention(q, k, v, index, "flash")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER or not flash.runs()[0], reason="no Hopper GPU, or no flash_attn.cute")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("off", [0, 128, 77])
@pytest.mark.parametrize("queries", [1000, 4096])
def test_attention_is_the_reference(queries, off, group, dim):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (1, 2 * group, queries, dim), (1, 2, queries + off, dim), (1, 2, queries + off, dim)
    q, k, v = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes)
    for index in (
        index_of(queries, queries + off, 2 * group), index_of(queries, queries + off, 2 * group, ordered=True), index_of(queries, queries + off, per_kv=True),
    ):  # fmt: skip
        wanted, wanted_lse = BLOCK_SPARSE(q, k, v, index, dim**-0.5, executor="reference")
        for _ in range(2):  # the second call takes the tables of the first
            out, lse = BLOCK_SPARSE(q, k, v, index, dim**-0.5, executor="flash")
            assert float((out.float() - wanted.float()).norm() / wanted.float().norm()) < 8e-3 and (lse - wanted_lse).abs().max() < 2e-3
        assert lse.dtype == torch.float32 and out.dtype == q.dtype and out.is_contiguous()
