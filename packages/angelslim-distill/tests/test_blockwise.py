"""Blocks that round learn to make what the unquantized ones make, one after another, each fed by those before it.

The file is also a program: the processes of one training, as torchrun would start them.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from angelslim_core.calibration.data import Samples
from angelslim_core.context import Context
from angelslim_core.errors import NumericError, RecipeError, StoppedError, UsageError
from angelslim_core.fake_cache import FakeCache, place_cache, placed_caches
from angelslim_core.fake_quant import FakeQuantizer, place, placed, rounding_off
from angelslim_core.loading import load_model
from angelslim_core.parallel import Group, joined
from angelslim_core.plugins import PluginHost
from angelslim_core.schemes import Grid, Scheme
from angelslim_core.source import describe_source, open_source
from angelslim_distill.blockwise import BlockOptions, train_blocks


class Three(FakeQuantizer):
    """Three bits, a learnt scale for each row; `levels` None: as the weight is."""

    def __init__(self, weight, levels=3.0, learns_inputs=False):
        super().__init__(Scheme("three", Grid(3, "int", "channel")))
        self.levels = levels
        self.scale = nn.Parameter(weight.float().abs().amax(1, keepdim=True) / 3)
        self.register_buffer("seen", torch.zeros(()))

    def weight(self, weight_OI):
        if self.levels is None:
            return weight_OI + 0 * self.scale.sum().to(weight_OI.dtype)
        u = weight_OI.float() / self.scale
        codes = u + (u.round().clamp(-self.levels, self.levels) - u).detach()
        return (codes * self.scale).to(weight_OI.dtype)

    def inputs(self, x):
        if self.training and not self.seen:
            self.seen += x.detach().float().abs().max()
        return x


class Frozen(Three):
    trains_weight = False


def rounding(folder, work, kind=Three, levels=3.0, places=("mlp", "self_attn"), **context):
    """A model whose linears round, and a run's context."""
    model = load_model(folder, "cpu", emulate=False).model
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)  # so that blocks change what they are fed
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.split(".")[-2:][0] in places:
            place(module, kind(module.weight, levels))
    source = open_source(folder)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (12, 20, 9, 16, 20, 7)]
    description = describe_source(source, PluginHost().registry.layouts)
    return model, Context(source, description, "cpu", 0, work, **{"samples": Samples(ids), "batch_size": 2, **context})


@pytest.fixture
def opened(tiny, tmp_path):
    """opened(...) -> a tiny model whose linears round, and a run's context."""

    def make(kind=Three, levels=3.0, dtype="float32", where="work", architecture="llama", **given):
        return rounding(tiny(architecture, dtype=dtype), tmp_path / where, kind, levels, **given)

    return make


QUICK = BlockOptions(epochs=3, batch=2, lr=2e-3, quantizer_lr=2e-3, held_out=0.0)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_quantizers_that_change_nothing_have_no_error_and_stay_as_they_are(opened):
    model, context = opened(levels=None)
    before = values(model)
    found = train_blocks(model, context, QUICK)
    assert [(b["start_error"], b["error"]) for b in found] == [(0, 0), (0, 0)]
    assert all(torch.equal(p, before[name]) for name, p in values(model).items())


@pytest.mark.parametrize(("kind", "dtype"), [(Three, "float32"), (Three, "bfloat16"), (Frozen, "float32")])
def test_each_block_comes_closer_and_nothing_else_is_trained(opened, kind, dtype):
    model, context = opened(kind, dtype=dtype)
    before = values(model)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    found = train_blocks(model, context, BlockOptions(epochs=8, batch=2, lr=2e-3, quantizer_lr=2e-3, held_out=0.0))
    assert all(block["error"] < 0.9 * block["start_error"] and block["epoch"] > 0 for block in found)
    changed = {name for name, p in values(model).items() if not torch.equal(p, before[name])}
    linears = placed(model)
    assert changed >= {f"{n}.quantizer.scale" for n in linears}
    assert changed - {f"{n}.quantizer.scale" for n in linears} == ({f"{n}.weight" for n in linears} if kind is Three else set())
    assert trains == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(linear.quantizer.progress == 1.0 for linear in linears.values())


def test_weights_stay_where_only_quantizers_are_trained(opened):
    model, context = opened()
    before = values(model)
    train_blocks(model, context, BlockOptions(epochs=2, train="quantizers", quantizer_lr=1e-2))
    assert all(torch.equal(p, before[name]) or name.endswith(".scale") for name, p in values(model).items())


