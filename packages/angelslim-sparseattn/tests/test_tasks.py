import random

import pytest
from transformers import AutoTokenizer

from angelslim_core.errors import UsageError
from angelslim_core.testing.models import tiny_tokenizer
from angelslim_sparseattn.tasks import CLASSES, make_task
from angelslim_sparseattn.tasks.base import Filler, sample, score
from angelslim_sparseattn.tasks.words import names, numbers

TEXT = "The first sentence is here. A second one follows it! Is there a third one? Yes. The fourth sentence ends the text."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("text", [None, TEXT], ids=["generated", "text"])
def test_a_task_fills_its_length_and_its_answers_stand_in_it(name, text, tokenizer):
    length = 8192
    found = sample(name, make_task(name), tokenizer, length, 0, Filler(text))
    assert 0.9 * length < len(found.ids) + found.new_tokens <= length
    written = tokenizer.decode(found.ids)
    assert score(written, found.answers) == 1
    assert found == sample(name, make_task(name), tokenizer, length, 0, Filler(text))
    assert found.answers != sample(name, make_task(name), tokenizer, length, 1, Filler(text)).answers
    begin = written.split("<|assistant|>")[1]
    assert not name.startswith("niah") or score(begin, found.answers) == 0  # the answer's beginning gives nothing away


@pytest.mark.parametrize(("name", "count"), [("niah_single", 1), ("niah_multikey_1", 4), ("niah_multivalue", 4), ("niah_multiquery", 4)])
def test_needles_are_as_many_as_the_task_says(name, count):
    prompt = make_task(name).prompt(random.Random(0), 50, Filler())
    assert prompt.text.count("One of the special magic numbers for") == count
    assert len(prompt.answers) == (4 if name in ("niah_multivalue", "niah_multiquery") else 1)


def test_every_multikey_has_its_own_value():
    prompt = make_task("niah_multikey_2").prompt(random.Random(0), 99, Filler())
    assert prompt.text.count("One of the special magic numbers for") == 100
    asked = prompt.begin.split(" for ")[1].split(" mentioned")[0]
    assert f"for {asked} is: {prompt.answers[0]}." in prompt.text


def test_variables_form_a_chain_in_order():
    prompt = make_task("vt").prompt(random.Random(0), 20, Filler())
    places = [prompt.text.index(f"VAR {name} = ") for name in prompt.answers]
    assert places == sorted(places) and len(prompt.answers) == 5


def test_asked_words_are_the_most_frequent():
    for name, most in (("cwe", 10), ("fwe", 4)):
        prompt = make_task(name).prompt(random.Random(0), 300, Filler())
        words = [w for w in prompt.text.replace('"', " ").split() if "-" in w or w == "..." or len(w) == 6]
        counts = sorted(set(words), key=words.count, reverse=True)
        assert set(prompt.answers) <= set(counts[:most])
        least = min(words.count(a) for a in prompt.answers)
        assert all(words.count(w) < least for w in counts if w not in (*prompt.answers, "..."))


def test_answers_count_as_whole_words():
    assert score("They are 12 and ABC.", ["12", "abc"]) == 1
    assert score("They are 123.", ["12"]) == 0
    assert score("-12- xABC", ["12", "abc"]) == 0.5


def test_words_do_not_repeat():
    rng = random.Random(0)
    assert len(set(names(rng, 5000))) == 5000 and len(set(numbers(rng, 100))) == 100


def test_what_cannot_be(tokenizer):
    with pytest.raises(UsageError, match="no task 'nothing'"):
        make_task("nothing")
    with pytest.raises(UsageError, match="takes at least"):
        sample("vt", make_task("vt"), tokenizer, 64, 0, Filler())
    with pytest.raises(UsageError, match="no sentence"):
        Filler("one two")
