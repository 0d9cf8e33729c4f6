"""Draft folders: what is written is read again, and what is no draft, or another target's, is refused before it is used."""

import json
import os
import pickle
import struct

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from angelslim_core.cli.main import cli
from angelslim_core.errors import ModelError, OutputError
from angelslim_specdec.drafts.base import TargetShape
from angelslim_specdec.drafts.dspark import DSpark
from angelslim_specdec.drafts.eagle3 import Eagle3
from angelslim_specdec.folder import load_draft, open_draft, save_draft
from angelslim_specdec.vocabulary import Vocabulary

TARGET = TargetShape(32, 48, 6, 4, 2, 8, 64, 1e-6, {"rope_type": "default", "rope_theta": 10000.0}, 256, fingerprint="abc")


def eagle3(**options):
    torch.manual_seed(0)
    draft = Eagle3.from_target(TARGET, draft_vocab_size=24, **options)
    chosen = Vocabulary.select(torch.rand(64), 24)
    draft.d2t.copy_(chosen.d2t)
    draft.t2d.copy_(chosen.t2d)
    return draft


@pytest.fixture
def folder(tmp_path):
    save_draft(eagle3(), tmp_path / "draft")
    return tmp_path / "draft"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_draft_comes_back_bit_for_bit(tmp_path):
    for draft in (eagle3(fc_norm=True, norm_before_fc=True), DSpark.from_target(TARGET, num_hidden_layers=2, block_size=4, markov_rank=8)):
        save_draft(draft, tmp_path / draft.name, shard_bytes=8192)
        assert len(list((tmp_path / draft.name).glob("model-*-of-*.safetensors"))) > 1
        state = torch.get_rng_state()
        again = load_draft(tmp_path / draft.name, TARGET)
        assert torch.equal(state, torch.get_rng_state())
        assert type(again) is type(draft) and again.config == draft.config and not again.training
        ours, theirs = draft.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
        assert not any(t.is_meta for t in again.buffers())


def test_the_folder_shares_embedding_and_head_and_says_its_sizes_at_top_level(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Eagle3LlamaForCausalLM"]
    assert (config["hidden_size"], config["vocab_size"], config["draft_vocab_size"]) == (32, 64, 24)
    assert not any("embed" in name for name in load_file(folder / "model.safetensors"))


def test_dtypes(tmp_path):
    save_draft(eagle3(), tmp_path / "d", dtype=torch.bfloat16)
    assert {t.dtype for t in load_draft(tmp_path / "d").state_dict().values()} == {torch.bfloat16, torch.int64, torch.bool}
    assert load_draft(tmp_path / "d", dtype=torch.float32).fc.weight.dtype == torch.float32


def test_a_folder_appears_whole_or_not_at_all(folder, monkeypatch):
    with pytest.raises(OutputError):
        save_draft(eagle3(), folder)
    before = (folder / "model.safetensors").read_bytes()

    def die(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("angelslim_specdec.folder.write_tensors", die)
        with pytest.raises(RuntimeError):
            save_draft(eagle3(), folder, replace=True)
    assert (folder / "model.safetensors").read_bytes() == before and [p.name for p in folder.parent.iterdir()] == ["draft"]
    save_draft(eagle3(norm_output=True), folder, replace=True)
    assert load_draft(folder).config.norm_output and [p.name for p in folder.parent.iterdir()] == ["draft"]


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"vocab_size": 65}, {"num_layers": 7}, {"fingerprint": "other"}], ids=str)
def test_a_draft_of_another_target_is_refused(folder, change):
    other = TargetShape(**{**TARGET.__dict__, **change})
    with pytest.raises(ModelError, match=r"another target|whose"):
        open_draft(folder, other)
    assert open_draft(folder, TARGET).config.hidden_size == 32


def test_a_draft_of_no_fingerprint_fits_every_target_of_its_shape(folder):
    edit(folder, target_fingerprint="")
    open_draft(folder, TARGET)


