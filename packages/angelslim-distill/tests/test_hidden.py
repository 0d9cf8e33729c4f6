"""Hidden states against each other."""

import pytest
import torch

from angelslim_distill.hidden import Widths, hs_cosine, hs_mse


def states(width=5, dtype=torch.float64):
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    return torch.randn(2, 3, width, dtype=dtype, requires_grad=True), torch.randn(2, 3, width, dtype=dtype), mask


def test_mse_is_the_sum_of_squares_over_tokens_and_width():
    s, t, mask = states()
    wanted = sum((s[b, i] - t[b, i]).square().sum() for b in range(2) for i in range(3) if mask[b, i]) / (3 * 5)
    found = hs_mse(s, t, mask)
    assert found.count == 3
    torch.testing.assert_close(found.mean, wanted)
    (gradient,) = torch.autograd.grad(found.mean, s)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).all()


def test_cosine_sees_directions_only():
    s, t, mask = states()
    torch.testing.assert_close(hs_cosine(s, 3 * t, mask).mean, hs_cosine(s, t, mask).mean)
    assert hs_cosine(s, 2 * s, mask).mean.item() == pytest.approx(0, abs=1e-12)
    assert hs_cosine(s, -s, mask).mean.item() == pytest.approx(2)


@pytest.mark.parametrize("loss", [hs_mse, hs_cosine])
def test_gradients(loss):
    s, t, mask = states()
    t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, t, mask).mean, s)
    assert torch.autograd.grad(loss(s, t, mask).mean, t, allow_unused=True) == (None,)
    nothing = loss(s, t, torch.zeros_like(mask)).mean
    assert nothing == 0 and (torch.autograd.grad(nothing, s)[0] == 0).all()
    with pytest.raises(ValueError, match="student"):
        loss(s, t[..., 1:], mask)


@pytest.mark.parametrize("loss", [hs_mse, hs_cosine])
def test_low_precision_is_compared_in_fp32(loss):
    s, t, mask = states(dtype=torch.bfloat16)
    found = loss(s, t, mask).mean
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(s.float(), t.float(), mask).mean)


def test_maps_are_where_widths_differ_and_learn():
    maps = Widths([5, 8], [8, 8])
    assert [tuple(p.shape) for p in maps.parameters()] == [(8, 5)]
    s, _, mask = states(dtype=torch.bfloat16)
    wide = torch.randn(2, 3, 8)
    narrow, same = maps([s, wide])
    assert narrow.shape == wide.shape and same is wide
    hs_mse(narrow, wide, mask).mean.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*maps.parameters(), s))
