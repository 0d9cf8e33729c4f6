"""`quant.lsq` with `kv` under `distill.qad` and `distill.blockwise`: scales learn, and what is stored is what was trained.

The file is also a program: one of the processes of a run.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from angelslim_core import ModelPass, PluginHost, compress, hookimpl
from angelslim_core.context import Context
from angelslim_core.errors import StoppedError
from angelslim_core.fake_cache import place_cache, placed_caches
from angelslim_core.fake_quant import place, placed
from angelslim_core.kv_cache import round_cache
from angelslim_core.loading import load_model, load_tokenizer
from angelslim_core.source import describe_source, open_source
from angelslim_core.testing.training import chats
from angelslim_core.validation import validate
from angelslim_distill.data.rows import collate, prepare
from angelslim_distill.evaluation import evaluate
from angelslim_distill.passes.qad import Qad
from angelslim_distill.teacher import teacher_of
from angelslim_distill.trainer import DistillTraining

IDS = torch.arange(3, 67)[None]
QAD = {"steps": 6, "batch": 4, "length": 64, "held_out": 0.2, "every": 2, "lr": 1e-3, "quantizer_lr": 2e-2}
seen = {}


class Looks(ModelPass):
    """Trains nothing: keeps what the model as trained makes, and its scales."""

    id = "looks.looks"

    def run(self, model, context):
        with torch.no_grad():
            seen["logits"] = model.eval()(IDS).logits.float()
            seen["scales"] = {name: torch.stack(quantizer.scales()) for name, quantizer in placed_caches(model).items()}
            seen["caches"] = len(seen["scales"])
        return {}


@hookimpl
def angelslim_register_passes():
    return [Looks]


def lsq(**options):
    return {"use": "quant.lsq", "with": {"group_size": 32, "kv": "fp8", **options}}


def qad(data, **options):
    return {"use": "distill.qad", "with": {**QAD, "data": str(data), **options}}


def run(model, out, *steps, stop_requested=lambda: False, **recipe):
    host = PluginHost()
    host.register_module("looks", SimpleNamespace(__name__="looks", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes))
    given = {"steps": [*steps, {"use": Looks.id}], **recipe}
    return compress(model, out=out, recipe=given, plugins=["looks", "quant", "distill"], host=host, stop_requested=stop_requested)


def logits(folder):
    with torch.no_grad():
        return load_model(folder, "cpu", own_reader=True).model(IDS).logits.float()


def scales(folder):
    return {n: t for n, t in load_file(folder / "model.safetensors").items() if n.endswith(("k_scale", "v_scale"))}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.mark.parametrize(
    ("dtype", "options"), [("float32", {}), ("bfloat16", {"kv": "fp8_head"}), ("float32", {"kv": "fp8_head", "train_weights": True})], ids=str
)
def test_what_is_stored_is_what_was_trained(tiny, data, tmp_path, dtype, options):
    model = tiny("llama", dtype=dtype)
    result = run(model, tmp_path / "o", lsq(**options), qad(data, keep="last"))
    stored = scales(tmp_path / "o")
    assert seen["caches"] == 2 and len(stored) == 4 and all(t.shape == (2 if options else 1,) for t in stored.values())
    for name, both in seen["scales"].items():
        assert all(stored[f"{name}.{suffix}"].equal(scale) for suffix, scale in zip(("k_scale", "v_scale"), both, strict=True))
    assert torch.equal(logits(tmp_path / "o"), seen["logits"])
    with torch.no_grad():  # read by transformers
        assert torch.allclose(
            load_model(tmp_path / "o", "cpu", packed=False).model(IDS).logits.float(), seen["logits"], atol=2e-2 if dtype == "bfloat16" else 1e-5
        )
    cached = json.loads((tmp_path / "o/config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert cached["strategy"] == ("attn_head" if options else "tensor") and cached["num_bits"] == 8 and cached["type"] == "float" and not cached["dynamic"]
    found = validate(tmp_path / "o", model, run=True)
    assert found["ok"], found["problems"]
    assert result.passes[0]["metrics"]["k_scale"] == [float(t.max()) for n, t in stored.items() if n.endswith("k_scale")]
    assert "self_attn.quantizer" not in " ".join(load_file(tmp_path / "o/model.safetensors"))


def test_the_same_tensors_and_config_as_kv_fp8(tiny, data, tmp_path):
    model = tiny("llama", dtype="float32")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 4, "tokens": 16}
    run(model, tmp_path / "trained", lsq(), qad(data, keep="last"))
    host = PluginHost()
    compress(model, out=tmp_path / "calibrated", host=host, recipe={"steps": [lsq(kv="none"), qad(data), {"use": "quant.kv_fp8"}], "calibration": calibration})
    trained, calibrated = tmp_path / "trained", tmp_path / "calibrated"
    shapes = [{n: (t.shape, t.dtype) for n, t in load_file(folder / "model.safetensors").items()} for folder in (trained, calibrated)]
    assert shapes[0] == shapes[1]
    assert json.loads((trained / "config.json").read_text()) == json.loads((calibrated / "config.json").read_text())
    plans = [json.loads((folder / "angelslim/plan.json").read_text()) for folder in (trained, calibrated)]
    assert plans[0]["kv_cache"] == plans[1]["kv_cache"] and plans[0]["engines"] == plans[1]["engines"]


@pytest.mark.parametrize("train_weights", [False, True])
def test_a_bad_start_is_learnt_away(tiny, data, tmp_path, train_weights):
    """From a sixteenth of the largest key and value: scales grow, and the loss on the rows that are trained on falls."""
    folder = tiny("llama", dtype="float32", initializer_range=0.1)
    host = PluginHost()
    host.load(["quant"])
    pass_class = host.registry.find_pass("quant.lsq")
    pass_ = pass_class(pass_class.Config(bits=8, group_size=32, kv="fp8", train_weights=train_weights))
    model = load_model(folder, "cpu", emulate=False).model
    source = open_source(folder, host.registry.exporters.values())
    description = describe_source(source, host.registry.layouts)
    for site in (s for s in description.sites if s.layer is not None):
        place(model.get_submodule(site.name), pass_.quantizer(site, model.get_submodule(site.name).weight.data))
    for name in description.attentions:
        place_cache(model.get_submodule(name), pass_.cache_quantizer(2))
    rows = prepare(data, load_tokenizer(folder), str(folder), length=64, packed=False, held_out=0.0).train
    with torch.no_grad():
        model.train()(collate(rows).input_ids)
        start = {}
        for name, quantizer in placed_caches(model).items():
            quantizer.k_log -= math.log(16)
            quantizer.v_log -= math.log(16)
            start[name] = torch.stack(quantizer.scales())
    teacher = teacher_of(model) if not train_weights else teacher_of(load_model(folder, "cpu").model.requires_grad_(False))
    before = evaluate(model, teacher, rows, 8).kl
    options = {**QAD, "data": data, "steps": 24, "held_out": 0.0, "keep": "last", "pack": False, "quantizer_lr": 0.2, "lr": 1e-5}
    Qad(Qad.Config.model_validate(options)).run(model, Context(source, description, "cpu", 0, tmp_path))
    after = evaluate(model, teacher, rows, 8).kl
    moved = torch.cat([(torch.stack(q.scales()) / start[name]).flatten() for name, q in placed_caches(model).items()])
    assert bool((moved > 1.2).all()) and after < 0.3 * before
    with torch.no_grad():  # of the scales alone
        for name in placed_caches(model):
            del model.get_submodule(name).quantizer
            round_cache(model.get_submodule(name), *start[name])
    assert evaluate(model, teacher, rows, 8).kl > 3 * after and len(placed(model)) == 14


def test_block_by_block(tiny, data, tmp_path):
    """Blocks learn the scales of their caches, and a training from end to end goes on with them."""
    model = tiny("llama", dtype="float32", initializer_range=0.2)
    calibration = {"data": str(data), "samples": 8, "tokens": 32}
    block = {"use": "distill.blockwise", "with": {"epochs": 3, "batch": 2, "quantizer_lr": 2e-2}}
    result = run(model, tmp_path / "o", lsq(kv="fp8_head"), block, calibration=calibration)
    assert torch.equal(logits(tmp_path / "o"), seen["logits"]) and validate(tmp_path / "o", model)["ok"]
    metrics = result.passes[1]["metrics"]
    assert all(end < start for start, end in zip(metrics["start_errors"], metrics["errors"], strict=True))
    first = seen["scales"]
    run(model, tmp_path / "still", lsq(kv="fp8_head"), {**block, "with": {**block["with"], "quantizer_lr": 1e-9}}, calibration=calibration)
    assert all(bool((both / seen["scales"][name] - 1).abs().max() > 1e-3) for name, both in first.items())
    run(model, tmp_path / "both", lsq(kv="fp8_head"), block, qad(data, steps=2, quantizer_lr=1e-9), calibration=calibration)
    torch.testing.assert_close(seen["scales"], first)


def test_on_the_own_answers_of_a_student(tiny, data, tmp_path):
    """It samples with the cache as it is rounded then."""
    model = tiny("llama", dtype="float32")
    given = {name: QAD[name] for name in ("batch", "length", "held_out", "quantizer_lr")}
    run(
        model,
        tmp_path / "o",
        lsq(),
        {"use": "distill.on_policy", "with": {**given, "data": str(data), "steps": 2, "keep": "last", "max_new_tokens": 8, "teacher": str(model)}},
    )
    assert torch.equal(logits(tmp_path / "o"), seen["logits"])


def test_a_stopped_block_by_block_training_goes_on_to_the_same_scales(tiny, data, tmp_path):
    model = tiny("llama", dtype="float32", initializer_range=0.2)
    steps = [lsq(), {"use": "distill.blockwise", "with": {"epochs": 2, "quantizer_lr": 2e-2}}]
    calibration = {"data": str(data), "samples": 6, "tokens": 32}
    run(model, tmp_path / "whole", *steps, calibration=calibration)

    def after_a_block():
        return bool(list(tmp_path.glob(".o.angelslim/measured/blockwise-*/block-00000/numbers.json")))

    with pytest.raises(StoppedError):
        run(model, tmp_path / "o", *steps, calibration=calibration, stop_requested=after_a_block)
    run(model, tmp_path / "o", *steps, calibration=calibration)
    assert (tmp_path / "o/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def start(processes, model, out, **options):
    """Exit codes of the processes of a run, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, str(model), str(out), json.dumps(options)]
    running = [subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
    return [process.wait(timeout=240) for process in running]


@pytest.mark.parametrize("options", [{}, {"train_weights": True, "shard": True}, {"train_weights": True, "shard": True, "teacher": True}], ids=str)
def test_two_processes_give_the_scales_of_one(tiny, tmp_path, options):
    """Also where the model that computes is a copy whose weights lie in parts, as a teacher's do."""
    model = tiny(dtype="float32")
    if "teacher" in options:
        options = {**options, "teacher": str(tiny(dtype="float32", num_hidden_layers=3))}
    assert start(2, model, tmp_path / "two", **options) == [0, 0]
    train(model, tmp_path / "one", **options)
    first, second = (torch.load(tmp_path / f"two.{rank}", weights_only=True) for rank in range(2))
    assert all(first[name].equal(second[name]) for name in first) and len(first) == 2
    one, two = scales(tmp_path / "one"), scales(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=0)
    assert torch.allclose(logits(tmp_path / "one"), logits(tmp_path / "two"), atol=1e-3) and validate(tmp_path / "two", model)["ok"]


INT8 = {"bits": 8, "group_size": None, "activations": "int8"}


def block_by_block(model, folder, **options):
    """What one process and two leave: scales of caches, of all that is stored, and numbers of blocks; those of two, which agree, second."""
    assert start(2, model, folder / "two", **options) == [0, 0]
    train(model, folder / "one", **options)
    caches = [torch.load(folder / name, weights_only=True) for name in ("one.0", "two.0", "two.1")]
    assert all(caches[1][name].equal(caches[2][name]) for name in caches[0])
    stored = [{n: t for n, t in load_file(folder / name / "model.safetensors").items() if "scale" in n} for name in ("one", "two")]
    assert validate(folder / "two", model)["ok"]
    return caches[:2], stored, [json.loads((folder / name / "angelslim/metrics.json").read_text())["passes"][1]["metrics"] for name in ("one", "two")]


@pytest.mark.parametrize("options", [{"kv": "fp8"}, {"kv": "fp8_head", "train_weights": True}, INT8], ids=str)
def test_two_processes_train_blocks_as_one(tiny, tmp_path, options):
    """All samples are one step. FP8 codes of the second block are on either side of ties, by rounding in the first, and Adam's steps are of one size."""
    block = {"epochs": 3, "batch": 6, "held_out": 0.0, "quantizer_lr": 5e-3, "lr": 1e-3}
    (one, two), _, (alone, together) = block_by_block(tiny(dtype="float32", initializer_range=0.2), tmp_path, block=block, **options)
    torch.testing.assert_close(two["model.layers.0.self_attn"], one["model.layers.0.self_attn"], rtol=1e-3, atol=0)
    assert together["start_errors"] == pytest.approx(alone["start_errors"], rel=1e-3) and together["errors"] == pytest.approx(alone["errors"], rel=0.02)
    assert all(end < first for first, end in zip(together["start_errors"], together["errors"], strict=True))


def test_blocks_begin_with_the_scales_of_one_sample_whatever_share_of_them_a_process_has(tiny, tmp_path):
    """Of three batches one process has two, which are other rows than those that one process begins with."""
    block = {"epochs": 1, "batch": 2, "held_out": 0.0, "quantizer_lr": 1e-9}
    (one, two), stored, (alone, together) = block_by_block(tiny(dtype="float32", initializer_range=0.2), tmp_path, block=block, batch_size=2, **INT8)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
    torch.testing.assert_close(stored[1], stored[0], rtol=1e-5, atol=0)
    assert together["start_errors"] == pytest.approx(alone["start_errors"], rel=1e-3)


def test_a_killed_training_goes_on_to_the_same_scales(tiny, tmp_path):
    model = tiny(dtype="float32")
    assert start(1, model, tmp_path / "o", kill_at=3) == [-signal.SIGKILL]
    train(model, tmp_path / "o")
    train(model, tmp_path / "whole")
    assert (tmp_path / "o/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def train(model, out, shard=False, teacher=None, block=None, batch_size=1, **options):
    """A run in this process; the scales that it sees lie beside the output."""
    rank, threads = os.environ.get("RANK", "0"), torch.get_num_threads()
    text = out.parent / f"chats{rank}.jsonl"
    torch.set_num_threads(1)
    text = text if text.is_file() else chats(text)
    if block is None:
        given = {"quantizer_lr": 0.05, "shard": shard, "checkpointing": shard, "keep": "last", **({"teacher": teacher} if teacher else {})}
        run(model, out, lsq(**options), qad(text, **given))
    else:
        calibration = {"data": str(text), "samples": 6, "tokens": 32, "batch_size": batch_size}
        run(model, out, lsq(**options), {"use": "distill.blockwise", "with": block}, calibration=calibration)
    torch.set_num_threads(threads)
    torch.save(seen["scales"], f"{out}.{rank}")


def killed_at(step):
    """Let this process be killed before a step of a training."""
    terms = DistillTraining._terms

    def counted(self, at, part):
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return terms(self, at, part)

    DistillTraining._terms = counted


if __name__ == "__main__":
    given = json.loads(sys.argv[3])
    killed_at(given.pop("kill_at", None))
    train(sys.argv[1], Path(sys.argv[2]), **given)
