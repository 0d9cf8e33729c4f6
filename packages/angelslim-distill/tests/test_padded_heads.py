"""Heads that are wider than the tokenizer's vocabulary: what pads one is no token, where student and teacher are not padded alike."""

import shutil

import pytest
import torch

from angelslim_core import compress, load
from angelslim_core.errors import ModelError, PlanError, UsageError
from angelslim_core.loading import load_model, load_tokenizer
from angelslim_core.testing.training import chats
from angelslim_distill import kd_loss
from angelslim_distill.cache.making import CacheOptions, make_cache
from angelslim_distill.cache.reading import open_cache
from angelslim_distill.chunked import head_loss
from angelslim_distill.data.rows import collate, prepare
from angelslim_distill.fingerprints import vocabulary_size
from angelslim_distill.heads import Reader
from angelslim_distill.kinds import Loss
from angelslim_distill.objective import Objective, measures
from angelslim_distill.rollouts import Sampled
from angelslim_distill.targets import Hidden
from angelslim_distill.teacher import teacher_from

TOKENS = 256
CASES = [{}, {"kind": "rkl"}, {"kind": "jsd", "lm_weight": 0.5}, {"kind": "cakld", "temperature": 2.0}, {"top_k": 7}, {"kind": "mse"}]


@pytest.fixture(scope="module")
def padded(tiny, tmp_path_factory):
    """padded(wider, **overrides): a model folder whose head and embedding have so many rows more; those are likelier than most tokens."""
    made = {}

    def make(wider, **overrides):
        key = (wider, *sorted(overrides.items()))
        if key not in made:
            plain = tiny("llama", dtype="float32", initializer_range=0.1, **overrides)
            made[key] = tmp_path_factory.mktemp("padded") / "model"
            shutil.copytree(plain, made[key])
            model = load_model(plain, "cpu").model
            model.resize_token_embeddings(TOKENS + wider)
            with torch.no_grad():
                model.get_output_embeddings().weight[TOKENS:] = 2 * model.get_output_embeddings().weight[:wider]
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="module")
def rows(tiny, data):
    return prepare(data, load_tokenizer(tiny("llama", dtype="float32")), "model", length=64, packed=False, held_out=0.0).train


def objective(kind="kl", temperature=1.0, **options):
    return Objective(Loss(kind, temperature, 0.3), **options)


def found(student, teacher, batch, **options):
    """Sums of a batch, and the gradients of the student's parameters."""
    model = load_model(student, "cpu").model
    sums = objective(**options).sums(Reader(model)(batch), teacher(batch), batch)
    sums.total.backward()
    return [*sums], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("wider", "options"), [((13, 0), {}), ((0, 64), {}), *(((13, 64), case) for case in CASES)], ids=str)
def test_padding_changes_no_loss_and_gets_no_gradient(padded, rows, wider, options):
    batch, tokenizer = collate(rows[:4]), load_tokenizer(padded(0))
    assert vocabulary_size(tokenizer) == TOKENS
    sums, gradients = found(padded(0), teacher_from(padded(0, seed=1), tokenizer, "cpu"), batch, **options)
    others, theirs = found(padded(wider[0]), teacher_from(padded(wider[1], seed=1), tokenizer, "cpu"), batch, **options)
    torch.testing.assert_close(others, sums, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name][: len(gradient)], gradient, rtol=1e-3, atol=1e-5)
        assert not theirs[name][len(gradient) :].any()
    plain = measures(*both(padded(0), padded(0, seed=1), tokenizer, batch), batch)
    torch.testing.assert_close(measures(*both(padded(wider[0]), padded(wider[1], seed=1), tokenizer, batch), batch), plain, rtol=1e-4, atol=1e-5)


def both(student, teacher, tokenizer, batch):
    with torch.no_grad():
        return Reader(load_model(student, "cpu").model)(batch), teacher_from(teacher, tokenizer, "cpu")(batch)


def test_heads_that_are_padded_alike_are_compared_whole(padded, rows):
    """What pads them is then something that the student learns to be as unlikely as the teacher says."""
    batch = collate(rows[:4])
    teacher = teacher_from(padded(13, seed=1), load_tokenizer(padded(13)), "cpu")
    sums, gradients = found(padded(13), teacher, batch)
    logits = [load_model(folder, "cpu").model(input_ids=batch.input_ids).logits for folder in (padded(13), padded(13, seed=1))]
    torch.testing.assert_close(sums[0] / batch.counted.sum(), kd_loss(*logits, batch.counted))
    assert gradients["lm_head.weight"][TOKENS:].any()


