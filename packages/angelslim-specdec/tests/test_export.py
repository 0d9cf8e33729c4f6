"""Exports: read back they are the draft bit for bit, and each way in which an engine would take them for another is caught by name."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from angelslim_core.cli.main import cli
from angelslim_core.errors import AngelslimError, ModelError, OutputError, PlanError, UsageError
from angelslim_core.testing.models import tiny_checkpoint
from angelslim_specdec.drafts.base import Batch, Heads, TargetShape
from angelslim_specdec.drafts.dflare import DFlare
from angelslim_specdec.drafts.dflash import DFlash
from angelslim_specdec.drafts.dfly import DFly
from angelslim_specdec.drafts.dspark import DSpark
from angelslim_specdec.drafts.eagle3 import Eagle3
from angelslim_specdec.export import export_draft
from angelslim_specdec.exporters import LAYOUTS, Given, Served
from angelslim_specdec.exporters.base import Fields
from angelslim_specdec.exporters.traps import TRAPS
from angelslim_specdec.folder import open_draft, save_draft
from angelslim_specdec.vocabulary import Vocabulary

LAYERS, H, V = 8, 32, 256
ROPE = {"rope_type": "default", "rope_theta": 250000.0}
TARGET = TargetShape(H, 48, LAYERS, 4, 2, 8, V, 1e-5, ROPE, 4096)
SMALL = {"num_hidden_layers": 2, "aux_hidden_state_layer_ids": (1, 3, 6)}


def drafted(kind, **options):
    """A random draft, without whose norms at random mistakes would be hidden."""
    torch.manual_seed(1)
    draft = kind.from_target(TARGET, **options)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if draft.config.draft_vocab_size < V:
        chosen = Vocabulary.select(torch.rand(V), draft.config.draft_vocab_size, [2])
        draft.d2t.copy_(chosen.d2t)
        draft.t2d.copy_(chosen.t2d)
    return draft


KINDS = {
    "eagle3": lambda: drafted(Eagle3, draft_vocab_size=100),
    "eagle3 full": lambda: drafted(Eagle3, draft_vocab_size=V),
    "eagle3 norms": lambda: drafted(Eagle3, draft_vocab_size=100, norm_before_residual=True, fc_norm=True, norm_output=True),
    "eagle3 one norm": lambda: drafted(Eagle3, draft_vocab_size=100, norm_before_fc=True, aux_hidden_state_layer_ids=(0, 2, 4, 7)),
    "eagle3 llama3": lambda: drafted(
        Eagle3, draft_vocab_size=100, rope_parameters={**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                       "original_max_position_embeddings": 512},
    ),
    "dflash": lambda: drafted(DFlash, block_size=4, **SMALL),
    "dflash small": lambda: drafted(DFlash, draft_vocab_size=100, block_size=4, **SMALL),
    "dspark": lambda: drafted(DSpark, block_size=4, markov_rank=8, **SMALL),
    "dspark small": lambda: drafted(DSpark, draft_vocab_size=100, block_size=4, markov_rank=8, sample_from_anchor=False, **SMALL),
}  # fmt: skip
HOLD = {
    "vllm": set(KINDS), "speculators": set(KINDS), "zlab": {"dflash"},
    "sglang": {"eagle3", "eagle3 full", "eagle3 llama3", "dflash"},
}  # fmt: skip


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    root = tmp_path_factory.mktemp("drafts")
    made = {name: make() for name, make in KINDS.items()}
    for name, draft in made.items():
        save_draft(draft, root / name)
    return SimpleNamespace(root=root, made=made)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(
        "llama", tmp_path_factory.mktemp("target") / "m", hidden_size=H, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=V, max_position_embeddings=4096, dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported(drafts, model, tmp_path_factory):
    """exported(draft, layout): a folder; read it only."""
    root, made = tmp_path_factory.mktemp("exported"), {}

    def make(name, to):
        if (name, to) not in made:
            made[name, to] = root / f"{name} {to}"
            export_draft(drafts.root / name, to, made[name, to], model=str(model))
        return made[name, to]

    return make


def losses(draft):
    """Sums of a training step, in which every weight, rope and norm has its part."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, V, (2, 40), generator=g)
    positions = torch.arange(40).repeat(2, 1)
    taps = len(draft.config.aux_hidden_state_layer_ids)
    batch = Batch(
        ids,
        torch.ones(2, 40, dtype=torch.bool),
        torch.zeros_like(ids),
        positions,
        torch.randn(2, 40, taps * H, generator=g),
        torch.randn(2, 40, H, generator=g),
    )
    heads = Heads(torch.randn(V, H, generator=g), torch.randn(V, H, generator=g))
    torch.manual_seed(5)
    with torch.no_grad():
        return draft.train_loss(batch, heads).sums


