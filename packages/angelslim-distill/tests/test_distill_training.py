"""A student nears its teacher, whatever shares its steps, stops it or goes wrong."""

import copy
import json
import math

import pytest
import torch

from angelslim_core import fake_quant
from angelslim_core.errors import ModelError, NumericError, RecipeError, StoppedError, UsageError
from angelslim_core.fake_cache import FakeCache, place_cache, placed_caches
from angelslim_core.loading import load_model, load_tokenizer
from angelslim_core.testing.training import Int3, Int3Along, chats, rounded
from angelslim_core.training import TrainingOptions
from angelslim_distill.data.rows import Supervised, collate, prepare
from angelslim_distill.evaluation import evaluate
from angelslim_distill.heads import Reader, logits_of
from angelslim_distill.history import History
from angelslim_distill.kinds import Loss
from angelslim_distill.losses import kd_loss
from angelslim_distill.objective import Objective
from angelslim_distill.parameters import choose_parameters
from angelslim_distill.targets import Hidden
from angelslim_distill.teacher import ModelTeacher, teacher_from, teacher_of
from angelslim_distill.trainer import DistillTraining, Looks


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny("llama", dtype="float32")


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory):
    path = chats(tmp_path_factory.mktemp("data") / "chats.jsonl")
    return prepare(path, load_tokenizer(folder), "model", length=64, packed=False, held_out=0.2)


def student(folder, kind=Int3, train="auto"):
    model = load_model(folder, "cpu").model
    if kind is not None:
        rounded(model, kind)
    choose_parameters(model, train)
    return model


def training(model, rows, *, batch=4, accumulate=1, teacher=None, objective=None, looks=None, source=None, options=None, **more):
    options = TrainingOptions(**{"steps": 6, "lr": 1e-3, "rates": {".quantizer.": 1e-2}, "accumulate": accumulate, "clip": 1.0, **(options or {})})
    source = source or Supervised(rows.train, batch, accumulate=accumulate)
    return DistillTraining(model, source, teacher or teacher_of(model), objective or Objective(), options, looks or Looks(rows.held_out, 3, 4), **more)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(found, wanted, exactly=True):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **({"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-6}), msg=name)


def test_without_rounding_the_student_is_its_teacher_bit_for_bit(folder, rows):
    plain, model = load_model(folder, "cpu").model, student(folder)
    batch = collate(rows.train[:4])
    assert teacher_of(model).model is model
    with torch.no_grad():
        wanted, found, rounds = Reader(plain)(batch).states, teacher_of(model)(batch).states, Reader(model)(batch).states
    assert torch.equal(found, wanted) and not torch.equal(rounds, wanted) and not found.requires_grad
    teacher = ModelTeacher(model.train())
    model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        teacher(batch)
    assert model.training and all(linear.rounds for linear in fake_quant.placed(model).values())


def test_a_teacher_whose_weights_are_trained_is_a_copy(folder, rows):
    model = student(folder, Int3Along)
    teacher, batch = teacher_of(model), collate(rows.train[:4])
    before = teacher(batch).states
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert teacher.model is not model and not fake_quant.placed(teacher.model) and torch.equal(teacher(batch).states, before)
    assert not any(p.requires_grad for p in teacher.model.parameters()) and fake_quant.placed(model)


class Cache(FakeCache):
    """Keys and values are cut off at a number that is learnt."""

    def __init__(self):
        super().__init__()
        self.most = torch.nn.Parameter(torch.full((1,), 0.01))

    def rounded(self, key, value):
        return tuple(torch.minimum(torch.maximum(x, -self.most), self.most) for x in (key, value))


@pytest.mark.parametrize("kind", [Int3, Int3Along])
def test_caches_round_for_the_student_alone_and_are_trained_with_it(folder, rows, kind):
    plain, model, batch = load_model(folder, "cpu").model, load_model(folder, "cpu").model, collate(rows.train[:4])
    rounded(model, kind)
    for layer in model.model.layers:
        place_cache(layer.self_attn, Cache())
    linears = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".scale") or (kind is Int3Along and n.endswith("proj.weight")))
    assert choose_parameters(model, "auto") == linears + 2
    teacher = teacher_of(model)
    assert (teacher.model is model) == (kind is Int3) and (teacher.model is model or not placed_caches(teacher.model))
    with torch.no_grad():
        wanted, rounds = Reader(plain)(batch).states, Reader(model)(batch).states
        for linear in fake_quant.placed(model).values():
            linear.rounds = False
        cache_alone = Reader(model)(batch).states
    assert torch.equal(teacher(batch).states, wanted) and len({float(x.sum()) for x in (wanted, rounds, cache_alone)}) == 3


