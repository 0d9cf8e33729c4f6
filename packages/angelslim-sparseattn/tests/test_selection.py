"""Triton's selection against its references: scores, masses, and lists, in the interpreter where there is no GPU."""

from dataclasses import replace

import pytest
import torch

from angelslim_sparseattn import make_policy, select, selection, sparse_attention
from angelslim_sparseattn.block_index import Lists, joined, to_cells
from angelslim_sparseattn.estimators import ANTIDIAGONAL_MASS, ANTIDIAGONAL_MEAN, MEAN_KEY_MASS, VALUE_BIAS
from angelslim_sparseattn.kernels.select_rows import COMPACT, SELECT_ROWS, Rule, bound, counts_of
from angelslim_sparseattn.patterns import causal, last_rows, own
from angelslim_sparseattn.policies import CLASSES
from angelslim_sparseattn.prefill import Kept, Prefill

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# queries, keys, block, stride, heads, kv heads, width
SIZES = [
    (96, 96, 16, 4, 2, 1, 16),
    (83, 83, 16, 8, 2, 1, 48),
    (30, 95, 16, 2, 3, 3, 16),
    (70, 150, 32, 16, 4, 1, 80),
    (17, 64, 16, 16, 2, 2, 32),
    (40, 40, 16, 1, 1, 1, 16),
]


def prefill(queries, keys, block=16, heads=4, kv_heads=2, width=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, width + 3)
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return Prefill(q, k, v, width**-0.5, block, keys)


def both(kernel, s, *args):
    return (kernel(s, *args, executor=name) for name in ("triton", "reference"))


def close(s, found, wanted, atol=1e-5):
    seen = causal(s).expand_as(wanted)
    assert torch.allclose(found[seen], wanted[seen], atol=atol, rtol=1e-4)


def mass_tiles():
    from angelslim_sparseattn.kernels.triton import mass

    return list(mass.CONFIGS)


def cells_of(s, lists):
    return to_cells(lists, s.rows, s.columns)


