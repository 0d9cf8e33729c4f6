import pytest
import torch

from angelslim_specdec.drafts.base import Heads
from angelslim_specdec.training import losses
from angelslim_specdec.training.losses import DIVERGENCES, divergence, dpace_weights, e2e_tv, teacher, token_losses


@pytest.fixture
def case():
    torch.manual_seed(0)
    heads = Heads(torch.randn(13, 6), torch.randn(13, 6))
    ids = torch.tensor([0, 2, 3, 7, 12])
    return heads, ids, torch.randn(9, 6), torch.randn(9, 6), torch.randn(5, 6)


def by_hand(kind, p_full, p, q):
    kl = (p * (p / q).log()).sum(-1)
    alpha = torch.minimum(p_full, q).sum(-1)
    share = (-3 * alpha).exp()
    return {"ce": -(p * q.log()).sum(-1), "kl": kl, "tv": 1 - alpha, "lk_alpha": -alpha.log(), "lk_hybrid": share * kl + (1 - share) * (1 - alpha)}[kind]


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("elements", [2**25, 26], ids=["whole", "chunked"])
def test_losses_and_gradients_are_those_of_the_formulas(case, kind, elements, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
    heads, ids, final, hidden, weight = case
    told = teacher(final, heads, ids)
    p_full = (final @ heads.head.T).softmax(-1)
    assert torch.equal(told.best, p_full.argmax(-1))
    hidden.requires_grad_(), weight.requires_grad_()
    rows = torch.tensor([3, 1, 8, 8, 0, 2, 5, 6, 7])
    got, best = token_losses(hidden, weight, told, rows, kind)
    up = torch.rand(9)
    found = torch.autograd.grad((got * up).sum(), (hidden, weight))
    q = (hidden @ weight.T).softmax(-1)
    p = p_full[rows][:, ids]
    want = by_hand(kind, p, p / p.sum(-1, keepdim=True), q)
    if kind == "lk_hybrid":  # the share has no gradient
        kl, tv = (by_hand(of, p, p / p.sum(-1, keepdim=True), q) for of in ("kl", "tv"))
        share = (-3 * (1 - tv)).exp().detach()
        want = share * kl + (1 - share) * tv
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(found, torch.autograd.grad((want * up).sum(), (hidden, weight)))
    assert torch.equal(best, q.argmax(-1))


def test_whole_vocabulary(case):
    heads, _, final, _, _ = case
    told = teacher(final, heads, None)
    same = final @ heads.head.T
    assert divergence(same, told.logits, told.total, "kl").abs().max() < 1e-6
    assert divergence(same, told.logits, told.total, "tv").abs().max() < 1e-6


def test_length_of_blocks():
    tv, valid = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[True, True, True]])
    assert e2e_tv(tv, valid).item() == pytest.approx(1 - (0.5 + 0.25 + 0.25) / 3)
    assert e2e_tv(tv, torch.tensor([[True, False, True]])).item() == pytest.approx(1 - (0.5 + 0.5 + 0.5) / 3)
    ce = -torch.tensor([[0.5, 0.2, 0.8]]).log()
    c = [0.75, 0.6, 0.9]
    a, b, d = c[0], c[0] * c[1], c[0] * c[1] * c[2]
    torch.testing.assert_close(dpace_weights(ce, valid), torch.tensor([[a + b + d, b + d, d]]))
    torch.testing.assert_close(dpace_weights(ce, torch.tensor([[True, True, False]])), torch.tensor([[a + b, b, 0.0]]))
