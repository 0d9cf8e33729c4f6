"""The draft's selection of tokens: frequent ones first, offsets on disk, nothing else believed."""

import pytest
import torch

from angelslim_core.errors import ModelError, UsageError
from angelslim_specdec.vocabulary import Vocabulary

COUNTS = torch.tensor([0, 5, 0, 7, 5, 0, 1, 0, 0, 2])


def test_frequent_tokens_stay_and_the_lowest_fill_up():
    assert Vocabulary.select(COUNTS, 4).ids.tolist() == [1, 3, 4, 9]
    assert Vocabulary.select(COUNTS, 2).ids.tolist() == [1, 3]  # of equals the lower
    assert Vocabulary.select(COUNTS, 7).ids.tolist() == [0, 1, 2, 3, 4, 6, 9]
    assert Vocabulary.select(COUNTS, 3, [8, 0]).ids.tolist() == [0, 3, 8]
    assert Vocabulary.select(COUNTS, 10).d2t.tolist() == [0] * 10
    assert COUNTS.tolist() == [0, 5, 0, 7, 5, 0, 1, 0, 0, 2]


def test_offsets_and_marks_are_each_other_s_inverse():
    chosen = Vocabulary.select(torch.rand(500, generator=torch.Generator().manual_seed(0)), 77)
    assert torch.equal(torch.arange(77) + chosen.d2t, chosen.t2d.nonzero()[:, 0]) and int(chosen.t2d.sum()) == 77
    again = Vocabulary.from_stored(chosen.d2t, 500, "d", chosen.t2d)
    assert torch.equal(again.ids, chosen.ids)


@pytest.mark.parametrize(("size", "always"), [(0, ()), (11, ()), (1, (1, 2)), (3, (10,)), (3, (-1,))])
def test_impossible_selections(size, always):
    with pytest.raises(UsageError):
        Vocabulary.select(COUNTS, size, always)


GOOD = Vocabulary.select(COUNTS, 4)
WRONG = {
    "ids in the place of offsets": (GOOD.ids, GOOD.t2d),
    "another selection": (Vocabulary.select(COUNTS, 4, [0]).d2t, GOOD.t2d),
    "fewer than marked": (GOOD.d2t[:3], GOOD.t2d),
    "not ascending": (torch.tensor([3, 0, 0, 0]), None),
    "negative": (torch.tensor([-1, 0, 0, 0]), None),
    "beyond the target": (torch.tensor([0, 0, 0, 7]), None),
    "absurd": (torch.tensor([0, 0, 0, 2**63 - 1]), None),
    "int32": (GOOD.d2t.int(), None),
    "floats": (GOOD.d2t.float(), None),
    "empty": (GOOD.d2t[:0], None),
    "two-dimensional": (GOOD.d2t[None], None),
    "marks of another size": (GOOD.d2t, GOOD.t2d[:9]),
    "marks as numbers": (GOOD.d2t, GOOD.t2d.long()),
}


@pytest.mark.parametrize(("d2t", "t2d"), WRONG.values(), ids=list(WRONG))
def test_what_is_no_selection_is_refused(d2t, t2d):
    with pytest.raises(ModelError, match=r"d2t|t2d"):
        Vocabulary.from_stored(d2t, 10, "draft", t2d)


def test_absolute_ids_are_named_as_such():
    with pytest.raises(ModelError, match="holds ids of the target, where offsets are wanted"):
        Vocabulary.from_stored(GOOD.ids, 10, "draft", GOOD.t2d)