def outputs(model, ids):
    """What the model's blocks are fed and what they make, for one sample."""
    seen = []
    handles = [
        layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out))) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def test_a_block_is_fed_by_the_rounding_blocks_and_compared_with_the_unquantized_model(opened):
    model, context = opened()
    wanted, sums, tokens = {}, 0.0, 0
    for i, ids in enumerate(context.samples.ids):
        with rounding_off(model):
            wanted[i] = outputs(model, ids)[1][1]
    first = train_blocks(model, context, BlockOptions(epochs=1, lr=1e-9, quantizer_lr=1e-9, batch=2, held_out=0.0, relative=False))
    isolated = 0.0
    for i, ids in enumerate(context.samples.ids):
        own, layers = outputs(model, ids), model.model.layers
        sums += float((own[1][1] - wanted[i]).square().mean(-1).sum())
        with rounding_off(model):
            fed = outputs(model, ids)[1][0]
        positions = model.model.rotary_emb(fed, torch.arange(len(ids))[None])
        with torch.no_grad():
            out = layers[1](fed, position_embeddings=positions)
        isolated += float(((out[0] if isinstance(out, tuple) else out).reshape(wanted[i].shape) - wanted[i]).square().mean(-1).sum())
        tokens += len(ids)
    assert first[1]["start_error"] == pytest.approx(sums / tokens, rel=1e-3)
    assert abs(isolated / tokens - sums / tokens) > 0.02 * sums / tokens  # fed by the unquantized model it would be another


def test_padding_does_not_count(opened):
    alone, context = opened(where="a", batch_size=1)
    together, beside = opened(where="b", batch_size=6)
    options = BlockOptions(epochs=1, lr=1e-9, quantizer_lr=1e-9, held_out=0.0)
    one, all_of = train_blocks(alone, context, options), train_blocks(together, beside, options)
    for a, b in zip(one, all_of, strict=True):
        assert a["start_error"] == pytest.approx(b["start_error"], rel=1e-4)


def test_the_best_epoch_is_what_is_left(opened):
    model, context = opened()
    before = values(model)
    found = train_blocks(model, context, BlockOptions(epochs=2, batch=2, lr=0.5, quantizer_lr=0.5, held_out=0.0))  # far too much
    assert [block["epoch"] for block in found] == [0, 0] and all(b["error"] == b["start_error"] for b in found)
    assert all(torch.equal(p, before[name]) for name, p in values(model).items())
    assert any("block 0: training did not lower the error" in line for line in context.warnings)


def test_held_out_samples_are_not_trained_on(opened):
    model, context = opened(where="a", batch_size=1)
    other, beside = opened(where="b", batch_size=1)
    beside.samples = Samples([*context.samples.ids[:-2], *torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(7)).tolist()])
    for m, c in ((model, context), (other, beside)):
        found = train_blocks(m, c, BlockOptions(epochs=1, held_out=0.34, lr=3e-4, quantizer_lr=1e-4, relative=False))
        assert found[0]["epoch"] == 1
    first = {n: p for n, p in values(model).items() if ".layers.0." in n}
    moved = {n: p for n, p in values(other).items() if ".layers.0." in n}
    assert all(torch.equal(p, moved[n]) for n, p in first.items())


def test_the_same_seed_is_the_same_training_and_a_stopped_one_goes_on_bit_for_bit(opened):
    whole, context = opened(where="whole")
    found = train_blocks(whole, context, QUICK)
    asked = iter([*[False] * 5, True])  # in the second block
    cut, stopped = opened(where="cut", stop_requested=lambda: next(asked))
    with pytest.raises(StoppedError):
        train_blocks(cut, stopped, QUICK)
    again, resumed = opened(where="cut")
    (kept,) = (resumed.workdir / "measured").iterdir()
    assert [p.name for p in kept.iterdir()] == ["block-00000"]
    assert train_blocks(again, resumed, QUICK) == found
    assert all(torch.equal(p, values(whole)[name]) for name, p in values(again).items())
    third, other = opened(where="cut")  # of other options nothing is taken up
    train_blocks(third, other, BlockOptions(epochs=1))
    assert len(list((other.workdir / "measured").iterdir())) == 2


def test_a_loss_that_is_not_finite_ends_it_with_the_block(opened):
    model, context = opened()
    with torch.no_grad():
        placed(model)["model.layers.1.mlp.down_proj"].quantizer.scale[0] = float("nan")
    with pytest.raises(NumericError, match="block 1"):
        train_blocks(model, context, QUICK)
    (kept,) = (context.workdir / "measured").iterdir()
    assert (kept / "block-00000/numbers.json").is_file()


def test_quantizers_see_inputs_before_they_are_judged(opened):
    model, context = opened()
    train_blocks(model, context, QUICK)
    assert all(linear.quantizer.seen > 0 for linear in placed(model).values())


def test_a_model_that_does_not_round_is_refused(opened):
    model, context = opened(places=())
    with pytest.raises(RecipeError, match="no linear of the model's blocks rounds"):
        train_blocks(model, context, QUICK)


