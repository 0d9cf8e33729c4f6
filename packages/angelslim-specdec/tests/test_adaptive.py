"""What is verified of a batch's proposals: prefixes that pay, and never by a choice that bends the distribution."""

import math

import pytest
import torch

from angelslim_core.errors import UsageError
from angelslim_specdec.adaptive import SHARES, CostTable, Pace, check_lossless, cut, lengths, measure
from angelslim_specdec.drafters.base import Proposal
from angelslim_specdec.verification import match, ratio


@pytest.mark.parametrize("seed", range(20))
def test_kept_tokens_are_prefixes_of_the_best_share(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, size = 1 + seed % 7, 1 + seed % 5
    confidence = (torch.rand(rows, size, generator=generator) * 4).round() / 4  # many ties, zeros and ones
    ms = torch.rand(len(SHARES), generator=generator) + 0.5
    counts = lengths(confidence, CostTable(ms, packed=True))
    expected = confidence.cumprod(1)
    ranked = expected.flatten().sort(descending=True).values
    sizes = [math.ceil(share * rows * size) for share in SHARES]
    use = [(rows + float(ranked[:n].sum())) / float(ms[i]) for i, n in enumerate(sizes)]
    best = max(range(len(use)), key=use.__getitem__)
    assert int(counts.sum()) == sizes[best] and (counts <= size).all()
    kept = sum(float(expected[r, : int(counts[r])].sum()) for r in range(rows))
    assert kept == pytest.approx(float(ranked[: sizes[best]].sum()))  # prefixes, and yet the largest there are


def test_ties_keep_the_earlier_token_of_every_row():
    assert lengths(torch.ones(4, 4), CostTable(torch.tensor([9.0, 1.0, 9.0, 9.0, 9.0]), packed=True)).tolist() == [1, 1, 1, 1]


def test_padded_rows_share_one_length():
    confidence = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.2, 0.1]])
    # 2, 3.8, 4.7 and 4.79 expected tokens
    assert lengths(confidence, CostTable(torch.tensor([1.0, 1.1, 1.2, 1.3]))).tolist() == [2, 2]
    assert lengths(confidence, CostTable(torch.tensor([1.0, 1.0, 1.0, 1.0]))).tolist() == [3, 3]
    assert lengths(confidence, CostTable(torch.tensor([1.0, 2.0, 3.0, 4.0]))).tolist() == [0, 0]


def test_cut_keeps_to_what_was_proposed():
    proposal = Proposal(torch.zeros(2, 3, dtype=torch.long), confidence=torch.ones(2, 3), counts=torch.tensor([3, 1]))
    assert cut(proposal, CostTable(torch.ones(4)), "ratio").tolist() == [3, 1]


def test_what_is_not_lossless_is_refused():
    tokens, half = torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), 0.5)
    drawn = Proposal(tokens, q=torch.full((1, 2, 2), 0.5), confidence=half)
    with pytest.raises(UsageError, match="ratio rule") as refused:
        check_lossless(drawn, "ratio")
    assert refused.value.number == 761
    check_lossless(drawn, "match")
    check_lossless(Proposal(tokens, confidence=half), "ratio")
    with pytest.raises(UsageError, match="no confidence"):
        cut(Proposal(tokens), CostTable(torch.ones(3)), "match")


def test_cutting_drawn_tokens_bends_the_ratio_rule_but_not_the_match_rule():
    """One row that drafts token 0 or 1 from q = (.75, .25), which is cut where it is token 1; the target says .5, .5."""
    generator, samples = torch.Generator().manual_seed(0), 100_000
    q = torch.tensor([0.75, 0.25]).expand(samples, 1, 2)
    tokens = (torch.rand(samples, 1, generator=generator) >= 0.75).long()
    counts = lengths(q.gather(2, tokens[..., None])[..., 0][:1], CostTable(torch.tensor([1.0, 1.5])))
    assert lengths(torch.tensor([[0.75]]), CostTable(torch.tensor([1.0, 1.5]))).tolist() == [1] and counts.shape == (1,)
    counts = torch.where(tokens[:, 0] == 0, 1, 0)  # what `lengths` says of either, row by row
    assert lengths(torch.tensor([[0.25]]), CostTable(torch.tensor([1.0, 1.5]))).tolist() == [0]
    p, uniforms = torch.full((samples, 2, 2), 0.5), torch.rand(samples, 2, generator=generator)

    def share_of_zero(accepted, following):
        return float(torch.where(accepted > 0, tokens[:, 0], following).eq(0).float().mean())

    assert share_of_zero(*ratio(p, tokens, q, None, uniforms, counts)) == pytest.approx(0.625, abs=0.01)
    assert share_of_zero(*match(p, tokens, uniforms, counts)) == pytest.approx(0.5, abs=0.01)


def test_costs_are_measured_in_order():
    calls = []
    table = measure(lambda count: calls.append(count), [0, 1, 3], "cpu", repeats=2)
    assert calls == [0, 0, 0, 1, 1, 1, 3, 3, 3] and table.ms.shape == (3,) and (table.ms >= 0).all()


def test_pace_follows_what_is_accepted():
    pace = Pace([1.0, 1.1, 1.2, 1.3, 1.4])
    assert pace.next() == 4  # nothing known: all
    for _ in range(40):
        pace.saw([4, 4], [4, 4])
    assert pace.best() == 4
    for _ in range(200):
        k = pace.next()
        pace.saw([0, 0], [k, k])
    assert pace.best() == 0
    drafted = [pace.next() for _ in range(48) if pace.saw([0, 0], [0, 0]) is None]
    assert set(drafted) == {0, 1} and drafted.count(1) == 2
    for _ in range(2000):
        k = pace.next()
        pace.saw([k, k], [k, k])
    assert pace.best() == 4


def test_pace_finds_the_length_that_pays():
    generator = torch.Generator().manual_seed(0)
    ms = [1.0, 1.3, 1.5, 1.7, 1.9, 2.1]  # with .7 at each position the most is at three: 2.533 tokens in 1.7, 1.49 a unit of time
    pace, tokens, spent = Pace(ms), 0, 0.0
    for _ in range(600):
        k = pace.next()
        hits = (torch.rand(8, k, generator=generator) < 0.7).long().cumprod(1).sum(1).tolist()
        pace.saw(hits, [k] * 8)
        tokens, spent = tokens + sum(hits) + 8, spent + 8 * ms[k]
    assert tokens / spent > 0.96 * 2.533 / 1.7
    assert pace.rates()[0] == pytest.approx(0.7, abs=0.08)