@pytest.mark.parametrize(("wider", "top_k"), [((13, 64), TOKENS), ((64, 13), 9), ((13, 13), 9)], ids=str)
def test_a_cache_of_a_padded_teacher_is_that_of_one_that_is_not(padded, data, tmp_path, wider, top_k):
    """All tokens kept, it is the teacher itself; a bucket holds the rest of the tokens, and nothing of what pads."""
    options = CacheOptions(top_k=top_k, length=64, pack=False, held_out=0.0)
    made = make_cache(padded(wider[1], seed=1), data, tmp_path / "c", options, "cpu")
    assert made.vocab_size == TOKENS
    tokenizer = load_tokenizer(padded(0))
    batch = collate(prepare(data, tokenizer, "model", length=64, packed=False, held_out=0.0).train[:4])
    cache = open_cache(tmp_path / "c", tokenizer, TOKENS + wider[0], teacher=padded(wider[1], seed=1))
    sums, gradients = found(padded(wider[0]), cache, batch)
    wanted, theirs = found(padded(0), teacher_from(padded(0, seed=1), tokenizer, "cpu"), batch, top_k=None if top_k == TOKENS else top_k)
    torch.testing.assert_close(sums[:2], wanted[:2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradients["lm_head.weight"][:TOKENS], theirs["lm_head.weight"], rtol=1e-2, atol=1e-4)


def test_losses_refuse_logits_of_another_vocabulary_than_what_is_kept(padded, data, tmp_path):
    make_cache(padded(0), data, tmp_path / "c", CacheOptions(top_k=9, length=64, pack=False, held_out=0.0), "cpu")
    cache = open_cache(tmp_path / "c", load_tokenizer(padded(0)), TOKENS + 13)
    batch = collate(prepare(data, load_tokenizer(padded(0)), "model", length=64, packed=False, held_out=0.0).train[:2])
    kept, states = cache(batch), torch.randn(*batch.input_ids.shape, 8)
    with pytest.raises(UsageError, match="269 tokens, the teacher's of 256"):
        kd_loss(torch.randn(*batch.input_ids.shape, TOKENS + 13), kept, batch.counted)
    with pytest.raises(UsageError, match="269 tokens, the teacher's of 256"):
        head_loss(Hidden(states, torch.randn(TOKENS + 13, 8)), kept, batch.counted, Loss(), batch.labels)
    with pytest.raises(ModelError, match="over 256 tokens, and the student's head has 250"):
        open_cache(tmp_path / "c", load_tokenizer(padded(0)), 250)


@pytest.mark.parametrize("cached", [False, True])
def test_a_student_is_trained_towards_a_teacher_that_is_padded_otherwise(padded, data, tmp_path, cached):
    options = {"steps": 20, "batch": 4, "length": 64, "held_out": 0.2, "every": 5, "lr": 3e-3, "warmup": 0.1}
    student, teacher = padded(13), padded(64, seed=1)
    if cached:
        make_cache(teacher, data, tmp_path / "c", CacheOptions(top_k=64, length=64, held_out=0.2), "cpu")
        options["cache"] = str(tmp_path / "c")
    step = {"use": "distill.logits", "with": {**options, "data": str(data), "teacher": str(teacher)}}
    metrics = compress(student, recipe={"steps": [step]}, out=tmp_path / "out").passes[0]["metrics"]
    assert metrics["kl"] < 0.9 * metrics["kl_before"]
    before, after = load(student)[0].lm_head.weight, load(tmp_path / "out")[0].lm_head.weight
    assert len(after) == TOKENS + 13 and torch.equal(after[TOKENS:], before[TOKENS:]) and not torch.equal(after[:TOKENS], before[:TOKENS])


def test_a_student_of_fewer_tokens_than_a_cache_is_refused_before_any_work(tiny, padded, data, tmp_path):
    make_cache(padded(0), data, tmp_path / "c", CacheOptions(top_k=9, length=64), "cpu")
    step = {"use": "distill.logits", "with": {"data": str(data), "length": 64, "teacher": str(padded(0)), "cache": str(tmp_path / "c")}}
    with pytest.raises(PlanError, match="over 256 tokens, and the student's head has 200"):
        compress(tiny("llama", dtype="float32", vocab_size=200), recipe={"steps": [step]}, out=tmp_path / "out")


def test_answers_are_of_tokens_that_the_tokenizer_knows(padded):
    """A narrower teacher has no embedding for others."""
    model = load_model(padded(64), "cpu").model
    with torch.no_grad():
        model.lm_head.weight[TOKENS:] *= 5
    drawn = {tokens: {t for row in Sampled(model, 24, [], tokens=tokens)([[5, 6], [7]] * 4, 0) for t in row} for tokens in (None, TOKENS)}
    assert max(drawn[None]) >= TOKENS > max(drawn[TOKENS])
