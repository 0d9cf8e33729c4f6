"""Losses between distributions: numbers worked out by hand, and what must hold of any."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from angelslim_core.errors import AngelslimError
from angelslim_distill.kinds import KINDS, MODES, Loss
from angelslim_distill.losses import Sums, kd_loss, kd_sums, token_losses, top_k_of, uld_loss
from angelslim_distill.targets import TopK

TEACHER, STUDENT, LABEL = [1.0, 2, 0, -1], [2, 0.5, 0, -1], 1
# of kinds, which top-k conventions they have
KEPT = [(kind, mode) for kind in KINDS for mode in MODES if kind != "mse" and not (mode == "zero" and kind in ("rkl", "cakld"))]


def row(numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def of_fixture(student=STUDENT, teacher=TEACHER, **options):
    return kd_loss(row(student), row(teacher), torch.ones(1), labels=torch.tensor([LABEL]), **options).item()


def made(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def case(tokens=23, seed=0, dtype=torch.float64):
    """Student, teacher, ragged mask and labels of 3 rows of 5."""
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    labels = torch.randint(tokens, (3, 5), generator=torch.Generator().manual_seed(seed))
    return made(3, 5, tokens, seed=seed, dtype=dtype).requires_grad_(), made(3, 5, tokens, seed=seed + 1, dtype=dtype), mask, labels


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"kind": "kl"}, 0.631148), ({"kind": "rkl"}, 0.570273), ({"kind": "cakld"}, 0.591950), ({"kind": "mse"}, 0.8125), ({"kind": "tvd"}, 0.485470),
        ({"kind": "jsd", "beta": 0.1}, 0.054720), ({"kind": "jsd"}, 0.140751), ({"kind": "jsd", "beta": 0.9}, 0.050703),
        ({"kind": "kd", "temperature": 2}, 0.561174), ({"kind": "rkl", "temperature": 2}, 0.534479), ({"kind": "mse", "temperature": 2}, 0.8125),
        ({"top_k": 2, "top_k_mode": "renorm"}, 0.715798), ({"top_k": 2, "top_k_mode": "zero"}, 0.856734), ({"top_k": 2}, 0.631148),
        ({"student": [2, 0.5, -1, 0]}, 0.686234), ({"student": [2, 0.5, -1, 0], "top_k": 2}, 0.631148),
        # reverse KL over the student's own most likely tokens
        ({"student": TEACHER, "teacher": STUDENT, "top_k": 2, "top_k_mode": "renorm"}, 0.655785),
    ],
)  # fmt: skip
def test_numbers_of_the_design(options, value):
    assert of_fixture(**options) == pytest.approx(value, abs=1e-6)


def test_ranks_of_other_vocabularies():
    assert uld_loss(row(STUDENT), row(TEACHER), torch.ones(1)).item() == pytest.approx(0.156876, abs=1e-6)
    x = made(3, 5, 8).requires_grad_()
    same = torch.cat((x.detach().flip(-1), torch.full((3, 5, 3), -1e4, dtype=torch.float64)), -1)
    assert uld_loss(x, same, torch.ones(3, 5)).item() == pytest.approx(0, abs=1e-12)
    mask = torch.zeros(3, 5)
    (gradient,) = torch.autograd.grad(uld_loss(x, same, mask), x)
    assert gradient.abs().sum() == 0


def test_gradient_of_a_tempered_kl():
    s = row(STUDENT).requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(s, row(TEACHER), torch.ones(1), "kd", 2.0), s)
    assert gradient[0].tolist() == pytest.approx([0.417277, -0.452251, 0.021770, 0.013204], abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind, temperature):
    s, t, mask, labels = case(tokens=7)
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, t, mask, kind, temperature, labels=labels, beta=0.3), s)


@pytest.mark.parametrize(("kind", "mode"), KEPT)
def test_gradients_of_top_k_are_those_of_differences(kind, mode):
    s, t, mask, labels = case(tokens=7)
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, t, mask, kind, 1.7, 3, labels, 0.3, mode), s)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_cost_and_ask_nothing(kind, temperature, dtype):
    s, _, mask, labels = case(dtype=dtype)
    # logits that a constant is added to are the same distribution; to mse they are not, and tvd has no slope where rounding decides the sign
    for more in (0.0,) if kind in ("mse", "tvd") or dtype == torch.bfloat16 else (0.0, 4.0):
        value = kd_loss(s, s.detach() + more, mask, kind, temperature, labels=labels)
        (gradient,) = torch.autograd.grad(value, s)
        small = 1e-12 if dtype == torch.float64 else 2e-6
        assert abs(value.item()) < small and gradient.abs().max() < small
        assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_far_apart_give_no_nan(kind, dtype):
    s = torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0]], dtype=dtype).requires_grad_()
    t = s.detach().roll(1, 0)
    for top_k in (None, 2) if kind != "mse" else (None,):
        value = kd_loss(s, t, torch.ones(3), kind, labels=torch.tensor([0, 1, 2]), top_k=top_k)
        (gradient,) = torch.autograd.grad(value, s)
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mse"])
def test_tokens_that_both_exclude_change_nothing(kind):
    s, t, mask, labels = case()
    never = torch.full((3, 5, 2), -torch.inf, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(kd_loss(s, t, mask, kind, labels=labels), s)
    (found,) = torch.autograd.grad(kd_loss(torch.cat((s, never), -1), torch.cat((t, never), -1), mask, kind, labels=labels), s)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_divides_both_and_its_square_multiplies(kind):
    s, t, mask, labels = case()
    found = token_losses(s[mask], t[mask], Loss(kind, 2.0), labels[mask])
    if kind == "cakld":
        c = t[mask].softmax(-1).gather(-1, labels[mask][:, None])[:, 0]  # at temperature 1
        wanted = c * token_losses(s[mask] / 2, t[mask] / 2, Loss("rkl")) + (1 - c) * token_losses(s[mask] / 2, t[mask] / 2, Loss("kl"))
    else:
        wanted = token_losses(s[mask] / 2, t[mask] / 2, Loss(kind))
    torch.testing.assert_close(found, 4 * wanted)


def test_ends_and_middle_of_jsd():
    s, t, mask, _ = case()
    kl, rkl = kd_loss(s, t, mask, "kl"), kd_loss(s, t, mask, "rkl")
    assert kd_loss(s, t, mask, "jsd", beta=0) == kl and kd_loss(s, t, mask, "jsd", beta=1) == rkl
    torch.testing.assert_close(kd_loss(t, s, mask, "kl"), rkl)
    each = token_losses(s[mask], t[mask], Loss("jsd"))
    torch.testing.assert_close(each, token_losses(t[mask], s[mask], Loss("jsd")))
    assert each.max() <= math.log(2)
    # the value jumps there: what comes close to kl is jsd / beta
    assert kd_loss(s, t, mask, "jsd", beta=1e-6) < 1e-5
    torch.testing.assert_close(kd_loss(s, t, mask, "jsd", beta=1e-6) / 1e-6, kl, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("kind", "mode"), KEPT)
def test_all_tokens_kept_is_the_whole_distribution(kind, mode):
    s, t, mask, labels = case(tokens=11)
    found = kd_sums(s, t, mask, Loss(kind, 1.5, 0.3, mode), labels, top_k=11)
    wanted = kd_sums(s, t, mask, Loss(kind, 1.5, 0.3), labels)
    torch.testing.assert_close((found.total, found.count), (wanted.total, wanted.count))
    torch.testing.assert_close(*(torch.autograd.grad(x.total, s)[0] for x in (found, wanted)))


@pytest.mark.parametrize("kind", ["kl", "rkl", "jsd", "tvd"])
def test_a_bucket_never_shows_more_than_there_is(kind):
    s, t, mask, _ = case(tokens=40)
    values = [token_losses(s[mask], t[mask], Loss(kind), top_k=k) for k in (1, 2, 5, 20, 39, 40)]
    assert all((more - less).min() > -1e-9 for less, more in pairwise(values))


@pytest.mark.parametrize(("kind", "mode"), KEPT)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_was_kept_gives_what_logits_give(kind, mode, temperature):
    s, t, mask, labels = case(dtype=torch.float32)
    kept = top_k_of(t, 8, labels)
    loss = Loss(kind, temperature, 0.3, mode)
    for k in (8, 3):
        if mode == "bucket" and temperature != 1:
            with pytest.raises(ValueError, match="no other temperature"):
                kd_sums(s, kept, mask, loss, top_k=k)
            continue
        found, wanted = kd_sums(s, kept, mask, loss, top_k=k), kd_sums(s, t, mask, loss, labels, top_k=k)
        torch.testing.assert_close((found.total, found.count), (wanted.total, wanted.count))
        torch.testing.assert_close(*(torch.autograd.grad(x.total, s)[0] for x in (found, wanted)))


def test_what_is_kept_may_be_rounded_above_one():
    kept = TopK(torch.tensor([[0, 1]]), torch.tensor([[-0.1, -2.0]], dtype=torch.bfloat16), torch.tensor([-0.1]))
    assert kept.logp.float().exp().sum() > 1
    s = torch.randn(1, 9, requires_grad=True)
    value = kd_loss(s, kept, torch.ones(1))
    assert value.isfinite() and torch.autograd.grad(value, s)[0].isfinite().all()


@pytest.mark.parametrize("top_k", [None, 5])
def test_no_gradient_reaches_the_teacher(top_k):
    s, t, mask, labels = case()
    t.requires_grad_()
    kd_loss(s, t, mask, "cakld", labels=labels, top_k=top_k).backward()
    assert t.grad is None and s.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_do_not_count(kind):
    s, t, mask, labels = case()
    value = kd_loss(s, t, mask, kind, labels=labels)
    (wanted,) = torch.autograd.grad(value, s)
    assert (wanted[~mask] == 0).all()
    # whatever they hold is not read
    bad = s.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_()
    again = kd_loss(bad, t.masked_fill(~mask[..., None], torch.inf), mask, kind, labels=labels.masked_fill(~mask, -100))
    assert torch.equal(again, value) and torch.equal(torch.autograd.grad(again, bad)[0], wanted)
    nothing = kd_loss(s, t, torch.zeros_like(mask), kind, labels=labels)
    assert nothing.item() == 0 and (torch.autograd.grad(nothing, s)[0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_parts_are_the_sum(kind):
    s, t, mask, labels = case()
    whole = kd_sums(s, t, mask, Loss(kind), labels)
    parts = [kd_sums(s[i : i + 1], t[i : i + 1], mask[i : i + 1], Loss(kind), labels[i : i + 1]) for i in range(3)]
    added = Sums(sum(p.total for p in parts), sum(p.count for p in parts))
    torch.testing.assert_close(added.mean, whole.mean)
    torch.testing.assert_close(*(torch.autograd.grad(x.mean, s)[0] for x in (added, whole)))


def test_a_teacher_that_knows_the_next_token_gives_cross_entropy():
    s, _, mask, labels = case()
    t = torch.nn.functional.one_hot(labels, s.shape[-1]).double() * 1e4
    wanted = cross_entropy(s[mask], labels[mask])
    torch.testing.assert_close(kd_loss(s, t, mask, "kl"), wanted)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(kd_loss(s, t.roll(1, 1), mask, "kl"), wanted)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"kind": "kll"}, "choose one of: kl, kd"), ({"temperature": 0.0}, "above 0"), ({"temperature": -1.0}, "above 0"), ({"temperature": math.nan}, "above 0"),
        ({"beta": 1.5}, "from 0"), ({"top_k_mode": "cut"}, "bucket, renorm, zero"), ({"kind": "cakld", "labels": None}, "give labels"),
        ({"top_k": 0}, "from 1"), ({"top_k": 24}, "from 1"), ({"kind": "mse", "top_k": 3}, "no top_k"),
        ({"kind": "rkl", "top_k": 3, "top_k_mode": "zero"}, "no top_k"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, what):
    s, t, mask, labels = case()
    with pytest.raises(ValueError) as error:
        kd_loss(s, t, mask, **{"labels": labels, **options})
    assert isinstance(error.value, AngelslimError) and what in error.value.hint


def test_shapes_that_differ_are_refused():
    s, t, mask, labels = case()
    for arguments in ((s[:2], t, mask), (s, t[..., 1:], mask), (s, t, mask[:, 1:]), (s, t, mask, "kl", 1.0, None, labels[:2])):
        with pytest.raises(ValueError, match="student"):
            kd_loss(*arguments)
    with pytest.raises(ValueError, match="of 4 tokens"):
        kd_loss(s, top_k_of(t, 4), mask, top_k=5)
