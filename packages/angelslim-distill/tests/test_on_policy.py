"""The student's own answers as batches: of the seed and its weights alone, up to their ends, and without gradient."""

import json

import pytest
import torch

from angelslim_core.calibration.packing import pack, row_of
from angelslim_core.calibration.spans import Document
from angelslim_core.errors import UsageError
from angelslim_core.fake_quant import FakeQuantizer, place, placed
from angelslim_core.loading import load_model, load_tokenizer
from angelslim_core.parallel import Group
from angelslim_core.schemes import Grid, Scheme
from angelslim_core.training import TrainingOptions
from angelslim_distill.data.rows import Supervised, collate, prepare
from angelslim_distill.losses import Loss
from angelslim_distill.objective import Objective
from angelslim_distill.on_policy import OnPolicy, prompts_of
from angelslim_distill.parameters import choose_parameters
from angelslim_distill.rollouts import Sampled, sampling
from angelslim_distill.teacher import teacher_from
from angelslim_distill.trainer import DistillTraining, Looks

STOP = 2


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny(dtype="float32")


@pytest.fixture
def model(folder):
    return load_model(folder, "cpu", emulate=False).model


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return [row_of([_document(torch.randint(3, 250, (n,), generator=generator).tolist(), 4)]) for n in (9, 12, 7, 11, 8, 10)]


def _document(ids, first):
    return Document(ids, [i >= first for i in range(len(ids))])


def mixed(rows, answer, lmbda=1.0, **more):
    given = {"batch": 2, "lmbda": lmbda, "seed": 3, **more}
    data = Supervised(rows, given["batch"], seed=3, group=given.get("group"))
    return OnPolicy(data, prompts_of(rows), answer, [STOP], **given)


def said(*answers):
    """A rollout source that gives these in turn, and keeps what it was asked."""
    kept = []

    def answer(prompts, seed):
        kept.append((prompts, seed))
        return [list(answers[i % len(answers)]) for i in range(len(prompts))]

    answer.kept = kept
    return answer


def equal(a, b):
    names = ("input_ids", "attention_mask", "labels", "counted")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and list(a.samples) == list(b.samples)


def test_answers_count_up_to_their_end_and_prompts_do_not(rows):
    batch = mixed(rows, said([7, 8, STOP], [9])).batch(0, 0)
    prompt = batch.input_ids[0, :4].tolist()
    assert batch.input_ids.tolist() == [[*prompt, 7, 8, STOP], [*batch.input_ids[1, :4].tolist(), 9, 0, 0]]
    # position t predicts t + 1: the last of the prompt the answer's first token, the last token of an answer nothing
    assert batch.counted.tolist() == [[False] * 3 + [True] * 3 + [False], [False] * 3 + [True] + [False] * 3]
    assert batch.labels[0][batch.counted[0]].tolist() == [7, 8, STOP] and batch.labels[1][batch.counted[1]].tolist() == [9]
    assert batch.attention_mask.sum(1).tolist() == [7, 5]


def test_empty_answers_are_left_out_and_data_stand_in_where_all_are(rows):
    batch = mixed(rows, said([STOP], [7, 8])).batch(0, 0)
    assert batch.input_ids.shape == (1, 6) and batch.input_ids[0, 4:].tolist() == [7, 8]
    for nothing in ([STOP], []):
        lines = []
        source = mixed(rows, said(nothing), tell=lines.append)
        assert equal(source.batch(4, 0), source.data.batch(4, 0)) and lines == ["step 5: all of the student's answers are empty, and data stand in for them"]


def test_without_own_answers_it_is_the_data_and_no_answer_is_asked_for(rows):
    answer = said([7])
    source = mixed(rows, answer, lmbda=0.0)
    assert all(equal(source.batch(step, 0), source.data.batch(step, 0)) for step in range(9)) and not answer.kept


def test_seed_and_step_decide_alike_in_all_processes(rows):
    class One(Group):
        rank, size = 1, 2

    class Zero(Group):
        rank, size = 0, 2

    first, second = (mixed(rows, said([7]), lmbda=0.3, group=group()) for group in (Zero, One))
    decided = [first.is_own(step) for step in range(2000)]
    assert decided == [second.is_own(step) for step in range(2000)] and 0.25 < sum(decided) / 2000 < 0.35
    assert decided != [mixed(rows, said([7]), lmbda=0.3, seed=4).is_own(step) for step in range(2000)]
    both = [mixed(rows, said([7]), group=group()) for group in (Zero, One)]
    for step in range(3):  # an epoch of six prompts
        for source in both:
            source.batch(step, 0)
    asked = [prompt for source in both for prompts, _ in source.rollouts.kept for prompt in prompts]
    assert sorted(asked) == sorted(prompts_of(rows)) and len({seed for source in both for _, seed in source.rollouts.kept}) == 6
    with pytest.raises(UsageError, match="3 answers a batch"):
        OnPolicy(first.data, prompts_of(rows), said([7]), [STOP], batch=3, group=Zero())