@pytest.mark.parametrize("top_k", [None, 7])
def test_the_loss_is_the_dense_one_of_the_models_own_logits(folder, rows, top_k, monkeypatch):
    monkeypatch.setattr("angelslim_distill.objective.CHUNK", 5)
    model, batch = student(folder, Int3Along), collate(rows.train[:4])
    teacher, objective = teacher_of(model), Objective(Loss("cakld", 2.0), top_k, 0.5, 2.0)
    sums = objective.sums(Reader(model)(batch), teacher(batch), batch)
    (sums.total / batch.counted.sum()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits, wanted = model(input_ids=batch.input_ids).logits, teacher.model(input_ids=batch.input_ids).logits
    kd = kd_loss(logits, wanted, batch.counted, "cakld", 2.0, top_k, batch.labels)
    lm = torch.nn.functional.cross_entropy(logits[batch.counted], batch.labels[batch.counted])
    (2.0 * kd + 0.5 * lm).backward()
    torch.testing.assert_close(torch.stack((sums.kd, sums.lm)) / batch.counted.sum(), torch.stack((kd, lm)))
    same(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, exactly=False)


def test_towards_a_teacher_that_is_sure_of_the_next_token_the_loss_is_cross_entropy(folder, rows):
    model, batch = student(folder, None), collate(rows.train[:4])
    hidden = Reader(model)(batch)
    sure = Hidden(torch.nn.functional.one_hot(batch.labels, 256).float(), 1e4 * torch.eye(256))
    found = Objective().sums(hidden, sure, batch).total
    next_token = torch.nn.functional.cross_entropy(
        logits_of(hidden, hidden.states[:, :-1])[batch.counted[:, :-1]], batch.input_ids[:, 1:][batch.counted[:, :-1]], reduction="sum"
    )
    torch.testing.assert_close(found, next_token)


def test_without_a_weight_for_the_teacher_it_is_not_asked(folder, rows, tmp_path):
    def nobody(batch):
        raise AssertionError

    training(student(folder, None), rows, teacher=nobody, objective=Objective(kd_weight=0, lm_weight=1), looks=Looks()).run(tmp_path)
    with pytest.raises(UsageError, match="nothing is trained for"):
        Objective(kd_weight=0)
    with pytest.raises(UsageError, match="compares logits"):
        Objective(Loss("mse"), top_k=3)


@pytest.mark.parametrize("kind", [Int3, Int3Along])
def test_batches_of_one_accumulated_step_as_one_batch_does(folder, rows, tmp_path, kind):
    assert len({int(collate([row]).counted.sum()) for row in rows.train}) > 3
    found = []
    for batch, accumulate in ((4, 1), (1, 4)):
        model = student(folder, kind)
        run = training(model, rows, batch=batch, accumulate=accumulate, objective=Objective(lm_weight=0.3), options={"weight_decay": 0.1})
        history = run.run(tmp_path / f"{kind.__name__}-{batch}")
        found.append((parameters(model), [look["kl"] for look in history.looks], [loss for _, loss in history.losses]))
    same(found[0][0], found[1][0], exactly=False)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3) and found[0][2] == pytest.approx(found[1][2], rel=1e-3)