def test_blocks_with_nothing_to_train_are_passed_through(opened):
    model, context = opened()
    for name in [n for n in placed(model) if ".layers.0." in n]:
        linear = model.get_submodule(name)
        del linear.quantizer
        linear.__class__ = nn.Linear
    found = train_blocks(model, context, QUICK)
    assert found[0] == {"start_error": 0.0, "error": 0.0, "epoch": 0} and found[1]["error"] < found[1]["start_error"]


def test_what_quantizers_share_is_stepped_once(opened):
    """Adam's first step is of one size, whatever the gradient; three quantizers with one parameter take it once."""
    model, context = opened(places=("self_attn",))
    for layer in model.model.layers:
        linears = list(placed(layer).values())
        for linear in linears:
            linear.quantizer.scale = (
                nn.Parameter(linears[0].quantizer.scale.detach().mean().reshape(1, 1)) if linear is linears[0] else linears[0].quantizer.scale
            )
    before = values(model)
    found = train_blocks(model, context, BlockOptions(epochs=1, batch=6, train="quantizers", quantizer_lr=1e-3, final_lr=1.0, held_out=0.0))
    moved = [(p - before[name]).abs().item() for name, p in values(model).items() if name.endswith("scale")]
    assert [block["epoch"] for block in found] == [1, 1] and moved == pytest.approx([1e-3, 1e-3], rel=1e-3)


class Cut(FakeCache):
    """Keys and values are cut off at a number that is learnt."""

    def __init__(self, most):
        super().__init__()
        self.most = nn.Parameter(torch.full((1,), most))

    def rounded(self, key, value):
        return tuple(torch.minimum(torch.maximum(x, -self.most), self.most) for x in (key, value))


def test_what_attentions_learn_of_their_caches_is_trained_and_kept(opened):
    """Of another start than the one that was kept, nothing is taken up."""
    found = []
    for most in (0.5, 0.5, 0.6):
        model, context = opened(levels=None, where="same")
        for layer in model.model.layers:
            place_cache(layer.self_attn, Cut(most))
        blocks = train_blocks(model, context, BlockOptions(epochs=3, batch=2, quantizer_lr=2e-2, train="quantizers"))
        assert all(block["error"] < block["start_error"] for block in blocks)
        found.append([float(cache.most) for cache in placed_caches(model).values()])
    assert found[0] == found[1] and all(most > 0.5 for most in found[0]) and len(list((context.workdir / "measured").iterdir())) == 2


class Two(Group):
    """The first of two processes, alone: exchanges are as if the other had the same."""

    size = 2


def test_processes_must_share_a_batch_evenly(opened):
    model, context = opened(group=Two())
    with pytest.raises(UsageError, match="3 samples a step"):
        train_blocks(model, context, BlockOptions(batch=3))
    model, context = opened(group=Two(), batch_size=6)
    with pytest.raises(UsageError, match="1 batches of samples leave some of 2 processes"):
        train_blocks(model, context, BlockOptions(batch=2))


def test_other_architectures(opened):
    for architecture in ("gemma3_text", "qwen3"):
        model, context = opened(architecture=architecture, where=architecture)
        assert all(block["error"] < block["start_error"] for block in train_blocks(model, context, QUICK))


TOGETHER = BlockOptions(epochs=3, batch=6, lr=2e-3, quantizer_lr=2e-3, held_out=0.0)


def as_process(rank, size, port, folder, work):
    """One process of a training; it says what it found and what it has."""
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with joined("cpu") as group:
        model, context = rounding(folder, work, batch_size=1, group=group)
        found = train_blocks(model, context, TOGETHER)
        linears = placed(model)
        sums = {n: [float(p.sum()), float(p.abs().sum())] for n, p in model.named_parameters()}
        return {"found": found, "sums": sums, "seen": [float(linear.quantizer.seen) for linear in linears.values()]}


def test_two_processes_train_as_one_does(tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tiny(dtype="float32")
    done = subprocess.run([sys.executable, __file__, "2", port, folder, tmp_path / "two"], capture_output=True, text=True, check=True)
    first, second = (json.loads(line) for line in sorted(done.stdout.splitlines()))
    assert first == second
    alone = as_process(0, 1, "", folder, tmp_path / "one")
    assert first["found"][1]["error"] < first["found"][1]["start_error"]
    for a, b in zip(first["found"], alone["found"], strict=True):
        assert a["epoch"] == b["epoch"] and a["start_error"] == pytest.approx(b["start_error"], rel=1e-4) and a["error"] == pytest.approx(b["error"], rel=0.02)
    for name, numbers in first["sums"].items():
        assert numbers == pytest.approx(alone["sums"][name], rel=0.02, abs=0.05), name


if __name__ == "__main__":
    _, size, port, folder, work = sys.argv
    pids = []
    for rank in range(int(size)):
        pids.append(os.fork())
        if pids[-1] == 0:
            found = json.dumps(as_process(rank, int(size), port, Path(folder), Path(work)))
            os.write(1, f"{found}\n".encode())  # at once: both processes write there
            os._exit(0)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
