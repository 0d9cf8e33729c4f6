"""Vision strategies against slow oracles in float64, written from the papers, and what must hold of any of them."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from angelslim_core.errors import NumericError
from angelslim_mmprune import picking
from angelslim_mmprune.finite import NotFiniteError
from angelslim_mmprune.plan import Grid, Need, Pool
from angelslim_mmprune.strategies import CLASSES, make_strategy, prunesid

OURS = ["divprune", "scope", "id_selection", "vispruner", "vispruner_audio", "hiprune", "visionzip", "visionzip_audio", "prunesid"]


def pool_of(strategy, features, statistics=(), grids=(), segments=None, padding=float("nan")):
    """Pools side by side of lists of [N, D]; statistics: for each need, a list of [N] or [N, d]. What is behind a pool is `padding`."""
    most = max(len(x) for x in features)

    def padded(values):
        return torch.stack([torch.cat([v.float(), torch.full((most - len(v), *v.shape[1:]), padding)]) for v in values])

    found = {need: padded(values) for need, values in zip(strategy.needs, statistics, strict=True)}
    return Pool(padded(features), tuple(len(x) for x in features), segments, grids, found)


def random_pool(strategy, counts, seed=0, width=6, make=None):
    """Features, and positive statistics that differ, as a strategy needs them; also as lists in float64."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, width, generator=generator) if make is None else make(n, generator) for n in counts]
    shape = {"keys": (5,)}
    statistics = [[torch.rand(n, *shape.get(need.statistic, ()), generator=generator) + 0.01 for n in counts] for need in strategy.needs]
    return pool_of(strategy, features, statistics), features, statistics


def sets(plan, keep):
    rows = [[j for j in row if j >= 0] for row in plan.keep.tolist()]
    assert [len(row) for row in rows] == list(keep), "not as many as asked for"
    assert all(row == sorted(set(row)) for row in rows), "not ascending"
    assert all(not any(j >= 0 for j in whole[len(row) :]) for whole, row in zip(plan.keep.tolist(), rows, strict=True)), "not at the front"
    return rows


# ---- oracles: one pool, numpy float64, loops


def unit64(x):
    x = x.double().numpy()
    norms = np.sqrt((x * x).sum(1))
    return np.array([row / norm if norm > 0 else row for row, norm in zip(x, norms, strict=True)])


def largest(score, of):
    """The first of `of` whose score is largest."""
    return min(of, key=lambda i: (-score[i], i))


def top(score, k, of=None):
    return sorted(range(len(score)) if of is None else of, key=lambda i: (-float(score[i]), i))[:k]


def divprune_oracle(x, k):
    """Max-min problem of the paper, greedily: distances to all that is chosen, anew at each pick."""
    u = unit64(x)
    n = len(u)
    distance = [[1 - float(u[i] @ u[j]) for j in range(n)] for i in range(n)]
    chosen = [largest([min(distance[i][j] for j in range(n) if j != i) for i in range(n)], range(n))]
    while len(chosen) < k:
        free = [i for i in range(n) if i not in chosen]
        chosen.append(largest([min(distance[i][j] for j in chosen) for i in range(n)], free))
    return sorted(chosen)


def scope_oracle(x, a, k, alpha=1.0, combine="multiply"):
    """Coverage of a set S: sum over j of max(0, max over S of cos_ij); a token's gain is the difference of two coverages."""
    u = unit64(x)
    n = len(u)
    cosine = u @ u.T

    def coverage(chosen):
        return sum(max([0.0] + [cosine[i, j] for i in chosen]) for j in range(n))

    chosen = []
    while len(chosen) < k:
        now = coverage(chosen)
        gain = [coverage([*chosen, i]) - now for i in range(n)]
        weight = [float(v) ** alpha for v in a]
        score = [g * w if combine == "multiply" else g + w for g, w in zip(gain, weight, strict=True)]
        chosen.append(largest(score, [i for i in range(n) if i not in chosen]))
    return sorted(chosen)


