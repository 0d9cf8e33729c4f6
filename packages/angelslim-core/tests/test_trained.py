"""Steps that say how linears round while a later one trains: what is stored is what was trained, whatever stands before and after.

The file is also a program: one of the processes of a run.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

import angelslim_quant.plugin as quant
from angelslim_core import Grid, ModelPass, PassConfig, PluginHost, Quantized, Scheme, TensorPass, TrainedPass, compress, hookimpl
from angelslim_core.errors import AngelslimError, ModelError, NumericError, PlanError, StoppedError
from angelslim_core.fake_quant import FakeQuantizer, placed, read_trained, rounding_off, set_progress, write_trained
from angelslim_core.loading import load_model
from angelslim_core.pipeline import prepare
from angelslim_core.report import write_report
from angelslim_core.testing.conformance import check_pass
from angelslim_core.testing.models import add_mtp, stack_experts, store_as_fp8
from angelslim_core.training import Terms, Training, TrainingOptions
from angelslim_core.validation import validate

IDS = torch.arange(3, 99)[None]
seen = {}  # what a pass left in the model, before it is stored


class Rounds(FakeQuantizer):
    """Codes -7 to 7 times a learnt scale of a row, which is rounded as it is stored."""

    def __init__(self, scheme, weight_OI, share):
        super().__init__(scheme)
        self.scale = torch.nn.Parameter(weight_OI.float().abs().amax(1, keepdim=True) / 7)
        self.share, self.dtype = share, weight_OI.dtype

    def _rounded(self):
        scale = self.scale.detach().to(self.dtype)
        return torch.where(scale > 0, scale, torch.ones_like(scale))  # a row of zeros

    def weight(self, weight_OI):
        found = self.quantized(weight_OI)
        steep = self.scale * found.codes.float() + weight_OI.float()  # the way back goes straight through
        return (found.dequantize() + (steep - steep.detach())).to(weight_OI.dtype)

    def bias(self, weight_OI):
        return weight_OI.float().sum(1) * self.share if self.share else None

    def quantized(self, weight_OI):
        scale = self._rounded()
        codes = (weight_OI.float() / scale.float()).round().clamp(-7, 7).to(torch.int8)
        return Quantized(self.scheme, codes, scale, numbers={"largest": int(codes.max())})


class Int4(TrainedPass):
    """Rows of four bits with a learnt scale."""

    id = "toy.int4"

    def scheme(self, site):
        return Scheme("int4 rows", Grid(4, "int", "channel", scale_dtype=site.dtype))

    def quantizer(self, site, weight_OI):
        return Rounds(self.scheme(site), weight_OI, 0.0)


class Biased(Int4):
    """The same, with a share of each row's sum as a bias."""

    id = "toy.biased"
    adds_bias = True

    def quantizer(self, site, weight_OI):
        return Rounds(self.scheme(site), weight_OI, 0.01)


class Silent(Biased):
    """The same, and does not say so."""

    id = "toy.silent"
    adds_bias = False


class Double(TensorPass):
    """Doubles weights."""

    id = "toy.double"

    def apply(self, weights, context):
        return {site: weight * 2 for site, weight in weights.items()}


class Distill(ModelPass):
    """Makes logits what they were without rounding."""

    id = "toy.distill"

    class Config(PassConfig):
        steps: int = Field(6, description="Steps.")
        lr: float = Field(3e-5, description="Rate.")
        stop_at: int = Field(-1, description="Raise an error at this step.")

    def run(self, model, context):
        group = context.group
        linears = placed(model)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad(), rounding_off(model):
            targets = model(IDS).logits.float()
        if not self.config.steps:
            seen["logits"] = targets
            return {}
        training = Training(parameters, TrainingOptions(steps=self.config.steps, lr=self.config.lr, seed=context.seed), group)
        folder = context.workdir / "measured" / "toy"
        seen["resumed"] = training.resume(folder)
        losses = []

        def terms(step, part):
            set_progress(model, step / self.config.steps)
            rows = slice(group.rank, None, group.size)  # positions shared by the processes
            error = (model(IDS).logits.float() - targets)[:, rows].square()
            count = torch.tensor([float(error.numel())])
            return Terms(error.sum()[None], count, torch.ones(1), torch.zeros(0))

        while not training.is_done:
            if training.step == self.config.stop_at and not seen["resumed"]:
                if seen["error"] is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise seen["error"]
            context.check_stop(f"step {training.step}")
            training.advance(terms)
            found = training.seen()
            losses.append([training.step, found.loss])
            training.save(folder)
        model.eval()
        with torch.no_grad():
            seen["logits"] = model(IDS).logits.float()
        curves = [{"title": "loss", "x": "step", "y": "mean square", "points": losses}]
        return {"rounded": len(linears), "first": losses[0][1] if losses else None, "last": losses[-1][1] if losses else None, "curves": curves}


