"""From recipe to published folder: the four kinds of pass, ledger, gates, resume, and what must leave nothing behind."""

import errno
import json
import os
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from pydantic import Field
from safetensors.torch import load_file, save_file

from angelslim_core import LayerPass, ModelPass, PassConfig, PluginHost, RuntimePass, TensorPass, compress, hookimpl, load, stream
from angelslim_core.errors import EngineError, ModelError, NumericError, OutputError, PlanError, RecipeError, ResourceError, StoppedError, UsageError
from angelslim_core.io.writer import ShardWriter, disk_error
from angelslim_core.pipeline import prepare
from angelslim_core.source import open_source
from angelslim_core.testing.models import add_mtp, split_shards, stack_experts

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


class Double(TensorPass):
    """Doubles weights."""

    id = "toy.double"

    class Config(PassConfig):
        factor: float = Field(2.0, description="Factor.")

    def apply(self, weights, context):
        return {site: weight * self.config.factor for site, weight in weights.items()}


class Scale(LayerPass):
    """Adds the mean input magnitude to every weight, so that it depends on what was captured."""

    id = "toy.scale"

    def run(self, layer):
        seen = {}
        layer.observe(lambda site, x: seen.setdefault(site, []).append(x.float().abs().mean()))
        for site, values in seen.items():
            linear = layer.linear(site)
            linear.weight.data = (linear.weight + torch.stack(values).mean().to(linear.weight.dtype)).detach()
        return {"linears": len(seen)}


class Train(ModelPass):
    """Sets every norm to one."""

    id = "toy.train"

    def run(self, model, context):
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.fill_(1)
        return {"loss": 0.5}


class Toward(TensorPass):
    """Goes half of the way to another checkpoint, which is read ahead."""

    id = "toy.toward"
    threads: ClassVar[set[int]] = set()

    class Config(PassConfig):
        base: Path = Field(description="The other checkpoint.")

    def prepare(self, context):
        self._base = open_source(self.config.base)

    def fetch(self, sites, context):
        self.threads.add(get_ident())
        return {site: self._base.read(site.tensor, site.part) for site in sites}

    def apply(self, weights, context):
        return self.apply_with(weights, self.fetch([*weights], context), context)

    def apply_with(self, weights, fetched, context):
        assert weights.keys() == fetched.keys()
        return {site: ((w.float() + fetched[site].float()) / 2).to(w.dtype) for site, w in weights.items()}


class Bias(RuntimePass):
    """Multiplies logits when the model is loaded."""

    id = "toy.bias"

    class Config(PassConfig):
        factor: float = Field(3.0, description="Factor.")

    def policy(self, context):
        return {"factor": self.config.factor}

    @classmethod
    def install(cls, model, policy):
        factor = float(policy["factor"])
        model.get_output_embeddings().register_forward_hook(lambda module, args, out: out * factor)


class Noted(Bias):
    """Multiplies logits by what a file in the artifact says."""

    id = "toy.noted"

    class Config(PassConfig):
        note: Path = Field(description="A file.")

    def policy(self, context):
        return {"file": "made/factor"}

    def make(self, loaded, folder, context):
        assert loaded.policies == [] and not folder.name.endswith("o") and loaded.tokenizer is not None
        (folder / "made").mkdir()
        (folder / "made/factor").write_text(self.config.note.read_text())
        with torch.no_grad():
            return {"first": float(loaded.model(torch.tensor([[5]])).logits[0, 0, 0])}

    @classmethod
    def install_from(cls, folder, model, policy):
        cls.install(model, {"factor": (folder / policy["file"]).read_text()})


class Claims(Double):
    """Claims the weight."""

    id = "toy.claims"
    claims = frozenset({"linear.weight"})


class Needs(Double):
    """Needs another pass before it."""

    id = "toy.needs"
    requires = frozenset({"toy.double"})


class Clashes(Double):
    """Excludes another pass."""

    id = "toy.clashes"
    conflicts = frozenset({"toy.double"})


