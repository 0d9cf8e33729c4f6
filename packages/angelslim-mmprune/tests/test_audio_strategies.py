"""Strategies over neighbours in time, and the DPP without relevance, against oracles that keep lists."""

import math

import pytest
import torch

from angelslim_mmprune.finite import NotFiniteError
from angelslim_mmprune.merging import samp
from angelslim_mmprune.plan import Need, Pool
from angelslim_mmprune.strategies import make_strategy

MERGING = ["atome", "fastadasp"]
ALL = [*MERGING, "segmentwise", "samp", "cdpruner"]


def pool(seed, counts, width=6, segments=None, copies=False):
    """NaN stands behind the tokens of a clip."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(counts), max(counts), width, generator=generator)
    if copies:
        x[:, 1::3] = x[:, : x[:, 1::3].shape[1] * 3 : 3]
    score = {
        Need("encoder", -1, name): torch.rand(x.shape[:2], generator=generator) for name in ("received", "pooled_max", "pooled_diagonal")
    }  # fmt: skip
    for p, n in enumerate(counts):
        for each in (x, *score.values()):
            each[p, n:] = float("nan")
    return Pool(x, tuple(counts), segments, (), score)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm())) if a.norm() * b.norm() > 0 else 0.0


def atome(x, k):
    x = x.double()
    groups = [[i] for i in range(len(x))]
    while len(groups) > k:
        means = [x[group].mean(0) for group in groups]
        pairs = sorted(range(len(groups) // 2), key=lambda i: (-round(cosine(means[2 * i], means[2 * i + 1]), 6), i))
        for i in sorted(pairs[: min(len(groups) - k, len(groups) // 2)], reverse=True):
            groups[2 * i : 2 * i + 2] = [groups[2 * i] + groups[2 * i + 1]]
    return groups


def fastadasp(x, k):
    x = x.double()
    pairs = sorted(range(1, len(x)), key=lambda j: (-round(cosine(x[j], x[j - 1]), 6), j))[: len(x) - k]
    groups = []
    for j in range(len(x)):
        if j in pairs:
            groups[-1].append(j)
        else:
            groups.append([j])
    return groups


def members(plan, p, k):
    return [(plan.groups[p] == g).nonzero()[:, 0].tolist() for g in range(k)]


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("seed", range(3))
def test_merges_are_plain_means_of_neighbours(seed, name, copies):
    counts = [16, 11, 1, 2]
    for share in (0.9, 0.5, 0.3, 0.01):
        keep = [max(1, round(n * share)) for n in counts]
        tokens = pool(seed, counts, copies=copies)
        plan = make_strategy(name).plan(tokens, keep)
        features = plan.apply(tokens.features)
        for p, (n, k) in enumerate(zip(counts, keep, strict=True)):
            x = tokens.features[p, :n]
            wanted = {"atome": atome, "fastadasp": fastadasp}[name](x, k)
            assert members(plan, p, k) == wanted and len(wanted) == k
            assert torch.allclose(features[p, :k], torch.stack([x[group].mean(0) for group in wanted]), atol=1e-5)
            assert plan.keep[p].tolist() == [group[0] for group in wanted] + [-1] * (max(keep) - k)
            assert (plan.groups[p, n:] == -1).all() and not features[p, k:].any()


def test_a_round_of_atome_takes_the_most_alike_pairs():
    """By hand: pairs at 10, 2 and 5 degrees; two go, the one between 20 and 30 stays though its tokens' other neighbours are nearer."""
    angles = torch.tensor([20, 30, 31, 33, 90, 95.0]) * math.pi / 180
    x = torch.stack([angles.cos(), angles.sin()], 1)[None]
    assert members(make_strategy("atome").plan(Pool(x, (6,)), [4]), 0, 4) == [[0], [1], [2, 3], [4, 5]]
    assert members(make_strategy("fastadasp").plan(Pool(x, (6,)), [4]), 0, 4) == [[0], [1, 2, 3], [4], [5]]


@pytest.mark.parametrize("name", MERGING)
def test_clips_of_a_prompt_are_merged_across_last(name):
    x = torch.ones(1, 8, 4)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
    plan = make_strategy(name, budget_scope="prompt").plan(Pool(x, (8,), segments), [5])
    assert all(len(segments[0, group].unique()) == 1 for group in members(plan, 0, 5))
    assert len(members(make_strategy(name).plan(Pool(x, (8,), segments), [1]), 0, 1)[0]) == 8


