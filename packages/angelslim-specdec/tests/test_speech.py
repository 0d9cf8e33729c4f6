"""Text piece by piece is the text as a whole, at a cost that does not grow with it."""

import pytest

from angelslim_core.loading import load_tokenizer
from angelslim_specdec.speech import _MOST, Speech


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny())


@pytest.mark.parametrize("size", [1, 3, 7])
def test_pieces_are_the_text(tokenizer, size):
    known = [c for c in "öïé日本語\U0001f600\U0001f680" if tokenizer.decode(tokenizer(c, add_special_tokens=False)["input_ids"]) == c]
    assert sum(len(c.encode()) > 2 for c in known) >= 2, "of several tokens each"
    text = "".join(f"{c} and {c}{c}, " for c in known) * 9
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    speech, pieces = Speech(tokenizer), []
    for at in range(0, len(ids), size):
        pieces.append(speech.add(ids[at : at + size]))
        assert "\ufffd" not in pieces[-1]
    assert "".join(pieces) == tokenizer.decode(ids) and len(ids) > 4 * _MOST


def test_a_long_text_is_not_decoded_again_and_again(tokenizer):
    sizes = []

    class Counting:
        def decode(self, ids, **options):
            sizes.append(len(ids))
            return tokenizer.decode(ids, **options)

    speech = Speech(Counting())
    for i in range(500):
        speech.add([40 + i % 50])
    assert max(sizes) < 32
    wrong = tokenizer("\u00e9", add_special_tokens=False)["input_ids"][:1]
    for _ in range(500):  # bytes that never become a character
        speech.add(wrong)
    assert max(sizes) <= _MOST + 2