@hookimpl
def angelslim_register_passes():
    return [Double, Toward, Scale, Train, Bias, Noted, Claims, Needs, Clashes]


def toys(**hooks):
    host = PluginHost()
    host.register_module("toy", SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes, **hooks))
    return host


def run(model, out, *use, host=None, **options):
    return compress(model, list(use), out, plugins=["toy", "quant"], host=host or toys(), **options)


def tensors(folder):
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def calibrated(text, *steps, **more):
    return {"steps": [{"use": s} if isinstance(s, str) else s for s in steps], "calibration": {"data": str(text), "samples": 4, "tokens": 16, **more}}


def test_a_tensor_pass_changes_its_targets_and_nothing_else(tiny, tmp_path):
    run(tiny(), tmp_path / "o", "toy.double", overrides=["steps[0].targets=['layers[1:].mlp']"])
    before, after = tensors(tiny()), tensors(tmp_path / "o")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].equal(tensor * 2 if "layers.1.mlp" in name else tensor), name


def test_steps_run_in_order_and_ignore_takes_out(tiny, tmp_path):
    recipe = {"steps": [{"use": "toy.double"}, {"use": "toy.double", "with": {"factor": 3}, "ignore": ["v"]}]}
    compress(tiny(), out=tmp_path / "o", recipe=recipe, plugins=["toy"], host=toys())
    before, after = tensors(tiny()), tensors(tmp_path / "o")
    assert after["model.layers.0.self_attn.q_proj.weight"].equal(before["model.layers.0.self_attn.q_proj.weight"] * 6)
    assert after["model.layers.0.self_attn.v_proj.weight"].equal(before["model.layers.0.self_attn.v_proj.weight"] * 2)


