"""Compiled layers and attention by documents: the same losses, gradients and trainings, few graphs, and no silence where they cannot be had."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from angelslim_core import fake_quant
from angelslim_core.calibration.packing import row_of
from angelslim_core.calibration.spans import Document
from angelslim_core.errors import EngineError, StoppedError
from angelslim_core.loading import load_model, load_tokenizer
from angelslim_core.testing.training import Int3, Int3Along, chats, rounded
from angelslim_core.training import TrainingOptions
from angelslim_distill import attention, computing
from angelslim_distill.computing import Ways
from angelslim_distill.data.rows import Form, Supervised, collate, moved, prepare
from angelslim_distill.heads import Reader
from angelslim_distill.objective import Objective
from angelslim_distill.parameters import choose_parameters
from angelslim_distill.passes.base import Distilling, Options
from angelslim_distill.teacher import teacher_of
from angelslim_distill.trainer import DistillTraining, Looks

EAGER = Ways(compile=True, backend="aot_eager")


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny("llama", dtype="float32", num_hidden_layers=3)


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory):
    path = chats(tmp_path_factory.mktemp("data") / "chats.jsonl")
    found = prepare(path, load_tokenizer(folder), "model", length=160, packed=True, held_out=0.2)
    assert any(int(row.documents[-1]) for row in found.train)
    return found


@pytest.fixture
def on_any_device(monkeypatch):
    """Attention of variable length, by its definition, where no GPU is."""
    monkeypatch.setattr(computing, "varlen_obstacle", lambda model: "")


class OwnProduct(Int3Along):
    def product(self, x, weight_OI, bias_O):
        return torch.nn.functional.linear(x, self.weight(weight_OI), bias_O)


def training(folder, rows, ways=None, kind=Int3Along, *, steps=4, accumulate=1, source=None, train="auto", **more):
    model = load_model(folder, "cpu").model
    rounded(model, kind)
    choose_parameters(model, train)
    options = TrainingOptions(steps=steps, lr=1e-3, rates={".quantizer.": 1e-2}, clip=1.0, accumulate=accumulate)
    source = source or Supervised(rows.train, 4, accumulate=accumulate, multiple=160)
    return DistillTraining(model, source, teacher_of(model), Objective(lm_weight=0.1), options, Looks(rows.held_out, 2, 4, "last"), ways=ways, **more)


def parameters(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def by_tensors(query, key, value, starts, longest, scale):
    """`documents_attention` as a compiler can follow it."""
    places = torch.arange(len(query))
    documents = torch.searchsorted(starts, places.int(), right=True)
    mask = (documents[:, None] == documents) & (places[:, None] >= places)
    parts = (x.transpose(0, 1)[None] for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize(("kind", "train"), [(Int3Along, "auto"), (Int3, "auto"), (Int3Along, "all")])
def test_compiled_layers_train_as_plain_ones_and_are_two_graphs(folder, rows, tmp_path, kind, train):
    plain, compiled = training(folder, rows, None, kind, train=train), training(folder, rows, EAGER, kind, train=train, accumulate=1)
    wanted = plain.run(tmp_path / "plain")
    found = compiled.run(tmp_path / "compiled")
    assert compiled.computing.way.compiled and not plain.computing.way.compiled
    assert compiled.computing.graphs == 2, "one of the teacher's layers and one of the student's, whatever their number"
    same(parameters(compiled), parameters(plain))
    assert [loss for _, loss in found.losses] == pytest.approx([loss for _, loss in wanted.losses], rel=1e-5)
    assert all("forward" not in layer.__dict__ for layer in computing.layers_of(compiled.model))
    assert all(linear.held is None for linear in fake_quant.placed(compiled.model).values())


@pytest.mark.parametrize("ways", [Ways(compile=True, attention="varlen", backend="aot_eager"), Ways(attention="varlen"), Ways(attention="auto")], ids=str)
def test_attention_by_documents_trains_as_under_a_mask(folder, rows, tmp_path, on_any_device, monkeypatch, ways):
    if ways.compile:
        monkeypatch.setattr(attention, "documents_attention", by_tensors)
    plain, other = training(folder, rows, accumulate=2), training(folder, rows, ways, accumulate=2)
    plain.run(tmp_path / "plain")
    other.run(tmp_path / "other")
    assert other.computing.way == (bool(ways.compile), True) and other.computing.graphs == (2 if ways.compile else 0)
    same(parameters(other), parameters(plain))
    assert other.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_documents_see_themselves_alone_in_either_way(tiny, rows, architecture):
    model = load_model(tiny(architecture, dtype="float32"), "cpu").model
    attention.register()
    batch, reader = collate(rows.train[:3], 7), Reader(model)
    wanted = reader(batch).states[batch.attention_mask]
    reader.is_varlen = True
    torch.testing.assert_close(reader(batch).states[batch.attention_mask], wanted)
    for starts, positions in ((None, batch.positions), (None, None)):
        bare = type(batch)(batch.input_ids, batch.attention_mask, batch.labels, batch.counted, batch.samples, positions, starts)
        reader.is_varlen = False
        wanted = reader(bare).states[batch.attention_mask]
        reader.is_varlen = True
        torch.testing.assert_close(reader(bare).states[batch.attention_mask], wanted)


@pytest.mark.parametrize("longest", [0, 70])
def test_documents_start_where_positions_do_and_padding_is_few_of_them(rows, longest):
    chosen = sorted(rows.train, key=len)[:3]
    batch = collate(chosen, 150, Form(True, 48, longest))
    starts, length = batch.starts.tolist(), batch.input_ids.shape[1]
    wanted = []
    for i, row in enumerate(chosen):
        wanted += [i * length + int((row.documents == n).nonzero()[0]) for n in range(int(row.documents[-1]) + 1)]
        wanted += range(i * length + len(row), (i + 1) * length, longest or length)
    assert starts[: len(wanted)] == wanted and set(starts[len(wanted) :]) == {3 * length} and len(starts) == 48
    assert batch.longest == (longest or length) and max(b - a for a, b in pairwise(starts)) <= batch.longest
    ones = torch.zeros(1, 2 * attention.FEWEST, dtype=torch.int64)
    many = attention.starts_of(ones, ones.bool(), 1)
    assert many.tolist()[: ones.numel() + 1] == list(range(ones.numel() + 1)) and len(many) == 4 * attention.FEWEST


def test_batches_of_a_training_have_one_form(rows):
    source = Supervised(rows.train, 3, multiple=160)
    batches = [source.batch(step, 0) for step in range(30)]
    assert len({(len(b.starts), b.longest, b.input_ids.shape) for b in batches}) == 1 and all(b.positions is not None for b in batches)
    assert batches[0].longest == max(int(torch.bincount(row.documents).max()) for row in rows.train)
    lone = [row_of([Document([5] * n, [True] * n)]) for n in (9, 8, 12, 11)]
    assert Supervised(lone, 2).batch(0, 0).positions is None


def test_the_operation_of_a_gpu_takes_what_it_is_given():
    query, key, value = (torch.empty(96, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (9, 3, 3))
    out = attention.documents_attention(query, key, value, torch.empty(65, dtype=torch.int32, device="meta"), 32, 0.125)
    out.sum().backward()
    assert out.shape == query.shape == query.grad.shape and key.grad.shape == value.grad.shape == key.shape


def test_the_host_asks_the_device_for_nothing(folder, rows):
    class Waits(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.found += str(operation) in ("aten._local_scalar_dense.default", "aten.nonzero.default")
            return operation(*args, **(kwargs or {}))

    run = training(folder, rows)
    batch = moved(run.source.batch(0, 0), torch.device("cpu"))
    run.computing(batch)
    with Waits() as waits:
        student, _ = run.computing(batch)
        student.states.sum().backward()
    assert waits.found == 0


def test_a_compiled_training_that_is_stopped_ends_as_one_that_ran_through(folder, rows, tmp_path):
    whole = training(folder, rows, EAGER)
    whole.run(tmp_path / "whole")
    calls = iter(range(100))
    with pytest.raises(StoppedError):
        training(folder, rows, EAGER).run(tmp_path / "cut", stop_requested=lambda: next(calls) == 1)
    last = training(folder, rows, EAGER)
    last.run(tmp_path / "cut")
    for name, wanted in parameters(whole).items():
        assert torch.equal(parameters(last)[name], wanted), name


def test_what_is_asked_for_by_name_and_cannot_be_done_is_an_error(folder, rows, tmp_path, monkeypatch):
    for given, message in (
        ({"ways": EAGER, "kind": OwnProduct}, "makes its product itself"), ({"ways": EAGER, "checkpointing": True}, "checkpointing"),
        ({"ways": Ways(attention="varlen")}, "16 bits on a GPU"), ({"ways": Ways(compile=True, backend="nothing_of_this_name")}, "on the first batch"),
    ):  # fmt: skip
        with pytest.raises(EngineError, match=message):
            training(folder, rows, **given).run(tmp_path / "states")


@pytest.mark.parametrize("why", ["breaks", "lies", "is too large"])
def test_what_was_to_be_tried_and_fails_is_told_and_done_the_plain_way(folder, rows, tmp_path, on_any_device, monkeypatch, why):
    def broken(query, *given):
        if why == "breaks":
            raise OSError("no such kernel")  # compilers raise what they like
        if why == "is too large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return query * 1.0

    monkeypatch.setattr(attention, "documents_attention", broken)
    told, plain = [], training(folder, rows)
    run = training(folder, rows, Ways(attention="auto"), tell=told.append)
    run.run(tmp_path / "auto")
    plain.run(tmp_path / "plain")
    assert run.computing.way == computing.PLAIN and len(told) == 1
    assert {"breaks": "no such kernel", "lies": "hidden states are", "is too large": "out of memory"}[why] in told[0]
    for name, wanted in parameters(plain).items():
        assert torch.equal(parameters(run)[name], wanted), name


def test_rows_of_many_lengths_are_an_error_of_compiled_layers(folder, rows, tmp_path, monkeypatch):
    class Longer(Supervised):
        def batch(self, step, part):
            self._multiple = 200 + 64 * step
            return super().batch(step, part)

    monkeypatch.setattr(computing, "MOST_GRAPHS", 4)
    run = training(folder, rows, EAGER, source=Longer(rows.train, 4))
    with pytest.raises(EngineError, match="more than 4 graphs"):
        run.run(tmp_path)
    assert run.computing.graphs == 4


def test_auto_compiles_layers_where_a_gpu_is_and_little_is_padded():
    class Training(Distilling):
        id = "t.t"

        class Config(Options):
            pass

    def found(lengths, device="cuda", **options):
        return Training.bind(Training.Config(data="x", **options)).is_compiled(lengths, 64, device)

    assert found([1000, 1024, 900], compile="auto") == "auto" and found([1000, 100, 90], compile="auto") is False
    assert found([1000], "cpu", compile="auto") is False and found([1000, 10], compile=True) is True and found([1000]) == "auto"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_documents_attention_is_its_definition():
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (torch.randn(160, heads, 64, dtype=torch.bfloat16, device="cuda", generator=generator).requires_grad_() for heads in (9, 3, 3))
    starts = torch.tensor([0, 3, 67, 160, 160, 160], dtype=torch.int32, device="cuda")
    slope = torch.randn(160, 9, 64, dtype=torch.bfloat16, device="cuda", generator=generator)
    found = []
    for attend in (attention.documents_attention(query, key, value, starts, 93, 0.125), attention.reference(query, key, value, starts, 0.125)):
        found.append([attend, *torch.autograd.grad(attend, (query, key, value), slope)])
    for one, other in zip(*found, strict=True):
        assert float((one.float() - other.float()).norm() / other.float().norm()) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_fastest_way_is_taken_unasked(tiny, tmp_path, rows):
    model = load_model(tiny("llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3), "cuda").model
    rounded(model, Int3Along)
    choose_parameters(model, "auto")
    told = []
    run = DistillTraining(
        model, Supervised(rows.train, 4, multiple=192), teacher_of(model), Objective(), TrainingOptions(steps=4, lr=1e-3), Looks(rows.held_out, 2, 4),
        ways=Ways("auto", "auto"), tell=told.append,
    )  # fmt: skip
    history = run.run(tmp_path)
    assert run.computing.way == (True, True) and run.computing.graphs == 2 and not told and len(history.losses) == 4