HOSTILE = {
    "no architectures": {"architectures": None},
    "another architecture": {"architectures": ["LlamaForCausalLM"]},
    "two architectures": {"architectures": ["Eagle3LlamaForCausalLM"] * 2},
    "architectures of numbers": {"architectures": [1]},
    "hidden size of another": {"hidden_size": 16},
    "huge hidden size": {"hidden_size": 10**30},
    "large hidden size": {"hidden_size": 1 << 23},
    "negative": {"intermediate_size": -1},
    "zero": {"head_dim": 0},
    "a string": {"hidden_size": "32"},
    "a truth": {"num_attention_heads": True},
    "a list": {"hidden_size": [32]},
    "an object": {"vocab_size": {"a": 1}},
    "a real": {"num_key_value_heads": 2.5},
    "layers without end": {"num_target_layers": 10**9},
    "odd heads": {"num_attention_heads": 3},
    "vocabulary larger than the target's": {"draft_vocab_size": 65},
    "vocabulary of another": {"draft_vocab_size": 23},
    "layer ids beyond": {"aux_hidden_state_layer_ids": [1, 2, 6]},
    "layer ids below": {"aux_hidden_state_layer_ids": [-1, 2, 3]},
    "layer ids of text": {"aux_hidden_state_layer_ids": ["1", "2", "3"]},
    "two layers": {"aux_hidden_state_layer_ids": [1, 2]},
    "no theta": {"rope_parameters": {"rope_type": "default"}},
    "theta as text": {"rope_parameters": {"rope_theta": "1e4"}},
    "theta of zero": {"rope_parameters": {"rope_theta": 0}},
    "theta without end": {"rope_parameters": {"rope_theta": 10**400}},
    "rope of objects": {"rope_parameters": {"rope_theta": 1e4, "factor": {"a": 1}}},
    "rope of an unknown type": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "../../x"}},
    "rope that lacks its factor": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}},
    "rope no object": {"rope_parameters": 3},
    "eps of zero": {"rms_norm_eps": 0},
    "a flag as text": {"norm_output": "yes"},
    "a key nobody knows": {"auto_map": {"AutoModel": "evil.Model"}},
    "more norms than stored": {"fc_norm": True},
    "positions": {"max_position_embeddings": 10**18},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_config_is_one_line_and_exit_5(folder, changes):
    edit(folder, **changes)
    with pytest.raises(ModelError):
        load_draft(folder)
    done = CliRunner().invoke(cli, ["specdec", "export", "--draft", str(folder), "--to", "vllm", "--out", str(folder.parent / "out")])
    assert isinstance(done.exception, ModelError) and done.exception.exit_code == 5
    assert not (folder.parent / "out").exists()


def raw(folder, text):
    (folder / "config.json").write_bytes(text)


def tensors(folder, change):
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": 1}))


def link(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def index(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "../../secret.safetensors"}}))


def header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def truncated(folder):
    os.truncate(folder / "model.safetensors", 4000)


BROKEN = {
    "no JSON": lambda f: raw(f, b"{"),
    "a list": lambda f: raw(f, b"[1]"),
    "nested without end": lambda f: raw(f, b'{"a":' * 100000),
    "a number without end": lambda f: raw(f, b'{"hidden_size":' + b"9" * 5000 + b"}"),
    "not a number": lambda f: raw(f, b'{"rms_norm_eps": NaN}'),
    "no config": lambda f: (f / "config.json").unlink(),
    "pickle": pickled,
    "a link out": link,
    "an index that leaves the folder": index,
    "an endless header": header,
    "truncated": truncated,
    "a tensor less": lambda f: tensors(f, lambda t: t.pop("fc.weight")),
    "a tensor more": lambda f: tensors(f, lambda t: t.update(extra=torch.ones(1))),
    "a tensor of another shape": lambda f: tensors(f, lambda t: t.update({"norm.weight": torch.ones(31)})),
    "a norm of whole numbers": lambda f: tensors(f, lambda t: t.update({"norm.weight": torch.ones(32, dtype=torch.int32)})),
    "d2t of ids": lambda f: tensors(f, lambda t: t.update(d2t=t["t2d"].nonzero()[:, 0].contiguous())),
    "d2t of int32": lambda f: tensors(f, lambda t: t.update(d2t=t["d2t"].int())),
    "t2d of another selection": lambda f: tensors(f, lambda t: t.update(t2d=~t["t2d"])),
    "not finite": lambda f: tensors(f, lambda t: t["fc.weight"].fill_(torch.nan)),
    "no folder": lambda f: f.rename(f.parent / "moved"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_folder_is_refused(folder, damage):
    damage(folder)
    with pytest.raises(ModelError):
        load_draft(folder)
