"""How many tokens stay, and plans as data."""

import pytest
import torch
from pydantic import ValidationError

from angelslim_core.errors import UsageError
from angelslim_mmprune.budget import Budget, keep_count, split
from angelslim_mmprune.plan import Plan, Pool
from angelslim_mmprune.strategies import make_strategy


@pytest.mark.parametrize(
    ("tokens", "ratio", "compat", "kept"),
    [(35, 0.1, "keep", 4), (35, 0.1, "drop", 3), (3, 0.99, "keep", 3), (3, 0.01, "keep", 1), (3, 0.01, "drop", 1), (0, 0.5, "drop", 0), (10, 0.25, "keep", 2), (14, 0.25, "keep", 4), (0, 0.5, "keep", 0), (7, 1.0, "drop", 7), (1000, 0.3, "keep", 300)],
)  # fmt: skip
def test_counts_are_those_of_the_decimal_number(tokens, ratio, compat, kept):
    """35 x .1 is 3.5 and rounds to 4; in floats of what is dropped it is 3.4999 and rounds to 3."""
    assert keep_count(tokens, ratio, compat) == kept


@pytest.mark.parametrize("values", [{"keep_ratio": 0}, {"keep_ratio": 1.01}, {"keep_ratio": float("nan")}, {"keep_ratio": True}, {"keep_ratio": "x"}, {"keep_tokens": 0}, {"keep_tokens": True}, {"keep_ratio": 0.5, "keep_tokens": 3}])  # fmt: skip
def test_budgets_that_are_none(values):
    with pytest.raises(ValidationError):
        Budget(**values)
    with pytest.raises(ValueError, match="random"):
        make_strategy("random", **values)


def test_more_than_there_are():
    assert Budget(keep_tokens=5).count(5) == 5 and Budget().count(8) == 2
    with pytest.raises(UsageError):
        Budget(keep_tokens=6).count(5)
    with pytest.raises(UsageError):
        split(4, [1, 2])


@pytest.mark.parametrize("sizes", [[5], [3, 3, 3], [10, 1, 1], [0, 7], [100, 50, 25, 1], [0, 0]])
def test_shares_add_up_and_fit(sizes):
    for total in range(sum(sizes) + 1):
        shares = split(total, sizes)
        assert sum(shares) == total and all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
        assert all(abs(share - total * size / sum(sizes)) < 1 for share, size in zip(shares, sizes, strict=True) if sum(sizes))


def test_a_plan_gathers_or_merges():
    values = torch.arange(12.0).view(1, 6, 2).repeat(2, 1, 1)
    plan = Plan.of([torch.tensor([4, 1]), torch.tensor([3])])
    assert plan.keep.tolist() == [[1, 4], [3, -1]]
    assert torch.equal(plan.apply(values)[0], values[0, [1, 4]]) and torch.equal(plan.apply(values)[1], torch.stack([values[1, 3], torch.zeros(2)]))
    merged = Plan(
        plan.keep, torch.tensor([[0, 0, -1, 1, 1, 1], [-1, 0, 0, 0, -1, -1]]), torch.tensor([[0.25, 0.75, 9, 0.5, 0.25, 0.25], [9, 0.5, 0, 0.5, 9, 9]])
    )
    wanted = [values[0, 0] * 0.25 + values[0, 1] * 0.75, values[0, 3] * 0.5 + values[0, 4] * 0.25 + values[0, 5] * 0.25]
    assert torch.allclose(merged.apply(values)[0], torch.stack(wanted)) and torch.allclose(merged.apply(values)[1, 0], values[1, 2])
    assert merged.apply(values.bfloat16()).dtype == torch.bfloat16


def test_random_depends_on_its_seed_and_the_count_only():
    pool = Pool(torch.randn(2, 9, 4), (9, 6))
    plan = make_strategy("random", seed=3).plan(pool, [4, 2])
    assert [(row[row >= 0]).tolist() for row in plan.keep] == [
        make_strategy("random", seed=3).plan(pool.one(i), [k]).keep[0].tolist() for i, k in ((0, 4), (1, 2))
    ]
    assert plan.keep[0].unique().numel() == 4 and not torch.equal(make_strategy("random", seed=4).plan(pool, [4, 2]).keep, plan.keep)
    with pytest.raises(UsageError, match="no strategy"):
        make_strategy("nothing")
