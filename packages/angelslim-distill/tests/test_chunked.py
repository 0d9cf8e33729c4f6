"""Losses from hidden states in chunks, against those of whole logits."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from angelslim_core.errors import AngelslimError
from angelslim_distill import chunked
from angelslim_distill.chunked import head_loss
from angelslim_distill.kinds import KINDS, MODES, Loss
from angelslim_distill.losses import kd_sums, top_k_of
from angelslim_distill.targets import Hidden

V, H = 31, 6
MASKS = {"ragged": [[1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 1, 1, 1]], "all": [[1] * 7] * 2, "one row": [[1] * 7, [0] * 7], "none": [[0] * 7] * 2}


def made(*shape, seed, dtype=torch.float64, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def student(dtype=torch.float64, **options):
    given = {"bias": made(V, seed=2, dtype=dtype).requires_grad_(), "softcap": 7.0, "scale": 0.5} | options
    return Hidden(made(2, 7, H, seed=0, dtype=dtype).requires_grad_(), made(V, H, seed=1, dtype=dtype).requires_grad_(), **given)


def teacher(dtype=torch.float64, **options):
    """Of another width."""
    return Hidden(made(2, 7, 4, seed=3, dtype=dtype), made(V, 4, seed=4, dtype=dtype), **{"softcap": 3.0, **options})


def logits(hidden):
    """All at once."""
    y = hidden.states @ hidden.weight.T
    y = (y if hidden.bias is None else y + hidden.bias) * hidden.scale
    return y if hidden.softcap is None else hidden.softcap * torch.tanh(y / hidden.softcap)


def labels():
    return torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(0))


def leaves(hidden):
    return [x for x in (hidden.states, hidden.weight, hidden.bias) if x is not None]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rows", [1, 7, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_whole_logits(kind, temperature, rows, mask):
    mask, loss, ours, theirs = torch.tensor(MASKS[mask]).bool(), Loss(kind, temperature, 0.3), student(), teacher()
    found = head_loss(ours, theirs, mask, loss, labels(), kd_weight=0.7, ce_weight=0.3, rows=rows)
    kd = kd_sums(logits(ours), logits(theirs), mask, loss, labels())
    ce = cross_entropy(logits(ours)[mask], labels()[mask], reduction="sum")
    wanted = 0.7 * kd.total + 0.3 * ce
    torch.testing.assert_close((found.total, found.kd, found.ce, found.count), (wanted, kd.total, ce, kd.count))
    torch.testing.assert_close(*(torch.autograd.grad(3 * x, leaves(ours)) for x in (found.total, wanted)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 7, None])
def test_equals_whole_logits_with_kept_tokens(mode, rows):
    mask, loss, ours = torch.tensor(MASKS["ragged"]).bool(), Loss("kl", top_k_mode=mode), student()
    kept = top_k_of(logits(teacher()), 5, labels())
    found = head_loss(ours, kept, mask, loss, rows=rows)
    wanted = kd_sums(logits(ours), kept, mask, loss).total
    torch.testing.assert_close((found.total, found.ce.item()), (wanted, 0.0))
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves(ours)) for x in (found.total, wanted)))


def test_without_a_teacher_there_is_cross_entropy():
    mask, ours = torch.tensor(MASKS["ragged"]).bool(), student(bias=None, softcap=None, scale=1.0)
    found = head_loss(ours, None, mask, Loss(), labels(), ce_weight=2.0, rows=3)
    wanted = 2 * cross_entropy(logits(ours)[mask], labels()[mask], reduction="sum")
    torch.testing.assert_close(found.total, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves(ours)) for x in (found.total, wanted)))


@pytest.mark.parametrize("frozen", ["states", "weight", "bias"])
def test_what_is_frozen_costs_no_gradient(frozen, monkeypatch):
    ours = student()
    ours = replace(ours, **{frozen: getattr(ours, frozen).detach()})
    given = {}
    whole = chunked._sums
    monkeypatch.setattr(chunked, "_sums", lambda *a: given.setdefault("found", whole(*a)))
    found = head_loss(ours, teacher(), torch.ones(2, 7), Loss())
    gradients = given["found"][1]
    assert [g is None for g in gradients] == [frozen == name for name in ("states", "weight", "bias")]
    rest = [x for x in leaves(ours) if x.requires_grad]
    wanted = kd_sums(logits(ours), logits(teacher()), torch.ones(2, 7), Loss()).total
    torch.testing.assert_close(*(torch.autograd.grad(x, rest) for x in (found.total, wanted)))


def test_a_look_asks_for_no_gradient(monkeypatch):
    def look(*arguments, **options):
        assert arguments[4] is None
        return chunked_gradient(*arguments, **options)

    chunked_gradient = chunked.LOSS_GRADIENT
    wanted = head_loss(student(), teacher(), torch.ones(2, 7), Loss()).total
    monkeypatch.setattr(chunked, "LOSS_GRADIENT", look)
    with torch.no_grad():
        found = head_loss(student(), teacher(), torch.ones(2, 7), Loss()).total
    assert not found.requires_grad and torch.equal(found, wanted.detach())


def test_the_teacher_gets_no_gradient_and_masked_rows_are_not_read():
    mask = torch.tensor(MASKS["ragged"]).bool()
    ours, theirs = student(), teacher()
    bad = replace(ours, states=ours.states.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_())
    theirs = replace(theirs, weight=theirs.weight.requires_grad_(), states=theirs.states.masked_fill(~mask[..., None], torch.inf).requires_grad_())
    found = head_loss(bad, theirs, mask, Loss(), labels().masked_fill(~mask, -100), ce_weight=1.0)
    found.total.backward()
    assert found.total.isfinite() and theirs.weight.grad is None and theirs.states.grad is None
    assert (bad.states.grad[~mask] == 0).all() and (bad.states.grad[mask] != 0).any()


def test_no_tensor_of_all_logits_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    count, vocabulary = 64, 1000
    ours = Hidden(torch.randn(1, count, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True))
    with Watch():
        head_loss(ours, Hidden(torch.randn(1, count, 8), torch.randn(vocabulary, 8)), torch.ones(1, count), Loss(), rows=8).total.backward()
    assert max(sizes) <= 8 * 1024


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_with_a_mask_on_the_cpu_the_host_waits_for_nothing(mask, kept, monkeypatch):
    """Tensors on "meta" have no numbers, and refuse whatever a GPU would make the host wait for."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # meta has none
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: nullcontext())

    def away(hidden):
        given = {name: getattr(hidden, name).detach().to("meta").requires_grad_() for name in ("states", "weight", "bias") if getattr(hidden, name) is not None}
        return replace(hidden, **given)

    ours, theirs, own = away(student()), away(teacher()), labels().to("meta")
    theirs = top_k_of(torch.empty(2, 7, V, device="meta"), 5, own) if kept else theirs
    mask = torch.tensor(MASKS[mask])
    found = head_loss(ours, theirs, mask, Loss(), own, ce_weight=1.0, rows=4)
    gradients = torch.autograd.grad(found.total / found.count, leaves(ours))
    assert [g.shape for g in gradients] == [x.shape for x in leaves(ours)]
    with pytest.raises((RuntimeError, NotImplementedError)):
        head_loss(ours, theirs, mask.to("meta"), Loss(), own, ce_weight=1.0)


