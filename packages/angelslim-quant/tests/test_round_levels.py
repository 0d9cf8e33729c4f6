"""Rounding to levels and its way back: each implementation against its plain reference, the reference against autograd."""

import pytest
import torch

from angelslim_core.schemes import Grid, dequantize
from angelslim_quant.kernels.round_levels import ROUND_LEVELS, ROUND_LEVELS_BACK, Levels
from angelslim_quant.kernels.round_ternary import ROUND_TERNARY, ROUND_TERNARY_BACK
from angelslim_quant.trained.seq2 import LEVELS as SEQ2
from angelslim_quant.trained.sherry import RULES as SHERRY
from angelslim_quant.trained.tequila import RULES as TEQUILA

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INT3 = Levels(1, 0, -4, 3)


def run(kernel, name, *args):
    """An implementation's result on the CPU; Triton's is called where it says it runs on GPUs only, which its interpreter is not."""
    function = {i.name: i.function for i in kernel.implementations}[name]
    if name == "triton":
        pytest.importorskip("triton")
        args = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    found = function(*args)
    return found.cpu() if isinstance(found, torch.Tensor) else [None if a is None else a.cpu() for a in found]


def case(dtype, group_size, zero, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, slope = (torch.randn(19, 96, generator=generator).to(dtype) for _ in range(2))
    weight[3], weight[4, ::2], weight[5] = 0, -0.0, weight[5] * 1e-6
    grid = Grid(3, "int", "group" if group_size else "channel", group_size)
    scale = torch.rand(grid.scale_shape((19, 96)), generator=generator) * 0.5 + 0.05
    scale[6] = 0.5  # ties
    weight[6] = torch.arange(96) / 8 - 6
    zeros = torch.randint(-4, 4, scale.shape, generator=generator).float() if zero else None
    return slope, weight, scale, zeros, grid


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 24, None])
@pytest.mark.parametrize("levels", [SEQ2, INT3], ids=["seq2", "int3"])
@pytest.mark.parametrize("zero", [False, True])
def test_triton(dtype, group_size, levels, zero):
    slope, *args, grid = case(dtype, group_size, zero)
    assert run(ROUND_LEVELS, "triton", *args, grid, levels).equal(ROUND_LEVELS.reference(*args, grid, levels))
    for with_weight in (True, False):
        found = run(ROUND_LEVELS_BACK, "triton", slope, *args, grid, levels, with_weight)
        wanted = ROUND_LEVELS_BACK.reference(slope, *args, grid, levels, with_weight)
        assert (found[0] is None) is not with_weight and (not with_weight or found[0].equal(wanted[0]))
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [SEQ2, INT3], ids=["seq2", "int3"])
@pytest.mark.parametrize("zero", [False, True])
def test_the_way_back_is_autograd_straight_through_the_rounding(levels, zero):
    slope, weight, scale, zeros, grid = case(torch.float32, 32, zero)
    weight[3:7] += 0.01  # at the very ends of the range autograd takes half
    weight.requires_grad_(), scale.requires_grad_()
    offset = torch.zeros(19, 3, 1) if zeros is None else zeros[..., None]
    ratio = weight.unflatten(1, (-1, 32)) / scale[..., None]
    ratio = torch.minimum(torch.maximum(ratio, levels.low - offset), levels.high - offset)
    steps = (ratio - levels.shift) / levels.step
    codes = (steps + (steps.round() - steps).detach()) * levels.step + levels.shift
    (codes * scale[..., None]).flatten(1).backward(slope)
    found = ROUND_LEVELS_BACK.reference(slope, weight.detach(), scale.detach(), zeros, grid, levels, True)
    assert bool((weight.grad == 0).any()) and bool((weight.grad != 0).any())
    torch.testing.assert_close(found[0], weight.grad)
    torch.testing.assert_close(found[1], scale.grad, rtol=1e-4, atol=1e-4)


RULES = [*TEQUILA.values(), *SHERRY.values()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group_size", "scale_dtype"), [(64, "BF16"), (192, "F16"), (None, "F32")])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_triton_rounds_to_ternary(dtype, group_size, scale_dtype, rule):
    generator = torch.Generator().manual_seed(0)
    weight, slope = (torch.randn(19, 192, generator=generator).to(dtype) for _ in range(2))
    weight[3], weight[4, ::2], weight[5], weight[6] = 0, -0.0, weight[5] * 1e-6, weight[6].sign()
    grid = Grid(4, "int", "group" if group_size else "channel", group_size, scale_dtype=scale_dtype)
    given, pull = torch.rand(grid.scale_shape((19, 192)), generator=generator) + 0.1, torch.randn(19, generator=generator)
    for scale, share, as_codes in ((None, 0.0, False), (None, 0.0, True), (given, 0.5, False), (None, 0.25, False)):
        found = run(ROUND_TERNARY, "triton", weight, grid, rule, scale, share, as_codes)
        wanted = ROUND_TERNARY.reference(weight, grid, rule, scale, share, as_codes)
        assert found[0].dtype == wanted[0].dtype
        if as_codes:
            assert found[0].equal(wanted[0])
        for a, b in zip(found, wanted, strict=True):  # a scale is a sum in another order, rounded
            torch.testing.assert_close(a, b, rtol=8e-3, atol=1e-5)
    for pulls, share, with_scale in ((pull, 0.0, False), (None, 0.5, True)):
        found = run(ROUND_TERNARY_BACK, "triton", slope, weight, grid, rule, pulls, share, with_scale)
        wanted = ROUND_TERNARY_BACK.reference(slope, weight, grid, rule, pulls, share, with_scale)
        assert found[0].equal(wanted[0]) and (found[1] is None) is not with_scale
        torch.testing.assert_close(found[1:], list(wanted[1:]), rtol=1e-4, atol=1e-4) if with_scale else None


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_triton_stores_is_what_it_computes(rule):
    weight = torch.randn(33, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    grid = Grid(4, "int", "group", 64, scale_dtype="BF16")
    value, codes = (run(ROUND_TERNARY, "triton", weight, grid, rule, None, 0.0, as_codes) for as_codes in (False, True))
    assert codes[1].equal(value[1]) and codes[1].bfloat16().float().equal(codes[1])
    assert dequantize(codes[0], codes[1], None, grid).bfloat16().equal(value[0])
