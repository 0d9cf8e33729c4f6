"""Prompts that a target makes up: where a user's turn opens, what is of use, and going on."""

import json
from itertools import count

import pytest
from click.testing import CliRunner

from angelslim_core.calibration.chats import read_prompts
from angelslim_core.calibration.spans import Renderer
from angelslim_core.cli.main import cli
from angelslim_core.errors import ModelError, OutputError, StoppedError
from angelslim_core.loading import load_tokenizer
from angelslim_core.testing.models import tiny_checkpoint
from angelslim_specdec.data.invent import invent, opening

STOP = 1


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    tiny_checkpoint("llama", folder, tokenizer=True)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    return Renderer(tokenizer, str(folder))


def words(renderer, *texts):
    """Attempts that say these in turn, forever, ends of turns included where a text has one."""
    asked = []

    def tokens(start, first):
        asked.append(first)
        for number in count(first):
            text = texts[number % len(texts)]
            yield number, renderer.encode(text.rstrip("$")) + ([STOP] if text.endswith("$") else [])

    tokens.asked = asked
    return tokens


def test_the_opening_is_all_that_stands_before_a_users_words(renderer):
    assert renderer.tokenizer.decode(opening(renderer)) == "<user>"


def test_a_template_that_shows_no_user_is_refused(renderer):
    blind = Renderer(renderer.tokenizer, "m")
    blind.template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ModelError, match="opens no user's turn"):
        opening(blind)


def test_cut_empty_and_repeated_attempts_are_left_out(renderer, tmp_path):
    out = tmp_path / "p.jsonl"
    found = invent(renderer, words(renderer, "abc$", "cut", " $", "abc$", "de$"), (STOP,), 2, out, {})
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"id": "0", "prompt": "abc"}, {"id": "4", "prompt": "de"}]
    assert (found.written, found.cut, found.empty, found.repeated) == (2, 1, 1, 1)


def test_a_stopped_run_goes_on_behind_its_last_attempt_and_repeats_nothing(renderer, tmp_path):
    out, source = tmp_path / "p.jsonl", words(renderer, "a$", "b$", "c$")
    with pytest.raises(StoppedError):
        invent(renderer, source, (STOP,), 3, out, {}, stop_requested=lambda: True)
    found = invent(renderer, source, (STOP,), 3, out, {})
    assert source.asked == [0, 1] and found.resumed == 1 and found.written == 2
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["a", "b", "c"]
    assert invent(renderer, source, (STOP,), 3, out, {}).written == 0, "finished: nothing is asked"
    assert source.asked == [0, 1]
    with pytest.raises(OutputError):
        invent(renderer, source, (STOP,), 3, out, {"seed": 1})


def test_a_target_that_only_repeats_itself_ends_with_an_error(renderer, tmp_path):
    with pytest.raises(ModelError, match="said before"):
        invent(renderer, words(renderer, "a$"), (STOP,), 2, tmp_path / "p.jsonl", {})


def test_the_command_writes_what_regen_reads(tmp_path):
    model, out = tmp_path / "m", tmp_path / "p.jsonl"
    tiny_checkpoint("llama", model, tokenizer=True)
    command = ["specdec", "invent", "--model", str(model), "--count", "3", "--out", str(out), "--max-new-tokens", "200", "--device", "cpu", "--json"]
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["written"] == 3 and len(read_prompts(out)) == 3