class Shift(ModelPass):
    """Sets every norm to one."""

    id = "toy.shift"

    def run(self, model, context):
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.fill_(1)
        return {"rounded": len(placed(model))}


@hookimpl
def angelslim_register_passes():
    return [Int4, Biased, Silent, Double, Distill, Shift]


def run(model, out, *steps, **options):
    host = PluginHost()
    host.register_module("toy", SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes))
    host.register_module("quant", quant)
    recipe = {"steps": [{"use": s} if isinstance(s, str) else s for s in steps], **options.pop("recipe", {})}
    if out is None:
        return prepare(model, recipe=recipe, plugins=["toy", "quant"], host=host, **options)
    return compress(model, out=out, recipe=recipe, plugins=["toy", "quant"], host=host, **options)


def logits(folder):
    model = load_model(folder, "cpu", own_reader=True).model
    with torch.no_grad():
        return model(IDS).logits.float()


def ledger(folder):
    return json.loads((folder / "angelslim/ledger.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_stored_is_what_was_trained(tiny, tmp_path, dtype, tied):
    model = tiny(dtype=dtype, tie_word_embeddings=tied)
    result = run(model, tmp_path / "o", "toy.int4", "toy.distill")
    assert torch.equal(logits(tmp_path / "o"), seen["logits"])
    with torch.no_grad():
        read_by_transformers = load_model(tmp_path / "o", "cpu", packed=False).model(IDS).logits.float()
    assert torch.allclose(read_by_transformers, seen["logits"], atol=2e-2 if dtype == "bfloat16" else 1e-5)
    trained, distilled = result.passes
    assert distilled["metrics"]["rounded"] == 14 and distilled["metrics"]["last"] < distilled["metrics"]["first"]
    assert 10 < trained["metrics"]["sqnr_db_mean"] < 30  # of what was trained to what is stored
    assert trained["id"] == "toy.int4" and distilled["metrics"]["curves"][0]["points"][0][0] == 1
    found = validate(tmp_path / "o", model, run=True)
    assert found["ok"], found["problems"]
    fates = ledger(tmp_path / "o")
    assert fates["model.layers.0.mlp.up_proj.weight"] == {"fate": "quantized", "scheme": "int4 rows", "trained": True}
    assert fates["model.norm.weight"] == {"fate": "trained"}
    assert ("lm_head.weight" in fates) != tied
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o"]


def test_a_rotation_before_training(tiny, tmp_path):
    """The trained model is the rotated one, with its matrix in front of `down`; nothing is rotated twice."""
    model = tiny(dtype="float32", tie_word_embeddings=True)
    rotation = {"use": "quant.rotate", "with": {"r4": True}}
    still = {"use": "toy.distill", "with": {"steps": 0}}
    result = run(model, tmp_path / "plain", rotation, still)
    base, rotated = logits(model), logits(tmp_path / "plain")
    assert float((base - rotated).abs().max()) < 1e-3 * float(base.abs().max())
    assert torch.equal(rotated, seen["logits"]) and result.passes[0]["metrics"]["r4"] == 2
    result = run(model, tmp_path / "o", rotation, "toy.int4", "toy.distill")
    assert torch.equal(logits(tmp_path / "o"), seen["logits"])
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["quantization_config"]["transform_config"]["config_groups"] and config["tie_word_embeddings"] is False
    assert validate(tmp_path / "o", model)["ok"]
    assert ledger(tmp_path / "o")["model.layers.0.mlp.up_proj.weight"] == {"fate": "quantized", "scheme": "int4 rows", "transformed": True, "trained": True}


def test_a_rotation_after_training(tiny, tmp_path):
    model = tiny(dtype="float32")
    run(model, tmp_path / "o", "toy.shift", "quant.rotate")
    run(model, tmp_path / "trained", "toy.shift")
    trained, rotated = logits(tmp_path / "trained"), logits(tmp_path / "o")
    assert float((trained - rotated).abs().max()) < 1e-3 * float(trained.abs().max())
    assert float((trained - logits(model)).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_biases_that_training_leaves(tiny, tmp_path, dtype):
    """Linears of a key of the config get one together; those that no step names get zeros."""
    model = tiny(dtype=dtype)
    step = {"use": "toy.biased", "targets": ["q", "k", "v"]}
    plan = run(model, None, step, "toy.distill").plan
    assert plan.source.shapes["model.layers.0.self_attn.o_proj.bias"] == (64,)
    run(model, tmp_path / "o", step, "toy.distill")
    stored, config = load_file(tmp_path / "o/model.safetensors"), json.loads((tmp_path / "o/config.json").read_text())
    assert plan.bytes_after == sum(t.nbytes for t in stored.values())
    assert config["attention_bias"] is True and not config.get("mlp_bias")
    assert not stored["model.layers.1.self_attn.o_proj.bias"].any() and stored["model.layers.1.self_attn.q_proj.bias"].any()
    assert "model.layers.1.mlp.up_proj.bias" not in stored
    assert torch.equal(logits(tmp_path / "o"), seen["logits"])
    assert ledger(tmp_path / "o")["model.layers.1.self_attn.o_proj.bias"] == {"fate": "added", "by": "toy.biased"}
    found = validate(tmp_path / "o", model, run=True)
    assert found["ok"], found["problems"]


def test_biases_beside_those_that_are_there(tiny, tmp_path):
    model = tiny("seed_oss")  # q, k, v have one
    run(model, tmp_path / "o", "toy.biased", "toy.distill")
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["attention_bias"] and config["attention_out_bias"] and config["mlp_bias"]
    assert torch.equal(logits(tmp_path / "o"), seen["logits"])
    fates = {n: e["fate"] for n, e in ledger(tmp_path / "o").items() if n.startswith("model.layers.0.self_attn") and n.endswith("bias")}
    assert fates == {f"model.layers.0.self_attn.{r}_proj.bias": "added" if r == "o" else "trained" for r in "qkvo"}


def test_what_training_does_not_touch_is_kept(tiny_copy, tmp_path):
    """Layers that transformers does not run, experts in one tensor, and other steps beside the trained ones."""
    model = tiny_copy("glm4_moe")
    add_mtp(model)
    run(
        model,
        tmp_path / "o",
        {"use": "toy.int4", "targets": ["attention"]},
        "toy.distill",
        {"use": "quant.int8_dynamic", "targets": ["mlp"], "ignore": ["experts"]},
    )
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "o/model.safetensors")
    names = [n for n in before if n.startswith("model.layers.2.")]
    assert names and all(torch.equal(before[n], after[n]) for n in names)
    assert ledger(tmp_path / "o")[names[0]] == {"fate": "copied"}
    found = validate(tmp_path / "o", model)
    assert found["ok"], found["problems"]
    stacked = tiny_copy("qwen3_moe", name="stacked")
    stack_experts(stacked)
    run(stacked, tmp_path / "s", {"use": "toy.int4", "targets": ["attention"]}, "toy.distill")
    assert torch.equal(logits(tmp_path / "s"), seen["logits"]) and validate(tmp_path / "s", stacked)["ok"]


@pytest.mark.parametrize("architecture", ["gemma3", "llava", "kimi_k2"])
def test_names_that_differ_between_checkpoint_and_transformers(tiny, tmp_path, architecture):
    model = tiny(architecture)
    run(model, tmp_path / "o", {"use": "toy.int4", "targets": ["attention"]}, "toy.distill")
    assert torch.equal(logits(tmp_path / "o"), seen["logits"])
    assert validate(tmp_path / "o", model)["ok"] and ledger(tmp_path / "o").keys() == load_file(model / "model.safetensors").keys()


def test_a_model_published_in_fp8_and_a_head(tiny_copy, tmp_path):
    model = tiny_copy()
    store_as_fp8(model, block=(32, 32))
    run(model, tmp_path / "o", {"use": "toy.int4", "targets": ["head", "mlp"]}, "toy.distill")
    assert torch.equal(logits(tmp_path / "o"), seen["logits"])
    fates = ledger(tmp_path / "o")
    assert fates["lm_head.weight"]["fate"] == "quantized" and fates["model.layers.0.mlp.up_proj.weight_scale_inv"]["fate"] == "dropped"


@pytest.mark.parametrize(
    ("architecture", "steps", "code", "hint"),
    [
        ("llama", ["toy.int4"], "AS-PLN-980", "distill.qad"),
        ("llama", ["toy.distill", "toy.int4"], "AS-PLN-980", "distill.qad"),
        ("llama", ["toy.distill", "quant.rotate", "toy.distill"], "AS-PLN-981", "before or after"),
        ("llama", ["toy.int4", "toy.distill", "quant.int8_dynamic"], "AS-PLN-008", "disjoint"),
        ("llama", ["toy.int4", "toy.int4", "toy.distill"], "AS-PLN-008", "disjoint"),
        ("llama", ["toy.int4", "toy.distill", "toy.double"], "AS-PLN-982", "disjoint"),
        ("llama", ["quant.int8_dynamic", "toy.distill"], "AS-PLN-006", ""),
        ("qwen3_moe", ["toy.int4", "toy.distill"], "AS-PLN-983", "experts"),
        ("llama", [{"use": "toy.int4", "targets": ["head"]}, "toy.distill"], "AS-PLN-984", "ignore"),
        ("qwen2", ["toy.biased", "toy.distill"], "AS-PLN-986", "reactivation: 0"),
    ],
)
def test_recipes_that_cannot_be_trained(tiny_copy, tmp_path, architecture, steps, code, hint):
    model = tiny_copy(architecture, tie_word_embeddings=architecture == "llama")
    if architecture == "llama":  # a head that is stored, and tied
        tensors = load_file(model / "model.safetensors")
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError) as caught:
        run(model, tmp_path / "o", *steps)
    assert caught.value.code == code and hint in (caught.value.hint or "")


def test_linears_of_two_dtypes(tiny_copy):
    """Scales would be stored in one, and trained in the other."""
    model = tiny_copy()
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].float()}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match="is stored in BF16, and the model is trained in F32") as caught:
        run(model, None, "toy.int4", "toy.distill")
    assert caught.value.code == "AS-PLN-985"
    assert run(model, None, {"use": "toy.int4", "targets": ["layers[1:2].down"]}, "toy.distill").plan.schemes