def same(s, found, wanted):
    assert found.ptr.equal(wanted.ptr) and found.order == wanted.order
    n = int(wanted.ptr[-1])
    assert found.col[:n].equal(wanted.col[:n]) and (len(found.col) == n or not found.exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_antidiagonal_means_and_values(size, dtype):
    queries, keys, block, stride, heads, kv_heads, width = size
    s = prefill(queries, keys, block, heads, kv_heads, width, dtype)
    bias, wanted_bias = both(VALUE_BIAS, s, stride)
    assert torch.allclose(bias, wanted_bias, atol=1e-4)
    # pooled factors are rounded to the dtype, now and then the other way where they are summed in another order
    atol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    for each in (None, wanted_bias):
        close(s, *both(ANTIDIAGONAL_MEAN, s, stride, each, 0.3), atol)


@pytest.mark.parametrize("owners", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_antidiagonal_masses(size, owners, monkeypatch):
    from angelslim_sparseattn.kernels.triton import mass

    queries, keys, block, stride, heads, kv_heads, width = size
    s = prefill(queries, keys, block, heads, kv_heads, width)
    found, wanted = both(ANTIDIAGONAL_MASS, s, stride, owners)
    close(s, found, wanted)
    assert not owners or (wanted < 0).any()
    monkeypatch.setattr(mass, "MEMORY", 1)  # a block of queries at a time
    close(s, ANTIDIAGONAL_MASS(s, stride, owners, executor="triton"), wanted)


@pytest.mark.parametrize(("queries", "keys"), [(512, 1024), (301, 707)])
@pytest.mark.parametrize("name", mass_tiles())
def test_antidiagonal_masses_by_whole_tiles(name, queries, keys):
    from angelslim_sparseattn.kernels.triton import mass

    s = prefill(queries, keys, 32, 2, 1, 16 if DEVICE == "cpu" else 64, torch.bfloat16)
    wide = replace(s, q=s.q.float(), k=s.k.float())
    for owners in (False, True):
        wanted = ANTIDIAGONAL_MASS(wide, 2, owners, executor="reference")
        close(s, mass.antidiagonal_mass(s, 2, owners, mass.CONFIGS[name]), wanted, 1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mean_key_masses(size):
    queries, keys, block, _, heads, kv_heads, width = size
    close(*((s := prefill(queries, keys, block, heads, kv_heads, width)), *both(MEAN_KEY_MASS, s)), 1e-4)


RULES = {
    "top_k": lambda rows: Rule("top_k", k=tuple((3 * i) % 7 for i in range(rows)), n_init=16, n_local=40),
    "top_k of none": lambda rows: Rule("top_k", k=(0,) * rows),
    "top_k of all": lambda rows: Rule("top_k", k=(1000,) * rows),
    "top_k, last rows": lambda rows: Rule("top_k", k=(2,) * rows, n_last=20),
    "top_p": lambda rows: Rule("top_p", share=0.6, n_init=1),
    "top_p of none": lambda rows: Rule("top_p", share=0.0),
    "top_p of all": lambda rows: Rule("top_p", share=1.0, n_init=1),
    "top_p, falling": lambda rows: Rule("top_p", share=0.9, slope=0.02, n_local=40),
    "in order": lambda rows: Rule("top_p", share=0.7, n_init=1, ordered=True),
    "in order, all": lambda rows: Rule("top_p", share=1.0, n_init=1, ordered=True),
    "at_least": lambda rows: Rule("at_least", share=0.5, n_init=16, n_local=32, n_last=16),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", [(112, 112), (60, 157), (7, 90)], ids=str)
def test_lists_are_those_of_the_reference(lengths, rule):
    s = prefill(*lengths, heads=2)
    chosen = RULES[rule](s.rows)
    generator = torch.Generator().manual_seed(3)
    score = torch.randn(2, s.rows, s.columns, generator=generator).to(DEVICE)
    if chosen.mode != "top_k":
        score = torch.where(score > 1, -score, score.abs()) if chosen.ordered else score.abs()
        score[1, :, 1:4] = 0.0
    score[0] = (score[0] * 2).round() / 2  # ties, among them of 0 and -0
    score = torch.where(causal(s), score, torch.nan)  # what kernels leave there
    found, wanted = both(SELECT_ROWS, s, score, chosen)
    same(s, found, wanted)
    cells = cells_of(s, wanted)
    assert (cells | own(s)).equal(cells) and not (cells & ~causal(s)).any()
    if chosen.mode == "top_k":
        assert wanted.ptr.diff().view(2, -1).tolist() == [list(counts_of(s.span, chosen).per_row)] * 2
    assert bound(s.span) == int(causal(s).sum())


@pytest.mark.parametrize("own_first", [False, True])
def test_cells_become_lists(own_first):
    s = prefill(60, 157)
    cells = (torch.rand(4, s.rows, s.columns, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.4) & causal(s) | own(s)
    same(s, *both(COMPACT, s, cells, own_first, None))
    same(s, *both(COMPACT, s, cells[0].expand(4, -1, -1), own_first, None))
    keys = torch.randint(0, 100000, (4, 2000), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    alone = torch.rand(4, s.rows, 2000, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.3
    same(s, *both(COMPACT, s, alone, False, keys))


def test_lists_are_joined_in_order(monkeypatch):
    from angelslim_sparseattn import block_index

    a = Lists(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1, 7, 7]).int(), exact=False)
    b = Lists(torch.tensor([0, 1]), torch.tensor([4, 9]).int(), exact=False)
    for piece, narrow in ((2**24, 2**28), (2, 2**28), (1, 3)):
        monkeypatch.setattr(block_index, "PIECE", piece)
        monkeypatch.setattr(block_index, "NARROW_ABOVE", narrow)
        ptr, col, exact, _ = joined([a, b, a], [1, 1, 2], 2, 10)
        assert not exact and ptr.tolist() == [0, 2, 2, 3, 3, 4, 4, 6, 7]  # a row is missing in each head but the last
        assert col[: int(ptr[-1])].tolist() == [0, 1, 1, 4, 0, 1, 1] and col.dtype == (torch.int16 if narrow == 3 else torch.int32)


# options under which 30 blocks of 16 are sparse
SMALL = {
    "minference": {"vertical": 60, "slash": 108}, "flexprefill": {"gamma": 0.5, "min_budget": 32}, "xattention": {"tau": 0.5},
    "flashprefill": {"alpha": 0.9, "n_init": 16, "n_local": 16, "n_last": 16}, "vecattention": {"theta": 0.8}, "cosa": {"p": 0.4},
    "stem": {"rate": 0.2, "n_init": 32, "n_local": 32}, "a_shape": {"n_init": 16, "n_local": 32},
}  # fmt: skip


def by_triton(monkeypatch):
    """Every operation of selection runs as Triton's kernel."""
    from angelslim_core.kernels import Kernel

    choose = Kernel.choose
    monkeypatch.setattr(Kernel, "choose", lambda self, *args, executor="auto", **kw: choose(self, *args, executor="triton", **kw))


@pytest.mark.parametrize("name", CLASSES)
def test_policies_select_the_same_by_triton(name, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, heads, 170, 16, generator=generator).to(DEVICE) for heads in (2, 1, 1))
    policy = make_policy(name, **SMALL.get(name, {}))
    lengths = {"q_len": [170, 75], "kv_len": [170, 163]}
    wanted = select(q.cpu(), k.cpu(), v.cpu(), policy, block=16, **lengths)
    for scratch in (1, 2**30):  # a head at a time, and all
        monkeypatch.setattr(selection, "SCRATCH_BYTES", scratch)
        if scratch > 1:
            by_triton(monkeypatch)
        found = select(q, k, v, policy, block=16, check=True, **lengths).check()
        n = int(wanted.row_ptr[-1])
        assert found.row_ptr.equal(wanted.row_ptr.to(DEVICE)) and found.col[:n].equal(wanted.col.to(DEVICE)) and found.order == wanted.order
        assert found.density() == wanted.density() and found.delta == wanted.delta
        if wanted.tokens is not None:
            n = int(wanted.tokens.ptr[-1])
            assert found.tokens.ptr.equal(wanted.tokens.ptr.to(DEVICE)) and found.tokens.col[:n].equal(wanted.tokens.col.to(DEVICE))


def test_lists_in_the_other_order_are_turned():
    s = prefill(60, 157)
    rule = Rule("top_p", share=0.5, ordered=True)
    kept = Kept(lists=SELECT_ROWS(s, torch.rand(4, s.rows, s.columns, device=DEVICE), rule))
    turned = selection._listed(s, kept, ordered=False).lists
    assert turned.order == "ascending" and cells_of(s, turned).equal(cells_of(s, kept.lists))
    assert not turned.col.equal(kept.lists.col) and selection._listed(s, kept, ordered=True) is kept


def test_heads_are_taken_as_memory_allows():
    s = prefill(32, 32, heads=12, kv_heads=3)
    for most, sizes in ((99, [12]), (11, [8, 4]), (7, [4, 4, 4]), (3, [2] * 6), (1, [1] * 12), (0, [1] * 12)):
        parts = list(s.parts(most))
        assert [len(part.q) for part in parts] == sizes and torch.cat([part.q for part in parts]).equal(s.q)
        assert torch.cat([part.k.repeat_interleave(part.groups, 0) for part in parts]).equal(s.k.repeat_interleave(4, 0))


def test_a_last_block_that_is_not_full_is_no_last_query():
    s = prefill(90, 90)
    assert not last_rows(s, 0).any() and last_rows(s, 1)[:, 0].tolist() == [False] * 5 + [True] and last_rows(s, 11)[4].all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLASSES)
def test_on_a_gpu(name):
    """BF16 on the real thing: as the reference but for near ties, and the host waits for nothing."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, heads, 4000, 128, generator=generator, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    policy = make_policy(name, **({"rate": 0.2} if name == "stem" else {}))
    found = select(q, k, v, policy, check=True).check()
    wanted = select(q.cpu(), k.cpu(), v.cpu(), policy)
    apart = int((found.to_bool().cpu() ^ wanted.to_bool()).sum())
    assert apart <= 0.01 * int(wanted.row_ptr[-1]) and found.order == wanted.order
    if name != "vecattention":
        torch.cuda.set_sync_debug_mode("error")
        try:
            sparse_attention(q, k, v, policy.model_copy(update={"min_len": 0}), check=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    repeated = select(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1), policy)
    n = int(found.row_ptr[-1])
    assert repeated.row_ptr.equal(found.row_ptr) and repeated.col[:n].equal(found.col[:n])


@pytest.mark.gpu
def test_nan_is_found_on_a_gpu():
    q, k, v = (torch.randn(1, heads, 300, 64, device="cuda", dtype=torch.float16) for heads in (4, 2, 2))
    k[0, 1, 77, 3] = torch.nan
    for call in (lambda: select(q, k, v, make_policy("stem"), check=True), lambda: sparse_attention(q, k, v, make_policy("stem"), check=True)):
        with pytest.raises(ValueError, match="k: holds NaN"):
            call()
    select(q, k, v, make_policy("stem"))
