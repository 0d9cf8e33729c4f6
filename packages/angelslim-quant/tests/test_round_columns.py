"""The inner loop of GPTQ: its reference against rounding to nearest, its Triton kernel against the reference."""

import pytest
import torch

from angelslim_core.schemes import Grid, dequantize
from angelslim_quant.kernels.round_columns import ROUND_COLUMNS, Steps
from angelslim_quant.numerics import fp8, integer, microscale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = [
    Grid(4, "int", "group", 16),
    Grid(3, "int", "group", 16, symmetric=False),
    Grid(8, "int", "channel"),
    Grid(4, "float", "group", 16, scale_dtype="F8_E4M3"),
    Grid(8, "float", "tensor"),
]


def case(grid, outputs=37, inputs=48):
    """A weight, its levels by rounding to nearest, their values, and what `round_columns` is given."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(outputs, inputs, generator=generator)
    if grid.type == "int":
        codes, scale, zero = integer.quantize(weight, grid)
        steps, levels, values = integer.steps(scale, zero, grid), codes.float(), dequantize(codes, scale, zero, grid)
    elif grid.bits == 8:
        weight[0, :16] *= torch.logspace(-6, 0, 16)  # subnormal ones too
        codes, scale = fp8.quantize(weight, grid)
        steps, levels, values = fp8.element_steps(scale, outputs), codes.float(), codes.float() * scale
    else:
        t = microscale.weight_scale_of(weight.abs().amax())
        scale = microscale.block_scales(weight, grid, t)
        steps = microscale.element_steps(scale, t)
        values = microscale.round_to(weight.unflatten(1, (-1, 16)) / microscale.steps(scale, t)[..., None], grid).flatten(1)
        levels, values = values, values * microscale.steps(scale, t).repeat_interleave(16, 1)
    group = (torch.arange(inputs) // (grid.group_size or inputs)).int()
    return weight, levels, values, steps, group


@pytest.mark.parametrize("grid", GRIDS)
def test_without_later_columns_it_rounds_as_quantize_does(grid):
    weight, levels, values, steps, group = case(grid)
    block = weight.T.contiguous()
    found, errors = ROUND_COLUMNS.reference(block, torch.eye(48), None, steps, group)
    assert found.T.equal(levels) and block.T.equal(weight)
    assert torch.allclose(weight - errors.T, values, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pulled", [False, True])
def test_triton_is_the_reference(grid, pulled):
    triton = pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.round_columns import round_columns

    assert triton
    weight, _, _, steps, group = case(grid)
    generator = torch.Generator().manual_seed(2)
    upper = torch.eye(48) + 0.2 * torch.randn(48, 48, generator=generator).triu(1)
    pull = 0.1 * torch.randn(48, 48, generator=generator).triu(1) if pulled else None
    order = torch.randperm(48, generator=generator)
    blocks = [weight.T[order].contiguous() for _ in range(2)]
    wanted = ROUND_COLUMNS.reference(blocks[0], upper, pull, steps, group[order])
    moved = Steps(steps.step_GO.to(DEVICE), None if steps.zero_GO is None else steps.zero_GO.to(DEVICE), steps.levels, steps.half)
    block = blocks[1].to(DEVICE)
    found = round_columns(block, upper.to(DEVICE), None if pull is None else pull.to(DEVICE), moved, group[order].to(DEVICE))
    # an fp32 sum in another order may tip a tie, and what comes after that output's column differs
    same = (found[0].cpu() == wanted[0]).all(0)
    assert same.float().mean() > 0.9
    assert torch.allclose(found[1].cpu()[:, same], wanted[1][:, same], atol=1e-5) and torch.allclose(block.cpu()[:, same], blocks[0][:, same], atol=1e-5)
    if pulled:  # what was to be shown depends on it
        assert not torch.allclose(ROUND_COLUMNS.reference(weight.T[order].contiguous(), upper, None, steps, group[order])[1], wanted[1], atol=1e-3)


def test_the_kernel_says_where_it_runs():
    block = torch.zeros(4, 4)
    assert not ROUND_COLUMNS.implementations[0].supports(block)[0]
    assert ROUND_COLUMNS.describe()["op"] == "quant.round_columns"