def test_what_a_pass_fetches_is_read_ahead(tiny, tiny_copy, tmp_path, text):
    """Also in a sweep, after a step that changed the weights, and of experts cut out of a stacked tensor."""
    step = {"use": "toy.toward", "with": {"base": str(tiny())}}
    double = run(tiny(), tmp_path / "double", "toy.double").path
    Toward.threads.clear()
    options = {"plugins": ["toy", "quant"], "host": toys()}
    result = compress(tiny(), out=tmp_path / "o", recipe={"steps": [{"use": "toy.double"}, step]}, **options)
    assert Toward.threads and get_ident() not in Toward.threads
    before, twice, after = tensors(tiny()), tensors(double), tensors(result.path)
    for name, tensor in before.items():
        assert torch.equal(after[name], ((twice[name].float() + tensor.float()) / 2).to(tensor.dtype)), name
    swept = compress(
        tiny(), out=tmp_path / "s", recipe=calibrated(text, {"use": "toy.double"}, step, {"use": "toy.scale", "targets": ["layers[1:2].q"]}), **options
    )
    changed = [n for n, t in tensors(swept.path).items() if not torch.equal(t, after[n])]
    assert changed == ["model.layers.1.self_attn.q_proj.weight"]
    stacked = tiny_copy("qwen3_moe")
    stack_experts(stacked)
    result = compress(stacked, out=tmp_path / "m", recipe={"steps": [{"use": "toy.double"}, {**step, "with": {"base": str(stacked)}}]}, **options)
    before, after = tensors(stacked), tensors(result.path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert before.keys() == after.keys() and torch.equal(after[name], (before[name].float() * 1.5).to(before[name].dtype))


def test_layer_and_tensor_passes_share_a_sweep(tiny, tmp_path, text):
    result = compress(
        tiny(), out=tmp_path / "o", recipe=calibrated(text, "toy.scale", "toy.double", "quant.int8_dynamic"), plugins=["toy", "quant"], host=toys()
    )
    assert [p["id"] for p in result.passes] == ["toy.scale", "toy.double", "quant.int8_dynamic"]
    assert result.passes[0]["metrics"]["linears"] == 14 and result.passes[2]["metrics"]["linears"] == 14
    after = tensors(tmp_path / "o")
    name = "model.layers.0.self_attn.q_proj.weight"
    restored = after[name].float() * after[f"{name}_scale"].float()
    moved = restored / 2 - tensors(tiny())[name].float()
    assert float(moved.std()) < 0.01 < float(moved.mean())  # the same positive amount everywhere, doubled


def test_the_sweep_sees_what_was_stored_before(tiny, tmp_path, text):
    """The second layer's inputs change when the first layer is quantized coarsely."""
    plain = compress(tiny(), out=tmp_path / "a", recipe=calibrated(text, {"use": "toy.scale", "targets": ["layers[1:2]"]}), plugins=["toy"], host=toys())
    steps = [{"use": "quant.int4_rtn", "with": {"bits": 2, "group_size": 32}, "targets": ["layers[0:1]"]}, {"use": "toy.scale", "targets": ["layers[1:2]"]}]
    coarse = compress(tiny(), out=tmp_path / "b", recipe=calibrated(text, *steps), plugins=["toy", "quant"], host=toys())
    assert plain.fallbacks == coarse.fallbacks == []
    name = "model.layers.1.mlp.up_proj.weight"
    assert not tensors(tmp_path / "a")[name].equal(tensors(tmp_path / "b")[name])


def test_model_passes_come_first_and_feed_the_others(tiny, tmp_path):
    result = run(tiny(), tmp_path / "o", "toy.train", "toy.double")
    after = tensors(tmp_path / "o")
    assert bool((after["model.norm.weight"] == 1).all()) and result.passes[0]["metrics"] == {"loss": 0.5}
    assert after["model.layers.0.mlp.up_proj.weight"].equal(tensors(tiny())["model.layers.0.mlp.up_proj.weight"] * 2)
    with pytest.raises(PlanError, match="must come before"):
        run(tiny(), tmp_path / "p", "toy.double", "toy.train")


def test_runtime_policies_are_left_and_installed(tiny, tmp_path):
    run(tiny(), tmp_path / "o", "toy.bias")
    assert json.loads((tmp_path / "o/angelslim/runtime.json").read_text()) == {"policies": [{"pass": "toy.bias", "policy": {"factor": 3.0}}]}
    from angelslim_core.loading import load_model

    ids = torch.tensor([[5, 6, 7]])
    loaded = load_model(tmp_path / "o", host=toys())
    assert loaded.policies == ["toy.bias"]
    with torch.no_grad():
        assert torch.allclose(loaded.model(ids).logits, load(tiny())[0](ids).logits * 3)
    with pytest.raises(ModelError, match=r"toy\.bias"):  # a stranger's policy is not loaded unasked
        load(tmp_path / "o")


def test_a_runtime_pass_makes_files_from_the_output_and_finds_them_again(tiny, tmp_path):
    from angelslim_core.loading import load_model

    (tmp_path / "note").write_text("2.5")
    model = tiny(dtype="float32")
    recipe = {"steps": [{"use": "toy.noted", "with": {"note": str(tmp_path / "note")}}, {"use": "quant.int8_dynamic"}]}
    result = compress(model, out=tmp_path / "o", recipe=recipe, plugins=["toy", "quant"], host=toys())
    written = tmp_path / "o/angelslim"
    assert "made/factor" in (written / "SHA256SUMS").read_text() and not any(str(tmp_path) in p.read_text() for p in written.iterdir())
    ids = torch.tensor([[5]])
    with torch.no_grad():
        found = load_model(tmp_path / "o", host=toys()).model(ids).logits[0, 0, 0]
        source = load(model)[0](ids).logits[0, 0, 0]
    first = result.passes[0]["metrics"]["first"]
    assert float(found) == pytest.approx(2.5 * first, rel=1e-4) and first != float(source)


@pytest.mark.parametrize(
    ("use", "error", "says"),
    [
        (["toy.claims", "toy.claims"], PlanError, "both set|already"),
        (["quant.int8_dynamic", "toy.claims"], PlanError, "both set"),
        (["quant.int8_dynamic", "quant.fp8_dynamic"], PlanError, "both set"),
        (["toy.needs"], PlanError, "needs toy.double"),
        (["toy.clashes", "toy.double"], PlanError, "exclude"),
        (["toy.scale"], UsageError, "calibration"),
    ],
)
def test_clashes_are_found_before_work(tiny, tmp_path, use, error, says):
    with pytest.raises(error, match=says):
        run(tiny(), tmp_path / "o", *use)
    assert not list(tmp_path.iterdir())


def test_disjoint_targets_mix_schemes(tiny, tmp_path):
    steps = [{"use": "quant.int8_dynamic", "targets": ["attention"]}, {"use": "quant.int4_rtn", "with": {"group_size": 32}, "targets": ["mlp"]}]
    result = compress(tiny(), out=tmp_path / "o", recipe={"steps": steps})
    config = json.loads((tmp_path / "o/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and sorted(len(g["targets"]) for g in config["config_groups"].values()) == [6, 8]
    assert result.metrics["linears"] == 14
    assert load(tmp_path / "o")[0] is not None


def test_fused_sets_share_a_scheme(tiny, tmp_path):
    with pytest.raises(PlanError, match="one matmul"):
        run(tiny(), tmp_path / "o", "quant.int8_dynamic", overrides=["steps[0].ignore=[q]"])


def test_rules_that_match_nothing(tiny, tmp_path):
    for override in ("steps[0].targets=[nothing_like_this]", "steps[0].ignore=['re:.*mlp.gate']"):
        with pytest.raises(PlanError, match="matches no linear") as caught:
            run(tiny(), tmp_path / "o", "quant.int8_dynamic", overrides=[override])
        assert caught.value.exit_code == 3
    run(tiny(), tmp_path / "o", "quant.int8_dynamic", overrides=["steps[0].ignore=['re:.*mlp.gate']", "steps[0].optional=true"])


def test_errors_about_the_model_name_their_place_in_the_recipe(tiny, tmp_path):
    recipe = tmp_path / "r.yaml"
    for step, place in (
        ("    targets: [mlp, nothing_like_this]\n", "r.yaml:3:5 steps[0].targets"),
        ("    with: {group_size: 48}\n", "r.yaml:2:5 steps[0]"),
    ):
        recipe.write_text(f"steps:\n  - use: quant.int4_rtn\n{step}")
        with pytest.raises(PlanError) as caught:
            prepare(tiny(), recipe=recipe)
        assert caught.value.where == place
    assert "down_proj" in caught.value.what and "64" in caught.value.hint


def test_head_is_quantized_only_when_named(tiny, tmp_path):
    run(tiny(), tmp_path / "o", "quant.int8_dynamic", overrides=["steps[0].targets=[head]"])
    assert tensors(tmp_path / "o")["lm_head.weight"].dtype == torch.int8
    with pytest.raises(PlanError, match="matches no linear"):
        run(tiny(tie_word_embeddings=True), tmp_path / "p", "quant.int8_dynamic", overrides=["steps[0].targets=[head]"])
    run(tiny(tie_word_embeddings=True), tmp_path / "p", "quant.int8_dynamic", overrides=["steps[0].ignore=[lm_head]"])


def test_ledger_is_complete(tiny_copy, tmp_path):
    folder = tiny_copy("deepseek_v3")
    add_mtp(folder)
    run(folder, tmp_path / "o", "quant.int8_dynamic")
    ledger = json.loads((tmp_path / "o/angelslim/ledger.json").read_text())
    assert ledger.keys() == tensors(folder).keys()
    fates = {n: e["fate"] for n, e in ledger.items()}
    assert fates["model.layers.2.mlp.experts.0.up_proj.weight"] == "copied"  # the MTP layer
    assert fates["model.layers.1.mlp.experts.0.up_proj.weight"] == "quantized" and fates["model.layers.1.mlp.gate.weight"] == "copied"
    ignore = json.loads((tmp_path / "o/config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.1.mlp.gate"} <= set(ignore)


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm4_moe"])
def test_models_with_mtp_experts_load(tiny_copy, tmp_path, architecture):
    from angelslim_core.loading import load_model

    folder = tiny_copy(architecture)
    add_mtp(folder)
    run(folder, tmp_path / "o", "quant.int8_dynamic")
    assert load_model(folder).backend == "transformers" and load_model(tmp_path / "o").model.config.num_hidden_layers == 2
    stray = tensors(folder) | {"model.layers.1.mlp.extra.weight": torch.zeros(2)}
    save_file(stray, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not used by the model"):
        load_model(folder)


def test_mtp_linears_are_listed_as_ignored(tiny_copy, tmp_path):
    folder = tiny_copy("deepseek_v3")
    add_mtp(folder)
    run(folder, tmp_path / "o", "quant.int8_dynamic")
    ignore = json.loads((tmp_path / "o/config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.layers.2.eh_proj", "model.layers.2.mlp.experts.0.up_proj", "model.layers.2.self_attn.o_proj"} <= set(ignore)


def test_stacked_experts_are_written_apart(tiny, tiny_copy, tmp_path):
    folder = tiny_copy("qwen3_moe")
    stack_experts(folder)
    for model, out in ((tiny("qwen3_moe"), "apart"), (folder, "stacked")):
        run(model, tmp_path / out, "quant.int8_dynamic")
    apart, stacked = tensors(tmp_path / "apart"), tensors(tmp_path / "stacked")
    assert apart.keys() == stacked.keys() and all(apart[n].equal(stacked[n]) for n in apart)


def test_stacked_experts_keep_their_form_when_only_transformed(tiny_copy, tmp_path):
    folder = tiny_copy("qwen3_moe")
    stack_experts(folder)
    run(folder, tmp_path / "o", "toy.double", overrides=["steps[0].targets=[expert_up]"])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    before, after = tensors(folder)[name], tensors(tmp_path / "o")[name]
    assert after[:, :32].equal(before[:, :32]) and after[:, 32:].equal(before[:, 32:] * 2)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_a_block_fp8_checkpoint_is_a_source(tiny, tmp_path, text, architecture):
    first = tmp_path / "fp8"
    run(tiny(architecture), first, "quant.fp8_block", overrides=["steps[0].with.block_size=32"])
    again = run(first, tmp_path / "int8", "quant.int8_dynamic")
    stored = tensors(first)
    name = "model.layers.0.self_attn.q_proj.weight"
    restored = (stored[name].float() * stored[f"{name}_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)).bfloat16()
    from angelslim_core.source import open_source

    assert open_source(first).read(name).equal(restored)
    assert again.metrics["sqnr_db_min"] > 30
    ledger = json.loads((tmp_path / "int8/angelslim/ledger.json").read_text())
    assert ledger[f"{name}_scale_inv"] == {"fate": "dropped", "reason": f"folded into {name}"}
    compress(first, out=tmp_path / "static", recipe=calibrated(text, "quant.fp8_static"))
    with pytest.raises(ModelError, match="already quantized"):
        run(tmp_path / "int8", tmp_path / "twice", "quant.int8_dynamic")


def test_same_seed_same_bytes_and_shards(tiny_copy, tmp_path):
    folder = tiny_copy()
    run(folder, tmp_path / "one", "quant.int8_dynamic")
    split_shards(folder, 3)
    run(folder, tmp_path / "many", "quant.int8_dynamic", overrides=["export.max_shard=20kB"])
    run(folder, tmp_path / "again", "quant.int8_dynamic", overrides=["export.max_shard=20kB"])
    many = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(many) > 3 and (tmp_path / "many/model.safetensors.index.json").is_file()
    assert [f.read_bytes() for f in many] == [f.read_bytes() for f in sorted((tmp_path / "again").glob("*.safetensors"))]
    one, spread = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == spread.keys() and all(one[n].equal(spread[n]) for n in one)


def test_weight_files_are_flushed_in_between(tiny, tmp_path, monkeypatch):
    flushed = []
    run(tiny(), tmp_path / "plain", "quant.int8_dynamic")
    monkeypatch.setattr(stream, "FLUSHED", 1 << 14)
    monkeypatch.setattr(ShardWriter, "flush", lambda self: flushed.append(os.fdatasync(self._descriptor)))
    run(tiny(), tmp_path / "flushed", "quant.int8_dynamic")
    assert flushed and (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "flushed/model.safetensors").read_bytes()
    fails = iter([True])  # the first only
    monkeypatch.setattr(ShardWriter, "flush", lambda self: next(fails, False) and disk_full(self))
    with pytest.raises(ResourceError, match="cannot be written"):
        run(tiny(), tmp_path / "full", "quant.int8_dynamic")
    assert not (tmp_path / "full").exists()


def disk_full(writer):
    raise disk_error(OSError(errno.ENOSPC, "No space left on device"), writer.path, writer.nbytes)


def test_sharded_output_loads(tiny, tmp_path):
    run(tiny(), tmp_path / "o", "quant.int8_dynamic", overrides=["export.max_shard=20kB"])
    model, tokenizer = load(tmp_path / "o")
    assert tokenizer is not None and model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights(tiny_copy, tmp_path, where, value):
    folder = tiny_copy()
    found = load_file(folder / "model.safetensors")
    found[where].view(-1)[-1] = value
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=where.rsplit(".", 1)[0]):
        run(folder, tmp_path / "o", "quant.int8_dynamic")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_output_that_exists_or_is_the_source(tiny, tiny_copy, tmp_path):
    folder = tiny_copy()
    for out in (folder, folder / "inside", tmp_path):
        with pytest.raises(OutputError):
            run(folder, out, "quant.int8_dynamic")
    run(folder, tmp_path / "o", "quant.int8_dynamic")
    with pytest.raises(OutputError, match="exists"):
        run(folder, tmp_path / "o", "quant.int8_dynamic")
    run(folder, tmp_path / "o", "quant.fp8_dynamic", replace=True)
    assert tensors(tmp_path / "o")["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert {p.name for p in tmp_path.iterdir()} == {"model", "o"}


def test_gates_publish_nothing(tiny, tmp_path, text):
    recipe = {"steps": [{"use": "quant.int4_rtn", "with": {"bits": 2, "group_size": 64}}], "eval": {"text": str(text), "windows": 2, "length": 16}}
    with pytest.raises(NumericError, match="gate") as caught:
        compress(tiny(), out=tmp_path / "o", recipe={**recipe, "gates": {"max_kl": 1e-9}})
    assert caught.value.exit_code == 8 and {p.name for p in tmp_path.iterdir()} == {"text.txt"}
    result = compress(tiny(), out=tmp_path / "o", recipe={**recipe, "gates": {"min_top1": 0.0}})
    assert "standard error" in (tmp_path / "o/README.md").read_text() and result.metrics["kl"] > 0
    compress(tiny(), out=tmp_path / "one", recipe={**recipe, "eval": {"text": str(text), "windows": 1, "length": 16}})
    assert "15 tokens, transformers" in (tmp_path / "one/README.md").read_text()  # one window has no standard error


def test_what_the_evaluation_needs_is_checked_before_work(tiny, tiny_copy, tmp_path, text, monkeypatch):
    monkeypatch.setattr(Double, "apply", lambda *arguments: pytest.fail("work began"))
    bare = tiny_copy()
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    for model, file, length, says in ((tiny(), "none.txt", 16, "No such file"), (tiny(), tmp_path, 16, "no text file"), (tiny(), text, 9999, "less than one"), (bare, text, 16, "no tokenizer")):  # fmt: skip
        with pytest.raises(RecipeError, match=says):
            run(model, tmp_path / "o", "toy.double", overrides=[f"eval.text={file}", f"eval.length={length}"])
    assert {p.name for p in tmp_path.iterdir()} == {"text.txt", "model"}


def test_engines_are_asked_before_work(tiny, tmp_path):
    for engine, use in (("llama.cpp", "quant.int8_dynamic"), ("vllm", "quant.fp8_block"), ("no_such_engine", "quant.int8_dynamic")):
        with pytest.raises(EngineError) as caught:
            run(tiny(), tmp_path / "o", use, overrides=[f"export.engines=[{engine}]"])
        assert caught.value.exit_code == 9
    run(tiny(), tmp_path / "o", "quant.int8_dynamic", overrides=["export.engines=[vllm, transformers]"])


def test_memory_limit_is_checked_before_work(tiny, tmp_path):
    with pytest.raises(ResourceError, match="RAM"):
        run(tiny(), tmp_path / "o", "quant.int8_dynamic", overrides=["runtime.max_ram=1MB"])
    assert not list(tmp_path.iterdir())
    (problem,) = prepare(tiny(), ["quant.int8_dynamic"], overrides=["runtime.max_ram=1MB"]).plan.problems
    assert "RAM" in problem


def test_running_out_of_memory_keeps_the_work(tiny, tmp_path, monkeypatch):
    from angelslim_core import stream

    def full(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    plain, calls = stream.apply_steps, []
    monkeypatch.setattr(stream, "apply_steps", lambda *args: plain(*args) if calls.append(1) or len(calls) < 10 else full())
    with pytest.raises(ResourceError, match="memory ran out"):
        run(tiny(), tmp_path / "o", "quant.int8_dynamic", overrides=["export.max_shard=20kB"])
    assert [p.name for p in tmp_path.iterdir()] == [".o.angelslim"]
    monkeypatch.undo()
    run(tiny(), tmp_path / "o", "quant.int8_dynamic", overrides=["export.max_shard=20kB"])
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize("steps", [["quant.int8_dynamic"], ["toy.scale", "quant.int8_dynamic"]])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tiny, tmp_path, text, steps):
    recipe = calibrated(text, *steps) if "toy.scale" in steps else {"steps": [{"use": s} for s in steps]}
    recipe["export"] = {"max_shard": "20kB"}
    options = {"recipe": recipe, "plugins": ["toy", "quant"]}
    whole = compress(tiny(), out=tmp_path / "whole", host=toys(), **options)
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return asked == 7

    for _ in range(60):
        asked = 0
        try:
            result = compress(tiny(), out=tmp_path / "broken", host=toys(), stop_requested=stop, **options)
            break
        except StoppedError as error:
            assert error.exit_code == 75 and not (tmp_path / "broken").exists()
            if (tmp_path / ".broken.angelslim").exists():
                with pytest.raises(RecipeError, match="another recipe"):  # something else may not take over
                    compress(tiny(), out=tmp_path / "broken", host=toys(), **{**options, "recipe": {**recipe, "runtime": {"seed": 9}}})
    else:
        raise AssertionError("never finished")
    one, two = (sorted((tmp_path / n).glob("*.safetensors")) for n in ("whole", "broken"))
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two]
    assert result.metrics == whole.metrics and (result.resumed_layers > 0) == ("toy.scale" in steps)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_damaged_work_is_redone(tiny, tmp_path, text):
    options = {"recipe": calibrated(text, "quant.fp8_static"), "host": None}
    compress(tiny(), out=tmp_path / "whole", recipe=options["recipe"])
    calls = iter([False, True])
    with pytest.raises(StoppedError):
        compress(tiny(), out=tmp_path / "o", recipe=options["recipe"], stop_requested=lambda: next(calls))
    (tmp_path / ".o.angelslim/layers/00000.safetensors").write_bytes(b"damaged")
    result = compress(tiny(), out=tmp_path / "o", recipe=options["recipe"])
    assert result.resumed_layers == 0
    assert (tmp_path / "o/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_output_folder_holds_what_it_should(tiny_copy, tmp_path):
    folder = tiny_copy()
    (folder / "modeling_x.py").write_text("raise SystemExit")
    (folder / "LICENSE").write_text("free")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.X"}}))
    result = run(folder, tmp_path / "o", "quant.int8_dynamic")
    names = {p.relative_to(tmp_path / "o").as_posix() for p in (tmp_path / "o").rglob("*") if p.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "README.md", "angelslim/SHA256SUMS", "angelslim/plan.json"} <= names
    assert not [n for n in names if n.endswith(".py")] and "modeling_x.py" in result.warnings[0]
    written = json.loads((tmp_path / "o/config.json").read_text())
    assert "auto_map" not in written
    everything = "".join((tmp_path / "o" / n).read_text() for n in names if not n.endswith(".safetensors"))
    assert str(tmp_path) not in everything


def test_the_card_names_base_model_and_licence(tiny_copy, tmp_path, monkeypatch):
    folder = tiny_copy()
    monkeypatch.setattr("angelslim_core.pipeline.resolve", lambda model: folder)
    for card, licence in (("---\nlicense: apache-2.0\n---\n# x\n", "apache-2.0"), ("license: mit\n", None), ("---\nlicense: [a]\n---\n", None)):
        (folder / "README.md").write_text(card)
        run("owner/name", tmp_path / "o", "quant.int8_dynamic", replace=True)
        _, head, _ = (tmp_path / "o/README.md").read_text().split("---", 2)
        head = yaml.safe_load(head)
        assert head["base_model"] == "owner/name" and head.get("license") == licence
    assert yaml.safe_load((tmp_path / "o/angelslim/recipe.yaml").read_text())["model"] == {"path": "owner/name"}


def test_plugins_can_watch_and_edit(tiny, tmp_path):
    seen = []

    @hookimpl
    def angelslim_modify_plan(plan):
        plan.warnings.append("seen by toy")

    @hookimpl(wrapper=True)
    def angelslim_run_pass(pass_):
        seen.append(pass_.id)
        return (yield)

    @hookimpl
    def angelslim_run_finished(artifact):
        seen.append(artifact.path.name)

    hooks = {f.__name__: f for f in (angelslim_modify_plan, angelslim_run_pass, angelslim_run_finished)}
    result = run(tiny(), tmp_path / "o", "toy.train", host=toys(**hooks))
    assert seen == ["toy.train", "o"] and "seen by toy" in result.warnings


def test_unused_calibration_is_a_warning(tiny, tmp_path, text):
    result = compress(tiny(), out=tmp_path / "o", recipe=calibrated(text, "quant.int8_dynamic"))
    assert any("no step uses it" in w for w in result.warnings)


def test_calibration_needs_a_tokenizer(tiny, tmp_path, text):
    with pytest.raises(ModelError, match="tokenizer"):
        compress(tiny(tokenizer=False), out=tmp_path / "o", recipe=calibrated(text, "quant.fp8_static"))
    run(tiny(tokenizer=False), tmp_path / "o", "quant.int8_dynamic")  # a data-free run does not


def test_the_model_can_write_its_own_calibration(tiny, tmp_path):
    recipe = {"steps": [{"use": "quant.fp8_static"}], "calibration": {"data": "self", "samples": 3, "tokens": 12}}
    compress(tiny(), out=tmp_path / "a", recipe=recipe)
    compress(tiny(), out=tmp_path / "b", recipe=recipe)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    compress(tiny(), out=tmp_path / "c", recipe=recipe, seed=1)
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()


def test_plan_reads_no_weight(tiny_copy):
    folder = tiny_copy()
    plan = prepare(folder, ["quant.int8_dynamic"]).plan
    path = folder / "model.safetensors"
    size = path.stat().st_size
    header = path.read_bytes()[: 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)  # the weights are gone
    again = prepare(folder, ["quant.int8_dynamic"]).plan
    assert again.as_dict() == plan.as_dict()
