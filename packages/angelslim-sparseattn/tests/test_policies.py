"""What each policy selects: budgets counted by hand, scores against double sums, planted needles, nesting and causality."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from angelslim_core.errors import AngelslimError
from angelslim_sparseattn import make_policy, select, sparse_attention
from angelslim_sparseattn.estimators import antidiagonal_mass, antidiagonal_mean, diagonal_sums, value_bias
from angelslim_sparseattn.policies import CLASSES, vecattention
from angelslim_sparseattn.policies.stem import Stem
from angelslim_sparseattn.prefill import Prefill

# options under which 30 blocks of 16 are sparse
SMALL = {
    "a_shape": {"n_init": 16, "n_local": 32},
    "tri_shape": {"n_init": 16, "n_local": 32, "n_last": 20},
    "dilated": {"n_init": 16, "n_local": 32, "stride": 3},
    "minference": {"vertical": 60, "slash": 108},
    "flexprefill": {"gamma": 0.5, "min_budget": 32},
    "xattention": {"tau": 0.5},
    "flashprefill": {"alpha": 0.9, "n_init": 16, "n_local": 16, "n_last": 16},
    "vecattention": {"theta": 0.8},
    "cosa": {"p": 0.4},
    "stem": {"rate": 0.2, "n_init": 32, "n_local": 32},
}
DYNAMIC = [name for name in CLASSES if name not in ("a_shape", "tri_shape", "dilated")]
LENGTHS = [(480, 480), (475, 475), (200, 473), (17, 300)]


def qkv(queries, keys=None, heads=4, kv_heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, heads, queries, dim), (1, kv_heads, keys or queries, dim), (1, kv_heads, keys or queries, dim)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def prefill(q, k, v, block=16, prompt_len=None):
    return Prefill(q[0], k[0], v[0], q.shape[-1] ** -0.5, block, prompt_len or k.shape[2])


def last_own(index):
    return index.own()[1][0]


def lists_of(index):
    """Blocks and single keys of each row of each head."""
    ends, singles = index.row_ptr.tolist(), index.tokens.ptr.tolist() if index.tokens is not None else [0] * len(index.row_ptr)
    col, token = index.col.tolist(), index.tokens.col.tolist() if index.tokens is not None else []
    rows = [(col[ends[r] : ends[r + 1]], token[singles[r] : singles[r + 1]]) for r in range(len(ends) - 1)]
    return [rows[h * index.shape[2] : (h + 1) * index.shape[2]] for h in range(index.shape[1])]


def same(a, b):
    return lists_of(a) == lists_of(b)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_indices_are_sound_and_sparse(name, lengths):
    index = select(*qkv(*lengths), make_policy(name, **SMALL[name]), block=16)  # select checks it
    assert index.heads == "per_q" and index.q_len == lengths[:1] and index.kv_len == lengths[1:]
    if lengths[0] == 480:
        assert index.density() < 0.95
    for options in ({}, {"min_len": 0}):
        assert select(*qkv(40), make_policy(name, **options)).density() == 1


@pytest.mark.parametrize("name", CLASSES)
def test_lists_of_query_heads_do_not_depend_on_how_kv_heads_are_shared(name):
    q, k, v = qkv(475, heads=14, kv_heads=2)
    policy = make_policy(name, **SMALL[name])
    index = select(q, k, v, policy, block=16)
    repeated = select(q, k.repeat_interleave(7, 1), v.repeat_interleave(7, 1), policy, block=16)
    assert same(index, repeated)
    if index.tokens is None:
        union = index.per_kv(2).check().to_bool().repeat_interleave(7, 1)
        assert not (index.to_bool() & ~union).any()


@pytest.mark.parametrize("name", CLASSES)
def test_later_tokens_change_earlier_lists_only_where_declared(name):
    policy = make_policy(name, **SMALL[name])
    q, k, v = qkv(480)
    index = select(q, k, v, policy, block=16)
    blocks, leaks = 20, False
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        for x in (q, k, v):
            x[:, :, blocks * 16 :] = 5 * torch.randn(x[:, :, blocks * 16 :].shape, generator=generator)
        again = select(q, k, v, policy, block=16)
        lists = [[rows[i][:blocks] for i in range(4)] for rows in map(lists_of, (index, again))]
        leaks |= lists[0] != lists[1]
    if name == "tri_shape":  # which rows are last depends on the prompt's length, not on what is in it
        shorter = select(*(x[:, :, : blocks * 16] for x in (q, k, v)), policy, block=16).to_bool()
        leaks = not shorter.equal(index.to_bool()[:, :, :blocks, :blocks])
    assert leaks == policy.looks_ahead


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a_shape", [{"n_local": n} for n in (16, 64, 200)]),
        ("dilated", [{"stride": n} for n in (8, 4, 2)]),
        ("minference", [{"slash": n} for n in (100, 200, 400)]),
        ("flexprefill", [{"gamma": g} for g in (0.3, 0.6, 0.9)]),
        ("xattention", [{"tau": t} for t in (0.2, 0.5, 0.8, 1.0)]),
        ("flashprefill", [{"alpha": a} for a in (0.95, 0.6, 0.3, 0.0)]),
        ("vecattention", [{"theta": t} for t in (1.0, 0.5, 0.1, 0.0)]),
        ("cosa", [{"p": p, "delta": -1} for p in (0.2, 0.5, 0.8, 1.0)]),
        ("stem", [{"rate": r} for r in (0.1, 0.3, 0.6, 1.0)]),
        ("stem", [{"rate": None, "score": "mass", "stride": 8, "alpha": 1.0, "tau": t} for t in (0.2, 0.5, 0.8, 1.0)]),
    ],
)
def test_larger_budgets_keep_more(name, options):
    q, k, v = qkv(470)
    q *= 2
    dense, full = sparse_attention(q, k, v, select(q, k, v, make_policy("stem", rate=1.0)), return_lse=True)
    before, recalled, apart, densities = None, torch.zeros(1), torch.inf, []
    for each in options:
        index = select(q, k, v, make_policy(name, **{**SMALL[name], **each}), block=16)
        cells = index.to_bool()
        assert before is None or not (before & ~cells).any()
        out, lse = sparse_attention(q, k, v, index, return_lse=True)
        recall, error = (lse - full).exp(), (out - dense).norm()
        assert (recall >= recalled - 1e-4).all() and error <= apart * 1.001 and recall.max() < 1.001
        before, recalled, apart = cells, recall, error
        densities.append(index.density())
    assert densities[-1] > densities[0]
    if name in ("xattention", "flashprefill", "vecattention", "cosa", "stem"):
        assert densities[-1] == 1


# static patterns, by hand


def test_static_patterns():
    q, k, v = qkv(320, heads=1, kv_heads=1)
    a = select(q, k, v, make_policy("a_shape", n_init=17, n_local=33), block=16).to_bool()[0, 0]
    assert a[10].nonzero()[:, 0].tolist() == [0, 1, 8, 9, 10]  # the row's first query, 160, sees keys from 128 on
    exact = torch.arange(320)[:, None] - torch.arange(320)
    near = ((exact < 33) & (exact >= 0)) | ((torch.arange(320) < 17) & (exact >= 0))
    assert a.equal(near.unflatten(0, (20, 16)).unflatten(2, (20, 16)).any(3).any(1))
    tri = select(q, k, v, make_policy("tri_shape", n_init=17, n_local=33, n_last=17), block=16).to_bool()[0, 0]
    assert tri[18:].equal(torch.ones(20, 20, dtype=torch.bool).tril()[18:]) and tri[:18].equal(a[:18])
    dilated = select(q, k, v, make_policy("dilated", n_init=16, n_local=17, stride=4), block=16).to_bool()[0, 0]
    assert dilated[15].nonzero()[:, 0].tolist() == [0, 3, 7, 11, 14, 15]


def test_diagonal_sums():
    attention = torch.rand(2, 3, 7)
    attention[:, torch.arange(7) > torch.tensor([4, 5, 6])[:, None]] = 0
    wanted = torch.zeros(2, 7)
    for row in range(3):
        for key in range(5 + row):
            wanted[:, 4 + row - key] += attention[:, row, key]
    assert torch.allclose(diagonal_sums(attention), wanted)


def test_minference_keeps_every_token_of_its_columns_and_diagonals():
    q, k, v = qkv(475, heads=1, kv_heads=1)
    k[:, :, 77] = 40 * q[:, :, -64:-50].mean(2)  # a column for a few of the last 64 queries, none for the very last
    q[:, :, -32:] = -q[:, :, -64:-50].mean(2, keepdim=True)
    index = select(q, k, v, make_policy("minference", vertical=31, slash=100), block=16)
    assert index.tokens is not None
    for i in range(index.shape[2]):
        kept = set(index.tokens.col[index.tokens.ptr[i] : index.tokens.ptr[i + 1]].tolist())
        blocks = set(index.to_bool()[0, 0, i].nonzero()[:, 0].tolist())
        end = min(i * 16 + 16, 475)
        assert {t for t in [*range(30), 77] if t < end} <= kept | {b * 16 + x for b in blocks for x in range(16)}
        assert {(t - o) // 16 for t in range(i * 16, end) for o in range(100) if t >= o} == blocks


# scores


@pytest.mark.parametrize("lengths", [(96, 96), (83, 83), (30, 95)], ids=str)
def test_flat_product_is_the_strided_double_sum(lengths):
    s = prefill(*qkv(*lengths))
    found, b, stride = antidiagonal_mean(s, 4), 16, 4
    q, k = s.q.double(), s.k.double()
    for h, i, j in [(0, 0, 0), (3, s.rows - 1, s.columns - 1), (2, s.rows - 1, 1), (1, 0, 2)]:
        total = 0.0
        for a in range(b // stride):
            for e in range(b // stride):
                for t in range(stride):
                    at_q, at_k = i * b + a * stride + stride - 1 - t, j * b + e * stride + t
                    if at_q < s.q_len and at_k < s.kv_len:
                        total += float(q[h, at_q] @ k[h // 2, at_k])
        rows, columns = min(b, s.q_len - i * b), min(b, s.kv_len - j * b)
        assert abs(float(found[h, i, j]) - s.scale * stride * total / (rows * columns)) < 1e-5


@pytest.mark.parametrize("lengths", [(96, 96), (83, 83), (30, 95)], ids=str)
def test_antidiagonal_mass_sums_to_real_rows(lengths):
    s = prefill(*qkv(*lengths))
    groups = [-(-min(16, s.q_len - i * 16) // 4) for i in range(s.rows)]
    assert torch.allclose(antidiagonal_mass(s, 4).sum(-1), torch.tensor(groups).float().expand(4, -1), atol=1e-4)


def test_value_terms():
    s = prefill(*qkv(90))
    norms = s.v.norm(dim=-1)
    assert torch.allclose(value_bias(s, 4, "log")[:, 1], norms[:, 16:32].amax(-1).log().clamp(min=0))
    u = torch.stack([norms[:, e : e + 4].amax(-1) for e in range(0, 90, 4)], -1)
    z = ((u + 1e-6).log() - (u + 1e-6).log().mean(-1, keepdim=True)) / ((u + 1e-6).log().std(-1, keepdim=True) + 1e-6)
    found = value_bias(s, 4, "znorm")
    assert torch.allclose(found[:, 1], z[:, 4:8].clamp(min=0).mean(-1), atol=1e-5)
    assert torch.allclose(found[:, -1], z[:, 20:].clamp(min=0).mean(-1), atol=1e-5)
    louder = Prefill(s.q, s.k, s.v * 100, s.scale, 16, 90)
    assert torch.allclose(value_bias(louder, 4, "znorm"), found, atol=1e-4)
    assert not torch.allclose(value_bias(louder, 4, "log"), value_bias(s, 4, "log"), atol=1)


def test_cosa_lists_owners_of_row_maxima_before_heavier_blocks():
    q, k, v = qkv(192, heads=1, kv_heads=1)
    q *= 2
    index = select(q, k, v, make_policy("cosa", p=1.0, stride=4), block=16)
    pairs = q[0, 0].view(48, 4, 16).flip(1).flatten(1) @ k[0, 0].view(48, 4, 16).flatten(1).T * 16**-0.5 / 4
    pairs = pairs.masked_fill(~torch.ones(48, 48, dtype=torch.bool).tril(), -torch.inf)
    highest = pairs.unflatten(1, (12, 4)).amax(-1)
    share = (highest - highest.amax(-1, keepdim=True)).exp().unflatten(0, (12, 4))
    owners, mass = (share >= 0.999).any(1).tolist(), share.sum(1).tolist()
    turned = 0
    for i, (blocks, _) in enumerate(lists_of(index)[0]):
        rest = sorted((not owners[i][j], -mass[i][j], j) for j in range(1, i))
        assert blocks == [i, *([0] if i else []), *(j for _, _, j in rest)]
        turned += rest != sorted(rest, key=lambda each: each[1])
    assert turned


# needles


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_far_block_that_queries_ask_for_is_found(name):
    q, k, v = qkv(480)
    k *= 0.1
    k[:, :, 10 * 16 : 11 * 16] = 8 * q[:, ::2, -16:].mean(2, keepdim=True)
    q[:, :, -32:] = 8 * q[:, ::2, -16:].mean(2, keepdim=True).repeat_interleave(2, 1)
    index = select(q, k, v, make_policy(name, **{**SMALL[name], **({"n_last": 0} if name == "flashprefill" else {})}), block=16)
    _, lse = sparse_attention(q, k, v, index, return_lse=True)
    full = sparse_attention(q, k, v, select(q, k, v, make_policy("stem", rate=1.0)), return_lse=True)[1]
    assert (lse - full).exp()[:, :, -16:].min() > 0.9
    if name != "vecattention":  # which keeps its keys one by one
        assert name == "minference" or index.to_bool()[0, :, -1, 10].all()
    without = select(q, k, v, make_policy("a_shape", **SMALL["a_shape"]), block=16)
    assert (sparse_attention(q, k, v, without, return_lse=True)[1] - full).exp()[:, :, -1].max() < 0.1


@pytest.mark.parametrize("score", ["mean", "mass"])
@pytest.mark.parametrize("term", ["znorm", "log"])
def test_among_equal_scores_stem_takes_the_block_of_large_values(term, score):
    q, k, v = qkv(480)
    k[:] = k[:, :, :1]
    v[:, :, 10 * 16 : 11 * 16] *= 10
    options = {"n_init": 16, "n_local": 16, "value_term": term, "rate": 1 / 30, "score": score, "stride": 8}
    for lam, chosen in ((0.2, 10), (0.0, 1)):
        cells = select(q, k, v, make_policy("stem", lam=lam, **options), block=16).to_bool()[0]
        assert cells[:, -1].nonzero()[:, 1].tolist() == [0, chosen, 29] * 4


def test_stem_finds_one_key_among_others_by_mass():
    q, k, v = qkv(480)
    k *= 0.1
    q[..., 0] += 4
    k[:, :, 165, 0] = 40
    k[:, :, 166:176, 0] = -5  # so that the block's mean is low
    options = {"n_init": 16, "n_local": 16, "rate": 1 / 30, "stride": 4, "lam": 0.0}
    mean, mass = (select(q, k, v, make_policy("stem", score=score, **options), block=16).to_bool()[0, :, -1, 10] for score in ("mean", "mass"))
    assert mass.all() and not mean.any()


def test_stem_by_mass_takes_the_heaviest():
    q, k, v = qkv(450)
    s = prefill(q, k, v)
    score = antidiagonal_mass(s, 4).log() + 0.5 * value_bias(s, 4, "znorm").repeat_interleave(2, 0)[:, None]
    cells = select(q, k, v, make_policy("stem", score="mass", stride=4, lam=0.5, rate=0.1, n_init=0, n_local=1), block=16).to_bool()[0]
    for i in range(4, 29):
        assert cells[:, i, :i].equal(torch.zeros(4, i, dtype=torch.bool).scatter(1, score[:, i, :i].topk(min(3, i)).indices, True))


def test_stem_by_share_is_xattention_whose_share_falls():
    q, k, v = qkv(475)
    plain = {"score": "mass", "stride": 4, "lam": 0.0, "n_init": 1, "n_local": 0}
    by_share = lambda alpha, tau=0.8: select(q, k, v, make_policy("stem", tau=tau, alpha=alpha, **plain), block=16)  # noqa: E731
    wanted = [select(q, k, v, make_policy("xattention", tau=tau, stride=4), block=16) for tau in (0.8, 0.4)]
    assert same(by_share(1.0), wanted[0])
    level, falling, low = (index.to_bool()[0] for index in (wanted[0], by_share(0.5), wanted[1]))
    assert (falling <= level).all() and (low <= falling).all() and not falling.equal(level)
    assert falling[:, 0].equal(level[:, 0]) and falling[:, -1].equal(low[:, -1])


def test_large_values_draw_stems_share():
    q, k, v = qkv(480)
    v[:, :, 160:176] *= 10
    options = {"score": "mass", "tau": 0.5, "alpha": 1.0, "stride": 4, "n_init": 1, "n_local": 0}
    kept = [select(q, k, v, make_policy("stem", lam=lam, **options), block=16).to_bool()[0, :, 12:, 10].sum() for lam in (0.0, 1.0, 100.0)]
    assert kept[0] < kept[1] <= kept[2] == 4 * 18
    rows_before = []
    for loud in (1, 1e6):  # what comes later changes nothing, however loud
        v[:, :, 400:416] *= loud
        index = select(q, k, v, make_policy("stem", lam=20.0, value_term="log", **options), block=16)
        rows_before.append(index.to_bool()[0, :, :25])
    assert rows_before[0].equal(rows_before[1])


# Stem's budgets


def counts_of(index):
    return index.row_ptr.diff().view(index.shape[1], -1)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("options", [{"rate": 0.1}, {"rate": 0.3, "bias": 3}, {"rate": 0.5, "alpha": 0.4}, {"rate": 0.3, "cap": 2}, {"rate": 0.4, "schedule": "paper"}], ids=str)  # fmt: skip
def test_stem_keeps_what_its_budget_says(lengths, options):
    policy = make_policy("stem", n_init=32, n_local=48, **options)
    q, k, v = qkv(*lengths)
    index = select(q, k, v, policy, block=16)
    p, budget, blocks = last_own(index), policy.budget(prefill(q, k, v)), -(-lengths[1] // 16)
    own = p - index.own()[0][0] + 1
    forced = torch.minimum(p + 1, 2 + torch.maximum(own, torch.tensor(3)))
    assert counts_of(index).equal((forced + torch.minimum(budget, p + 1 - forced)).expand(4, -1))
    if options.keys() == {"rate"}:
        assert (budget == -(-round(options["rate"] * 10) * blocks // 10)).all()
    cells = index.to_bool()[0]
    for i, end in enumerate(p.tolist()):
        assert cells[:, i, :2][:, : end + 1].all() and cells[:, i, max(0, end - 2) : end + 1].all()


def budget(blocks, **options):
    q, k, v = qkv(blocks * 16, heads=1, kv_heads=1, dim=1)
    return Stem(**options).budget(prefill(q, k, v))


def test_position_decay():
    k = budget(160, alpha=0.7)
    assert (k[:46] == 46).all() and k[-1] == 32 and k[46] == 46 and (k.diff() <= 0).all()
    assert budget(55, alpha=0.7).tolist() == [55] * 55 and (budget(56, alpha=1.0) == 41).all()
    assert budget(159, alpha=1.0)[-1] == 61 and budget(200)[-1] == 35 and budget(200).equal(budget(200, alpha=0.7))
    assert budget(30, rate=0.1).tolist() == [3] * 30 and budget(30, rate=1.0).tolist() == [30] * 30
    paper = budget(1024, schedule="paper", n_init=64, n_local=64)
    assert paper[0] == 205 and paper[512] == 175 and paper[-1] == 144  # 16K tokens: a fifth
    assert budget(60, schedule="paper", n_init=64, n_local=64).tolist() == [46] * 60


def test_budgets_follow_the_whole_prompt():
    q, k, v = qkv(480)
    policy = make_policy("stem", rate=0.2, alpha=0.5, n_init=32, n_local=32, lam=0.0)
    whole = select(q, k, v, policy, block=16).to_bool()
    chunk = select(q[:, :, 160:320], k[:, :, :320], v[:, :, :320], policy, block=16, prompt_len=480)
    assert chunk.to_bool().equal(whole[:, :, 10:20, :20])
    assert not select(q[:, :, 160:320], k[:, :, :320], v[:, :, :320], policy, block=16).to_bool().equal(chunk.to_bool())


@pytest.mark.parametrize(("alpha", "table"), [(1.0, [100, 95.0, 74.0, 43.1, 31.7, 25.5, 22.2]), (0.7, [100, 88.4, 66.4, 37.8, 27.6, 22.0, 19.2])])
def test_density_of_stem(alpha, table):
    for step, wanted in enumerate(table):
        q = torch.zeros(1, 1, 4096 * 2**step // 8, 1)  # blocks of 16 in place of 128: the schedule counts blocks
        policy = make_policy("stem", alpha=alpha, n_init=64, n_local=64)
        assert abs(100 * select(q, q, q, policy, block=16).density() - wanted) <= 0.0501


# other policies' limits


def test_everything_is_kept_where_a_threshold_says_so():
    q, k, v = qkv(470)
    for name, options in [("xattention", {"tau": 1}), ("flashprefill", {"alpha": 0}), ("vecattention", {"theta": 0}), ("cosa", {"p": 1})]:
        assert select(q, k, v, make_policy(name, **options), block=16).density() == 1
    assert select(q, k, v, make_policy("flexprefill", min_budget=470), block=16).density() == 1


class Peak(TorchDispatchMode):
    """Most bytes that tensors made meanwhile take up at a time."""

    def __init__(self):
        super().__init__()
        self.made, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made = [x for x in self.made if x() is not None] + [weakref.ref(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        alive = {x().untyped_storage().data_ptr(): x().untyped_storage().nbytes() for x in self.made}
        self.bytes = max(self.bytes, sum(alive.values()))
        return out


def test_vecattention_takes_little_memory(monkeypatch):
    """A head of 128K tokens, 128 wide, in a sixteenth of the tokens and of the width: a 256th of the memory, a quarter of which lists may take."""
    monkeypatch.setattr(vecattention, "MEMORY", vecattention.MEMORY // 256)
    q, k, v = qkv(8192, heads=1, kv_heads=1, dim=8)
    with Peak() as peak:
        make_policy("vecattention").keep(prefill(q, k, v, block=128))
    assert peak.bytes < 0.75 * 2**30 / 256


@pytest.mark.parametrize(("heads", "looks"), [(4, 1), (3, 2), (2, 2), (1, 4), (0.5, 8), (0.01, 4 * 30)], ids=str)
def test_vecattention_looks_at_as_many_heads_at_a_time_as_memory_is_for(monkeypatch, heads, looks):
    s = prefill(*qkv(470))
    policy, made, rows = make_policy("vecattention", theta=0.8), [], vecattention.VecAttention._rows
    wanted = policy.keep(s)
    monkeypatch.setattr(vecattention, "MEMORY", int(heads * policy.scratch_bytes(s)))
    monkeypatch.setattr(vecattention.VecAttention, "_rows", lambda *given: (made.append(given), rows(*given))[1])
    found = policy.keep(s)
    assert len(made) == looks and s.rows == 30
    assert torch.equal(found.cells, wanted.cells)
    assert torch.equal(found.tokens.ptr, wanted.tokens.ptr) and torch.equal(found.tokens.col, wanted.tokens.col)


def test_options_are_checked():
    calls = [
        ("no policy", lambda: make_policy("steam")),
        (r"stem\.rat\b", lambda: make_policy("stem", rat=0.1)),
        (r"stem\.rate", lambda: make_policy("stem", rate=0)),
        ("bias adds to rate", lambda: make_policy("stem", bias=3)),
        ("tau is a share of mass", lambda: make_policy("stem", tau=0.9)),
        ("which rate sets", lambda: make_policy("stem", score="mass", tau=0.9, rate=0.1)),
        ("which schedule sets", lambda: make_policy("stem", score="mass", tau=0.9, schedule="paper")),
        (r"xattention\.tau", lambda: make_policy("xattention", tau=1.5)),
        (r"a_shape\.n_init", lambda: make_policy("a_shape", n_init="many")),
    ]
    for what, call in calls:
        with pytest.raises(ValueError, match=what) as caught:
            call()
        assert isinstance(caught.value, AngelslimError)