def test_training_scales_alone_leaves_weights_as_they_are_and_brings_the_student_nearer(folder, rows, tmp_path):
    model = student(folder)
    before = parameters(model)
    run = training(model, rows, options={"steps": 100, "rates": {".quantizer.": 1e-2}}, looks=Looks(rows.held_out, 25, 4))
    history = run.run(tmp_path)
    after = parameters(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".quantizer." in name}
    kls = [look["kl"] for look in history.looks]
    assert run.kept["kl"] == min(kls) < 0.7 * kls[0], kls
    assert run.kept["kl"] == pytest.approx(evaluate(model, run.teacher, rows.held_out, 4).kl)
    assert len(history.losses) == 100 and [curve["title"][:8] for curve in history.curves()] == ["Training", "KL to th"]
    batch = collate(rows.held_out)
    model.eval()
    with torch.no_grad():
        fake = Reader(model)(batch).states
        for linear in fake_quant.placed(model).values():
            fake_quant.remove(linear)
        assert torch.equal(Reader(model)(batch).states, fake), "what is stored is what was trained"


class Stop:
    """Asks a training to stop before its n-th step is followed by another."""

    def __init__(self, at):
        self.at = at

    def __call__(self):
        self.at -= 1
        return self.at == 0


@pytest.mark.parametrize(("kind", "dtype"), [(Int3, "float32"), (Int3Along, "bfloat16")])
def test_a_stopped_training_ends_as_one_that_ran_through(tiny, rows, tmp_path, kind, dtype):
    folder = tiny("llama", dtype=dtype)
    looks = Looks(rows.held_out, 2, 4)
    whole = student(folder, kind)
    wanted = training(whole, rows, looks=looks, accumulate=2, batch=2).run(tmp_path / "whole")
    for stop in (3, 2):
        first = student(folder, kind)
        with pytest.raises(StoppedError):
            training(first, rows, looks=looks, accumulate=2, batch=2).run(tmp_path / "cut", stop_requested=Stop(stop))
        History([(6, 1.0)]).write(tmp_path / "cut", 6)  # as one that was killed before its state was whole
    last = student(folder, kind)
    found = training(last, rows, looks=looks, accumulate=2, batch=2).run(tmp_path / "cut")
    same(parameters(last), parameters(whole))
    assert found.looks == wanted.looks and dict(found.losses) == pytest.approx(dict(wanted.losses)) and found.tokens == wanted.tokens
    assert [path.name for path in (tmp_path / "cut").glob("history*")] == ["history-00000006.json"]
    assert all(linear.quantizer.scale.dtype == torch.float32 for linear in fake_quant.placed(last).values())
    other = training(student(folder, kind), rows, looks=looks, accumulate=2, batch=2, inputs={"data": "another"})
    with pytest.raises(ModelError, match="another data"):
        other.run(tmp_path / "cut")


def test_the_best_state_is_what_is_left(folder, rows, tmp_path):
    def run(keep):
        model = student(folder)
        run = training(model, rows, looks=Looks(rows.held_out, 2, 4, keep), options={"steps": 8, "rates": {".quantizer.": 0.5}, "warmup": 0.75})
        history = run.run(tmp_path / keep)
        return evaluate(model, run.teacher, rows.held_out, 4).kl, [look["kl"] for look in history.looks], run.kept

    best, looks, kept = run("best")
    last, _, left = run("last")
    assert best == pytest.approx(min(looks)) and last == pytest.approx(looks[-1]) and last > best
    assert kept["kl"] == min(looks) and left["step"] == 8


def test_numbers_that_are_not_finite_stop_it_and_the_last_good_state_is_kept(folder, rows, tmp_path):
    model = student(folder)

    class Broken(Supervised):
        def batch(self, step, part):
            if step == 4:
                with torch.no_grad():
                    model.model.norm.weight.fill_(math.inf)
            return super().batch(step, part)

    run = training(model, rows, source=Broken(rows.train, 4), looks=Looks(rows.held_out, 2, 4))
    with pytest.raises(NumericError, match="not finite"):
        run.run(tmp_path)
    good = student(folder)
    again = training(good, rows, looks=Looks(rows.held_out, 2, 4))
    assert again.training.resume(tmp_path) and again.training.step == 4
    assert json.loads((tmp_path / "best.json").read_text())["step"] in (0, 2, 4)
    assert all(p.isfinite().all() for p in good.parameters())


