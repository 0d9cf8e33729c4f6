"""Samp against an oracle in FP64 that keeps lists, on random and degenerate clips, in every implementation."""

import math

import pytest
import torch

from angelslim_core.errors import UsageError
from angelslim_mmprune.finite import NotFiniteError
from angelslim_mmprune.merging import SAMP_GROUPS, samp, samp_plan
from angelslim_mmprune.plan import of_host

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
executors = pytest.mark.parametrize("executor", ["reference", "steps", "triton"])


def determinants(x, relevance, k):
    """Which stay: greedily by the determinant of cosines times relevances, and by relevance where it is 0."""
    x = torch.nn.functional.normalize(x.double().cpu(), dim=1)
    r = (relevance.double().cpu() / relevance.double().max().clamp(min=1e-300)).clamp(min=1e-8)
    picks, det = [], 1.0
    for _ in range(k):
        rest = [i for i in range(len(x)) if i not in picks]
        gains = {i: float(torch.det(x[[*picks, i]] @ x[[*picks, i]].T)) / det if det else 0.0 for i in rest}
        differ = [i for i in rest if gains[i] > 1e-6]
        picks.append(max(differ, key=lambda i: (r[i] ** 2 * gains[i], -i)) if differ else max(rest, key=lambda i: (r[i], -i)))
        det = det * gains[picks[-1]] if differ else 0.0
    return sorted(picks)


def oracle(x, weight, relevance, k, threshold):
    """Groups and features: lists of members, all cosines, nothing carried along."""
    x, weight, relevance = x.double().cpu(), weight.double().cpu(), relevance.double().cpu()

    def cosine(i, j):
        return float(x[i] @ x[j] / (x[i].norm() * x[j].norm())) if x[i].norm() * x[j].norm() > 0 else 0.0

    groups, joined = [], {}
    for j in range(len(x)):
        mean = sum(cosine(i, j) for i in groups[-1]) / len(groups[-1]) if groups else -math.inf
        if groups and max(-1.0, min(1.0, mean)) >= threshold:
            joined[j] = (len(groups[-1]) * mean + 1) / (len(groups[-1]) + 1)
            groups[-1].append(j)
        else:
            groups.append([j])
    if len(groups) < k:
        for j in sorted(joined, key=lambda j: (round(joined[j], 6), j))[: k - len(groups)]:
            groups = [[i for i in group if i != j] for group in groups] + [[j]]
        groups.sort(key=lambda group: group[0])

    def mean(group):
        total = weight[group].sum()
        return (weight[group][:, None] * x[group]).sum(0) / total if total > 0 else x[group].mean(0)

    features = torch.stack([mean(group) for group in groups])
    if len(groups) > k:
        picks = determinants(features, torch.stack([relevance[group].mean() for group in groups]), k)
        groups, features = [groups[i] for i in picks], features[picks]
    return groups, features


