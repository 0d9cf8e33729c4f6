"""Strategies with stages in the language model, against slow ones in FP64 that know no batches."""

import itertools
import math

import pytest
import torch

from angelslim_core.errors import NumericError, UsageError
from angelslim_mmprune.budget import keep_count
from angelslim_mmprune.plan import Need, Pool
from angelslim_mmprune.statistics import of_llm
from angelslim_mmprune.strategies import make_strategy
from angelslim_mmprune.strategies.base import Stage

COUNTS = (13, 5, 9)


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pool_of(strategy, counts=COUNTS, text=((7, 3), (4, 4), (6, 1)), seed=0):
    """Statistics at random; behind the counts they are NaN. Text by pool: how many tokens, and how many of them before the pool's last."""
    tokens, most = max(counts), max((n for n, _ in text), default=0)
    pool = Pool(made(len(counts), tokens, 6), counts, text_counts=tuple(n for n, _ in text), text_before=tuple(n for _, n in text))
    statistics, of_text = {}, {}
    for i, need in enumerate(strategy.needs):
        width = {"last_row": (), "raw_keys": (8,), "hidden": (6,)}[need.statistic]
        statistics[need] = made(len(counts), tokens, *width, seed=seed + i)
        of_text[need] = made(len(text), most, *width, seed=seed + 9 + i)
        for row, count in enumerate(counts):
            statistics[need][row, count:] = torch.nan
            of_text[need][row, text[row][0] :] = torch.nan
    return Pool(
        pool.features,
        counts,
        statistics=statistics,
        text_counts=pool.text_counts,
        text_before=pool.text_before,
        text_statistics={n: of_text[n] for n in strategy.text_needs},
    )


def kept(plan):
    return [[k for k in row if k >= 0] for row in plan.keep.tolist()]


def highest(row, count):
    return sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count])


@pytest.mark.parametrize("keep", [(6, 2, 8), (1, 4, 1), (12, 3, 2)])
def test_fastv_keeps_what_the_last_token_attends_to(keep):
    strategy = make_strategy("fastv")
    assert strategy.stages == (Stage(1),) and strategy.needs == (Need("llm", 1, "last_row"),) and not strategy.text_needs
    pool = pool_of(strategy)
    row = pool.statistics[strategy.needs[0]]
    assert kept(strategy.plan(pool, keep)) == [highest(row[i, :n].tolist(), k) for i, (n, k) in enumerate(zip(COUNTS, keep))]


def test_fastv_weighs_heads_by_all_that_the_token_sees():
    """A head that looks at text counts less; where the softmax is over media alone it counts as much, and other tokens win."""
    strategy = make_strategy("fastv", layer=0)
    # two media tokens, one of text; of head 0 the text takes nearly all, among media it likes token 0 best; head 1 likes token 1 a little better
    q = torch.ones(1, 2, 3, 1)
    k = torch.tensor([[3.0, 0.0, 9.0], [0.0, 0.5, 0.0]]).view(1, 2, 3, 1)
    row = of_llm("last_row", q, k, 1.0)[:, :2]
    pool = Pool(made(1, 2, 4), (2,), statistics={strategy.needs[0]: row})
    assert kept(strategy.plan(pool, [1])) == [[1]]
    media_alone = k[..., :2, 0].softmax(-1).mean(1)
    assert media_alone.argmax() == 0


def test_equal_scores_go_to_the_first():
    strategy = make_strategy("fastv")
    pool = Pool(made(1, 6, 4), (6,), statistics={strategy.needs[0]: torch.tensor([[0.1, 0.3, 0.1, 0.3, 0.1, 0.1]])})
    assert kept(strategy.plan(pool, [3])) == [[0, 1, 3]]


def test_pyramiddrop_by_default_is_the_published_schedule():
    strategy = make_strategy("pyramiddrop")
    assert strategy.stages == (Stage(7, 0.5), Stage(15, 0.25), Stage(23, 0.125)) == strategy.at_depth(32).stages
    bounds = [-1, *(stage.layer for stage in strategy.stages), 31]
    shares = [1.0, *(stage.share for stage in strategy.stages)]
    assert math.isclose(sum((b - a) * s for a, b, s in zip(bounds, bounds[1:], shares)) / 32, 0.46875)


@pytest.mark.parametrize(("depth", "layers"), [(28, (6, 13, 20)), (36, (8, 17, 26)), (4, (0, 1, 2)), (2, (0,)), (3, (0, 1))])
def test_pyramiddrop_at_other_depths(depth, layers):
    strategy = make_strategy("pyramiddrop", keep_ratio=0.3).at_depth(depth)
    assert tuple(stage.layer for stage in strategy.stages) == layers and strategy.stages[-1].share == 0.3
    shares = [1.0, *(stage.share for stage in strategy.stages)]
    assert all(math.isclose(b / a, 0.3 ** (1 / len(layers)), rel_tol=1e-9) for a, b in itertools.pairwise(shares))
    own = make_strategy("pyramiddrop", layers=(1, 5))
    assert own.at_depth(depth) is own


def test_pyramiddrop_goes_stage_by_stage():
    """Of each stage the scores are those of its own layer, over what the stage before left."""
    strategy = make_strategy("pyramiddrop", keep_ratio=0.2, layers=(1, 3, 6))
    tokens, rows = 29, {need: made(1, 29, seed=i) for i, need in enumerate(strategy.needs)}
    alive, seen = list(range(tokens)), {}
    whole = list(alive)
    for need, stage in zip(strategy.needs, strategy.stages):
        assert (need.layer, need.statistic) == (stage.layer, "last_row")
        seen[need] = rows[need]
        keep = keep_count(tokens, stage.share)
        pool = Pool(made(1, len(alive), 4), (len(alive),), statistics={known: row[:, alive] for known, row in seen.items()})
        alive = [alive[i] for i in kept(strategy.plan(pool, [keep]))[0]]
        whole = [whole[i] for i in highest(rows[need][0, whole].tolist(), keep)]
        assert alive == whole and len(alive) == keep
    assert len(alive) == 6


