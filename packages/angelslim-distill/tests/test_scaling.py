"""Gradients multiplied in place by a number on the device."""

import pytest
import torch

from angelslim_core.errors import EngineError
from angelslim_distill import Hidden, Loss, head_loss
from angelslim_distill.kernels import scaling
from angelslim_distill.kernels.scaling import SCALE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def by(x, factor, executor):
    x = x.clone()
    SCALE(x, torch.tensor(factor, device=DEVICE), executor=executor)
    return x


@pytest.mark.parametrize("executor", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1 / 3, 1.0, -2.0, 0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("shape", [(1,), (5, 3), (41, 500)])
def test_as_the_reference(shape, factor, dtype, executor, monkeypatch):
    """41 x 500 numbers are of three tiles of the kernel, the last one in part."""
    if executor == "triton":
        pytest.importorskip("triton")
    if executor == "torch" and DEVICE == "cuda":
        pytest.skip("only for what the kernel does not take")
    monkeypatch.setattr(scaling, "PIECE", 1000)
    x = made(*shape, dtype=dtype)
    # Triton's interpreter cuts bf16 off rather than round it
    near = 2**-7 if dtype == torch.bfloat16 and executor == "triton" and DEVICE == "cpu" else 0
    torch.testing.assert_close(by(x, factor, executor), by(x, factor, "reference"), rtol=near, atol=0, equal_nan=True)


@pytest.mark.parametrize("executor", ["reference", "auto"])
def test_the_factor_is_not_rounded(executor):
    """A third is .2% larger in bf16, which would move all numbers alike."""
    x = made(100_000, dtype=torch.bfloat16)
    found = by(x, 1 / 3, executor).double()
    assert (found * x).sum() / x.double().square().sum() == pytest.approx(1 / 3, rel=2e-4)


def test_neither_is_that_of_a_mean():
    """Over 3 positions, against fp64."""
    shapes = ((3, 32), (400, 32))
    given = [(made(*shape) * scale + i).bfloat16() for i, (shape, scale) in enumerate(zip(shapes * 2, (1.0, 0.3) * 2, strict=True))]
    given[3] = given[3].roll(7, 0)
    found, exact = (
        torch.autograd.grad(head_loss(Hidden(s, w), Hidden(t, u), torch.ones(3), Loss()).total / 3, w)[0].double()
        for s, w, t, u in ([x.to(dtype).requires_grad_() for x in given] for dtype in (torch.bfloat16, torch.float64))
    )
    assert (found * exact).sum() / exact.square().sum() == pytest.approx(1, abs=5e-4)


def test_by_one_nothing_is_written():
    """Where the host knows the factor, that is; on a GPU the kernel asks."""
    x = torch.ones(5, 3)
    before = x._version
    SCALE(x, torch.tensor(1.0))
    assert x._version == before
    SCALE(x, torch.tensor(2.0))
    assert x._version > before


def test_what_has_gaps_or_is_fp64_is_left_to_torch():
    whole, factor = made(8, 6), torch.tensor(0.3, device=DEVICE)
    wanted = torch.cat((whole[:, :3] * factor, whole[:, 3:]), 1)
    SCALE(whole[:, :3], factor)
    assert torch.equal(whole, wanted)
    for x in (made(6, 8).T, made(4).double()):
        assert torch.equal(by(x, 0.3, "auto"), by(x, 0.3, "reference"))
    pytest.importorskip("triton")
    with pytest.raises(EngineError, match="in one piece"):
        SCALE(whole[:, :3], factor, executor="triton")
