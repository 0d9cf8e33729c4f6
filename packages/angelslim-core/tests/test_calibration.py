"""Calibration samples: every shape of row, text windows, the model's own samples, batches."""

import json
from dataclasses import dataclass

import pytest
import torch

from angelslim_core.calibration.data import Samples, batches, load_samples, self_samples
from angelslim_core.calibration.rows import MAX_LINE_BYTES
from angelslim_core.errors import ModelError, RecipeError

TEMPLATE = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"


@dataclass
class Options:
    data: str
    field: str | None = None
    template: str = "chat"
    samples: int = 4
    tokens: int = 1000


def make_tokenizer(**options):
    """One token per byte, and `<s>` before a text that may have special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, "<s>", "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", **options})


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


SHAPES = {
    "messages": ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "é"}]}, "[system:s][user:é]", "s\né"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}, "[user:a]", "a"),
    "tool call": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]}, "[user:q][assistant:]", "q"),
    "sharegpt": (
        {"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "[user:q][assistant:a]",
        "q\na",
    ),
    "sharegpt system": ({"conversations": [{"from": "system", "value": "s"}]}, "[system:s]", "s"),
    "pair": ({"input": "q", "output": "a"}, "[user:q][assistant:a]", "q\na"),
    "prompt": ({"prompt": "q"}, "[user:q]", "q"),
    "turns": ({"turns": ["q", "r"]}, "[user:q\n\nr]", "q\n\nr"),
    "text": ({"text": "plain"}, "<s>plain", "plain"),
    "first of several": ({"text": "no", "messages": [{"role": "user", "content": "q"}]}, "[user:q]", "q"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, tokenizer, tmp_path):
    row, chat, joined = SHAPES[shape]
    data = write(tmp_path / "c.jsonl", row)
    assert tokenizer.decode(load_samples(Options(data), tokenizer, 0).ids[0]) == chat
    assert tokenizer.decode(load_samples(Options(data, template="none", field="auto"), tokenizer, 0).ids[0]) == "<s>" + joined


def test_named_field(tokenizer, tmp_path):
    row = {"messages": [{"role": "user", "content": "no"}], "body": "yes", "talk": [{"from": "human", "value": "yes"}]}
    data = write(tmp_path / "c.jsonl", row)
    assert tokenizer.decode(load_samples(Options(data, field="body"), tokenizer, 0).ids[0]) == "<s>yes"
    assert tokenizer.decode(load_samples(Options(data, field="talk"), tokenizer, 0).ids[0]) == "[user:yes]"
    with pytest.raises(RecipeError, match=r"c\.jsonl:1: has no field 'text'.*'messages', 'body', 'talk'"):
        load_samples(Options(data, field="text"), tokenizer, 0)


def test_rows_are_shuffled_by_seed_and_cut(tokenizer, tmp_path):
    data = write(tmp_path / "c.jsonl", *({"text": f"{i:02d} and more"} for i in range(20)))

    def first(seed, samples=20):
        return [tokenizer.decode(s[1:3]) for s in load_samples(Options(data, samples=samples, tokens=6), tokenizer, seed).ids]

    assert first(1) == first(1) != first(2)
    assert sorted(first(1)) == sorted(first(2)) == [f"{i:02d}" for i in range(20)]
    assert first(1, 5) == first(1)[:5]
    samples = load_samples(Options(data, samples=20, tokens=6), tokenizer, 1)
    assert {len(s) for s in samples.ids} == {6} and not samples.warnings
    torch_state = torch.get_rng_state()
    first(3)
    assert torch.equal(torch_state, torch.get_rng_state())


def test_empty_rows_are_passed_over(tokenizer, tmp_path):
    empty = [{"text": ""}, {"messages": []}, {"messages": [{"role": "user", "content": " "}]}]
    data = write(tmp_path / "c.jsonl", *empty, "", "  ", {"text": "a"}, *empty, {"text": "b"})
    for seed in range(5):
        samples = load_samples(Options(data, samples=2), tokenizer, seed)
        assert sorted(tokenizer.decode(s) for s in samples.ids) == ["<s>a", "<s>b"] and not samples.warnings
    samples = load_samples(Options(data, samples=9), tokenizer, 0)
    assert len(samples.ids) == 2 and "2 samples, 9 were asked for" in samples.warnings[0]
    with pytest.raises(RecipeError, match="no usable sample"):
        load_samples(Options(write(tmp_path / "e.jsonl", *empty)), tokenizer, 0)


def test_without_template_there_is_a_warning(tmp_path):
    data = write(tmp_path / "c.jsonl", {"input": "q", "output": "a"})
    samples = load_samples(Options(data, samples=1), tok := make_tokenizer(), 0)
    assert tok.decode(samples.ids[0]) == "<s>q\na" and "no chat template" in samples.warnings[0]
    assert not load_samples(Options(data, samples=1, template="none"), tok, 0).warnings
    texts = write(tmp_path / "t.jsonl", {"text": "no chat, no warning"})
    assert not load_samples(Options(texts, samples=1), tok, 0).warnings


def test_hostile_template_stops_the_load(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(ModelError, match="cannot be rendered"):
        load_samples(Options(write(tmp_path / "c.jsonl", {"prompt": "q"})), tokenizer, 0)


@pytest.mark.parametrize(
    ("line", "number", "message"),
    [
        (b'{"text": ', 75, "is not JSON"),
        (b"[" * 100_000, 75, "is not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", 75, "is not JSON"),
        (b'{"text": "\\ud800"}', 73, "is not UTF-8"),
        (b'{"text": "\xff"}', 73, "is not UTF-8"),
        (b'["text"]', 76, "is no JSON object"),
        (b'{"question": "q", "answer": "a"}', 77, "its keys: 'question', 'answer'"),
        (b'{"input": "alone"}', 77, "input needs output"),
        (b'{"messages": ["a", {"role": "user"}]}', 77, "its keys: 'messages'"),
        (b'{"messages": [{"content": "no role"}]}', 77, "its keys: 'messages'"),
        (b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}', 74, "longer than"),
    ],
)
def test_bad_line_is_named(line, number, message, tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    # even where the row would not be drawn
    for seed in range(3):
        with pytest.raises(RecipeError, match=message) as caught:
            load_samples(Options(str(path), samples=1), tokenizer, seed)
        assert caught.value.number == number and caught.value.where == f"{path}:3" and "\n" not in str(caught.value)


def test_no_such_file(tokenizer, tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        load_samples(Options(str(tmp_path / "none.jsonl")), tokenizer, 0)
    for no_file in (str(tmp_path), "/dev/zero"):
        with pytest.raises(RecipeError, match="is no file"):
            load_samples(Options(no_file), tokenizer, 0)


def test_text_windows(tokenizer, tmp_path):
    text = "Zeile eins\r\nnaïve " * 40
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    samples = load_samples(Options(str(path), samples=5, tokens=7), tokenizer, 3)
    assert samples.ids == [whole[i * 7 : i * 7 + 7] for i in range(5)] and not samples.warnings
    everything = load_samples(Options(str(path), samples=10_000, tokens=7), tokenizer, 3)
    assert everything.ids == [whole[i * 7 : i * 7 + 7] for i in range(len(whole) // 7)] and everything.warnings
    assert load_samples(Options(str(path), tokens=10_000), tokenizer, 0).ids == [whole]
    path.write_text("")
    with pytest.raises(RecipeError, match="no usable sample"):
        load_samples(Options(str(path)), tokenizer, 0)
    path.write_bytes(b"PAR1\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_samples(Options(str(path)), tokenizer, 0)


def test_text_is_read_as_far_as_needed(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a" * 100: 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    path = tmp_path / "text.txt"
    # words far longer than usual: the first part read holds too few of them
    path.write_text(("a" * 100 + " ") * 50 + "b " * 50)
    samples = load_samples(Options(str(path), samples=6, tokens=10), tokenizer, 0)
    assert samples.ids == [[0] * 10] * 5 + [[1] * 10] and not samples.warnings


def test_fingerprint():
    assert Samples([[1, 2], [3]]).fingerprint == Samples([[1, 2], [3]], ["said"]).fingerprint
    assert len({Samples(ids).fingerprint for ids in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[3], [1, 2]], [[1, 2], [4]])}) == 5


def test_self_is_generated(tokenizer):
    samples = load_samples(Options("self", samples=3, tokens=5), tokenizer, 7, lambda num, tokens, seed: [[seed] * tokens] * num)
    assert samples.ids == [[7] * 5] * 3 and not samples.warnings
    with pytest.raises(RecipeError, match="self needs the model"):
        load_samples(Options("self"), tokenizer, 7)


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 258}
    made = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=256, eos_token_id=257))
    # a model that would rather stop at once, with settings that would make it repeat itself
    made.lm_head.weight.data[257] *= 50
    made.generation_config.update(do_sample=False, top_k=1, num_beams=2, max_length=3)
    return made.eval()


def test_self_samples(model, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ids = self_samples(model, tokenizer, 18, 9, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert [len(s) for s in ids] == [9] * 18
    assert all(s[0] == 256 and 257 not in s for s in ids)
    assert len({tuple(s) for s in ids}) == 18
    torch.manual_seed(6)
    assert ids == self_samples(model, tokenizer, 18, 9, seed=1) != self_samples(model, tokenizer, 18, 9, seed=2)
    assert self_samples(model, tokenizer, 2, 1, seed=1) == [[256], [256]]
    cold = self_samples(model, tokenizer, 4, 9, seed=1, temperature=1e-4)
    assert len({tuple(s) for s in cold}) == 1


def test_self_samples_without_bos(model):
    tokenizer = make_tokenizer(bos_token=None)
    ids = self_samples(model, tokenizer, 20, 3, seed=1)
    assert len({s[0] for s in ids}) > 5 and 257 not in {s[0] for s in ids}
    assert ids == self_samples(model, tokenizer, 20, 3, seed=1)


def test_batches():
    ids = [[1, 2, 3], [4], [5, 6]]
    first, second = batches(ids, 2, 9)
    assert first.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]] and first.input_ids.dtype == torch.int64
    assert first.mask.tolist() == [[True] * 3, [True, False, False]]
    assert second.input_ids.tolist() == [[5, 6]] and second.mask.all() and second.mask.dtype == torch.bool
    assert batches([], 2, 0) == []