@pytest.mark.parametrize(("to", "name"), [(to, name) for to, names in HOLD.items() for name in sorted(names)], ids=str)
def test_read_back_it_computes_the_same_to_the_bit(to, name, drafts, model, exported):
    """A draft made of nothing but the exported folder, as its engine reads it."""
    folder, draft = exported(name, to), drafts.made[name]
    layout, given = LAYOUTS[to], Given(open_draft(drafts.root / name), "F32", 4, Served("m", model))
    found = layout.facts(Fields(json.loads((folder / "config.json").read_text())), given)
    flags = {key: value for key, value in found.flags.items() if key in type(draft.config).model_fields}
    fields = {**draft.config.model_dump(), **found.sizes, **flags, "draft_vocab_size": found.draft_vocab, "rope_parameters": found.ropes[0]}
    again = type(draft)(type(draft.config)(**{**fields, "aux_hidden_state_layer_ids": found.layer_ids, "max_position_embeddings": found.max_positions}))
    weights = load_file(folder / "model.safetensors")
    if given.needs_head:
        head = load_file(model / "model.safetensors")["lm_head.weight"]
        assert torch.equal(weights.pop("lm_head.weight"), head[torch.arange(100) + weights["d2t"]])
    again.load_state_dict({n.replace("layers.0.", "midlayer.") if type(draft) is Eagle3 else n: t for n, t in weights.items()})
    assert torch.equal(losses(again), losses(draft))


@pytest.mark.parametrize("to", LAYOUTS)
def test_what_a_layout_cannot_hold_is_refused(to, drafts, model, tmp_path):
    for name in set(KINDS) - HOLD[to]:
        with pytest.raises(PlanError, match="cannot hold this draft"):
            export_draft(drafts.root / name, to, tmp_path / "out", model=str(model))
    for kind in (DFlare, DFly):
        save_draft(kind.from_target(TARGET, **SMALL), tmp_path / kind.name, replace=True)
        with pytest.raises(PlanError, match=f"no place for a {kind.name} draft"):
            export_draft(tmp_path / kind.name, to, tmp_path / "out", model=str(model))
    for ids in ((3, 1, 6), (1, 1, 6)):  # engines read them in order, each once
        save_draft(drafted(Eagle3, draft_vocab_size=100, aux_hidden_state_layer_ids=ids), tmp_path / "order", replace=True)
        with pytest.raises(PlanError, match=r"ascending order|no place"):
            export_draft(tmp_path / "order", to, tmp_path / "out", model=str(model))
    assert not (tmp_path / "out").exists()


def test_rows_of_the_target_s_head_need_the_target(drafts, tmp_path):
    with pytest.raises(PlanError, match="give the target's folder"):
        export_draft(drafts.root / "dflash small", "vllm", tmp_path / "out")


def layer(config, to):
    return config["transformer_layer_config"] if to == "speculators" else config


def both_ropes(theta):
    def change(config, to):
        layer(config, to)["rope_theta"] = theta
        layer(config, to)["rope_parameters"]["rope_theta"] = theta

    return change


def ids(change):
    """Change the ids wherever a layout keeps them."""

    def edit(config, to):
        for place in (config, config.get("eagle_config", {}), config.get("dflash_config", {})):
            for key in ("eagle_aux_hidden_state_layer_ids", "target_layer_ids", "aux_hidden_state_layer_ids"):
                if key in place:
                    place[key] = change(place[key])

    return edit


def absent(key):
    return lambda config, to: (config.pop(key, None), layer(config, to).pop(key, None))


@pytest.mark.parametrize(("kind", "most"), [("dflash", 3), ("dspark", 4), ("eagle3", None)])
def test_no_more_tokens_than_a_block_has(drafts, tmp_path, kind, most):
    found = export_draft(drafts.root / kind, "vllm", tmp_path / "own")
    assert f'"num_speculative_tokens": {most or 4}' in found["serve"]
    export_draft(drafts.root / kind, "vllm", tmp_path / "most", k=most or 9)
    if most is not None:
        with pytest.raises(UsageError, match=f"holds {most} tokens"):
            export_draft(drafts.root / kind, "vllm", tmp_path / "more", k=most + 1)
        assert not (tmp_path / "more").exists()


