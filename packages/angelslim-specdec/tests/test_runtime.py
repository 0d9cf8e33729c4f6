"""A loaded model with the policy generates what it did without, and the commands say so."""

import json
import logging

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, TextIteratorStreamer

from angelslim_core import compress, load
from angelslim_core.cli.main import cli
from angelslim_core.errors import AngelslimError, ModelError
from angelslim_specdec.passes import Ngram, Suffix


def ids_of(batch=1):
    return torch.randint(3, 256, (batch, 6), generator=torch.Generator().manual_seed(3)).repeat(1, 3)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    compress(model=tiny("llama", dtype="float32"), use=["specdec.ngram"], out=out)
    return out


def test_an_artifact_decodes_speculatively(made, tiny, caplog):
    model, tokenizer = load(made, "cpu")
    plain = AutoModelForCausalLM.from_pretrained(tiny("llama", dtype="float32"), dtype=torch.float32).eval()
    ids = ids_of(2)
    for options in ({}, {"do_sample": False, "temperature": None, "top_p": None}, {"eos_token_id": [7, 9]}):
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, **options}
        assert torch.equal(model.generate(ids, **given), plain.generate(ids, **given))
        assert torch.equal(model.generate(input_ids=ids, **given), plain.generate(ids, **given))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=12, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, ids.shape[1] :])
    caplog.set_level(logging.INFO, logger="angelslim_specdec")
    for given in ({"num_beams": 2}, {"repetition_penalty": 1.3}, {"attention_mask": torch.tensor([[1] * 18, [1] * 15 + [0] * 3])}):
        options = {"max_new_tokens": 6, "attention_mask": torch.ones_like(ids), **given}
        caplog.clear()
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
        assert "decoding without a draft" in caplog.text
    torch.manual_seed(0)
    first = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=True))
    assert not torch.equal(first[:, 18:], plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)[:, 18:])


def test_bad_policies(made):
    with pytest.raises(ModelError, match="greater than or equal to 1"):
        Ngram.install(torch.nn.Module(), {"k": 0})
    with pytest.raises(ModelError, match="is more than longest"):
        Ngram.install(torch.nn.Module(), {"shortest": 6})
    with pytest.raises(ModelError, match="not permitted"):
        Suffix.install(torch.nn.Module(), {"deep": 6})


def test_two_drafters_are_refused(tiny, tmp_path):
    with pytest.raises(AngelslimError, match="suffix"):
        compress(model=tiny("llama"), use=["specdec.ngram", "specdec.suffix"], out=tmp_path / "out")


@pytest.mark.parametrize("draft", ["none", "ngram", "suffix"])
def test_decode_command(tiny, draft):
    base = ["specdec", "decode", "--model", str(tiny("llama", dtype="float32")), "--draft", draft, "--prompt", "abcabcabc", "--max-new-tokens", "20"]
    done = CliRunner().invoke(cli, [*base, "--json"], catch_exceptions=False)
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1 and document["tokens"] == len(document["token_ids"]) and document["acceptance_length"] >= 1
    said = CliRunner().invoke(cli, base, catch_exceptions=False)
    assert said.stdout.rstrip("\n") == document["text"].rstrip("\ufffd\n") or "\ufffd" in document["text"]
    assert "tokens, " in said.stderr


def test_decode_command_refuses_trees_without_a_draft(tiny):
    done = CliRunner().invoke(cli, ["specdec", "decode", "--model", str(tiny("llama")), "--draft", "ngram", "--prompt", "a", "--tree", "2", "5"])
    assert isinstance(done.exception, AngelslimError) and done.exception.exit_code == 2
