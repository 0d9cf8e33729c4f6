"""Products of half-precision matrices where the CPU has no instructions for them."""

import pytest
import torch
import torch.nn.functional as F

from angelslim_core import products as module
from angelslim_core.products import products


@pytest.fixture(params=[True, False])
def slow(request, monkeypatch):
    found = frozenset({torch.bfloat16, torch.float16}) if request.param else frozenset()
    monkeypatch.setattr(module, "slow_on_cpu", lambda: found)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_those_of_fp32_rounded_once(slow, dtype):
    x, w, b = torch.randn(3, 5, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(8).to(dtype)
    exact = (x.double() @ w.double().T + b.double()).float()
    with products("cpu"):
        for out in (F.linear(x, w, b), torch.baddbmm(b, x, w.T.expand(3, -1, -1)), torch.addmm(b, x[0], w.T)[None]):
            assert out.dtype == dtype
            assert torch.allclose(out.float(), exact[: len(out)], rtol=2 ** -(23 if dtype == torch.float32 else 7), atol=1e-5)
        assert (x @ w.T).dtype == torch.matmul(x, w.T).dtype == dtype


def test_operands_are_widened_only_where_that_is_faster(slow):
    x = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    with products("cpu"):
        out = F.linear(x, torch.randn(3, 4, dtype=torch.bfloat16))
    assert (out.grad_fn.name() == "ToCopyBackward0") is slow
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    with products("cuda"):
        assert F.linear(x, x).grad_fn.name() != "ToCopyBackward0"