EAGLE, BLOCK = ("eagle3", ("vllm", "sglang", "speculators")), ("dflash", ("vllm", "sglang", "speculators", "zlab"))
WRONG = [
    ("tied_head", *EAGLE, lambda c, to: layer(c, to).update(tie_word_embeddings=True)),
    ("rope_theta", *EAGLE, both_ropes(10000.0)),
    ("rope_theta", *BLOCK, both_ropes(1e6)),
    ("rope_theta", *EAGLE, lambda c, to: layer(c, to).update(rope_theta=1e4)),  # older readers
    ("rope_theta", *EAGLE, lambda c, to: layer(c, to)["rope_parameters"].update(rope_theta=1e4)),  # later ones
    ("rope_theta", *EAGLE, lambda c, to: layer(c, to).pop("rope_theta")),
    ("rope_theta", *EAGLE, lambda c, to: layer(c, to)["rope_parameters"].update(rope_type="linear", factor=2.0)),
    ("max_positions", *EAGLE, lambda c, to: layer(c, to).update(max_position_embeddings=2048)),
    ("max_positions", *BLOCK, absent("max_position_embeddings")),
    ("layer_ids", *EAGLE, ids(lambda i: [j + 1 for j in i])),  # the other convention, either way
    ("layer_ids", *EAGLE, ids(lambda i: [j - 1 for j in i])),
    ("layer_ids", *BLOCK, ids(lambda i: [j + 1 for j in i])),
    ("layer_ids", *BLOCK, ids(lambda i: [])),
    ("d2t_offsets", *EAGLE, lambda c, to: c.update(d2t="ids")),
    ("d2t_offsets", *EAGLE, lambda c, to: c.update(d2t="shifted")),
    ("d2t_offsets", *EAGLE, lambda c, to: c.update(d2t="absent")),
    ("norm_flags", "eagle3", ("vllm", "speculators"), lambda c, to: c.update(norm_before_residual=True)),
    ("norm_flags", "eagle3", ("speculators",), absent("norm_before_residual")),  # whose default is True there
    ("norm_flags", "eagle3 norms", ("vllm", "speculators"), absent("norm_output")),
    ("norm_flags", "eagle3 norms", ("vllm",), absent("norm_before_residual")),
    ("block", *BLOCK, lambda c, to: c.update(block_size=16)),
    ("block", "dflash", ("vllm", "sglang", "zlab"), lambda c, to: c["dflash_config"].update(mask_token_id=3)),
    ("block", "dspark", ("vllm", "speculators"), lambda c, to: c.update(sample_from_anchor=False)),
    ("block", "dspark", ("vllm", "speculators"), absent("confidence_head_with_markov")),
    ("sizes", *EAGLE, lambda c, to: layer(c, to).update(num_key_value_heads=4)),
    ("vocabulary", *EAGLE, absent("draft_vocab_size")),
]


@pytest.mark.parametrize(("trap", "name", "to", "wrong"), [(t, n, to, w) for t, n, layouts, w in WRONG for to in layouts])
def test_each_trap_is_caught_by_name(trap, name, to, wrong, drafts, exported, model, tmp_path):
    folder = shutil.copytree(exported(name, to), tmp_path / "wrong")
    assert export_draft(drafts.root / name, to, folder, model=str(model), check=True)["checks"] == list(TRAPS)
    config = json.loads((folder / "config.json").read_text())
    wrong(config, to)
    how = config.pop("d2t", None)
    (folder / "config.json").write_text(json.dumps(config))
    if how:
        weights = load_file(folder / "model.safetensors")
        d2t = weights.pop("d2t")
        if how != "absent":
            weights["d2t"] = d2t + torch.arange(len(d2t)) if how == "ids" else torch.cat((d2t[:-1], d2t[-1:] + 1))
        save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        export_draft(drafts.root / name, to, folder, model=str(model), check=True)
    assert trap in caught.value.where.split(", ")


def test_a_draft_of_fewer_positions_than_its_target_is_refused(model, tmp_path):
    save_draft(drafted(Eagle3, draft_vocab_size=100, max_position_embeddings=1024), tmp_path / "d")
    with pytest.raises(ModelError) as caught:
        export_draft(tmp_path / "d", "vllm", tmp_path / "out", model=str(model))
    assert caught.value.where == "max_positions" and not (tmp_path / "out").exists()