def test_prompts_are_what_stands_before_answers_in_each_document():
    documents = [_document([5, 6, 7, 8], 2), _document([9, 10, 11], 1), _document([12, 13], 0)]
    assert sorted(prompts_of(pack(documents, 64))) == [[5, 6], [9]]


def sampled(model, **more):
    return Sampled(model, **{"max_new_tokens": 12, "stop_ids": [STOP], **more})


def test_the_seed_alone_decides_what_is_drawn_and_no_random_state_changes(model):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sampled(model)(prompts, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert sampled(model)(prompts, 7) == first != sampled(model)(prompts, 8)
    assert all(1 <= len(answer) <= 12 for answer in first)


def test_draws_are_the_models_distribution_under_temperature_and_top_p(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    prompts = [[5, 6, 7], [40, 5, 6, 7][1:]] * 2000
    drawn = torch.tensor([a[0] for a in sampled(model, max_new_tokens=1, stop_ids=[], temperature=0.7)(prompts, 1)])
    counts = torch.bincount(drawn, minlength=256) / len(drawn)
    assert float((counts - (logits / 0.7).softmax(-1)).abs().sum()) < 0.2
    nucleus = sampled(model, max_new_tokens=1, stop_ids=[], temperature=1.0, top_p=0.3)(prompts[:500], 1)
    probabilities, order = logits.softmax(-1).sort(descending=True)
    allowed = set(order[: int((probabilities.cumsum(-1) < 0.3).sum()) + 1].tolist())
    assert {a[0] for a in nucleus} == allowed


def test_padding_on_the_left_changes_no_answer(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(300)  # as good as greedy
    short, long = [5, 6, 7], list(range(20, 40))
    together = sampled(model, stop_ids=[])([short, long], 0)
    assert together == [sampled(model, stop_ids=[])([p], 0)[0] for p in (short, long)]


def test_nothing_follows_the_end_of_an_answer(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
    free = sampled(model, stop_ids=[])([[5, 6, 7], [9, 8, 7]], 0)
    stop = free[0][4]
    ended = sampled(model, stop_ids=[stop, 255])([[5, 6, 7], [9, 8, 7]], 0)
    assert ended[0] == free[0][: free[0].index(stop) + 1]
    assert ended[1] == (free[1][: free[1].index(stop) + 1] if stop in free[1] else free[1])


class Coarse(FakeQuantizer):
    """Rounds to tenths of the largest weight, and counts how often."""

    def __init__(self, weight):
        super().__init__(Scheme("coarse", Grid(4, "int", "channel")))
        self.scale = torch.nn.Parameter(weight.detach().abs().amax(1, keepdim=True) / 5)
        self.asked = 0

    def weight(self, weight_OI):
        self.asked += 1
        u = weight_OI / self.scale
        return (u + (u.round() - u).detach()) * self.scale

    def bias(self, weight_OI):
        return 0.01 * weight_OI.sum(1)


class OwnProduct(Coarse):
    """Makes its product itself, as `quant.sherry` and `quant.tequila` do."""

    def product(self, x, weight_OI, bias_O):
        return torch.nn.functional.linear(x, Coarse.weight(self, weight_OI), self.biased(weight_OI, bias_O))


@pytest.mark.parametrize("kind", [Coarse, OwnProduct])
def test_a_model_that_rounds_answers_as_it_rounds_and_rounds_once(model, kind):
    for name, module in list(model.named_modules()):
        if "mlp." in name and isinstance(module, torch.nn.Linear):
            place(module, kind(module.weight))
    own, config = placed(model), model.generation_config
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
        ids = [5, 6, 7]
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    model.train()
    before = [linear.quantizer.asked for linear in own.values()]
    assert sampled(model, max_new_tokens=6, stop_ids=[])([[5, 6, 7]], 0)[0] == ids[3:]
    assert [linear.quantizer.asked for linear in own.values()] == [n + 1 for n in before]
    assert model.training and model.generation_config is config
    assert not any({"weight", "bias", "product"} & linear.quantizer.__dict__.keys() for linear in own.values())
    with pytest.raises(ZeroDivisionError), sampling(model, None):
        raise ZeroDivisionError
    assert model.training and model.generation_config is config
    loss = model(torch.tensor([ids])).logits.float().logsumexp(-1).sum()  # what is trained afterwards rounds anew
    loss.backward()
    assert all(linear.quantizer.scale.grad.abs().sum() > 0 and linear.weight.grad.abs().sum() > 0 for linear in own.values())


def test_the_models_own_generation_config_does_not_count(model):
    plain = sampled(model)([[5, 6, 7]], 7)
    model.generation_config.repetition_penalty, model.generation_config.min_new_tokens, model.generation_config.temperature = 9.0, 3, 0.01
    assert sampled(model)([[5, 6, 7]], 7) == plain


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "c.jsonl"
    words = ["ab", "cd", "efg", "h"]
    lines = [{"messages": [{"role": "user", "content": " ".join(words[: i % 4 + 1])}, {"role": "assistant", "content": words[i % 3] * 3}]} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return prepare(path, load_tokenizer(folder), "model", length=96, packed=False, held_out=0.2)


@pytest.fixture(scope="module")
def teacher(folder, tiny):
    return teacher_from(tiny(dtype="float32", initializer_range=0.05), load_tokenizer(folder), "cpu")


def trained(folder, data, teacher, states, lmbda, stop=lambda: False, source=None, steps=6):
    model = load_model(folder, "cpu", emulate=False).model
    choose_parameters(model, "auto")
    supervised = Supervised(data.train, 4, seed=1)
    answers = Sampled(model, 8, [STOP])
    mixing = OnPolicy(supervised, prompts_of(data.train), answers, [STOP], batch=4, lmbda=lmbda, seed=1)
    objective = Objective(Loss("jsd", beta=0.5))
    options = TrainingOptions(steps=steps, lr=1e-3, seed=1)
    training = DistillTraining(model, mixing if source is None else supervised, teacher, objective, options, Looks(data.held_out, 2, 4, "last"))
    training.run(states, stop_requested=stop)
    return model, training


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(p, b[name]) for name, p in a.items())


def test_without_own_answers_training_is_the_supervised_one_bit_for_bit(folder, data, teacher, tmp_path):
    mixed_in, _ = trained(folder, data, teacher, tmp_path / "a", 0.0)
    plain, _ = trained(folder, data, teacher, tmp_path / "b", 0.0, source="data")
    assert same(parameters(mixed_in), parameters(plain))


def test_training_on_own_answers_nears_the_teacher_and_goes_on_exactly(folder, data, teacher, tmp_path):
    from angelslim_core.errors import StoppedError

    whole, training = trained(folder, data, teacher, tmp_path / "a", 0.5, steps=8)
    looks = training.history.looks
    assert looks[-1]["kl"] < looks[0]["kl"]
    asked = iter([False] * 3 + [True])
    with pytest.raises(StoppedError):
        trained(folder, data, teacher, tmp_path / "b", 0.5, stop=lambda: next(asked), steps=8)
    again, _ = trained(folder, data, teacher, tmp_path / "b", 0.5, steps=8)
    assert same(parameters(again), parameters(whole))
    plain, _ = trained(folder, data, teacher, tmp_path / "c", 0.0, steps=8)
    assert not same(parameters(plain), parameters(whole))


def test_no_gradient_goes_through_what_was_sampled(folder, data, teacher):
    """The gradient of a step is that of the same rows as data."""
    model = load_model(folder, "cpu", emulate=False).model
    choose_parameters(model, "auto")
    source = OnPolicy(Supervised(data.train, 4), prompts_of(data.train), Sampled(model, 8, [STOP]), [STOP], batch=4, lmbda=1.0)
    from angelslim_distill.heads import Reader

    batch = source.batch(0, 0)
    assert not batch.input_ids.requires_grad and all(p.grad is None for p in model.parameters())
    gradients = []
    for rows in (batch, _as_data(batch)):
        model.zero_grad()
        Objective(Loss("jsd")).sums(Reader(model)(rows), teacher(rows), rows)[0].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and same(*gradients)


def _as_data(batch):
    documents = []
    for ids, mask, counted in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), batch.counted.tolist(), strict=True):
        length = sum(mask)
        documents.append(Document(ids[:length], [False, *counted[: length - 1]]))
    return collate([row_of([d]) for d in documents])