def test_a_calibrated_step_after_training(tiny, tmp_path):
    """Its sweep runs over the trained weights, and stores the codes that training left."""
    model = tiny()
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 4, "tokens": 16}
    run(model, tmp_path / "plain", "toy.int4", "toy.distill")
    run(model, tmp_path / "o", "toy.int4", "toy.distill", "quant.kv_fp8", recipe={"calibration": calibration})
    before, after = load_file(tmp_path / "plain/model.safetensors"), load_file(tmp_path / "o/model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == {"k_scale", "v_scale"}
    assert validate(tmp_path / "o", model)["ok"]


def test_a_bias_that_a_pass_does_not_announce(tiny):
    host = PluginHost()
    host.register_module("toy", SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes))
    with pytest.raises(AngelslimError, match="give linears a bias"):
        compress(tiny(), out=tiny().parent / "silent", recipe={"steps": [{"use": "toy.silent"}, {"use": "toy.distill"}]}, plugins=["toy"], host=host)


def test_the_report_draws_what_training_says(tiny, tmp_path):
    run(tiny(), tmp_path / "o", "toy.int4", "toy.distill")
    write_report([tmp_path / "o"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Course" in page and "rounded 14" in page


def test_the_kit_knows_trained_passes(tmp_path):
    module = SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes)
    check_pass("toy", module, "toy.biased", tmp_path)


@pytest.mark.parametrize("error", [StoppedError(1, "here", "stopped"), NumericError(20, "step 3", "the loss is not finite")])
def test_a_run_that_ends_in_training_goes_on_there(tiny, tmp_path, error):
    model = tiny(dtype="float32")
    run(model, tmp_path / "whole", "toy.int4", "toy.distill")
    seen["error"] = error
    step = {"use": "toy.distill", "with": {"stop_at": 3}}
    with pytest.raises(type(error)):
        run(model, tmp_path / "o", "toy.int4", step)
    assert (tmp_path / ".o.angelslim/measured/toy").is_dir()
    result = run(model, tmp_path / "o", "toy.int4", step)
    assert seen["resumed"] and len(result.passes[1]["metrics"]["curves"][0]["points"]) == 3
    assert (tmp_path / "o/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize("error", [StoppedError(1, "here", "stopped"), NumericError(91, "gates.max_kl", "is 0.1"), RuntimeError("a bug")])
def test_a_finished_training_is_not_done_again(tiny, tmp_path, monkeypatch, error):
    from angelslim_core import pipeline

    model = tiny()
    run(model, tmp_path / "whole", "toy.int4", "toy.distill")

    def full(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_shards", full)
        with pytest.raises(type(error)):
            run(model, tmp_path / "o", "toy.int4", "toy.distill")
    monkeypatch.setattr(Distill, "run", full)
    with pytest.raises(AngelslimError, match="another recipe"):
        run(model, tmp_path / "o", "toy.int4", {"use": "toy.distill", "with": {"lr": 1e-5}})
    result = run(model, tmp_path / "o", "toy.int4", "toy.distill")
    assert result.passes[1]["metrics"]["rounded"] == 14 and result.passes[1]["seconds"] > 0
    assert (tmp_path / "o/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_dry_run_says_what_training_takes(tiny):
    plan = run(tiny(), None, "toy.int4", "toy.distill").plan
    shown = plan.as_dict()
    assert [(s["pass"], s["kind"], s["tensors"]) for s in shown["plan"]] == [("toy.int4", "model", 14), ("toy.distill", "model", 0)]
    assert {r["action"] for r in shown["tensors"]} == {"int4 rows", "train"}
    assert any("a teacher" in line for line in shown["problems"])
    numbers = sum(torch.Size(shape).numel() for shape in plan.source.shapes.values())
    assert plan.peak_ram_bytes > 22 * numbers and plan.bytes_after < plan.bytes_before
    json.dumps(shown)


def test_what_training_left_is_checked_as_it_is_read(tmp_path):
    scheme = Scheme("int4 rows", Grid(4, "int", "channel", scale_dtype="BF16"))
    kept = Quantized(scheme, torch.randint(-7, 8, (6, 8), dtype=torch.int8), torch.rand(6, 1).bfloat16() + 1, numbers={"a": 1})
    with pytest.raises(ModelError, match="is missing"):
        read_trained(tmp_path, "x", scheme)
    write_trained(tmp_path, {"x": kept})
    found = read_trained(tmp_path, "x", scheme)
    assert torch.equal(found.codes, kept.codes) and torch.equal(found.scale, kept.scale) and found.numbers == {"a": 1}
    with pytest.raises(ModelError, match="no codes"):
        read_trained(tmp_path, "y", scheme)
    with pytest.raises(ModelError, match="needs F32"):
        read_trained(tmp_path, "x", Scheme("other", Grid(4, "int", "channel")))
    write_trained(tmp_path, {"y": kept})
    with pytest.raises(ModelError, match="no codes"):
        read_trained(tmp_path, "x", scheme)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trained.json", "trained.safetensors"]


def start(processes, model, out, stop_at=-1):
    """Exit codes of the processes of a run, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (out.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    command = [sys.executable, __file__, str(model), str(out), str(stop_at)]
    running = [subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
    return [process.wait(timeout=240) for process in running]


def test_two_processes_train_what_one_trains(tiny, tmp_path):
    model = tiny(dtype="float32")
    run(model, tmp_path / "one", {"use": "quant.rotate"}, "toy.int4", "toy.distill")
    assert start(2, model, tmp_path / "two") == [0, 0]
    one, two = logits(tmp_path / "one"), logits(tmp_path / "two")
    assert torch.allclose(one, two, atol=1e-3 * float(one.abs().max()))
    evaluation = json.loads((tmp_path / "two/angelslim/metrics.json").read_text())["evaluation"]
    assert 0 < evaluation["kl"] < 0.01  # to the model as it was before training
    assert validate(tmp_path / "two", model)["ok"] and not (tmp_path / ".two.angelslim").exists()


def test_a_killed_training_goes_on(tiny, tmp_path):
    model = tiny(dtype="float32")
    assert start(1, model, tmp_path / "o", stop_at=3) == [-signal.SIGKILL]
    assert start(1, model, tmp_path / "o", stop_at=3) == [0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(model, tmp_path / "whole", "quant.rotate", "toy.int4", "toy.distill")
    torch.set_num_threads(threads)
    assert (tmp_path / "o/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    seen["error"] = None
    text = {"text": str(Path(sys.argv[2]).parent / "text.txt"), "windows": 2, "length": 32}
    steps = [{"use": "quant.rotate"}, "toy.int4", {"use": "toy.distill", "with": {"stop_at": int(sys.argv[3])}}]
    run(sys.argv[1], Path(sys.argv[2]), *steps, recipe={"eval": text})
