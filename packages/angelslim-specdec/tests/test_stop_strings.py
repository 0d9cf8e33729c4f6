"""An answer ends with the token that completes a stop string, as transformers has it, wherever rounds and tokens are cut."""

import itertools
import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from angelslim_core.cli.main import main
from angelslim_core.errors import UsageError
from angelslim_specdec import Engine, StopStrings, Target, generate
from angelslim_specdec.drafters.base import Drafter, Proposal

SPECIALS = ["<pad>", "<s>", "</s>"]
# tokens of one to four letters, so that strings begin and end inside of them; then the bytes of an accented letter
LETTERS = ["".join(p) for n in (1, 2, 3, 4) for p in itertools.product("abcd", repeat=n)]
PIECES = [*LETTERS[: 253 - 6], "Ã", "©", "Ċ", "ĊĊ", "e", "f"]


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*SPECIALS, *PIECES])}, merges=[]))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny("llama", dtype="float32"), dtype=torch.float32).eval()


def ids_of(*shape, seed=0):
    return torch.randint(3, 200, shape, generator=torch.Generator().manual_seed(seed))


class Sure(Drafter):
    """Proposes what really follows."""

    graphable = True

    def __init__(self, truth):
        self.truth = truth

    def start(self, prompts, lengths, capacity, warp):
        self.at = torch.zeros_like(lengths)

    def observe(self, tokens, aux, counts):
        self.at += counts

    def propose(self, k, uniforms=None):
        index = self.at[:, None] + 1 + torch.arange(k)
        return Proposal(self.truth.gather(1, index.clamp(max=self.truth.shape[1] - 1)))