@pytest.mark.parametrize("mask", MASKS)
def test_states_are_gathered_only_where_some_do_not_count(mask):
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    ours = student()
    with Watch():
        head_loss(ours, teacher(), torch.tensor(MASKS[mask]), Loss("cakld"), labels(), ce_weight=1.0, rows=4).total.backward()
    gathers = [f for f in called if f in (torch.ops.aten.index, torch.ops.aten.index_put_)]
    assert bool(gathers) == (mask not in ("all", "none"))


@pytest.mark.parametrize("rows", [2, 4, None])
def test_bf16_is_close_to_fp32(rows):
    """States and heads of bf16; the head's gradient is added up in bf16, once a chunk."""
    count, vocabulary, width = 64, 500, 48
    sizes = ((1, count, width), (vocabulary, width))
    s, w, t, u = (made(*size, seed=i, scale=scale).bfloat16() for i, (size, scale) in enumerate(zip(sizes * 2, (1.0, 0.3) * 2, strict=True)))
    low = Hidden(s.clone().requires_grad_(), w.clone().requires_grad_())
    high = Hidden(s.double().requires_grad_(), w.double().requires_grad_())
    found = head_loss(low, Hidden(t, u), torch.ones(1, count), Loss(), rows=rows).total / count
    wanted = kd_sums(logits(high), logits(Hidden(t.double(), u.double())), torch.ones(1, count), Loss()).mean
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for got, exact in zip(torch.autograd.grad(found, leaves(low)), torch.autograd.grad(wanted, leaves(high)), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).norm() / exact.norm() < (0.02 if rows == 2 else 0.01)


def test_autocast_decides_the_precision():
    ours, theirs = student(torch.float32), teacher(torch.float32)
    exact = head_loss(ours, theirs, torch.ones(2, 7), Loss()).total
    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(ours, theirs, torch.ones(2, 7), Loss()).total
    low, full = torch.autograd.grad(found, leaves(ours)), torch.autograd.grad(exact, leaves(ours))
    assert found.dtype == torch.float32 and found != exact
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
    assert all(a.dtype == torch.float32 and (a - b).norm() / b.norm() < 0.05 for a, b in zip(low, full, strict=True))


def test_gradients_are_given_once():
    found = head_loss(student(), teacher(), torch.ones(2, 7), Loss()).total
    found.backward(retain_graph=True)
    with pytest.raises(AngelslimError, match="second backward"):
        found.backward()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"mask": torch.ones(2, 6)}, "student"), ({"teacher": Hidden(made(2, 7, 4, seed=0), made(V + 1, 4, seed=0))}, "vocabulary"),
        ({"ce_weight": 1.0}, "tokens that were predicted"), ({"loss": Loss("cakld")}, "tokens that were predicted"), ({"rows": 0}, "is 0"),
        ({"labels": labels()[:1]}, "labels"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(change, what):
    with pytest.raises(ValueError, match=what):
        head_loss(**({"student": student(), "teacher": teacher(), "mask": torch.ones(2, 7), "loss": Loss()} | change))
