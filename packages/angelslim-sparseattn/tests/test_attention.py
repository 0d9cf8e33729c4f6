"""Attention over kept blocks: the reference and Triton's kernel (interpreted where there is no GPU) against brute force in fp64."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from angelslim_core.errors import AngelslimError
from angelslim_sparseattn import BlockIndex, make_policy, select, sparse_attention
from angelslim_sparseattn.block_index import Tokens
from angelslim_sparseattn.kernels import block_sparse as kernel
from angelslim_sparseattn.kernels import flex

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXECUTORS = ["reference", "triton", "sdpa"]


@pytest.fixture(params=EXECUTORS)
def executor(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def qkv(queries, keys=None, heads=4, kv_heads=2, dim=64, v_dim=None, batch=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, dim), (batch, kv_heads, keys or queries, dim), (batch, kv_heads, keys or queries, v_dim or dim)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def tokens_of(index, heads):
    """bool [B, Hq, L, N] of what an index keeps, causality of tokens included."""
    keep = index.to_bool().clone()
    keep = keep.repeat_interleave(index.block_m, -2).repeat_interleave(index.block_n, -1)
    if index.tokens is not None:
        rows = torch.repeat_interleave(torch.arange(len(index.tokens.ptr) - 1, device=keep.device), index.tokens.ptr.diff())
        by_row = keep.unflatten(2, (-1, index.block_m)).flatten(0, 2)
        by_row[rows, :, index.tokens.col.long()] = True
        keep = by_row.view(keep.shape)
    keep = keep[:, :, : max(index.q_len), : max(index.kv_len)]
    for b, (queries, keys) in enumerate(zip(index.q_len, index.kv_len)):
        keep[b] &= torch.ones(keep.shape[2:], dtype=torch.bool, device=keep.device).tril(keys - queries)
        keep[b, :, queries:] = False
        keep[b, :, :, keys:] = False
    return keep.repeat_interleave(heads // index.shape[1], 1)


def brute(q, k, v, keep, scale=None):
    """fp64 output and LSE over kept keys."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = (q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~keep, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def random_index(queries, keys, heads=4, block=16, seed=1, share=0.4, device=DEVICE):
    """Random lists, own blocks and block 0 in each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, heads, math.ceil(queries / block), math.ceil(keys / block))
    cells = torch.rand(shape, generator=generator) < share
    i, j, off = torch.arange(shape[2])[:, None], torch.arange(shape[3]), keys - queries
    first, last = (off + i * block) // block, (off + ((i + 1) * block).clamp(max=queries) - 1) // block
    return BlockIndex.from_bool(((cells | (j >= first)) & (j <= last)).to(device), (queries,), (keys,), block, block).check()


SIZES = [
    (1, 0, 64, None, 4, 2), (15, 0, 80, None, 4, 4), (16, 0, 96, 64, 4, 1), (17, 16, 128, None, 7, 1), (49, 9, 64, 128, 2, 1), (65, 77, 192, 128, 1, 1), (18, 1, 256, 256, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_everything_kept_is_dense_attention(executor, size, dtype):
    queries, off, dim, v_dim, heads, kv_heads = size
    q, k, v = qkv(queries, queries + off, heads, kv_heads, dim, v_dim, dtype=dtype)
    index = select(q, k, v, make_policy("stem", rate=1.0), block=16)
    assert index.density() == 1
    out, lse = sparse_attention(q, k, v, index, executor, return_lse=True)
    mask = torch.ones(queries, queries + off, dtype=torch.bool, device=DEVICE).tril(off)
    wanted, wanted_lse = brute(q, k, v, mask)
    assert out.dtype == dtype and out.shape == wanted.shape and lse.dtype == torch.float32
    own = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert error(out, wanted) <= (1e-6 if dtype == torch.float32 else min(8e-3, 1.5 * error(own, wanted)))
    assert torch.allclose(lse.double(), wanted_lse, atol=1e-5)


@pytest.mark.parametrize("lengths", [(96, 96), (50, 73), (32, 96), (60, 69)], ids=str)
def test_output_is_attention_over_the_listed_blocks(executor, lengths):
    q, k, v = qkv(*lengths, dim=32, v_dim=48)
    for index in (random_index(*lengths), random_index(*lengths).per_kv(2)):
        assert index.density() < 0.75 or index.heads == "per_kv"
        out, lse = sparse_attention(q, k, v, index, executor, return_lse=True, scale=0.3)
        wanted, wanted_lse = brute(q, k, v, tokens_of(index, 4), 0.3)
        assert error(out, wanted) < 1e-6 and torch.allclose(lse.double(), wanted_lse, atol=1e-5)


@pytest.mark.parametrize("name", ["minference", "vecattention"])
@pytest.mark.parametrize("lengths", [(100, 100), (40, 103)], ids=str)
def test_single_keys(executor, name, lengths):
    q, k, v = qkv(*lengths, dim=32)
    q *= 4
    index = select(q, k, v, make_policy(name, **({"vertical": 60, "slash": 50} if name == "minference" else {"theta": 0.2})), block=16)
    if name == "minference":  # near diagonals are all kept: without them single keys remain
        index = replace(random_index(*lengths, share=0), tokens=Tokens(*singles_before(index, lengths))).check()
    assert index.tokens is not None and len(index.tokens.col)
    out, lse = sparse_attention(q, k, v, index, executor, return_lse=True)
    wanted, wanted_lse = brute(q, k, v, tokens_of(index, 4))
    assert error(out, wanted) < 1e-6 and torch.allclose(lse.double(), wanted_lse, atol=1e-5)


def singles_before(index, lengths):
    """Every seventh key before own blocks."""
    counts, cols = [], []
    for start in index.own()[0].expand(4, -1).flatten().tolist():
        cols.append(torch.arange(start % 3, start * index.block_n, 7, dtype=torch.int32))
        counts.append(len(cols[-1]))
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]).to(DEVICE), torch.cat(cols).to(DEVICE)


def test_later_keys_never_matter(executor):
    q, k, v = qkv(90, dim=32)
    index = random_index(90, 90)
    first, lse = sparse_attention(q, k, v, index, executor, return_lse=True)
    k[:, :, 40:], v[:, :, 40:] = 7.0, -7.0
    again, lse_again = sparse_attention(q, k, v, index, executor, return_lse=True)
    assert first[:, :, :40].equal(again[:, :, :40]) and lse[:, :, :40].equal(lse_again[:, :, :40])
    assert not first[:, :, 40:].equal(again[:, :, 40:])


def test_padding_is_never_read_and_ragged_batches_are_their_sequences(executor):
    lengths = [(20, 41), (34, 34), (1, 17)]
    q, k, v = qkv(34, 41, heads=2, kv_heads=1, batch=3, dim=32)
    for b, (queries, keys) in enumerate(lengths):
        q[b, :, queries:], k[b, :, keys:], v[b, :, keys:] = torch.nan, torch.nan, torch.nan
    for name in ("stem", "cosa", "vecattention"):
        policy = make_policy(name, **({"rate": 0.2, "n_init": 16, "n_local": 16} if name == "stem" else {}))
        index = select(q, k, v, policy, block=16, q_len=[n for n, _ in lengths], kv_len=[n for _, n in lengths])
        out, lse = sparse_attention(q, k, v, index, executor, return_lse=True)
        for b, (queries, keys) in enumerate(lengths):
            assert not out[b, :, queries:].any() and (lse[b, :, queries:] == -torch.inf).all()
            alone = q[b : b + 1, :, :queries], k[b : b + 1, :, :keys], v[b : b + 1, :, :keys]
            found = sparse_attention(*alone, select(*alone, policy, block=16), executor)
            assert torch.allclose(found, out[b : b + 1, :, :queries], atol=1e-6)
    assert out.equal(sparse_attention(q, k, v, index, executor))


def test_order_of_lists_does_not_matter(executor):
    q, k, v = qkv(80, dim=32)
    index = random_index(80, 80)
    rank = torch.rand(index.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    shuffled = BlockIndex.from_bool(index.to_bool(), index.q_len, index.kv_len, 16, 16, rank=rank).check()
    assert shuffled.order == "priority" and not shuffled.col.equal(index.col)
    assert torch.allclose(*(sparse_attention(q, k, v, i, executor) for i in (index, shuffled)), atol=1e-5)


def skipped_by_hand(q, k, index, below):
    """bool [Hq, Pq, Pk]: blocks that are skipped, own ones first and the rest as listed."""
    scores = (q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT)[0] * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(), -torch.inf)
    skipped = torch.zeros(index.shape[1:], dtype=torch.bool, device=q.device)
    for h in range(index.shape[1]):
        for i in range(index.shape[2]):
            row = h * index.shape[2] + i
            listed = index.col[index.row_ptr[row] : index.row_ptr[row + 1]].tolist()
            running = scores[h, i * 16 : i * 16 + 16, i * 16 : i * 16 + 16].amax(-1)
            for j in (j for j in listed if j != i):
                highest = scores[h, i * 16 : i * 16 + 16, j * 16 : j * 16 + 16].amax(-1)
                skipped[h, i, j] = (highest - running).max() < below
                running = running if skipped[h, i, j] else torch.maximum(running, highest)
    return skipped


@pytest.mark.parametrize("executor", ["reference", "triton"])
def test_blocks_far_below_the_maximum_are_skipped(executor):
    q, k, v = qkv(90, heads=2, kv_heads=1, dim=32)
    q *= 3
    k[:, :, 16:64] *= 0.2
    index = select(q, k, v, make_policy("cosa", p=1.0, delta=12.0), block=16)
    assert index.order == "priority" and index.density() == 1
    gone = skipped_by_hand(q, k, index, math.log(12 / 90))
    assert 5 < int(gone.sum()) < len(index.col) - 12
    keep = tokens_of(index, 2) & ~gone.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :90, :90]
    wanted, wanted_lse = brute(q, k, v, keep)
    out, lse = sparse_attention(q, k, v, index, executor, return_lse=True)
    assert error(out, wanted) < 1e-6 and torch.allclose(lse.double(), wanted_lse, atol=1e-5)
    dense = brute(q, k, v, tokens_of(index, 2))[0]
    for delta in (-1.0, 90.0):  # a bound of 0 and above would skip everything
        assert error(sparse_attention(q, k, v, replace(index, delta=(delta,)), executor), dense) < 1e-6


def test_recall_follows_from_lse(executor):
    q, k, v = qkv(100, dim=32)
    index = random_index(100, 100, share=0.3)
    _, lse = sparse_attention(q, k, v, index, executor, return_lse=True)
    _, dense = sparse_attention(q, k, v, select(q, k, v, make_policy("stem", rate=1.0)), executor, return_lse=True)
    causal = torch.ones(100, 100, dtype=torch.bool, device=DEVICE).tril()
    weights = (q @ k.repeat_interleave(2, 1).mT * 32**-0.5).masked_fill(~causal, -torch.inf).softmax(-1)
    recall = (lse - dense).exp()
    assert torch.allclose(recall, (weights * tokens_of(index, 4)).sum(-1), atol=1e-3) and recall.max() <= 1.001 and recall.min() < 0.9


def test_inputs_of_any_layout(executor):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(35, dim=32))
    assert not q.is_contiguous()
    index = random_index(35, 35)
    found = sparse_attention(q, k, v, index, executor)
    assert found.equal(sparse_attention(q.contiguous(), k.contiguous(), v.mT.contiguous().mT, index, executor))


def test_which_executor_runs(monkeypatch):
    q, k, v = qkv(20, dim=32)
    index = random_index(20, 20)
    assert kernel.BLOCK_SPARSE.choose(q.cpu(), k.cpu(), v.cpu(), index, 1.0).name == "torch"
    for name in ("flex", "flash", "nonsense"):
        with pytest.raises(AngelslimError, match=name):
            sparse_attention(q.cpu(), k.cpu(), v.cpu(), random_index(20, 20, device="cpu"), name)
    with pytest.raises(AngelslimError, match="skipped"):
        sparse_attention(q, k, v, replace(index, delta=(5.0,)), "sdpa")
    if DEVICE == "cpu":
        monkeypatch.setattr(kernel, "triton_interprets", lambda: False)
        with pytest.raises(AngelslimError, match="on a GPU"):
            sparse_attention(q, k, v, index, "triton")
    wide = qkv(20, dim=300)
    monkeypatch.setattr(kernel, "triton_interprets", lambda: True)
    with pytest.raises(AngelslimError, match="256"):
        sparse_attention(*wide, index, "triton")
    assert error(sparse_attention(*wide, index, "reference"), brute(*wide, tokens_of(index, 4))[0]) < 1e-6


@pytest.fixture
def triton_kernel():
    pytest.importorskip("triton")
    from angelslim_sparseattn.kernels.triton import block_sparse

    return block_sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_way_to_run_the_kernel_is_the_reference(triton_kernel, dtype):
    for dim, v_dim, lengths in ((64, None, (100, 100)), (192, 128, (40, 133))):
        q, k, v = qkv(*lengths, heads=2, kv_heads=1, dim=dim, v_dim=v_dim, dtype=dtype)
        index = random_index(*lengths, heads=2, block=64)
        wanted, wanted_lse = brute(q, k, v, tokens_of(index, 2), 0.1)
        for config in {c._replace(warps=4, registers=None, stages=2) for c in triton_kernel.CONFIGS.values() if not c.hopper}:
            out, lse = triton_kernel.block_sparse(q, k, v, index, 0.1, config)
            assert error(out, wanted) < (1e-6 if dtype == torch.float32 else 8e-3) and torch.allclose(lse.double(), wanted_lse, atol=1e-5)


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_whole_blocks_are_skipped_whatever_the_tile(triton_kernel, tile):
    q, _, v = qkv(300, heads=2, kv_heads=2, dim=32)
    loud = torch.rand(20, generator=torch.Generator().manual_seed(1)) < 0.15  # few of a block's keys, so that its tiles differ
    k, q = q * torch.where(loud, 2.5, 0.5).repeat_interleave(16)[:300, None].to(DEVICE), q * 6
    index = replace(random_index(300, 300, heads=2, block=64, share=1), delta=(1.0,)).check()
    scale = 32**-0.5
    wanted, wanted_lse = kernel.reference(q, k, v, index, scale)
    assert not wanted_lse.equal(kernel.reference(q, k, v, replace(index, delta=None), scale)[1])
    out, lse = triton_kernel.block_sparse(q, k, v, index, scale, triton_kernel.Config(tile))
    assert error(out, wanted.double()) < 1e-6 and torch.allclose(lse, wanted_lse, atol=1e-5)


@pytest.mark.parametrize("tma", [True, False])
def test_what_lies_behind_a_sequence_is_not_read(triton_kernel, tma):
    block_sparse, config = triton_kernel.block_sparse, triton_kernel.Config(32, tma=tma)
    q, k, v = qkv(130, 200, batch=2, dim=32)
    lengths = (130, 77), (200, 141)
    cells = torch.ones(2, 4, 3, 4, dtype=torch.bool, device=DEVICE)
    index = BlockIndex.from_bool(cells, *lengths, 64, 64).intersect_causal()
    wanted = block_sparse(q, k, v, index, 0.2, config)[0]
    q[1, :, 77:], k[1, :, 141:], v[1, :, 141:] = torch.nan, torch.nan, torch.nan
    found = block_sparse(q, k, v, index, 0.2, config)[0]
    assert found.equal(wanted) and found.isfinite().all() and not found[1, :, 77:].any()
    q, k, v = qkv(160, dim=32)
    index = BlockIndex.from_bool(cells[:1, :, :, :3], (150,), (150,), 64, 64).intersect_causal()
    wanted = block_sparse(q, k, v, index, 0.2, config)[0]
    q[:, :, 150:], k[:, :, 150:], v[:, :, 150:] = torch.nan, torch.nan, torch.nan
    assert block_sparse(q, k, v, index, 0.2, config)[0].equal(wanted) and wanted.isfinite().all()


def test_flex_attention_sees_the_index():
    for lengths in ((300, 300), (200, 333), (64, 70)):
        index = random_index(*lengths, heads=2, block=64)
        for lists in (index, index.per_kv(2)):
            mask = flex.block_mask(lists, 4)
            assert mask.to_dense().bool().equal(lists.to_bool().repeat_interleave(4 // lists.shape[1], 1))
            first, last = index.own()
            assert mask.kv_num_blocks.equal((last - first + 1)[:, None].int().expand(1, 4, -1))
            assert all(mask.kv_indices[0, 0, i, 0] == first[0, i] for i in range(index.shape[2]))
            x = torch.arange(400, device=DEVICE)
            assert mask.mask_mod(0, 0, x[:, None], x).equal(torch.ones(400, 400, dtype=torch.bool, device=DEVICE).tril(lengths[1] - lengths[0]))


def test_what_flex_attention_cannot_take():
    q, k, v = qkv(100, dim=32)
    index = random_index(100, 100)
    assert flex.fits(q, k, v, index) == (True, "")
    assert "length" in flex.fits(q, k, v, random_index(90, 90))[1]
    assert "single keys" in flex.fits(q, k, v, replace(index, tokens=Tokens(*singles_before(index, (100, 100)))))[1]
    assert "skips" in flex.fits(q, k, v, replace(index, delta=(5.0,)))[1]
    assert "wide" in flex.fits(*qkv(100, dim=320), index)[1]


def test_short_sequences_and_dense_layers_attend_to_everything():
    q, k, v = qkv(700, dim=16)
    policy = make_policy("a_shape", n_init=0, n_local=0, min_len=600, dense_layers=(3,))
    dense = brute(q, k, v, torch.ones(700, 700, dtype=torch.bool, device=DEVICE).tril())[0]
    sparse = sparse_attention(q, k, v, select(q, k, v, policy), "reference")
    assert error(sparse, dense) > 0.1
    assert sparse_attention(q, k, v, policy, "reference").equal(sparse) and sparse_attention(q, k, v, policy, "reference", layer=2).equal(sparse)
    assert error(sparse_attention(q, k, v, policy, "reference", layer=3), dense) < 1e-6
    assert error(sparse_attention(q, k, v, make_policy("a_shape", n_init=0, n_local=0, min_len=701), "reference"), dense) < 1e-6
    mixed = [torch.cat([x, x]) for x in (q, k, v)]
    both = sparse_attention(*mixed, policy, "reference", q_len=[700, 599], kv_len=[700, 599])
    assert both[0].equal(sparse[0]) and error(both[1, :, :599], dense[0, :, :599]) < 1e-6


BAD = {
    "dimensions": lambda q, k, v: (q[0], k, v),
    "do not fit together": lambda q, k, v: (q, k[:, :, 1:], v),
    "no multiple": lambda q, k, v: (q[:, :3], k, v),
    "all the same": lambda q, k, v: (q, k.half(), v),
    "no more queries than keys": lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]),
    "fp32, fp16 or bf16": lambda q, k, v: (q.double(), k.double(), v.double()),
    "NaN": lambda q, k, v: (q, k, v.index_fill(2, torch.tensor([5], device=DEVICE), torch.nan)),
    "infinity": lambda q, k, v: (q.index_fill(2, torch.tensor([5], device=DEVICE), torch.inf), k, v),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_an_error(what):
    tensors = BAD[what](*qkv(20, dim=16))
    for policy in (make_policy("stem", rate=0.5), make_policy("a_shape")):
        for call in (select, lambda *args: sparse_attention(*args, check=True)):
            with pytest.raises(ValueError, match=what) as caught:
                call(*tensors, policy)
            assert isinstance(caught.value, AngelslimError)


def test_bad_arguments_are_errors():
    q, k, v = qkv(40, dim=16)
    stem, index = make_policy("stem"), random_index(40, 40)
    calls = [
        ("above 0", lambda: select(q, k, v, stem, scale=0.0)),
        ("multiple of 16", lambda: select(q, k, v, stem, block=24)),
        ("does not divide", lambda: select(q, k, v, make_policy("xattention", stride=7))),
        ("prompt of 39", lambda: select(q, k, v, stem, prompt_len=39)),
        ("do not fit 1 sequences", lambda: select(q, k, v, stem, q_len=[41])),
        ("at least one query", lambda: select(q, k, v, stem, q_len=[0])),
        ("other lengths", lambda: sparse_attention(q, k, v, index, q_len=[39])),
        ("was made for", lambda: sparse_attention(q[:, :2], k[:, :1], v[:, :1], index)),
        ("do not fit", lambda: sparse_attention(q[:, :, :30], k[:, :, :30], v[:, :, :30], index)),
    ]
    for what, call in calls:
        with pytest.raises(AngelslimError, match=what):
            call()


def test_importing_the_package_imports_no_torch():
    code = "import sys, angelslim_sparseattn, angelslim_sparseattn.plugin; assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_of_the_readme_runs(capsys):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    assert 0 < float(capsys.readouterr().out) <= 1 and names["out"].shape == names["q"].shape and names["lse"].isfinite().all()