def id_oracle(x, a, k, gamma=20.0):
    u = unit64(x)
    a = [float(v) for v in a]
    first = [(v - min(a)) / (max(a) - min(a)) for v in a]
    score, chosen = list(first), []
    while len(chosen) < k:
        free = [i for i in range(len(a)) if i not in chosen]
        best = min(free, key=lambda i: (-score[i], -first[i] if score[i] == 0 else 0, i))
        chosen.append(best)
        own = score[best]
        for j in free:
            score[j] = max(0.0, score[j] - math.exp(-gamma * (1 - float(u[best] @ u[j])) ** 2) * own)
    return sorted(chosen)


def vispruner_oracle(x, a, k, important=0.5, step=8):
    u = unit64(x)
    named = top(a, round(important * k))
    rest = [i for i in range(len(a)) if i not in named]
    wanted = k - len(named)
    while wanted and len(rest) > wanted:
        these, those = rest[::2], rest[1::2]
        near = {i: max(float(u[i] @ u[j]) for j in those) for i in these}
        for i in sorted(these, key=lambda i: (-near[i], i))[: min(step, len(rest) // 2, len(rest) - wanted)]:
            rest.remove(i)
    return sorted(named + (rest if wanted else []))


def hiprune_oracle(objects, whole, k, alpha=0.1, width=1, images=None):
    """`images`: first and last token of each; `width`: of each image."""
    n = len(objects)
    images = images or [(0, n - 1)]
    widths = width if isinstance(width, list) else [width] * len(images)
    anchors = top(objects, max(round(alpha * k / 5), 1 if alpha and k >= 5 else 0))
    taken = []
    for direction in range(5):
        for i in anchors:
            low, high, w = next((lo, hi, w) for (lo, hi), w in zip(images, widths, strict=True) if lo <= i <= hi)
            j = min(max(i + [0, -1, 1, -w, w][direction], low), high)
            if j not in taken:
                taken.append(j)
    taken = taken[:k]
    return sorted(taken + top(whole, k - len(taken), [i for i in range(n) if i not in taken]))


def visionzip_oracle(a, keys, k, contexts, merge="sum"):
    """Kept tokens, and the matrix [K, N] by which features become theirs."""
    n = len(a)
    u = unit64(keys)
    dominant = top(a, k - contexts)
    others = [i for i in range(n) if i not in dominant]
    targets = others[:: max(1, len(others) // contexts)][:contexts]
    keep = sorted(dominant + targets)
    matrix = np.zeros((k, n))
    for row, i in enumerate(keep):
        matrix[row, i] = 1
    members = {t: [] for t in targets}
    for i in others:
        if i not in targets:
            members[max(targets, key=lambda t: float(u[i] @ u[t]))].append(i)
    for t, merged in members.items():
        row = keep.index(t)
        for i in merged:
            matrix[row, i] = 1 / len(merged) if merge == "sum" else 1
        if merge == "mean":
            matrix[row] /= 1 + len(merged)
    return keep, matrix


def prunesid_oracle(x, a, k, score="attention", factor=18.0):
    n = len(x)
    z = 1 / (1 + np.exp(-x.double().numpy()))
    z = z.T - z.T.mean(0)  # samples are the features, variables the tokens
    groups_n = min(max(1, k // 4), *z.shape)
    load = np.abs(np.linalg.svd(z, full_matrices=False)[2][:groups_n].T)
    group = load.argmax(1)
    value = np.array([float(v) for v in a]) if score == "attention" else load.max(1)
    cosine = unit64(x) @ unit64(x).T
    mean = sum(cosine[i, j] for i in range(n) for j in range(i)) / (n * (n - 1) / 2)
    passed, behind = [], []
    for g in range(groups_n):
        mine = []
        for i in top(value, n, [i for i in range(n) if group[i] == g]):
            if all(cosine[i, j] <= max(factor * k / n, 1) * mean for j in mine):
                mine.append(i)
        passed.append(mine)
        behind.append([i for i in top(value, n, [i for i in range(n) if group[i] == g]) if i not in mine])
    upper = [min(5 * math.ceil(k / 64), len(p)) for p in passed]
    size = [len(p) + len(b) for p, b in zip(passed, behind, strict=True)]
    while sum(upper) < k:
        upper = [min(u + 1, s) for u, s in zip(upper, size, strict=True)]
    lower = [min(1, s) for s in size]
    rest, total = k - sum(lower), sum(map(len, passed))
    sums = [0] + [round(Fraction(rest * sum(map(len, passed[: g + 1])), total)) for g in range(groups_n)]
    share = [min(lower[g] + sums[g + 1] - sums[g], upper[g]) for g in range(groups_n)]
    for g in sorted(range(groups_n), key=lambda g: (-len(passed[g]), g)):
        while share[g] < upper[g] and sum(share) < k:
            share[g] += 1
    return sorted(i for g in range(groups_n) for i in (passed[g] + behind[g])[: share[g]])


def oracle(name, strategy, x, stats, k):
    """Kept tokens of one pool."""
    n = len(x)
    if name == "divprune":
        return divprune_oracle(x, k)
    if name == "scope":
        return scope_oracle(x, *stats, k, strategy.alpha, strategy.combine)
    if name == "id_selection":
        return id_oracle(x, *stats, k, strategy.gamma)
    if name.startswith("vispruner"):
        return vispruner_oracle(x, *stats, k, strategy.important, strategy.step)
    if name == "hiprune":
        return hiprune_oracle(*stats, k, strategy.alpha, math.isqrt(n))
    if name.startswith("visionzip"):
        of = {"visionzip": k, "visionzip_audio": n}[name]
        return visionzip_oracle(*stats, k, min(k, max(1, round(strategy.contextual * of))), strategy.merge)[0]
    return prunesid_oracle(x, *(stats or [None]), k, strategy.score, strategy.threshold)


CASES = [(name, {}) for name in OURS] + [
    ("scope", {"alpha": 0.05}),
    ("scope", {"alpha": 2.0}),
    ("scope", {"combine": "add"}),
    ("id_selection", {"gamma": 2.0}),
    ("vispruner", {"important": 0.0}),
    ("vispruner", {"important": 1.0}),
    ("vispruner", {"step": 1}),
    ("hiprune", {"alpha": 0.0}),
    ("hiprune", {"alpha": 0.6}),
    ("hiprune", {"alpha": 1.0}),
    ("visionzip", {"merge": "mean"}),
    ("visionzip", {"contextual": 0.0}),
    ("visionzip", {"contextual": 1.0}),
    ("visionzip_audio", {"contextual": 0.4}),
    ("prunesid", {"score": "loading"}),
    ("prunesid", {"threshold": 3.0}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_as_the_oracle_says(name, options, seed):
    """Three pools of different length, NaN behind the shorter ones, each as alone and as the oracle: features around one direction, as real ones."""
    strategy = make_strategy(name, **options)
    make = (lambda n, g: torch.randn(n, 8, generator=g) + torch.tensor([1.5, *[0.0] * 7])) if seed else None
    pool, features, statistics = random_pool(strategy, (31, 12, 23), seed, 6, make)
    for keep in ((16, 5, 1), (20, 1, 22), (7, 11, 12)):
        plan = strategy.plan(pool, keep)
        found = sets(plan, keep)
        for i in range(3):
            stats = [values[i] for values in statistics]
            assert found[i] == oracle(name, strategy, features[i], stats, keep[i]), (i, keep)
            alone = strategy.plan(pool.one(i), [keep[i]])
            assert alone.keep[0].tolist() == found[i]
            if plan.groups is not None:
                n = pool.counts[i]
                assert plan.groups[i, :n].equal(alone.groups[0]) and plan.weights[i, :n].allclose(alone.weights[0]) and (plan.groups[i, n:] == -1).all()


def odd_pools():
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(13, 4, generator=generator)
    yield "equal features", torch.ones(13, 4), torch.rand(13, generator=generator)
    yield "no features", torch.zeros(13, 4), torch.rand(13, generator=generator)
    yield "equal attention", random, torch.full((13,), 0.1)
    yield "no attention", random, torch.zeros(13)
    yield "copies", random[[0, 1, 2] * 4 + [0]], torch.rand(13, generator=generator)
    yield "opposites", torch.cat([random[:6], -random[:6], random[6:7]]), torch.rand(13, generator=generator)
    yield "all the same", torch.ones(13, 4), torch.zeros(13)


@pytest.mark.parametrize("name", OURS)
def test_exact_whatever_comes(name):
    """Every K of every length from 2, and features and statistics that leave nothing to choose by."""
    strategy = make_strategy(name)
    for n in (2, 3, 4, 7, 13):
        pool, *_ = random_pool(strategy, (n,) * (n - 1), n)
        sets(strategy.plan(pool, range(1, n)), range(1, n))
        sets(strategy.plan(pool, [0] * (n - 1)), [0] * (n - 1))
    for what, features, attention in odd_pools():
        statistics = [[features if need.statistic == "keys" else attention] * 12 for need in strategy.needs]
        plan = strategy.plan(pool_of(strategy, [features] * 12, statistics), range(1, 13))
        sets(plan, range(1, 13))
        assert plan.apply(features.expand(12, -1, -1)).isfinite().all(), what


@pytest.mark.parametrize("name", ["divprune", "scope", "id_selection", "prunesid"])
def test_where_a_token_stands_does_not_matter(name):
    strategy = make_strategy(name)
    pool, features, statistics = random_pool(strategy, (40,), 5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    other = pool_of(strategy, [features[0][order]], [[values[0][order]] for values in statistics])
    for keep in (4, 12, 25):
        moved = sets(strategy.plan(other, [keep]), [keep])[0]
        assert sorted(order[moved].tolist()) == sets(strategy.plan(pool, [keep]), [keep])[0]


@pytest.mark.parametrize("name", OURS)
def test_scale_does_not_matter(name):
    """Of features (components of a sigmoid aside) and of attention."""
    strategy = make_strategy(name)
    pool, features, statistics = random_pool(strategy, (30,), 6)
    other = pool_of(strategy, features if name == "prunesid" else [features[0] * 32], [[v[0] * 0.25] for v in statistics])
    assert strategy.plan(other, [11]).keep.equal(strategy.plan(pool, [11]).keep)
    halves = Pool(pool.features.bfloat16(), pool.counts, None, (), pool.statistics)
    sets(strategy.plan(halves, [11]), [11])


@pytest.mark.parametrize(
    ("name", "options"), [("vispruner", {"important": 1.0}), ("hiprune", {"alpha": 0.0}), ("id_selection", {"gamma": 1e6}), ("id_selection", {"gamma": 0.0})]
)
def test_limits_that_are_attention_alone(name, options):
    strategy = make_strategy(name, **options)
    pool, _, statistics = random_pool(strategy, (33,), 7)
    for keep in (1, 8, 20):
        assert sets(strategy.plan(pool, [keep]), [keep])[0] == sorted(top(statistics[-1][0], keep))


def test_scope_between_attention_and_coverage():
    """Tokens that are like no other add 1 each: attention decides. Of copies of a kept one nothing is left to cover, so they come last."""
    strategy = make_strategy("scope")
    attention = torch.tensor([0.3, 0.9, 0.1, 0.7, 0.5])
    assert sets(strategy.plan(pool_of(strategy, [torch.eye(5)], [[attention]]), [3]), [3])[0] == [1, 3, 4]
    features = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    attention = torch.tensor([1.0, 0.9, 0.8, 0.01, 0.02])
    assert sets(strategy.plan(pool_of(strategy, [features], [[attention]]), [3]), [3])[0] == [0, 3, 4]


def test_scope_of_coverage_alone():
    """At alpha 0 two tokens that cover each other gain the same, whatever they are: what is covered is the oracle's, if not by the same tokens."""
    strategy = make_strategy("scope", alpha=0.0)
    pool, features, statistics = random_pool(strategy, (31,), 0)
    cosine = unit64(features[0]) @ unit64(features[0]).T
    for keep in (1, 5, 16):
        found, wanted = (
            cosine[rows].max(0).clip(min=0).sum()
            for rows in (sets(strategy.plan(pool, [keep]), [keep])[0], scope_oracle(features[0], statistics[0][0], keep, 0.0))
        )
        assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", ["divprune", "id_selection", "scope"])
def test_copies_come_last(name):
    """Each of four directions three times: with four tokens one of each stays, and no token twice with more."""
    strategy = make_strategy(name)
    features = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(2))).Q.T.repeat_interleave(3, 0)
    statistics = [[torch.rand(12, generator=torch.Generator().manual_seed(9)) + 0.1] for _ in strategy.needs]
    pool = pool_of(strategy, [features], statistics)
    assert {j // 3 for j in sets(strategy.plan(pool, [4]), [4])[0]} == {0, 1, 2, 3}
    for keep in range(5, 12):
        sets(strategy.plan(pool, [keep]), [keep])


def test_divprune_starts_at_what_is_loneliest():
    """Angles 0, 100 and 230 degrees: the third is furthest from its nearest, -.64 against -.17, also where the pool is padded."""
    angles = torch.tensor([0.0, 100, 230]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1)
    strategy = make_strategy("divprune")
    assert sets(strategy.plan(pool_of(strategy, [features, torch.randn(6, 2)]), [1, 1]), [1, 1])[0] == [2]


def test_id_selection_of_equal_attention_goes_by_distance():
    strategy = make_strategy("id_selection")
    pool = pool_of(strategy, [torch.eye(4).repeat_interleave(3, 0)], [[torch.full((12,), 0.2)]])
    assert sets(strategy.plan(pool, [4]), [4])[0] == [0, 3, 6, 9]


def test_id_selection_damps_by_distance_and_by_score():
    """Angles 0, 12, 90 degrees, s = 1, .9, .3: of .9 nearly all goes to the first, so .3 is second; with gamma 1e4 little does, so it is not."""
    angles = torch.tensor([0.0, 12, 90, 180]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1)
    for gamma, second in ((20.0, 2), (1e4, 1)):
        strategy = make_strategy("id_selection", gamma=gamma)
        pool = pool_of(strategy, [features], [[torch.tensor([1.0, 0.9, 0.3, 0.0])]])
        assert sets(strategy.plan(pool, [2]), [2])[0] == [0, second]


def test_vispruner_drops_what_has_a_copy_between():
    """Tokens 0 and 4 have near copies at odd places 1 and 5; those go first, one at a time or both."""
    features = torch.eye(8)
    features[1], features[5] = features[0] + 0.01 * features[1], features[4] + 0.1 * features[5]
    for step in (1, 8):
        strategy = make_strategy("vispruner", important=0.0, step=step)
        pool = pool_of(strategy, [features], [[torch.arange(8.0)]])
        assert sets(strategy.plan(pool, [7]), [7])[0] == [1, 2, 3, 4, 5, 6, 7]
    strategy = make_strategy("vispruner", important=0.0)
    assert sets(strategy.plan(pool, [6]), [6])[0] == [1, 2, 3, 5, 6, 7]


def test_vispruner_sorts_what_is_left_each_time():
    """After each round odd and even are told apart anew by place: without that the oracle is missed in most of these."""
    strategy = make_strategy("vispruner", step=2)
    pool, features, statistics = random_pool(strategy, (41,) * 6, 11)
    plan = strategy.plan(pool, [10] * 6)
    assert sets(plan, [10] * 6) == [vispruner_oracle(features[i], statistics[0][i], 10, step=2) for i in range(6)]


def test_hiprune_keeps_what_is_around_an_anchor():
    strategy = make_strategy("hiprune")
    objects, whole = torch.zeros(40), torch.arange(40.0)
    objects[19] = 1
    grid = (Grid(1, 4, 10),)
    pool = pool_of(strategy, [torch.randn(40, 2)], [[objects], [whole]], (grid,))
    assert sets(strategy.plan(pool, [8]), [8])[0] == [9, 18, 19, 20, 29, 37, 38, 39]
    assert sets(strategy.plan(pool, [4]), [4])[0] == [36, 37, 38, 39]  # too few for an anchor
    objects[19], objects[0] = 0, 1  # what lies outside is held within, so that it is the anchor itself
    pool = pool_of(strategy, [torch.randn(40, 2)], [[objects], [whole]], (grid,))
    assert sets(strategy.plan(pool, [6]), [6])[0] == [0, 1, 10, 37, 38, 39]


def test_hiprune_of_several_images_in_a_pool():
    """Neighbours are of an anchor's own image and by its own width, whether a pool is one image or more."""
    counts, widths = (12, 10, 6), (4, 5, 3)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    ends = [(0, 11), (12, 21), (22, 27)]
    grids = tuple(Grid(1, n // w, w) for n, w in zip(counts, widths, strict=True))
    strategy = make_strategy("hiprune", alpha=1.0)
    generator = torch.Generator().manual_seed(4)
    for _ in range(8):
        objects, whole = torch.rand(28, generator=generator), torch.rand(28, generator=generator)
        pool = pool_of(strategy, [torch.randn(28, 2)], [[objects], [whole]], (grids,), segments[None])
        assert sets(strategy.plan(pool, [14]), [14])[0] == hiprune_oracle(objects, whole, 14, 1.0, list(widths), ends)
        square = pool_of(strategy, [torch.randn(28, 2)], [[objects], [whole]], (), segments[None])
        assert sets(strategy.plan(square, [14]), [14])[0] == hiprune_oracle(objects, whole, 14, 1.0, [3, 3, 2], ends)


def test_hiprune_where_anchors_are_more_than_stay():
    """K = 8 at alpha 1 gives 2 anchors and up to 10 tokens: both anchors, then left, right and above."""
    objects = torch.zeros(64)
    objects[18], objects[45] = 2, 1
    strategy = make_strategy("hiprune", alpha=1.0)
    pool = pool_of(strategy, [torch.randn(64, 2)], [[objects], [torch.arange(64.0)]])
    assert sets(strategy.plan(pool, [8]), [8])[0] == [10, 17, 18, 19, 37, 44, 45, 46]


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize(("name", "keep"), [("visionzip", (12, 1, 9)), ("visionzip_audio", (12, 1, 9))])
def test_visionzip_merges_as_the_matrix_says(name, keep, merge):
    strategy = make_strategy(name, merge=merge)
    pool, features, (attention, keys) = random_pool(strategy, (31, 12, 23), 8)
    plan = strategy.plan(pool, keep)
    merged = plan.apply(pool.features.nan_to_num())
    for i, k in enumerate(keep):
        contexts = strategy.contexts(pool.counts[i], k)
        assert contexts == {"visionzip": (2, 1, 1), "visionzip_audio": (2, 1, 1)}[name][i]
        kept, matrix = visionzip_oracle(attention[i], keys[i], k, contexts, merge)
        assert plan.keep[i, :k].tolist() == kept
        np.testing.assert_allclose(merged[i, :k].numpy(), matrix @ features[i].double().numpy(), atol=1e-5)
        assert not merged[i, k:].any()
    if merge == "mean":
        shares = torch.zeros(3, 12).scatter_add_(1, plan.groups.clamp(min=0), plan.weights * pool.valid)
        assert torch.allclose(shares, (plan.keep >= 0).float())


def test_visionzip_of_one_token_is_a_sum_of_all():
    """K = 1: nothing is dominant, the first token is what all others go into."""
    strategy = make_strategy("visionzip")
    pool, features, _ = random_pool(strategy, (9,), 1)
    plan = strategy.plan(pool, [1])
    assert plan.keep.tolist() == [[0]]
    assert torch.allclose(plan.apply(pool.features)[0, 0], features[0][0] + features[0][1:].mean(0), atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 30), (40, 7), (5, 5)])
def test_loadings_are_those_of_a_decomposition(shape, monkeypatch):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    z = 1 / (1 + np.exp(-x.double().numpy().T))
    wanted = np.abs(np.linalg.svd(z - z.mean(0), full_matrices=False)[2][:3].T)
    np.testing.assert_allclose(prunesid.loadings(x, 3).numpy(), wanted, atol=1e-4)
    # a subspace iteration finds the same where few components are strong
    generator = torch.Generator().manual_seed(2)
    strong = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    x = 0.1 * strong + 0.02 * torch.randn(*shape, generator=generator)
    exact = prunesid.loadings(x, 2)
    monkeypatch.setattr(prunesid, "EXACT", 0)
    assert torch.allclose(prunesid.loadings(x, 2), exact, atol=0.01)


def test_groups_share_exactly():
    generator = np.random.default_rng(0)
    for _ in range(300):
        groups = int(generator.integers(1, 9))
        counts = generator.integers(0, 12, groups)
        counts[0] += groups
        passed = [int(generator.integers(1, n + 1)) if n else 0 for n in counts]
        keep = int(generator.integers((counts > 0).sum(), counts.sum() + 1))
        shares = prunesid.shared(counts.tolist(), passed, keep)
        assert sum(shares) == keep and all(min(1, n) <= share <= n for share, n in zip(shares, counts, strict=True))


def test_prunesid_keeps_some_of_each_group():
    """Four groups of tokens that differ in different features: with 16 kept ones each has some, although attention names those of one."""
    generator = torch.Generator().manual_seed(0)
    features = torch.zeros(40, 32)
    for group in range(4):
        features[group * 10 : group * 10 + 10, group * 8 : group * 8 + 8] = (6.0 - group) * torch.randn(8, generator=generator).sign()
    features += 0.05 * torch.randn(40, 32, generator=generator)
    attention = torch.linspace(1, 0.1, 40)
    strategy = make_strategy("prunesid")
    kept = sets(strategy.plan(pool_of(strategy, [features], [[attention]]), [16]), [16])[0]
    assert {j // 10 for j in kept} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["divprune", "id_selection", "vispruner"])
def test_cosines_held_or_not(name, monkeypatch):
    strategy = make_strategy(name)
    pool, *_ = random_pool(strategy, (37, 20), 12)
    held = strategy.plan(pool, (15, 9)).keep
    monkeypatch.setattr(picking, "GRAM_TOKENS", 8)
    assert strategy.plan(pool, (15, 9)).keep.equal(held)
    cosines = picking.Cosines(picking.unit(pool.features, pool.valid))
    assert torch.allclose(cosines.nearest(pool.valid, 7), cosines.nearest(pool.valid))


@pytest.mark.parametrize("name", OURS)
def test_numbers_that_are_none(name):
    """NaN or Inf among tokens is an error, for features and each statistic; behind a pool's tokens it is nothing."""
    strategy = make_strategy(name)
    pool, *_ = random_pool(strategy, (9, 6), 2)
    strategy.plan(pool, (3, 2))
    for bad in (float("nan"), float("inf")):
        for which in (None, *strategy.needs):
            features, statistics = pool.features.clone(), {need: x.clone() for need, x in pool.statistics.items()}
            (features if which is None else statistics[which])[1, 4] = bad
            with pytest.raises(NotFiniteError) as error:
                strategy.plan(Pool(features, pool.counts, None, (), statistics), (3, 2))
            assert isinstance(error.value, ValueError) and isinstance(error.value, NumericError)


@pytest.mark.parametrize("name", OURS)
def test_numbers_too_large_to_compare(name):
    """Whose squares are infinite in fp32, so that every cosine would be 0."""
    strategy = make_strategy(name)
    pool, *_ = random_pool(strategy, (9, 6), 2)
    with pytest.raises(NotFiniteError):
        strategy.plan(Pool(pool.features * 1e25, pool.counts, None, (), pool.statistics), (3, 2))


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"idpruner", "vision_selector", "dart", "prunesid"}))
def test_numbers_of_the_host_go_to_the_device_without_a_wait(name, monkeypatch):
    """`torch.tensor` that is told a GPU waits until all work there is done."""
    strategy = make_strategy(name)
    pool, *_ = random_pool(strategy, (9, 6), 2)
    grids = ((Grid(1, 3, 3),), (Grid(1, 2, 3),))
    made = torch.tensor

    def tensor(*args, device=None, **options):
        assert device is None, "waits"
        return made(*args, **options)

    monkeypatch.setattr(torch, "tensor", tensor)
    strategy.plan(Pool(pool.features, pool.counts, None, grids, pool.statistics), (5, 3))


def test_needs_follow_options():
    assert not make_strategy("divprune").needs and not make_strategy("prunesid", score="loading").needs
    assert make_strategy("scope", layer=-1).needs == (Need("encoder", -1, "importance"),)
    assert make_strategy("hiprune", object_layer=15, layer=-1).needs == (Need("encoder", 15, "received"), Need("encoder", -1, "received"))
    assert make_strategy("vispruner_audio").needs == (Need("encoder", "features", "pooled_max"),)
    assert make_strategy("hiprune").needs == (Need("encoder", "objects", "received"), Need("encoder", "features", "received"))
    assert [need.statistic for need in make_strategy("visionzip_audio").needs] == ["importance", "keys"]
    for name in OURS:
        strategy = make_strategy(name)
        assert strategy.name == name and name in CLASSES and strategy.merges == name.startswith("visionzip")
    with pytest.raises(ValueError, match="alpha"):
        make_strategy("scope", alpha=-1)