def strings_of(texts, seed, count=2):
    """Strings that occur in texts, and one that does not."""
    draw = random.Random(seed)
    found = ["no such text"]
    for text in draw.sample(texts, min(count, len(texts))):
        start = draw.randrange(len(text) - 12)
        found.append(text[start : start + draw.randint(1, 9)])
    return found


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("drafter", [None, "suffix", "sure"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_transformers_generates(model, tokenizer, drafter, seed, static):
    ids = ids_of(4, 6, seed=seed)
    every = torch.ones_like(ids)
    truth = model.generate(ids, attention_mask=every, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    strings = strings_of([tokenizer.decode(row[6:]) for row in truth], seed)
    want = model.generate(ids, attention_mask=every, max_new_tokens=30, do_sample=False, stop_strings=strings, tokenizer=tokenizer)
    assert want.shape[1] < ids.shape[1] + 30 or (want == model.generation_config.pad_token_id).any()
    told = [[] for _ in ids]
    got = generate(
        Target(model, tokenizer), ids, Sure(truth) if drafter == "sure" else drafter, 30, k=7, static=static, stop_strings=strings,
        tell=lambda rows: [t.extend(r) for t, r in zip(told, rows)],
    )  # fmt: skip
    assert torch.equal(got.sequences, want) and told == got.decoded.tokens and got.decoded.lossless


def test_the_host_may_run_a_round_behind(model, tokenizer):
    ids = ids_of(3, 6)
    truth = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    strings = strings_of([tokenizer.decode(row[6:]) for row in truth], 1)
    made = []
    for runner in (None, lambda function: function):
        engine = Engine(Target(model, tokenizer), Sure(truth), 3, 36, k=3, static=True, runner=runner, words=StopStrings(tokenizer, strings))
        for _ in range(2):  # an engine serves many batches
            made.append(engine.decode(ids, torch.tensor([6] * 3), 30).tokens)
            # a row that has ended goes on for as long as the host has not seen it
            assert all(int(length) < 6 + len(row) + 4 * (1 + engine.lag) for length, row in zip(engine.cache.lengths, made[-1]))
    assert engine.lag == 1 and all(tokens == made[0] for tokens in made) and min(map(len, made[0])) < 30


def test_sampled_rows_are_cut_and_otherwise_the_same(model, tokenizer):
    ids = ids_of(4, 5, seed=3)
    whole = generate(model, ids, "suffix", 30, 0.9, seed=2).decoded.tokens
    strings = strings_of([tokenizer.decode(row) for row in whole], 5)
    cut = generate(Target(model, tokenizer), ids, "suffix", 30, 0.9, seed=2, stop_strings=strings).decoded.tokens
    assert any(len(a) < len(b) for a, b in zip(cut, whole))
    for short, row in zip(cut, whole):
        ends = [n for n in range(1, len(row) + 1) if any(s in tokenizer.decode(row[:n]) for s in strings)]
        assert short == row[: min([len(row), *ends])]


def pieces(tokenizer, *names):
    return [tokenizer.get_vocab()[n] for n in names]


@pytest.mark.parametrize(
    ("tokens", "strings", "kept", "found", "surplus"),
    [
        (["ab", "cd", "abcd", "a"], ["bcda"], 3, "bcda", 3), (["ab", "cd"], ["d"], 2, "d", 0), (["ab", "cd"], ["cd", "bc"], 2, "bc", 1),
        (["a", "Ã", "©", "b"], ["é"], 3, "é", 0), (["a", "Ã", "©", "b"], ["éb"], 4, "éb", 0), (["a", "</s>", "b"], ["ab"], None, None, 0),
        (["a", "</s>", "b"], ["a</s"], 2, "a</s", 0), (["bb", "a"], ["ccb"], 1, "ccb", 1), (["a"], ["cc"], None, None, 0), (["ab", "ab"], ["ab"], 1, "ab", 0),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_where_a_row_ends(tokenizer, tokens, strings, kept, found, surplus, at_once):
    """Whatever is accepted at once; in the prompt is "cc", which may begin a string and is none."""
    words, ids = StopStrings(tokenizer, strings), pieces(tokenizer, *tokens)
    words.start([pieces(tokenizer, "a", "cc")])
    total, ended = 0, None
    for start in range(0, len(ids), at_once):
        stays = words.add(0, ids[start : start + at_once])
        if ended is not None:
            assert stays == 0
        elif stays is not None:
            ended = total + stays
        total += at_once
    assert (ended, words.found[0], words.surplus[0]) == (kept, found, surplus)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_shown_that_is_behind_or_half_of_one(tokenizer, seed):
    draw = random.Random(seed)
    ids = [draw.randrange(3, 252) for _ in range(400)]
    strings = ["abcab", "aabcdd", "dda", "nowhere"] if seed % 2 else ["abab", "bcbcbcb"]
    words, said, shown = StopStrings(tokenizer, strings), [], ""
    words.start([pieces(tokenizer, "e")])
    for token in ids[5:]:
        stays = words.add(0, [token])
        said.append(token)
        text = tokenizer.decode(said).rstrip("\ufffd")
        now = words.shown(0, text)
        assert now.startswith(shown)
        shown = now
        if stays is not None:
            break
        assert len(now) == min(len(text) - n for s in strings for n in range(len(s)) if text.endswith(s[:n]))
    first = min((text.find(s) + len(s) for s in strings if s in text), default=None)
    assert first is not None and shown == text[:first]


def test_what_was_held_back_is_shown_when_nothing_follows(tokenizer):
    words = StopStrings(tokenizer, ["abc"])
    words.start([[5]])
    words.add(0, pieces(tokenizer, "d", "ab"))
    assert words.shown(0, "dab") == "d" and words.shown(0, "dab", whole=True) == "dab"


def test_wrong_use(model, tokenizer):
    for target, strings, what in ((model, ["a"], "tokenizer"), (Target(model, tokenizer), [""], "no strings"), (Target(model, tokenizer), [], "no strings")):
        with pytest.raises(UsageError, match=what) as caught:
            generate(target, ids_of(1, 4), None, 4, stop_strings=strings)
        assert caught.value.number == 783


def test_the_command(tiny, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["specdec", "decode", "--model", str(tiny(dtype="float32")), "--draft", "ngram", "--prompt", "x", "--temperature", "1", *arguments])
        assert ended.value.code == 0
        return capsys.readouterr().out

    whole = json.loads(run("--json"))
    text = next(whole["text"][i : i + 2] for i in range(6, len(whole["text"])) if whole["text"][i : i + 2].isascii())
    end = whole["text"].find(text) + 2
    found = json.loads(run("--stop", text, "--stop", "no such text", "--json"))
    assert found["stop"] == text and found["text"] == whole["text"][:end] and found["token_ids"] == whole["token_ids"][: len(found["token_ids"])]
    assert found["lossless"] and "stop" not in whole
    assert run("--stop", text) == whole["text"][:end] + "\n"
    assert json.loads(run("--stop", "no such text", "--json"))["stop"] is None
