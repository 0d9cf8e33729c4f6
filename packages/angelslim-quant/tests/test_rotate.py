"""Rotation leaves the function of a model as it was, refuses where it could not, and every later step sees it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import angelslim_quant.plugin as plugin
from angelslim_core import ModelPass, PluginHost, compress, hookimpl
from angelslim_core.cli.main import main
from angelslim_core.errors import PlanError
from angelslim_core.loading import load_model
from angelslim_core.pipeline import prepare
from angelslim_core.source import open_any, open_source
from angelslim_core.testing.conformance import check_pass
from angelslim_core.testing.models import TINY, add_mtp, stack_experts
from angelslim_core.validation import validate
from angelslim_quant.numerics.hadamard import WILLIAMSON, Rotation, factors, paley, williamson
from angelslim_quant.rotated import Change, rotate

IDS = torch.arange(3, 99)[None]
PROJECTORS = tuple(f"{name}.{kind}" for name in ("linear_fc2", "merger.mlp.2", "projector.linear_2", "projector.linear") for kind in ("weight", "bias"))
EXACT = sorted(set(TINY) - {"gemma3_text"})


def logits(folder):
    model = load_model(folder, "cpu", emulate=False).model
    with torch.no_grad():
        return model(IDS).logits.float()


def rotated(model, out, **options):
    compress(model, out=out, recipe={"steps": [{"use": "quant.rotate", "with": options}]})
    return out


def assert_same_function(model, out):
    before, after = logits(model), logits(out)
    assert float((after - before).abs().max()) < 1e-3 * max(1.0, float(before.abs().max()))
    assert float(before.std()) > 1e-2  # logits that say something


@pytest.mark.parametrize("order", [12, 20, 28, 36, 52, 60, 76, 100, 108, 148, 180, 344])
def test_paley_matrices(order):
    matrix = paley(order)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


@pytest.mark.parametrize("order", sorted(WILLIAMSON))
def test_williamson_matrices(order):
    matrix = williamson(order)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


@pytest.mark.parametrize("core", [1, 12, 20, 28, 36, 40, 52, 60, 108, 140, 156, 172])
def test_every_core_times_a_power_of_two(core):
    assert all(Rotation(core << k).block == core << k for k in range(8))


@pytest.mark.parametrize(("size", "block"), [(64, 64), (576, 576), (40, 40), (896, 896), (104, 104), (156, 156), (188, 4), (30, 2)])
@pytest.mark.parametrize("seed", [None, 7])
def test_orthogonal(size, block, seed):
    rotation = Rotation(size, seed)
    matrix = rotation(torch.eye(size))
    assert rotation.block == block
    assert torch.allclose(matrix.T @ matrix, torch.eye(size), atol=1e-5)
    assert torch.allclose(matrix[:block, :block].abs(), torch.full((block, block), block**-0.5))
    twice = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotation(twice), twice @ torch.block_diag(matrix, matrix), atol=1e-4)


def test_common_widths_are_mixed_as_a_whole():
    for size in (896, 1536, 2048, 2560, 2880, 3584, 4096, 5120, 6144, 6656, 7168, 8192):
        assert Rotation(size).block == size and max(factors(size)) <= 344


def test_pieces_make_the_whole(monkeypatch):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(40, generator=torch.Generator().manual_seed(1))
    wide, high = Rotation(40), Rotation(12)
    for change, factor in ((Change(inputs=wide, fold="n"), scale), (Change(outputs=high), None), (Change(inputs=wide, outputs=high), None)):
        results = []
        for chunk in (1 << 24, 64):
            monkeypatch.setattr("angelslim_quant.rotated.CHUNK", chunk)
            results.append(weight.clone())
            rotate(results[-1], change, factor, "cpu")
        expected = weight * (1 if factor is None else factor)
        expected = expected @ wide(torch.eye(40)) if change.inputs else expected
        expected = torch.block_diag(*[high(torch.eye(12))] * 2).T @ expected if change.outputs else expected
        assert all(torch.allclose(r, expected, atol=1e-5) for r in results)


@pytest.mark.parametrize("architecture", EXACT)
def test_function_kept(tiny, tmp_path, architecture):
    model = tiny(architecture, dtype="float32")
    out = rotated(model, tmp_path / "out", randomize=True)
    assert_same_function(model, out)
    assert validate(out, model)["ok"]
    before, after = open_source(model), open_source(out)
    assert before.dtypes == after.dtypes
    norm = next(n for n in before.dtypes if n.endswith("layers.1.input_layernorm.weight"))
    assert len(after.read(norm).unique()) == 1
    embedding = next(n for n in before.dtypes if "embed_tokens" in n)
    assert not torch.allclose(after.read(embedding), before.read(embedding), atol=1e-2)


@pytest.mark.parametrize(("options", "changed"), [({"r1": False}, {"v_proj", "o_proj"}), ({"r2": False}, None)])
def test_each_rotation_alone(tiny, tmp_path, options, changed):
    model = tiny("qwen2", dtype="float32")
    out = rotated(model, tmp_path / "out", **options)
    assert_same_function(model, out)
    before, after = open_source(model), open_source(out)
    different = {n.split(".")[-2] for n in before.dtypes if not before.read(n).equal(after.read(n))}
    assert different == changed if changed else {"embed_tokens", "lm_head", "norm", "q_proj", "down_proj"} <= different


@pytest.mark.parametrize("architecture", ["llama", "qwen3_next", "qwen3_vl"])
def test_a_tied_head_is_untied(tiny, tmp_path, architecture):
    model = tiny(architecture, dtype="float32", tie_word_embeddings=True)
    assert "lm_head.weight" not in open_source(model).dtypes
    out = rotated(model, tmp_path / "out")
    assert_same_function(model, out)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config.get("text_config", {}).get("tie_word_embeddings", False) is False
    source = open_source(out)
    assert not source.read("lm_head.weight").equal(source.read(next(n for n in source.dtypes if "embed_tokens" in n)))
    assert json.loads((out / "angelslim/ledger.json").read_text())["lm_head.weight"] == {"fate": "transformed"}
    assert validate(out, model)["ok"]


def test_biases_of_what_writes_the_stream(tiny, tmp_path):
    model = tiny("llama", dtype="float32", attention_bias=True, mlp_bias=True)
    assert {"model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.down_proj.bias"} <= open_source(model).dtypes.keys()
    assert_same_function(model, rotated(model, tmp_path / "out"))


def test_stacked_experts(tiny_copy, tmp_path):
    model = tiny_copy("qwen3_moe", dtype="float32")
    stack_experts(model)
    assert_same_function(model, rotated(model, tmp_path / "out"))


def test_a_width_without_a_matrix_is_rotated_in_blocks(tiny, tmp_path):
    model = tiny("llama", dtype="float32", hidden_size=188)  # no matrix of order 188 is built
    out = rotated(model, tmp_path / "out")
    assert_same_function(model, out)
    assert any("blocks of 4" in w for w in json.loads((out / "angelslim/metrics.json").read_text())["warnings"])


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen3_5", "qwen3_5_moe", "qwen2_5_vl", "llava", "qwen2_audio"])
def test_images_enter_the_rotated_stream(tiny, tmp_path, architecture):
    model = tiny(architecture, dtype="float32")
    out = rotated(model, tmp_path / "out")
    assert_same_function(model, out)
    before, after = open_source(model), open_source(out)
    rotation = Rotation(64)
    projectors = [n for n in before.dtypes if n.endswith(PROJECTORS) and "blocks" not in n]
    assert projectors
    for name in projectors:
        assert torch.allclose(after.read(name).T, rotation(before.read(name).T), atol=1e-5), name
    kept = [n for n in before.dtypes if "visual.blocks" in n or "_tower" in n]
    assert kept and all(after.read(n).equal(before.read(n)) for n in kept)


def test_logits_with_an_image(tiny_copy, tmp_path):
    """Image features enter as embeddings and, after the first layers, are added to the stream (deepstack)."""
    model = tiny_copy("qwen3_vl", dtype="float32")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7}))
    out = rotated(model, tmp_path / "out", r4=True)
    ids = torch.tensor([[20, 7, 5, 30, 31, 32]])
    patches = torch.randn(4, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))

    def seen(folder, scale):
        with torch.no_grad():
            image = {"pixel_values": patches * scale, "image_grid_thw": torch.tensor([[1, 2, 2]]), "mm_token_type_ids": (ids == 5).int()}
            return load_model(folder, "cpu").model(input_ids=ids, **image).logits

    before = seen(model, 1)
    assert float((before - seen(model, -1)).abs().max()) > 1e-2  # the image matters
    assert torch.allclose(seen(out, 1), before, atol=1e-3 * float(before.abs().max()))


def test_multi_token_prediction_is_left_out_with_a_reason(tiny, tiny_copy, tmp_path):
    model = tiny_copy("glm4_moe", dtype="float32")
    add_mtp(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    out = rotated(model, tmp_path / "out")
    assert_same_function(tiny("glm4_moe", dtype="float32"), out)
    assert not any(n.startswith("model.layers.2.") for n in open_source(out).dtypes)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert json.loads((out / "angelslim/ledger.json").read_text())["model.layers.2.eh_proj.weight"]["fate"] == "dropped"
    assert any("multi-token" in w for w in json.loads((out / "angelslim/metrics.json").read_text())["warnings"])
    assert validate(out, model)["ok"]


def test_the_step_is_in_every_record(tiny, tmp_path):
    out = rotated(tiny(), tmp_path / "out")
    records = {n: json.loads((out / f"angelslim/{n}.json").read_text()) for n in ("plan", "ledger", "metrics")}
    (step,) = records["plan"]["plan"]
    tensors = open_source(out).dtypes
    assert step["pass"] == "quant.rotate" and step["tensors"] == len(tensors)
    assert {row["action"] for row in records["plan"]["tensors"]} == {"transform"}
    assert {entry["fate"] for entry in records["ledger"].values()} == {"transformed"} and records["ledger"].keys() == tensors.keys()
    assert records["metrics"]["passes"][0]["metrics"] == {"tensors": len(tensors), "r1": 64, "r1_block": 64, "r2": 16, "r2_block": 16, "r2_layers": 2}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("then", ["quant.int4_rtn", "quant.gptq"])
def test_later_steps_see_rotated_weights(tiny, tmp_path, then):
    model, text = tiny("llama", tie_word_embeddings=True), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    steps = [{"use": "quant.rotate"}, {"use": then, "with": {"bits": 8, "group_size": 32}}]
    compress(model, out=tmp_path / "out", recipe={"steps": steps, "calibration": {"data": str(text), "samples": 2, "tokens": 16}})
    plain, out = open_source(rotated(model, tmp_path / "plain")), open_any(tmp_path / "out")
    assert len(out.quantized) == 14
    for name in plain.dtypes:
        wanted, got = plain.read(name).float(), out.read(name).float()
        assert float((got - wanted).norm() / wanted.norm()) < 0.02, name
    assert json.loads((tmp_path / "out/angelslim/ledger.json").read_text())["model.layers.0.mlp.up_proj.weight"]["transformed"]


def test_with_int4_through_the_command_line(tiny, tmp_path, capsys):
    model, out = tiny("qwen2", tie_word_embeddings=True), tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps:\n  - use: quant.rotate\n  - use: quant.int4_rtn\n    with: {group_size: 32}\n")
    for command in (["run", str(recipe), "--model", str(model), "--out", str(out)], ["validate", str(out), "--base", str(model), "--run"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0, capsys.readouterr().err
    assert load_model(out, "cpu", packed=False).backend == "transformers"


def test_conformance(tmp_path):
    check_pass("quant", plugin, "quant.rotate", tmp_path, randomize=True)


def refused(model, *steps):
    with pytest.raises(PlanError) as caught:
        prepare(model, recipe={"steps": [{"use": s} if isinstance(s, str) else s for s in steps]})
    return caught.value


def test_what_is_not_exact_is_refused(tiny, tmp_path):
    model = tiny("gemma3_text", dtype="float32")
    assert "post_attention_layernorm" in refused(model, "quant.rotate").where
    assert_same_function(model, rotated(model, tmp_path / "out", r1=False))
    images = tiny("gemma3", dtype="float32")
    assert "projector" in refused(images, "quant.rotate").where
    out = rotated(images, tmp_path / "images", r1=False)
    assert_same_function(images, out)
    before, after = open_source(images), open_source(out)
    assert all(after.read(n).equal(before.read(n)) for n in before.dtypes if "vision" in n or "projector" in n)
    latent = tiny("deepseek_v3", dtype="float32")
    assert "head by head" in refused(latent, {"use": "quant.rotate", "with": {"r1": False}}).what


def test_tensors_of_unknown_place_are_refused(tiny_copy):
    for name, shape in (("model.adapter.weight", (64, 64)), ("model.visual.head.weight", (64, 32))):
        model = tiny_copy(name=name)
        tensors = load_file(model / "model.safetensors")
        save_file({**tensors, name: torch.zeros(shape)}, model / "model.safetensors", metadata={"format": "pt"})
        assert refused(model, "quant.rotate").where == name


def test_order_and_targets(tiny):
    assert refused(tiny(), "quant.int8_dynamic", "quant.rotate").code == "AS-PLN-241"
    assert refused(tiny(), {"use": "quant.rotate", "targets": ["mlp"]}).code == "AS-PLN-242"


def test_signs_follow_the_seed(tiny, tmp_path):
    def embedding(seed, **options):
        out = tmp_path / f"{seed}{options}"
        compress(tiny(), out=out, recipe={"steps": [{"use": "quant.rotate", "with": options}]}, seed=seed)
        return open_source(out).read("model.embed_tokens.weight")

    assert not embedding(1, randomize=True).equal(embedding(2, randomize=True))
    assert embedding(1).equal(embedding(2))


def test_a_block_fp8_source(tiny, tmp_path):
    compress(tiny("deepseek_v3", dtype="float32"), out=tmp_path / "fp8", recipe={"steps": [{"use": "quant.fp8_block", "with": {"block_size": 32}}]})
    assert_same_function(tmp_path / "fp8", rotated(tmp_path / "fp8", tmp_path / "out"))


class Train(ModelPass):
    """Doubles the last norm."""

    id = "toy.train"

    def run(self, model, context):
        model.model.norm.weight.data.mul_(2)
        return {}


class Toy:
    ANGELSLIM_HOOKS = 1

    @hookimpl
    def angelslim_register_passes(self):
        return [Train]


def test_training_comes_before_or_after(tiny, tmp_path):
    def run(out, *ids):
        host = PluginHost()
        host.register_module("toy", Toy())
        compress(tiny(dtype="float32"), list(ids), tmp_path / out, host=host, plugins=["toy", "quant"])

    with pytest.raises(PlanError) as caught:
        run("never", "toy.train", "quant.rotate", "toy.train")
    assert caught.value.code == "AS-PLN-981"
    run("trained", "toy.train")
    run("out", "toy.train", "quant.rotate")
    assert_same_function(tmp_path / "trained", tmp_path / "out")