def test_beside_an_fp8_target_sglang_gets_fp16(drafts, model, tmp_path):
    fp8 = shutil.copytree(model, tmp_path / "fp8")
    weights = load_file(fp8 / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, fp8 / "model.safetensors")
    found = export_draft(drafts.root / "eagle3", "sglang", tmp_path / "out", model=str(fp8))
    assert found["dtype"] == "F16" and load_file(tmp_path / "out/model.safetensors")["fc.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float16"
    assert export_draft(drafts.root / "eagle3", "vllm", tmp_path / "v", model=str(fp8))["dtype"] == "F32"
    with pytest.raises(ModelError) as caught:
        export_draft(drafts.root / "eagle3", "sglang", tmp_path / "out2", model=str(fp8), dtype="BF16")
    assert caught.value.where == "fp8_dtype"


def test_a_wrong_exporter_cannot_publish(drafts, monkeypatch, tmp_path):
    layout, right = LAYOUTS["vllm"], LAYOUTS["vllm"].config
    monkeypatch.setattr(layout, "config", lambda given: {**right(given), "eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, raising=False)
    with pytest.raises(ModelError) as caught:
        export_draft(drafts.root / "eagle3", "vllm", tmp_path / "out")
    assert caught.value.where == "layer_ids" and not list(tmp_path.iterdir())


def test_a_changed_weight_is_seen(drafts, exported, model, tmp_path):
    for name, to, tensor in (("eagle3", "vllm", "midlayer.mlp.up_proj.weight"), ("dflash small", "vllm", "lm_head.weight")):
        folder = shutil.copytree(exported(name, to), tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        weights[tensor][0, 0] += 1
        save_file(weights, folder / "model.safetensors")
        with pytest.raises(ModelError) as caught:
            export_draft(drafts.root / name, to, folder, model=str(model), check=True)
        assert caught.value.where == "weights"


def test_another_target_s_folder_is_refused(drafts, tmp_path):
    other = tiny_checkpoint("llama", tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ModelError, match="whose hidden size is 32"):
        export_draft(drafts.root / "eagle3", "vllm", tmp_path / "out", model=str(other))


HOSTILE = [
    {"rope_theta": "fast"}, {"rope_parameters": [1]}, {"eagle_config": 3}, {"eagle_aux_hidden_state_layer_ids": [1.5, 2, 3]}, {"hidden_size": 10**400},
    {"max_position_embeddings": True}, {"tie_word_embeddings": "no"}, {"draft_vocab_size": {"a": 1}}, {"rms_norm_eps": 10**400}, {"dtype": 16},
]  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE, ids=str)
def test_a_hostile_export_is_refused(changes, drafts, exported, tmp_path):
    folder = shutil.copytree(exported("eagle3", "vllm"), tmp_path / "wrong")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError):
        export_draft(drafts.root / "eagle3", "vllm", folder, check=True)


def run(*arguments):
    return CliRunner().invoke(cli, ["specdec", "export", *map(str, arguments)])


@pytest.mark.parametrize("to", ["vllm", "sglang", "speculators"])
def test_the_command(to, drafts, model, tmp_path):
    given = ("--draft", drafts.root / "eagle3", "--to", to, "--out", tmp_path / "out")
    done = run(*given, "--model", model, "--k", 5, "--json")
    assert done.exit_code == 0, done.exception
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1 and document["tensors"] == 15 and not document["warnings"] and str(tmp_path / "out") in document["serve"]
    config, weights = json.loads((tmp_path / "out/config.json").read_text()), load_file(tmp_path / "out/model.safetensors")
    assert tuple(weights["fc.weight"].shape) == (H, 3 * H) and weights["d2t"].dtype == torch.int64
    assert ("layers.0." if to == "speculators" else "midlayer.") + "mlp.up_proj.weight" in weights
    if to == "speculators":
        assert config["speculators_model_type"] == "eagle3" and config["speculators_config"]["verifier"]["name_or_path"] == str(model)
        assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    assert isinstance(run(*given).exception, OutputError)
    assert run(*given, "--replace").exit_code == 0 and run(*given, "--check").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert isinstance(run("--draft", drafts.root / "eagle3", "--to", to, "--out", drafts.root / "eagle3", "--replace").exception, AngelslimError)
    assert (drafts.root / "eagle3/model.safetensors").is_file()
