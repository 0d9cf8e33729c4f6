"""What an engine is told of an image before it is encoded, and after."""

import math

import pytest
import torch

import angelslim_mmprune
from angelslim_core.errors import UsageError
from angelslim_mmprune import plan_from_features, planned_count
from angelslim_mmprune.budget import Budget
from angelslim_mmprune.plan import Need, Plan
from angelslim_mmprune.strategies import make_strategy
from angelslim_mmprune.strategies.base import Stage, Strategy

GENERATOR = torch.Generator().manual_seed(0)
SCORE = Need("encoder", -1, "importance")


class Top(Strategy):
    """By a statistic, each dropped token into the next kept one, or the last."""

    name = "top"
    merges = True

    @property
    def needs(self):
        return (SCORE,)

    def plan(self, pool, keep):
        kept = [pool.statistics[SCORE][i].topk(k).indices.sort().values for i, k in enumerate(keep)]
        groups = torch.stack([torch.searchsorted(k, torch.arange(pool.features.shape[1])).clamp(max=len(k) - 1) for k in kept])
        sizes = torch.stack([torch.bincount(g, minlength=pool.features.shape[1])[g] for g in groups])
        return Plan(Plan.of(kept).keep, groups, 1 / sizes.float())


class Late(Top):
    """Inside the language model."""

    name = "late"

    @property
    def stages(self):
        return (Stage(2),)


@pytest.mark.parametrize("options", [{"keep_ratio": 0.3}, {"keep_tokens": 5}, {"keep_ratio": 1.0}, {"keep_ratio": 0.01, "compat": "drop"}, {}])
@pytest.mark.parametrize("scope", ["prompt", "image", "frame"])
@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 3, 5), (1, 1, 20)])
def test_counts_are_known_before_and_kept(options, scope, grid):
    strategy = make_strategy("random", budget_scope=scope, **options)
    features = torch.randn(math.prod(grid), 8, generator=GENERATOR)
    found = plan_from_features(features, grid, strategy)
    assert len(found.keep) == len(found.features) == planned_count(grid, strategy) == planned_count(grid, Budget(budget_scope=scope, **options))
    assert torch.equal(found.features, features[found.keep]) and bool((found.keep.diff() > 0).all()) and found.groups is None
    if scope == "frame":
        frames = (found.keep // (math.prod(grid) // grid[0])).bincount(minlength=grid[0])
        assert frames.max() - frames.min() <= 1


def test_merges_are_those_of_each_frame_alone():
    features, score = torch.randn(24, 4, generator=GENERATOR), torch.rand(24, generator=GENERATOR)
    found = plan_from_features(features, (2, 3, 4), Top(keep_tokens=3, budget_scope="frame"), statistics={SCORE: score})
    for frame in range(2):
        part = slice(12 * frame, 12 * frame + 12)
        alone = plan_from_features(features[part], (1, 3, 4), Top(keep_tokens=3), statistics={SCORE: score[part]})
        rows = slice(3 * frame, 3 * frame + 3)
        assert torch.equal(found.keep[rows], alone.keep + 12 * frame) and torch.allclose(found.features[rows], alone.features)
        assert torch.equal(found.groups[part], alone.groups + 3 * frame)
    for group in range(6):
        assert torch.allclose(found.features[group], features[found.groups == group].mean(0), atol=1e-6)


def test_frames_that_keep_all_beside_one_that_does_not():
    strategy = Top(keep_ratio=0.85, budget_scope="frame")  # 3 of 4 tokens: 2 of 2 and 1 of 2
    features = torch.randn(4, 4, generator=GENERATOR)
    found = plan_from_features(features, (2, 1, 2), strategy, statistics={SCORE: torch.tensor([1.0, 2, 3, 4])})
    assert found.keep.tolist() == [0, 1, 3] and found.groups.tolist() == [0, 1, 2, 2]
    assert torch.allclose(found.features, torch.stack([features[0], features[1], features[2:].mean(0)]))


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((torch.randn(7, 4), (1, 2, 4)), {}, "do not fit a grid of 8"), ((torch.randn(1, 8, 4), (1, 2, 4)), {}, "do not fit"),
        ((torch.zeros(8, 4, dtype=torch.int64), (1, 2, 4)), {}, "do not fit"), ((torch.randn(8, 4), (2, 4)), {}, "no frames"),
        ((torch.randn(8, 4), (1, 2, -4)), {}, "no frames"), ((torch.randn(8, 4), (1, 2, 4.0)), {}, "no frames"),
        ((torch.randn(8, 4), (1, 2, 4)), {"keep_tokens": 9}, "9 of 8"), ((torch.randn(8, 4), (1, 2, 4), "nothing"), {}, "no strategy"),
        ((torch.randn(8, 4), (1, 2, 4), Top()), {"seed": 3}, "made already"), ((torch.randn(8, 4), (1, 2, 4), Top()), {}, "needs importance"),
        ((torch.randn(8, 4), (1, 2, 4), Late()), {}, "inside the language model"),
        ((torch.randn(8, 4), (1, 2, 4), Top()), {"statistics": {SCORE: torch.zeros(7)}}, "not of 8 tokens"),
        ((torch.randn(8, 4), (1, 2, 4), Top()), {"statistics": {SCORE: torch.zeros(8, 2)}}, "not of 8 tokens"),
        ((torch.randn(8, 4), (1, 2, 4), Top()), {"statistics": {SCORE: torch.tensor(1.0)}}, "not of 8 tokens"),
        ((torch.randn(8, 4), (1, 2, 4), Top()), {"statistics": {SCORE: torch.zeros(8, device="meta")}}, "on cpu"),
        ((torch.randn(8, 4), (1, 2, 4)), {"statistics": {SCORE: torch.zeros(8)}}, "not asked for"),
    ],
)  # fmt: skip
def test_what_does_not_fit(arguments, options, says):
    arguments = (*arguments, "random") if len(arguments) == 2 else arguments
    with pytest.raises(UsageError, match=says):
        plan_from_features(*arguments, **options)


def test_what_the_package_gives():
    from angelslim_mmprune import marginal_relevance, merging, mmr, samp, strategies

    assert mmr is marginal_relevance.mmr and samp is merging.samp and strategies.strategy_class("samp").name == "samp"
    assert all(hasattr(angelslim_mmprune, name) for name in angelslim_mmprune.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = angelslim_mmprune.nothing