def clip(seed, tokens, width=24, step=0.5):
    """A walk, so that neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    for j in range(1, tokens):
        if torch.rand(1, generator=generator) < 0.7:
            x[j] = x[j - 1] + step * x[j]
    return x.to(DEVICE), torch.rand(tokens, generator=generator).to(DEVICE), torch.rand(tokens, generator=generator).to(DEVICE)


def fixture():
    angles = torch.tensor([0, 20, 35, 90, 95, 100, 170, 200.0]) * math.pi / 180
    x = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([1, 2, 1, 1, 1, 2, 1, 1.0])[:, None]
    weight, relevance = torch.tensor([1, 1, 2, 1, 2, 1, 1, 3.0]), torch.tensor([0.5, 0.4, 0.3, 0.6, 0.2, 0.1, 0.7, 0.8])
    return x.to(DEVICE), weight.to(DEVICE), relevance.to(DEVICE)


def same(found, wanted, atol=1e-5):
    groups, features = wanted
    assert found.groups == groups
    assert torch.allclose(found.features.double().cpu(), features, atol=atol)


@executors
def test_by_hand(executor):
    """Three groups; two of them by the DPP; three tokens released; and a token near its neighbour but not near the group."""
    x, weight, relevance = fixture()
    merged = samp(x, weight, relevance, 3, executor=executor)
    assert merged.groups == [[0, 1, 2], [3, 4, 5], [6, 7]]
    wanted = torch.tensor([[1.129422, 0.457798], [-0.130402, 1.240501], [-0.950971, -0.213103]])
    assert torch.allclose(merged.features.cpu(), wanted, atol=1e-6)
    assert samp(x, weight, relevance, 2, executor=executor).groups == [[3, 4, 5], [6, 7]]
    assert samp(x, weight, relevance, 1, executor=executor).groups == [[6, 7]]
    assert samp(x, weight, relevance, 4, executor=executor).groups == [[0, 1], [2], [3, 4, 5], [6, 7]]
    assert samp(x, weight, relevance, 5, executor=executor).groups == [[0, 1], [2], [3, 4, 5], [6], [7]]
    released = samp(x, weight, relevance, 6, executor=executor)
    assert released.groups == [[0], [1], [2], [3, 4, 5], [6], [7]] and torch.equal(released.features[1], x[1])
    scores = SAMP_GROUPS(x[None], of_host([8], x.device), 0.85, executor=executor)[0]
    assert torch.allclose(scores[[2, 7, 1]].cpu(), torch.tensor([0.92836, 0.93301, 0.96985]), atol=1e-5)
    angles = torch.tensor([0, 20, 35, 60.0]) * math.pi / 180
    walk = torch.stack([angles.cos(), angles.sin()], 1).to(DEVICE)
    assert samp(walk, weight[:4], relevance[:4], 2, executor=executor).groups == [[0, 1, 2], [3]]


@executors
@pytest.mark.parametrize("threshold", [0.4, 0.75, 0.85])
@pytest.mark.parametrize("seed", range(3))
def test_as_the_oracle(seed, threshold, executor):
    x, weight, relevance = clip(seed, 23)
    for k in (1, 3, 8, 15, 22):
        same(samp(x, weight, relevance, k, threshold, executor=executor), oracle(x, weight, relevance, k, threshold))


@executors
def test_no_merge_and_one_group(executor):
    """Above 1 nothing is merged and a DPP of all tokens chooses; at -1 all is one group, from which tokens are released."""
    x, weight, relevance = clip(4, 15)
    pure = samp(x, weight, relevance, 6, 1.1, executor=executor)
    assert pure.groups == [[i] for i in determinants(x, relevance, 6)]
    assert torch.equal(pure.features, x[[group[0] for group in pure.groups]])
    one = samp(x, weight, relevance, 1, -1, executor=executor)
    assert one.groups == [list(range(15))]
    assert torch.allclose(one.features[0], (weight[:, None] * x).sum(0) / weight.sum(), atol=1e-5)
    for k in (2, 9, 14):
        same(samp(x, weight, relevance, k, -1, executor=executor), oracle(x, weight, relevance, k, -1))
    # rounding does not keep opposite tokens apart, and a token that is as near as the threshold says joins
    for seed in range(6):
        token = clip(seed, 1)[0]
        assert samp(torch.cat([token, -token]), weight[:2], relevance[:2], 1, -1, executor=executor).groups == [[0, 1]]
    assert samp(torch.eye(3, device=DEVICE), weight[:3], relevance[:3], 1, 0, executor=executor).groups == [[0, 1, 2]]


@executors
def test_degenerate_clips(executor):
    x, weight, relevance = clip(5, 9)
    constant = x[:1].expand(9, -1)
    for threshold in (0.85, 1.1):
        for k in (1, 4, 9):
            found = samp(constant, weight, relevance, k, threshold, executor=executor)
            assert len(found.groups) == k and torch.allclose(found.features, constant[:k], atol=1e-5)
            if threshold < 1:  # all fit alike: the first are released
                assert found.groups == ([[0, *range(k, 9)]] + [[i] for i in range(1, k)])
    # rank 1: the most relevant stay
    assert samp(constant, weight, relevance, 3, 1.1, executor=executor).groups == [[i] for i in sorted(relevance.topk(3).indices.tolist())]
    one = samp(x[:1], weight[:1], relevance[:1], 1, executor=executor)
    assert one.groups == [[0]] and torch.equal(one.features, x[:1])
    same(samp(x[:2], weight[:2], relevance[:2], 1, executor=executor), oracle(x[:2], weight[:2], relevance[:2], 1, 0.85))
    # no weight in a group: its plain mean; no relevance, and tokens of length 0: still as many as asked for
    same(samp(x, weight * 0, relevance * 0, 4, executor=executor), oracle(x, weight * 0, relevance * 0, 4, 0.85))
    silent = samp(x * 0, weight, relevance, 4, executor=executor)
    assert silent.features.shape == (4, x.shape[1]) and not silent.features.any()


@executors
@pytest.mark.parametrize("threshold", [0.3, 0.85, 1.1, -1.0])
def test_keeping_all_is_the_identity_and_budgets_are_exact(threshold, executor):
    x, weight, relevance = clip(6, 17)
    weight[3] = 0
    assert torch.equal(samp(x, weight, relevance, 17, threshold, executor=executor).features, x)
    for k in (1, 2, 5, 8, 11, 14, 16, 17):
        groups = samp(x, weight, relevance, k, threshold, executor=executor).groups
        members = [i for group in groups for i in group]
        assert len(groups) == k and len(set(members)) == len(members)
        assert all(group == sorted(group) and group for group in groups) and [g[0] for g in groups] == sorted(g[0] for g in groups)


@executors
def test_clips_side_by_side(executor):
    """Of other lengths and budgets, NaN behind them: each as alone."""
    alone = [clip(seed, tokens) for seed, tokens in ((0, 20), (1, 13), (2, 1), (3, 18))]
    keep, counts = [5, 12, 1, 2], [20, 13, 1, 18]
    x, weight, relevance = (torch.nn.utils.rnn.pad_sequence([each[i] for each in alone], True, float("nan")) for i in range(3))
    plan = samp_plan(x, weight, relevance, counts, keep, 0.85, executor=executor)
    features = plan.apply(x)
    for p, (each, k) in enumerate(zip(alone, keep, strict=True)):
        wanted = samp(*each, k, executor=executor)
        assert [[i for i in range(20) if plan.groups[p, i] == g] for g in range(k)] == wanted.groups
        assert plan.keep[p].tolist() == [group[0] for group in wanted.groups] + [-1] * (12 - k)
        assert torch.allclose(features[p, :k], wanted.features, atol=1e-6) and not features[p, k:].any()
        assert (plan.groups[p, counts[p] :] == -1).all()
        sums = torch.zeros(k, device=DEVICE).index_add_(0, plan.groups[p][plan.groups[p] >= 0], plan.weights[p][plan.groups[p] >= 0])
        assert torch.allclose(sums, torch.ones(k, device=DEVICE), atol=1e-6)


@executors
def test_groups_end_where_a_clip_does(executor):
    x, weight, relevance = clip(7, 10)
    constant = x[:1].expand(10, -1)[None]
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2]], device=DEVICE)
    plan = samp_plan(constant, weight[None], relevance[None], [10], [3], 0.85, segments, executor=executor)
    assert plan.keep.tolist() == [[0, 3, 5]] and plan.groups.equal(segments)


@executors
def test_scale_does_not_matter(executor):
    x, weight, relevance = clip(8, 30)
    for k in (4, 12, 25):
        found = samp(x, weight, relevance, k, executor=executor)
        scaled = samp(x * 64, weight * 8, relevance * 1e-3, k, executor=executor)
        assert scaled.groups == found.groups and torch.allclose(scaled.features, found.features * 64, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    x, weight, relevance = clip(9, 21)
    x = x.to(dtype)
    wanted = oracle(x, weight, relevance, 7, 0.8)
    for executor in ("auto", "steps", *(["triton"] if dtype != torch.float64 else [])):
        found = samp(x, weight, relevance, 7, 0.8, executor=executor)
        assert found.features.dtype == dtype
        same(found, wanted, 0.02)


def test_bad_input():
    x, weight, relevance = clip(0, 6)
    for k in (0, 7, -1, True):
        with pytest.raises(UsageError, match="keep_tokens"):
            samp(x, weight, relevance, k)
    with pytest.raises(UsageError, match="shapes"):
        samp(x, weight[:5], relevance, 3)
    with pytest.raises(UsageError, match="threshold"):
        samp(x, weight, relevance, 3, float("nan"))
    for bad in ((x, -weight, relevance), (x, weight, -relevance)):
        with pytest.raises(UsageError, match="below 0"):
            samp(*bad, 3)
    for bad in ((x * float("nan"), weight, relevance), (x, weight * float("inf"), relevance), (x, weight, relevance * float("nan"))):
        with pytest.raises(NotFiniteError):
            samp(*bad, 3)
        with pytest.raises(ValueError):
            samp(*bad, 3)
