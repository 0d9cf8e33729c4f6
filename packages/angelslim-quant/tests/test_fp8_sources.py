"""Block-FP8 checkpoints as sources: every pass makes of one what it makes of its plain values, byte for byte."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim_core import PluginHost, compress
from angelslim_core.errors import AngelslimError, ModelError, NumericError
from angelslim_core.io.checkpoint import Checkpoint
from angelslim_core.passes import TrainedPass
from angelslim_core.source import open_source
from angelslim_core.testing.models import add_mtp, store_as_fp8, tiny_checkpoint

HOST = PluginHost()
HOST.load(["quant"])
BLOCK = (48, 40)  # divides no dimension
# what a pass cannot do without, and what makes it quick or fits it to the small model
OPTIONS = {
    "quant.awq": {"group_size": 16, "grid": 3},
    "quant.fp8_block": {"block_size": 32},
    "quant.gptaq": {"group_size": 16},
    "quant.gptq": {"group_size": 16},
    "quant.int4_rtn": {"group_size": 16},
    "quant.learned_rounding": {"group_size": 16, "iterations": 2},
    "quant.mixed": {"group_size": 16, "bits": 6, "samples": 2},
    "quant.w4a8_fp8": {"group_size": 16},
    "quant.w4a8_int8": {"group_size": 16},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """pairs(architecture, **how): folders of a block-FP8 checkpoint and of its plain values."""
    made = {}

    def make(architecture="llama", mtp=False, **how):
        key = (architecture, mtp, *sorted(how.items()))
        if key not in made:
            folder = tiny_checkpoint(architecture, tmp_path_factory.mktemp("fp8") / "model")
            if mtp:
                add_mtp(folder)
            made[key] = folder, store_as_fp8(folder, **{"block": BLOCK, **how})
        return made[key]

    return make


def run(model, out, pass_id, text, **more):
    pass_class = HOST.registry.find_pass(pass_id)
    options = dict(OPTIONS.get(pass_id, {}))
    if "base" in pass_class.Config.model_fields:  # another checkpoint, stored likewise
        options["base"] = str(model)
    recipe = {"steps": [{"use": pass_id, "with": options}], **more}
    if pass_class.bind(pass_class.Config(**options)).needs_calibration:
        recipe["calibration"] = {"data": str(text), "samples": 4, "tokens": 32}
    host = PluginHost()
    host.load(["quant"])
    compress(model, out=out, recipe=recipe, plugins=["quant"], host=host)
    config = json.loads((out / "config.json").read_text())
    return {p.name: p.read_bytes() for p in out.glob("*.safetensors")}, in_any_order(config.get("quantization_config"))


def in_any_order(config):
    """Lists of modules go by the order of the files; groups are numbered by it."""
    if isinstance(config, dict):
        groups = config.get("config_groups", {}).values()
        found = {key: in_any_order(value) for key, value in config.items() if key != "config_groups"}
        return sorted([*found.items(), *(("group", in_any_order(group)) for group in groups)], key=str)
    return sorted(config, key=str) if isinstance(config, list) else config


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.mark.parametrize("pass_id", sorted(n for n, p in HOST.registry.passes.items() if not issubclass(p, TrainedPass)))
def test_every_pass_reads_block_fp8_as_its_plain_values(pairs, tmp_path, text, pass_id):
    stored, plain = pairs(scattered=True)
    found, expected = run(stored, tmp_path / "fp8", pass_id, text), run(plain, tmp_path / "plain", pass_id, text)
    assert found == expected and found[0]


# two of each kind of reading: streamed, swept
@pytest.mark.parametrize("pass_id", ["quant.int8_dynamic", "quant.gptq"])
@pytest.mark.parametrize(
    ("architecture", "how"),
    [("llama", {"scale": s}) for s in ("BF16", "ue8m0", "F8_E8M0")]
    + [
        ("llama", {"block": (128, 128)}),
        ("qwen3_moe", {"scattered": True}),
        ("deepseek_v3", {"mtp": True, "scattered": True}),
        ("kimi_k2", {"scale": "ue8m0"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{v}" for v in value.values()),
)
def test_other_forms(pairs, tmp_path, text, pass_id, architecture, how):
    stored, plain = pairs(architecture, **how)
    assert run(stored, tmp_path / "fp8", pass_id, text) == run(plain, tmp_path / "plain", pass_id, text)


def test_what_is_not_converted_stays(pairs, tmp_path, text):
    stored, plain = pairs("deepseek_v3", mtp=True, scattered=True)
    kept = json.loads((stored / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.1.mlp.gate" in kept and "lm_head" in kept
    run(stored, tmp_path / "o", "quant.int8_dynamic", text)
    written, before = Checkpoint.open(tmp_path / "o"), Checkpoint.open(plain)
    for name in kept:
        assert torch.equal(written.read(f"{name}.weight"), before.read(f"{name}.weight"))
    # layers for multi-token prediction stay, too, as plain values
    name = "model.layers.2.mlp.experts.0.up_proj.weight"
    assert torch.equal(written.read(name), before.read(name)) and f"{name}_scale_inv" not in written.tensors
    fates = json.loads((tmp_path / "o/angelslim/ledger.json").read_text())
    assert fates.keys() == Checkpoint.open(stored).tensors.keys()


def test_memory_is_one_tensor(pairs, monkeypatch):
    """Reading a tensor touches its own bytes and its scales, nothing else of the shards."""
    from angelslim_core.io import checkpoint

    stored, _ = pairs(scattered=True)
    source, read, plain = open_source(stored), [], checkpoint.read_bytes
    monkeypatch.setattr(checkpoint, "read_bytes", lambda file, offset, nbytes: (read.append(nbytes), plain(file, offset, nbytes))[1])
    name = "model.layers.0.mlp.up_proj.weight"
    source.read(name)
    assert sorted(read) == [3 * 2 * 4, 128 * 64] and source.checkpoint.tensors[name].file != source.checkpoint.tensors[f"{name}_scale_inv"].file


NAME = "model.layers.0.self_attn.q_proj.weight"
SCALE = f"{NAME}_scale_inv"


def drop(name):
    return lambda tensors, config: tensors.pop(name)


def put(name, make):
    return lambda tensors, config: tensors.update({name: make(tensors[name])})


def config_with(**changes):
    return lambda tensors, config: config["quantization_config"].update(changes)


@pytest.mark.parametrize(
    ("damage", "number", "says"),
    [
        (drop(SCALE), 463, "has no scale"),
        (drop(NAME), 59, "has scales but no weight"),
        (put(SCALE, lambda t: t[:1].clone()), 53, "where blocks need"),
        (put(SCALE, lambda t: t.flatten()), 53, "where blocks need"),
        (put(SCALE, lambda t: t.to(torch.int32)), 462, "no dtype of scales"),
        (put(NAME, lambda t: t.float().bfloat16()), 461, "no matrix of F8_E4M3"),
        (put(NAME, lambda t: t.float().to(torch.float8_e5m2)), 461, "no matrix of F8_E4M3"),
        (config_with(activation_scheme="static"), 460, "activation_scheme"),
        (config_with(weight_block_size=None), 54, "weight_block_size"),
        (config_with(weight_block_size=[0, 128]), 54, "weight_block_size"),
    ],
)  # fmt: skip
def test_what_is_no_block_fp8_is_refused_from_the_headers(pairs, tmp_path, damage, number, says):
    stored = damaged(pairs, tmp_path, damage)
    with pytest.raises(ModelError, match=says) as caught:
        compress(stored, ["quant.int8_dynamic"], tmp_path / "o", plugins=["quant"])
    assert caught.value.number == number and caught.value.exit_code == 5 and not (tmp_path / "o").exists()


def damaged(pairs, tmp_path, damage):
    stored = shutil.copytree(pairs()[0], tmp_path / "damaged")
    tensors, config = load_file(stored / "model.safetensors"), json.loads((stored / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    (stored / "config.json").write_text(json.dumps(config))
    return stored


def test_one_scale_a_tensor_is_refused(pairs, tmp_path):
    """FP8 with `weight_scale`, which block FP8 does not have."""

    def damage(tensors, config):
        tensors[f"{NAME}_scale"] = tensors.pop(SCALE).amax()

    with pytest.raises(ModelError, match="stored in FP8") as caught:
        compress(damaged(pairs, tmp_path, damage), ["quant.int8_dynamic"], tmp_path / "o", plugins=["quant"])
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("pass_id", ["quant.int8_dynamic", "quant.fp8_static", "quant.rotate"])
@pytest.mark.parametrize(
    "damage",
    [put(SCALE, lambda t: t.index_fill(0, torch.tensor([0]), float("nan"))), put(NAME, lambda t: torch.full_like(t.view(torch.uint8), 0x7F).view(t.dtype))],
    ids=["scale", "code"],
)
def test_nan_is_an_error_of_one_line(pairs, tmp_path, text, pass_id, damage):
    with pytest.raises(AngelslimError) as caught:
        run(damaged(pairs, tmp_path, damage), tmp_path / "o", pass_id, text)
    assert isinstance(caught.value, NumericError) and "NaN" in str(caught.value) and "q_proj" in str(caught.value)
    assert not (tmp_path / "o").exists()