@pytest.mark.parametrize("parts", [1, 4, 10])
@pytest.mark.parametrize("seed", range(3))
def test_segments_keep_their_share(seed, parts):
    counts = [23, 40, 3, 10]
    tokens = pool(seed, counts)
    scores = tokens.statistics[Need("encoder", -1, "received")]
    scores[0, :12] = 0.5  # ties
    for share in (0.9, 0.5, 0.25, 0.05):
        keep = [max(1, round(n * share)) for n in counts]
        plan = make_strategy("segmentwise", segments=parts).plan(tokens, keep)
        assert plan.groups is None
        for p, (n, k) in enumerate(zip(counts, keep, strict=True)):
            pieces = torch.tensor_split(torch.arange(n), min(parts, n))
            quota = [k // len(pieces)] * len(pieces)
            for s in sorted(range(len(pieces)), key=lambda s: (-len(pieces[s]), s))[: k % len(pieces)]:
                quota[s] += 1
            wanted = []
            for piece, size in zip(pieces, quota, strict=True):
                wanted += sorted(piece.tolist(), key=lambda i: (-float(scores[p, i]), i))[:size]
            assert plan.keep[p].tolist() == sorted(wanted) + [-1] * (max(keep) - k)


def test_segmentwise_reads_the_layer_it_names():
    assert make_strategy("segmentwise", layer=-2).needs == (Need("encoder", -2, "received"),)
    top = make_strategy("segmentwise", segments=1)
    tokens = pool(0, [30])
    assert top.plan(tokens, [9]).keep[0].equal(tokens.statistics[top.needs[0]][0].topk(9).indices.sort().values)


def test_samp_passes_its_statistics_on():
    tokens = pool(1, [14, 9], width=3)
    plan = make_strategy("samp", threshold=0.6).plan(tokens, [5, 8])
    for p, k in ((0, 5), (1, 8)):
        n = tokens.counts[p]
        weight, relevance = (tokens.statistics[Need("encoder", -1, name)][p, :n] for name in ("pooled_max", "pooled_diagonal"))
        assert members(plan, p, k) == samp(tokens.features[p, :n], weight, relevance, k, 0.6).groups


def test_cdpruner_is_blind_to_length():
    x = torch.tensor([[9.0, 0, 0], [5, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1e-3]])[None]
    assert make_strategy("cdpruner").plan(Pool(x, (5,)), [3]).keep.tolist() == [[0, 2, 4]]


@pytest.mark.parametrize("name", ALL)
def test_plans_are_exact_and_of_each_pool_alone(name):
    """No padding and no neighbour in the batch changes a plan; budgets of nothing leave nothing."""
    counts, keep = [13, 20, 1, 8], [6, 19, 1, 0]
    tokens = pool(2, counts)
    strategy = make_strategy(name)
    assert strategy.budget_scope == ("prompt" if name == "cdpruner" else "image") and "audio" in strategy.modalities
    plan = strategy.plan(tokens, keep)
    assert plan.keep.shape == (4, 19) and plan.keep.dtype == torch.int64 and (plan.groups is not None) == strategy.merges
    features = plan.apply(tokens.features)
    for p, k in enumerate(keep):
        row = plan.keep[p, :k]
        assert (row >= 0).all() and (row < counts[p]).all() and (row.diff() > 0).all() and (plan.keep[p, k:] == -1).all()
        assert features[p, :k].isfinite().all() and not features[p, k:].any()
        alone = strategy.plan(tokens.one(p), [k])
        assert alone.keep[0].equal(row) and (plan.groups is None or alone.groups[0].equal(plan.groups[p, : counts[p]]))
    everything = strategy.plan(tokens.one(1), [20])
    assert everything.keep[0].equal(torch.arange(20)) and everything.apply(tokens.features[1:2]).equal(tokens.features[1:2])


@pytest.mark.parametrize("name", ALL)
def test_nan_is_an_error(name):
    tokens = pool(3, [9, 5])
    for each in (tokens.features, *tokens.statistics.values()):
        each[1, 2] = float("nan")
    with pytest.raises(NotFiniteError):
        make_strategy(name).plan(tokens, [3, 2])
    with pytest.raises(ValueError, match="NaN"):
        make_strategy(name).plan(tokens, [3, 2])


@pytest.mark.parametrize(("name", "options"), [("samp", {"threshold": 2.5}), ("samp", {"threshold": float("nan")}), ("segmentwise", {"segments": 0})])
def test_options_out_of_range(name, options):
    with pytest.raises(ValueError):
        make_strategy(name, **options)
