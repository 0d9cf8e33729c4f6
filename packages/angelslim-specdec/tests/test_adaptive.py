"""What a round does is set by what rounds took and had accepted: it finds what pays, and comes back to it."""

import pytest
import torch

from angelslim_specdec.adaptive import Pace, Round


def play(pace, rounds, rates, ms, rows=8, seed=0, sure=None):
    """Rounds of drafts accepted at these rates, position by position; returns kinds played, and tokens and time in all.

    Args:
        sure: of a row, what it states for its tokens and how likely they are accepted; None: all alike.
    """
    generator = torch.Generator().manual_seed(seed)
    played, tokens, spent = [], 0, 0.0
    for _ in range(rounds):
        how = pace.next()
        chances = torch.tensor(rates).expand(rows, -1) if sure is None else sure(generator, rows, len(rates))
        accepted = (torch.rand(rows, len(rates), generator=generator) < chances).long().cumprod(1).sum(1)
        of = chances.cumprod(1)[:, : how.k]
        verified = torch.full((rows,), how.k)
        if how.size is not None:
            rank = of.T.flatten().argsort(descending=True, stable=True).argsort().view(how.k, rows)
            verified = (rank < how.size).sum(0)
        accepted = torch.minimum(accepted, verified)
        padded = torch.nn.functional.pad(of, (0, len(rates) - how.k))
        pace.saw(how, ms[how] / 1e3, accepted, verified, padded)
        played.append(how)
        tokens, spent = tokens + int(accepted.sum()) + rows, spent + rows * ms[how]
    return played, tokens, spent


def cost(pace, of):
    return {kind: of(kind) for kind in pace.rounds}


def test_kinds_of_round():
    assert Pace(5, 1).rounds == [Round(0), Round(1), Round(2), Round(4), Round(5)]
    assert Pace(4, 8).rounds == [Round(0), Round(1), Round(2), Round(4), Round(4, 8), Round(4, 16), Round(4, 24)]
    assert Pace(4, 8, cuts=False).rounds == [Round(0), Round(1), Round(2), Round(4)]
    assert Pace(1, 2).rounds == [Round(0), Round(1), Round(1, 1)] and Pace(7, 1).rounds == [Round(n) for n in (0, 1, 2, 4, 7)]


def test_all_kinds_are_measured_first_but_for_their_first_rounds():
    pace = Pace(2, 1)
    shown = {0: 1.0, 1: 1.1, 2: 4.0}
    for _ in range(6 * 3):
        how = pace.next()
        slow = 50 if pace._done[how] < pace.FRESH else 1  # a graph is captured
        pace.saw(how, slow * shown[how.k] / 1e3, torch.tensor([how.k]), torch.tensor([how.k]), torch.ones(1, 2))
    assert all(count == 6 for count in pace._done.values())
    assert pace.values()[Round(1)] == pytest.approx(2 / 1.1, rel=0.1) and pace.next() == Round(1)


def test_a_round_that_is_lost_is_run_again():
    pace = Pace(2, 1)
    for _ in range(40):
        pace.next()  # results that never come, as of rounds begun when all rows had ended
    assert pace.next() == Round(2)


def test_it_follows_what_is_accepted():
    pace = Pace(4, 1, ms=[1.0, 1.1, 1.2, 1.4])
    ms = cost(pace, lambda kind: 1 + 0.1 * kind.k)
    assert pace.next() == Round(4)  # nothing known: all
    assert set(play(pace, 40, [1.0] * 4, ms, 2)[0]) <= {Round(4), Round(2)}
    play(pace, 200, [0.0] * 4, ms, 2)
    late, _, _ = play(pace, 400, [0.0] * 4, ms, 2)
    assert late.count(Round(0)) > 380 and set(late) > {Round(0)}  # but for a try now and then, ever more seldom
    back, _, _ = play(pace, 3000, [1.0] * 4, ms, 2)
    assert back[-200:].count(Round(4)) > 190


def test_trying_costs_little_where_nothing_pays():
    pace = Pace(4, 64, ms=[1.0, 1.6, 2.2, 3.4, 1.8, 2.2, 2.8])
    ms = dict(zip(pace.rounds, [1.0, 1.6, 2.2, 3.4, 1.8, 2.2, 2.8], strict=True))
    play(pace, 300, [0.3] * 4, ms, 64)
    _, tokens, spent = play(pace, 2000, [0.3] * 4, ms, 64)
    assert tokens / spent > 0.995


@pytest.mark.parametrize("measured", [True, False])
def test_it_finds_the_length_that_pays(measured):
    kinds = Pace(5, 8, cuts=False).rounds
    ms = {kind: 1.0 + 0.3 * (kind.k > 0) + 0.2 * max(0, kind.k - 1) for kind in kinds}
    # with .7 at each position 2 of 0, 1, 2, 4 and 5 tokens gives 2.19 in 1.5, 4 gives 2.77 in 1.9 and 5 gives 2.94 in 2.1
    pace = Pace(5, 8, cuts=False, ms=None if measured else list(ms.values()))
    play(pace, 100, [0.7] * 5, ms)
    _, tokens, spent = play(pace, 600, [0.7] * 5, ms)
    assert tokens / spent > 0.97 * 2.19 / 1.5
    assert pace.reached()[0] == pytest.approx(0.7, abs=0.1)


def test_it_cuts_where_some_rows_are_sure_and_tokens_cost():
    def sure(generator, rows, k):
        return torch.where(torch.rand(rows, 1, generator=generator) < 0.4, 0.95, 0.05).expand(-1, k)

    pace = Pace(8, 32)
    ms = cost(pace, lambda kind: 1 + 0.25 * (kind.k * 32 if kind.size is None else kind.size) / 32 + 0.1 * (kind.k > 0))
    play(pace, 150, [0.0] * 8, ms, 32, 1, sure)
    played, tokens, spent = play(pace, 500, [0.0] * 8, ms, 32, 2, sure)
    assert sum(kind.size is not None for kind in played) > 450
    # what the best length alone would give: 1 + .4 (.95 + .95^2 ...) + .6 (.05 ...) tokens
    whole = max((1 + sum(0.4 * 0.95**i + 0.6 * 0.05**i for i in range(1, kind.k + 1))) / ms[kind] for kind in pace.rounds if kind.size is None)
    assert tokens / spent > 1.2 * whole


def test_a_draft_that_overrates_itself_is_not_believed():
    pace = Pace(4, 32, ms=[1.0, 1.6, 2.2, 3.4, 1.7, 2.2, 2.8])
    for _ in range(60):
        how = pace.next()
        number = torch.full((32,), how.k if how.size is None else how.size // 32)
        of = torch.full((32, 4), 0.99).cumprod(1)
        pace.saw(how, 0.0, torch.zeros(32, dtype=torch.int64), number, of)
    assert max(pace.rounds, key=pace.values().__getitem__) == Round(0) and pace.reached()[0] < 0.05


def test_ended_rows_count_for_nothing():
    pace = Pace(2, 4, ms=[1.0, 1.1, 1.2, 1.05, 1.1, 1.15])
    none = torch.zeros(0, dtype=torch.int64)
    pace.saw(Round(2), 0.0, none, none, torch.zeros(0, 2))
    assert pace.reached() == [1.0, 1.0]
