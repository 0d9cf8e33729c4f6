"""Text that the target writes itself: which pieces it is shown, what it makes of them, and going on."""

import json
import random

import pytest
import torch
from click.testing import CliRunner

from angelslim_core.cli.main import cli
from angelslim_core.errors import ModelError, StoppedError, UsageError
from angelslim_core.loading import load_model, load_tokenizer
from angelslim_core.testing.models import tiny_checkpoint
from angelslim_specdec.data.continued import LEAST, Passages, continue_passages, in_order, read_passages, starts_of

TEXT = "".join(f"{'  ' * (n % 3)}Line {n} of the naïve café, 日本 {'🙂' * (n % 4)} end.\n{chr(10) * (n % 2)}" for n in range(30))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    tiny_checkpoint("llama", folder, tokenizer=True)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(model, file, out, *more):
    command = ["specdec", "invent", "--model", str(model), "--text", str(file), "--out", str(out), "--device", "cpu", "--json"]
    found = CliRunner().invoke(cli, [*command, *("--prefix", "6", "20", "--max-new-tokens", "24"), *more])
    return found.exception, json.loads(found.stdout) if found.exit_code == 0 else {}


def texts(out):
    return [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]


def test_prefixes_begin_at_lines_and_are_pieces_of_the_text_of_the_lengths_asked_for(tokenizer):
    passages, lengths = Passages([TEXT], tokenizer, 6, 20, 0, "t"), set()
    lines = {start for start in range(len(TEXT)) if (start == 0 or TEXT[start - 1] == "\n") and TEXT[start] != "\n"}
    assert {start for _, start in passages.places} == lines
    for number in range(200):
        prefix = passages(number)
        assert any(TEXT.startswith(prefix.text, start) for start in lines)
        assert prefix.ids == tokenizer(prefix.text)["input_ids"], "no half characters"
        assert 3 <= len(prefix.ids) <= 20
        lengths.add(len(prefix.ids))
    assert len(lengths) > 12


def test_every_place_comes_once_before_any_comes_again(tokenizer):
    passages = Passages([TEXT, "another one of letters alone"], tokenizer, 28, 28, 0, "t")
    size = len(passages.places)
    firsts = [passages(number).text for number in range(2 * size)]
    assert sorted(firsts[:size]) == sorted(firsts[size:]) and firsts[:size] != firsts[size:]
    assert firsts == [passages(number).text for number in range(2 * size)], "asked again, also of an earlier turn"
    assert "another one of letters alone" in firsts


def test_where_lines_are_long_or_missing_words_or_else_characters_do():
    words = "some words " * 400
    found = starts_of(words)
    assert found[0] == 0 and len(found) == 5 and all(words[at - 1] == " " and words[at] != " " for at in found[1:])
    assert starts_of("字" * 2500 + "\nand words") == [0, 1000, 2000, 2501]
    assert starts_of("\n \n\n") == []


def test_a_text_begins_with_what_its_tokenizer_puts_there(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    assert Passages([TEXT], tokenizer, 4, 8, 0, "t").leading == []
    tiny_checkpoint("llama", tmp_path, tokenizer=True)
    adds = load_tokenizer(tmp_path)
    adds.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    prefix = Passages([TEXT], adds, 4, 8, 0, "t")(0)
    assert prefix.ids == adds(prefix.text)["input_ids"][:-1] and prefix.ids[0] == 1


@pytest.mark.parametrize("batch", ["1", "5"])
def test_greedily_it_writes_what_transformers_writes(model, tokenizer, file, tmp_path, batch):
    out = tmp_path / "rows.jsonl"
    assert run(model, file, out, "--count", "12", "--temperature", "0", "--batch", batch)[1]["written"] == 12
    loaded, passages = load_model(model).model, Passages([TEXT], tokenizer, 6, 20, 0, "t")
    stops = tokenizer.all_special_ids
    for line in out.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prefix = passages(int(row["id"]))
        ids = torch.tensor([prefix.ids])
        made = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=stops, pad_token_id=0)[0]
        assert set(row) == {"id", "text"} and row["text"].startswith(prefix.text)
        assert row["text"] == tokenizer.decode(made, skip_special_tokens=True).rstrip("\ufffd")


def test_rows_differ_begin_with_pieces_of_the_file_and_depend_on_the_seed(model, file, tmp_path):
    one, two, again = (tmp_path / f"{name}.jsonl" for name in "abc")
    for out, seed in ((one, "0"), (two, "1"), (again, "0")):
        assert run(model, file, out, "--count", "80", "--seed", seed)[1]["written"] == 80
    assert len(set(texts(one))) == 80, "more rows than there are places"
    assert all(any(TEXT.startswith(text[:5], at) for at in starts_of(TEXT)) for text in texts(one))
    assert not set(texts(one)) & set(texts(two))
    assert one.read_bytes() == again.read_bytes()


