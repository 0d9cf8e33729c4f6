"""Executors on a GPU, against fp64 and against each other."""

import math
from dataclasses import replace

import pytest
import torch

from angelslim_sparseattn import BlockIndex, sparse_attention
from angelslim_sparseattn.kernels.block_sparse import BLOCK_SPARSE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

KEYS = (1, 127, 128, 129, 1000, 4096, 4097)


@pytest.fixture(scope="module")
def kernel():
    pytest.importorskip("triton")
    from angelslim_sparseattn.kernels.triton import block_sparse

    return block_sparse


def qkv(queries, keys, heads=8, kv_heads=2, dim=128, v_dim=None, batch=1, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, v_dim or dim)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def index_of(queries, keys, heads, share=1.0, batch=1, block=128, seed=1, q_len=None, kv_len=None, rank=None):
    """Blocks at random, block 0 and own ones."""
    generator = torch.Generator("cuda").manual_seed(seed)
    cells = torch.rand(batch, heads, math.ceil(queries / block), math.ceil(keys / block), device="cuda", generator=generator) < share
    q_len, kv_len = q_len or (queries,) * batch, kv_len or (keys,) * batch
    i, j = (torch.arange(n, device="cuda") for n in cells.shape[2:])
    for b, (n, m) in enumerate(zip(q_len, kv_len)):
        start = i * block
        last = (torch.clamp(start + block, max=n) - 1 + m - n) // block
        first = (start + m - n) // block
        cells[b] |= (j == 0) | (j >= first[:, None])
        cells[b] &= (j <= last[:, None]) & (start < n)[:, None]
    return BlockIndex.from_bool(cells, tuple(q_len), tuple(kv_len), block, block, rank=rank).check()


def kept(index, queries, keys, heads):
    cells = index.to_bool().repeat_interleave(index.block_m, 2).repeat_interleave(index.block_n, 3)[:, :, :queries, :keys]
    return cells.repeat_interleave(heads // index.shape[1], 1) & torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)


def in_fp64(q, k, v, keep, scale=None):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = (q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~keep, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def holds(q, k, v, index, run, lse_within=2e-3):
    """Against fp64 and SDPA's own error in q's dtype."""
    keep = kept(index, q.shape[2], k.shape[2], q.shape[1])
    wanted, wanted_lse = in_fp64(q, k, v, keep)
    out, lse = run(q, k, v, index, q.shape[-1] ** -0.5)
    of_sdpa = error(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True), wanted)
    assert out.isfinite().all() and error(out, wanted) <= min(8e-3, 1.5 * of_sdpa + 1e-6), (error(out, wanted), of_sdpa)
    assert (lse - wanted_lse).abs().max() < lse_within


@pytest.mark.parametrize("off", [0, 128, 77])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_everything_kept_is_dense_attention(kernel, dim, group, off):
    for queries in KEYS:
        q, k, v = qkv(queries, queries + off, group * 2, 2, dim)
        holds(q, k, v, index_of(queries, queries + off, group * 2), kernel.block_sparse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (32, 160)], ids=str)
def test_widths(kernel, dims, dtype):
    q, k, v = qkv(900, 1300, dim=dims[0], v_dim=dims[1], dtype=dtype)
    holds(q, k, v, index_of(900, 1300, 8, 0.3), kernel.block_sparse)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_fp32(kernel, dim):
    q, k, v = qkv(300, 400, 4, 2, dim, dtype=torch.float32)
    index = index_of(300, 400, 4, 0.5)
    wanted, wanted_lse = in_fp64(q, k, v, kept(index, 300, 400, 4))
    out, lse = kernel.block_sparse(q, k, v, index, dim**-0.5)
    assert error(out, wanted) < 1e-5 and (lse - wanted_lse).abs().max() < 1e-4


def every_config():
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return []
    from angelslim_sparseattn.kernels.triton.block_sparse import CONFIGS

    return list(CONFIGS)


@pytest.mark.parametrize("name", every_config())
def test_every_configuration(kernel, name):
    config = kernel.CONFIGS[name]
    if config.hopper and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a Hopper GPU")

    def run(*args):
        return kernel.block_sparse(*args, config=config)

    for dim in (64, 128):
        for queries, off in ((1, 0), (127, 128), (1000, 0), (1024, 256), (4096, 0)):
            for share in (0.2, 1.0):
                q, k, v = qkv(queries, queries + off, dim=dim)
                index = index_of(queries, queries + off, 8, share)
                holds(q, k, v, index, run)
                holds(q, k, v, index.per_kv(2), run)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(1024, 1024, batch=2))
    index = index_of(1024, 1024, 8, 0.3, batch=2, rank=torch.rand(2, 8, 8, 8, device="cuda"))
    holds(q, k, v, index, run)
    first = run(q, k, v, index, 0.1)
    assert all(torch.equal(x, y) for _ in range(3) for x, y in zip(first, run(q, k, v, index, 0.1)))


@pytest.mark.parametrize("executor", ["flex", "flash", "sdpa"])
def test_other_executors(executor):
    for queries, off, share in ((1024, 0, 0.3), (1000, 0, 1.0), (512, 256, 0.3), (700, 77, 0.3)):
        q, k, v = qkv(queries, queries + off)
        index = index_of(queries, queries + off, 8, share)
        if not BLOCK_SPARSE.implementations[[i.name for i in BLOCK_SPARSE.implementations].index(executor)].available()[0]:
            pytest.skip("not installed")
        for lists in (index, index.per_kv(2)):
            holds(q, k, v, lists, lambda *args: BLOCK_SPARSE(*args, executor=executor), lse_within=1e-2)