def test_a_step_without_any_token_that_counts_is_an_error_and_one_of_its_parts_is_not(folder, rows, tmp_path):
    class Silent(Supervised):
        def __init__(self, silent, **given):
            super().__init__(rows.train, 2, accumulate=2)
            self.silent = silent

        def batch(self, step, part):
            batch = super().batch(step, part)
            if part in self.silent:
                batch.counted.zero_()
            return batch

    model = student(folder)
    training(model, rows, accumulate=2, source=Silent({0}), options={"steps": 1}).run(tmp_path / "one")
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(RecipeError, match="no token that counts"):
        training(student(folder), rows, accumulate=2, source=Silent({0, 1})).run(tmp_path / "none")


@pytest.mark.parametrize(("most", "shown"), [(1, 1), (10**6, 4)])
def test_of_a_large_first_batch_some_rows_are_shown_to_quantizers(folder, rows, monkeypatch, most, shown):
    monkeypatch.setattr("angelslim_distill.trainer.SHOWN", most)
    model, seen = student(folder), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    made = training(model, rows)
    first = made.source.batch(0, 0).input_ids
    assert len(seen) == 1 and torch.equal(seen[0], first[:shown])


def test_another_tokenizer_is_refused(folder, tiny_copy):
    other = tiny_copy("llama", dtype="float32")
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="another tokenizer"):
        teacher_from(other, load_tokenizer(folder), "cpu")
    (other / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        teacher_from(other, load_tokenizer(folder), "cpu")


def test_a_teacher_of_a_padded_vocabulary_teaches(folder, tiny, rows):
    teacher = teacher_from(tiny("llama", dtype="float32", vocab_size=320, num_hidden_layers=3), load_tokenizer(folder), "cpu")
    model, batch = student(folder, None), collate(rows.train[:4])
    found = Objective().sums(Reader(model)(batch), teacher(batch), batch)
    wanted = teacher.model(input_ids=batch.input_ids).logits[..., :256]
    expected = kd_loss(model(input_ids=batch.input_ids).logits, wanted, batch.counted)
    torch.testing.assert_close(found.total / batch.counted.sum(), expected)


def test_what_is_trained_is_what_was_asked_for(folder):
    names = {
        train: {n for n, p in student(folder, Int3Along, train).named_parameters() if p.requires_grad} for train in ("auto", "all", "quantizers", "weights")
    }
    assert names["quantizers"] == {n for n in names["all"] if ".quantizer." in n} and names["weights"] == names["all"] - names["quantizers"]
    assert names["auto"] == names["quantizers"] | {n.replace("quantizer.scale", "weight") for n in names["quantizers"]}
    frozen = {n for n, p in student(folder, Int3, "all").named_parameters() if not p.requires_grad}
    assert frozen == names["auto"] - names["quantizers"], "a quantizer may freeze its weight"
    with pytest.raises(RecipeError, match="nothing of the model"):
        student(folder, None, "quantizers")


def test_activations_computed_anew_give_the_same_steps(folder, rows, tmp_path):
    found = []
    for checkpointing in (False, True):
        model = student(folder, Int3Along)
        training(model, rows, checkpointing=checkpointing).run(tmp_path / str(checkpointing))
        found.append(parameters(model))
    same(*found, exactly=False)


@pytest.mark.parametrize("config", [{"final_logit_softcapping": 3.0}, {}])
def test_a_head_of_another_kind_is_honoured_or_refused(tiny, rows, config):
    model = load_model(tiny("gemma3_text", dtype="float32"), "cpu").model
    for name, value in config.items():
        setattr(model.config, name, value)
    batch = collate(rows.train[:2])
    hidden = Reader(model)(batch)
    torch.testing.assert_close(logits_of(hidden, hidden.states), model(input_ids=batch.input_ids).logits)
    odd = copy.deepcopy(model)
    odd.lm_head.register_forward_hook(lambda module, args, out: 3 * out)
    with pytest.raises(ModelError, match="not known here"):
        Reader(odd)(batch)
    rounded(model)
    fake_quant.place(model.lm_head, Int3(model.lm_head.weight))
    with pytest.raises(ModelError, match="its head is rounded"):
        Reader(model)