def test_a_file_cut_anywhere_is_completed_to_what_an_uninterrupted_run_writes(model, file, tmp_path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    arguments = ("--count", "20", "--batch", "4")
    run(model, file, whole, *arguments)
    written = whole.read_bytes()
    run(model, file, torn, *arguments)
    for at in random.Random(0).sample(range(len(written)), 4):
        torn.write_bytes(written[:at])
        assert run(model, file, torn, *arguments)[1]["resumed"] == written[:at].count(b"\n")
        assert torn.read_bytes() == written
    assert run(model, file, torn, *arguments)[1]["written"] == 0
    assert "seed" in str(run(model, file, torn, *arguments, "--seed", "1")[0])


def test_prompts_are_not_appended_to_text(model, file, tmp_path):
    out = tmp_path / "rows.jsonl"
    run(model, file, out, "--count", "2")
    command = ["specdec", "invent", "--model", str(model), "--out", str(out), "--count", "3", "--max-new-tokens", "24", "--device", "cpu", "--json"]
    assert "another prefix, text" in str(CliRunner().invoke(cli, command).exception)


def test_a_stopped_run_goes_on_behind_its_last_row(tokenizer, tmp_path):
    passages, asked, out = Passages([TEXT], tokenizer, 8, 8, 0, "t"), [], tmp_path / "rows.jsonl"

    def attempts(first):
        asked.append(first)
        for start in range(first, 100, 2):  # the later of two ends first
            yield from ((n, tokenizer(f" {n}")["input_ids"]) for n in (start + 1, start))

    with pytest.raises(StoppedError):
        continue_passages(passages, tokenizer, attempts, (2,), 5, out, {}, stop_requested=lambda: True)
    continue_passages(passages, tokenizer, attempts, (2,), 5, out, {})
    assert asked == [0, 1] and [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["0", "1", "2", "3", "4"]


def test_nothing_said_and_what_was_said_before_are_left_out(tokenizer, tmp_path):
    passages = Passages(["abcdefgh"], tokenizer, 8, 8, 0, "t")
    said = ["", " ", "x</s>", "x", "y"]
    attempts = lambda first: ((n, tokenizer(said[n % 5])["input_ids"]) for n in range(first, 10**6))  # noqa: E731
    out = tmp_path / "rows.jsonl"
    found = continue_passages(passages, tokenizer, attempts, (2,), 2, out, {})
    assert texts(out) == ["abcdefghx", "abcdefghy"] and (found.empty, found.repeated, found.cut) == (2, 1, 4)
    with pytest.raises(ModelError, match="said before"):
        continue_passages(passages, tokenizer, attempts, (2,), 3, out, {})


def test_attempts_come_in_order_however_they_end():
    numbers = list(range(5, 60))
    random.Random(0).shuffle(numbers)
    assert [n for n, _ in in_order(((n, [n]) for n in numbers), 5)] == list(range(5, 60))


def test_rows_of_jsonl_are_passages_of_their_own(model, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("first text of many", "second text of many", "no")))
    passages = Passages(read_passages(path), tokenizer, 6, 8, 0, "t")
    assert {passages(number).text[:6] for number in range(20)} == {"first ", "second"}
    assert run(model, path, tmp_path / "out.jsonl", "--count", "3")[1]["written"] == 3


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", (), "empty"),
        (b" \n\n", (), "empty"),
        (b"\xff\xfe text of no kind at all", (), "UTF-8"),
        (b"abc\nd", (), "6 tokens"),
        (None, (), "does not exist"),
        (TEXT.encode(), ("--prefix", "200", "250"), "256 positions"),
        (TEXT.encode(), ("--prefix", "20", "10"), "more than 10"),
        (TEXT.encode(), ("--max-new-tokens", "237"), "256 positions"),
    ],
)
def test_what_cannot_be_done_is_said_before_work_begins(model, tmp_path, content, arguments, message):
    path, out = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    error, _ = run(model, path, out, "--count", "2", *arguments)
    assert isinstance(error, UsageError) and message in error.what + error.hint + error.where
    assert not out.exists()


def test_rows_without_text_are_refused(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"conversations": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(UsageError, match=r"chat\.jsonl:1: holds no text"):
        read_passages(path)


@pytest.mark.parametrize("arguments", [("--prefix", "6", "20"), ("--temperature", "0")])
def test_what_only_text_has_is_refused_for_prompts(model, tmp_path, arguments):
    command = ["specdec", "invent", "--model", str(model), "--out", str(tmp_path / "p"), "--count", "1", "--device", "cpu", *arguments]
    assert isinstance(CliRunner().invoke(cli, command).exception, UsageError)


def test_a_prefix_may_be_one_character(tokenizer):
    passages = Passages(["🙂🙃🙂🙃"], tokenizer, LEAST, 7, 0, "t")
    assert {passages(number).text for number in range(9)} == {"🙂"}


def test_the_space_before_the_first_word_stays_where_a_tokenizer_takes_it_from_texts(tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llamas = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    passages, out = Passages(["one"], llamas, 4, 4, 0, "t"), tmp_path / "rows.jsonl"
    attempts = lambda first: iter([(first, llamas(" two", add_special_tokens=False)["input_ids"][1:])])  # noqa: E731
    continue_passages(passages, llamas, attempts, (2,), 1, out, {})
    assert texts(out) == ["one two"]