@pytest.mark.parametrize("dim", [64, 128])
def test_later_keys_never_matter(kernel, dim):
    q, k, v = qkv(1000, 1000, dim=dim)
    index = index_of(1000, 1000, 8, 0.4)
    out, lse = sparse_attention(q, k, v, index, "triton", return_lse=True)
    k[:, :, 500:], v[:, :, 500:] = 7.0, -7.0
    again, lse_again = sparse_attention(q, k, v, index, "triton", return_lse=True)
    assert out[:, :, :500].equal(again[:, :, :500]) and lse[:, :, :500].equal(lse_again[:, :, :500]) and not out.equal(again)


def test_order_skipping_and_bounds(kernel):
    q, k, v = qkv(2000, 2000)
    rank = torch.rand(1, 8, 16, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    index, shuffled = (index_of(2000, 2000, 8, 0.5, rank=r) for r in (None, rank))
    out = sparse_attention(q, k, v, index, "triton")
    assert not shuffled.col.equal(index.col) and error(sparse_attention(q, k, v, shuffled, "triton"), out.double()) < 8e-3
    for delta in (-1.0, 2000.0):
        assert sparse_attention(q, k, v, replace(shuffled, delta=(delta,)), "triton").equal(sparse_attention(q, k, v, shuffled, "triton"))
    far = replace(shuffled, delta=(1e-6,))
    assert far.skip_below() is not None and error(sparse_attention(q, k, v, far, "triton"), out.double()) < 8e-3


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_whole_blocks_are_skipped_whatever_the_tile(kernel, dim):
    q, _, v = qkv(1000, 1000, 8, 8, dim=dim)
    loud = torch.rand(32, generator=torch.Generator().manual_seed(1)) < 0.15  # few of a block's keys, so that its tiles differ
    k, q = q * torch.where(loud, 4.0, 0.5).repeat_interleave(32)[:1000, None].to(q), q * 2
    index = replace(index_of(1000, 1000, 8), delta=(1.0,))
    wanted, wanted_lse = BLOCK_SPARSE.reference(q.float(), k.float(), v.float(), index, dim**-0.5)
    unskipped = BLOCK_SPARSE.reference(q.float(), k.float(), v.float(), replace(index, delta=None), dim**-0.5)[1]
    assert not wanted_lse.equal(unskipped)
    for config in (None, *(c for c in (kernel.CONFIGS["64-twice"], kernel.CONFIGS["32-narrow"]) if dim <= c.widest)):
        out, lse = kernel.block_sparse(q, k, v, index, dim**-0.5, config)
        assert error(out, wanted.double()) < 8e-3 and (lse - wanted_lse).abs().max() < 2e-3


def test_recall_follows_from_lse(kernel):
    q, k, v = qkv(1500, 1500)
    index = index_of(1500, 1500, 8, 0.3)
    sparse, dense = (sparse_attention(q, k, v, i, "triton", return_lse=True)[1] for i in (index, index_of(1500, 1500, 8)))
    weights = (q.double() @ k.double().repeat_interleave(4, 1).mT * 128**-0.5).masked_fill(~kept(index_of(1500, 1500, 8), 1500, 1500, 8), -torch.inf)
    recall = (sparse - dense).exp()
    assert (recall - (weights.softmax(-1) * kept(index, 1500, 1500, 8)).sum(-1)).abs().max() < 1e-3 and recall.max() <= 1.001


@pytest.mark.parametrize("lengths", [((700, 333, 1), (900, 333, 129)), ((650,) * 3, (850,) * 3)], ids=["ragged", "same"])
def test_batches_are_their_sequences_and_padding_is_not_read(kernel, lengths):
    q_len, kv_len = lengths
    q, k, v = qkv(700, 900, batch=3)
    for b, (n, m) in enumerate(zip(q_len, kv_len)):
        q[b, :, n:], k[b, :, m:], v[b, :, m:] = torch.nan, torch.nan, torch.nan
    index = index_of(700, 900, 8, 0.4, batch=3, q_len=q_len, kv_len=kv_len)
    out, lse = sparse_attention(q, k, v, index, "triton", return_lse=True)
    cells = index.to_bool()
    for b, (n, m) in enumerate(zip(q_len, kv_len)):
        rows, columns = math.ceil(n / 128), math.ceil(m / 128)
        alone = BlockIndex.from_bool(cells[b : b + 1, :, :rows, :columns].contiguous(), (n,), (m,))
        found, found_lse = sparse_attention(q[b : b + 1, :, :n], k[b : b + 1, :, :m], v[b : b + 1, :, :m], alone, "triton", return_lse=True)
        assert error(found, out[b : b + 1, :, :n].double()) < 4e-3 and (found_lse - lse[b : b + 1, :, :n]).abs().max() < 1e-3
        assert not out[b, :, n:].any() and (lse[b, :, n:] == -torch.inf).all()


def test_at_128k_nothing_waits_and_little_memory_is_taken(kernel):
    n = 131072
    q, k, v = qkv(n, n, 32, 8)
    index = index_of(n, n, 32, 0.02)
    sparse_attention(q, k, v, index, "triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sparse_attention(q, k, v, index, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - out.nbytes < 2**30