@pytest.mark.parametrize("options", [{"keep_tokens": 5}, {"keep_ratio": None}, {"layers": (3, 3)}, {"layers": (-1,)}, {"layers": ()}, {"keep_ratio": 0}])
def test_pyramiddrop_options_that_are_none(options):
    with pytest.raises(UsageError, match="pyramiddrop"):
        make_strategy("pyramiddrop", **options)


def slow_dart(keys, hidden, text_keys, text_hidden, keep, media_pivots, text_pivots):
    """One pool in FP64."""

    def largest(rows, count):
        return highest_first([sum(abs(x) for x in row) for row in rows.double().tolist()])[:count]

    def highest_first(values):
        return sorted(range(len(values)), key=lambda i: (-values[i], i))

    chosen = largest(keys, min(media_pivots, keep))
    pivots = [hidden[i].double() for i in chosen] + [text_hidden[i].double() for i in largest(text_keys, text_pivots)]
    quota = math.ceil((keep - len(chosen)) / len(pivots))
    for pivot in pivots:
        free = [i for i in range(len(keys)) if i not in chosen]
        cosines = [float(pivot @ hidden[i].double() / pivot.norm() / hidden[i].double().norm()) for i in free]
        by_cosine = sorted(range(len(free)), key=lambda i: (cosines[i], free[i]))
        chosen += [free[i] for i in by_cosine[: min(quota, keep - len(chosen))]]
    assert len(chosen) == keep
    return sorted(chosen)


@pytest.mark.parametrize("pivots", [(4, 4), (2, 0), (1, 3)], ids=str)
@pytest.mark.parametrize("keep", [(11, 4, 8), (6, 2, 5), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("seed", [0, 100])
def test_dart_equals_a_slow_one(keep, pivots, seed):
    strategy = make_strategy("dart", media_pivots=pivots[0], text_pivots=pivots[1], layer=2)
    assert strategy.stages == (Stage(2),)
    text = ((7, 3), (4, 4), (6, 4))
    pool = pool_of(strategy, text=text, seed=seed)
    found = kept(strategy.plan(pool, keep))
    nothing = torch.empty(len(COUNTS), 0, 1)
    for row, (count, k) in enumerate(zip(COUNTS, keep)):
        keys, hidden = (pool.statistics[need][row, :count] for need in strategy.needs)
        of_text = [pool.text_statistics.get(need, nothing)[row, text[row][1] : text[row][0]] for need in strategy.needs]
        assert found[row] == slow_dart(keys, hidden, *of_text, k, *pivots)
        assert kept(strategy.plan(pool.one(row), [k])) == [found[row]]


def test_dart_drops_copies():
    """Of two kinds of tokens it keeps both, however few the second; FastV's highest scores would be of one."""
    strategy = make_strategy("dart", text_pivots=0, media_pivots=1)
    hidden = torch.tensor([[1.0, 0.0]] * 9 + [[-1.0, 0.1]]).expand(1, -1, -1)
    pool = Pool(made(1, 10, 4), (10,), statistics={strategy.needs[0]: torch.arange(10.0, 0, -1).view(1, 10, 1), strategy.needs[1]: hidden})
    assert kept(strategy.plan(pool, [2])) == [[0, 9]]


def test_dart_wants_the_text_that_it_reads():
    strategy = make_strategy("dart")
    assert strategy.text_needs == strategy.needs and make_strategy("dart", text_pivots=0).text_needs == ()
    pool = pool_of(make_strategy("dart", text_pivots=0))
    with pytest.raises(UsageError, match="text were not captured"):
        strategy.plan(pool, [6, 2, 5])
    none = pool_of(strategy, text=((0, 0),) * 3)
    assert kept(strategy.plan(none, [6, 2, 5])) == kept(make_strategy("dart", text_pivots=0).plan(none, [6, 2, 5]))


@pytest.mark.parametrize("name", ["fastv", "dart", "pyramiddrop"])
def test_plans_are_exact_ascending_and_of_numbers(name):
    strategy = make_strategy(name)
    keep = (7, 4, 1)
    pool = pool_of(strategy)
    found = kept(strategy.plan(pool, keep))
    assert [len(row) for row in found] == list(keep)
    assert all(a < b < n for row, n in zip(found, COUNTS) for a, b in itertools.pairwise(row))
    # another order of the tokens, the same ones
    order = torch.randperm(COUNTS[0], generator=torch.Generator().manual_seed(3))
    one = pool.one(0)
    moved = Pool(one.features[:, order], one.counts, statistics={n: x[:, order] for n, x in one.statistics.items()}, text_counts=one.text_counts,
                 text_statistics=one.text_statistics, text_before=one.text_before)  # fmt: skip
    assert sorted(order[kept(strategy.plan(moved, keep[:1]))[0]].tolist()) == found[0]
    for need in strategy.needs:
        broken = pool_of(strategy)
        broken.statistics[need][1, 2] = torch.nan
        if name == "pyramiddrop" and need != strategy.needs[-1]:
            continue
        with pytest.raises(NumericError) as error:
            strategy.plan(broken, keep)
        assert isinstance(error.value, ValueError)
