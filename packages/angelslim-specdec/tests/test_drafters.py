"""Drafters without weights propose what they say they do."""

import torch

from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.registry import drafters


def told(name, *rows, **options):
    """A drafter that has seen these rows."""
    drafter = drafters()[name](**options)
    lengths = torch.tensor([len(row) - 1 for row in rows])
    prompts = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    followers = prompts.clone()
    for i, row in enumerate(rows):
        prompts[i, : len(row) - 1], followers[i, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
    drafter.start(prompts, lengths, 100, Warp())
    drafter.observe(followers, None, lengths)
    return drafter


def proposed(drafter, k):
    found = drafter.propose(k)
    assert found.tokens.shape == (len(found.counts), k) and found.tokens.dtype == torch.int64
    return [row[:count] for row, count in zip(found.tokens.tolist(), found.counts.tolist())]


def test_ngram_takes_the_longest_match_and_the_latest_of_those():
    assert proposed(told("ngram", [1, 2, 3, 7, 9, 2, 3, 8, 5, 1, 2, 3]), 3) == [[7, 9, 2]]  # three tokens match, not two
    assert proposed(told("ngram", [2, 3, 7, 4, 2, 3, 8, 4, 2, 3]), 2) == [[8, 4]]
    assert proposed(told("ngram", [1, 2, 3, 4]), 2) == [[]]
    assert proposed(told("ngram", [1, 2, 1], shortest=1), 1) == [[2]]
    assert proposed(told("ngram", [1, 2, 1]), 1) == [[]]  # one token is no match


def test_ngram_goes_round_with_a_loop():
    assert proposed(told("ngram", [9, 5, 6, 5, 6, 5, 6]), 5) == [[5, 6, 5, 6, 5]]
    assert proposed(told("ngram", [9, 4, 4, 4]), 4) == [[4, 4, 4, 4]]


def test_rows_and_junk_behind_them_stay_apart():
    drafter = told("ngram", [1, 2, 3, 1, 2], [3, 1, 2])
    assert proposed(drafter, 2) == [[3, 1], []]
    drafter.observe(torch.tensor([[3, 9, 9], [3, 1, 2]]), None, torch.tensor([1, 3]))
    assert proposed(drafter, 2) == [[1, 2], [3, 1]]


def test_suffix_follows_what_came_most_often():
    row = [1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 4, 8, 1, 2]
    (found,) = proposed(told("suffix", row), 4)
    assert found[0] == 4 and len(found) <= 2  # two tokens match, so at most two are proposed
    (longer,) = proposed(told("suffix", row, factor=2.0, least=0.3), 4)
    assert longer[0] == 4 and len(longer) <= 4


def test_suffix_stops_where_it_is_unsure():
    (found,) = proposed(told("suffix", [5, 6, 7, 1, 5, 6, 7, 2, 5, 6, 7, 3, 5, 6], factor=8.0, least=0.5), 6)
    assert found == [7]
    assert proposed(told("suffix", [1, 2, 3]), 3) == [[]]


def test_suffix_forgets_nothing_within_its_depth():
    row = list(range(3, 40)) * 3
    assert proposed(told("suffix", row), 5) == [[3, 4, 5, 6, 7]]
    assert proposed(told("suffix", row, depth=2), 5) == [[3]]
