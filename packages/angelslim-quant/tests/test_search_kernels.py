"""Fused quantization: each implementation against its plain reference, bit by bit, at odd shapes and with values that are easily got wrong."""

import pytest
import torch

from angelslim_core import schemes
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_quant.kernels.quantize_fp8 import QUANTIZE_FP8
from angelslim_quant.kernels.quantize_groups import QUANTIZE_GROUPS
from angelslim_quant.kernels.search_blocks import SEARCH_BLOCKS
from angelslim_quant.kernels.search_range import SEARCH_RANGE
from angelslim_quant.numerics.microscale import weight_scale_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# of a weight and of its scales
PAIRS = [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32"), (torch.float32, "BF16")]
SHRINKS = (0.95, 0.9, 0.8, 0.7, 0.6)
OFFSETS = (0, 1, -1, 2, -2, 3, 4, 5, 6)


def run(kernel, name, *args):
    """An implementation's result on the CPU; Triton's is called where it says it runs on GPUs only, which its interpreter is not."""
    function = {i.name: i.function for i in kernel.implementations}[name]
    if name == "triton":
        pytest.importorskip("triton")
        args = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    return [None if a is None else a.cpu() for a in function(*args)]


def weight_of(dtype, shape=(19, 96), seed=0):
    """Rows of zeros, negative zeros, outliers, one sign, tiny values; and blocks whose roundings tie."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[3, 8:64], weight[4], weight[5] = 0, 0, weight[5] * 1e-3
    weight[7, ::3], weight[9, 5], weight[10], weight[11] = -0.0, 3.0, weight[10].abs(), -weight[11].abs()
    weight[12] = torch.tensor([6.0, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -5, -3.5, -2.5, -1.75, -1.25, -0.75, -0.25, 4]).repeat(shape[1] // 16)
    return weight.to(dtype)


def same(a, b):
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8)))


def check_search(found, wanted, error):
    """Bits agree, except of groups whose two least errors differ by no more than a sum in another order does."""
    if not all(map(same, found, wanted)):
        a, b = error(*found), error(*wanted)
        assert torch.allclose(a, b, rtol=1e-5, atol=0) and float((a != b).float().mean()) < 0.02


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Several chunks, the last of them smaller."""
    monkeypatch.setattr(schemes, "PIECE", 1000)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nvfp4", "nvfp4 weighted", "nvfp4 plain", "mxfp4", "mxfp4 search", "mxfp4 down", "mxfp8", "mxfp8 search weighted"])
def test_blocks(name, dtype, kind):
    weight = weight_of(dtype)
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 3 if "weighted" in kind else None
    if kind.startswith("nvfp4"):
        grid, t, rounding = Grid(4, "float", "tensor_group", 16, scale_dtype="F8_E4M3"), weight_scale_of(weight.abs().amax()), "up"
        offsets = (0,) if "plain" in kind else OFFSETS
    else:
        grid, t, rounding = Grid(int(kind[4]), "float", "group", 32, scale_dtype="U8"), None, "down" if "down" in kind else "up"
        offsets = (0, -1, 1) if "search" in kind else (0,)

    def error(codes, scale):
        found = Quantized(Scheme("", grid), codes, scale, global_scale=t).dequantize().sub_(weight.float()).square_()
        return (found if importance is None else found * importance).unflatten(1, (-1, grid.group_size)).sum(-1)

    wanted = SEARCH_BLOCKS.reference(weight, grid, t, importance, offsets, rounding)
    check_search(run(SEARCH_BLOCKS, name, weight, grid, t, importance, offsets, rounding), wanted, error)
    if len(offsets) > 1 and grid.bits == 4:  # what was to be shown depends on the search
        assert float(error(*wanted).sum()) < float(error(*SEARCH_BLOCKS.reference(weight, grid, t, importance, offsets[:1], rounding)).sum())


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_the_first_of_equal_scales_is_taken(name):
    # every value is one of FP4 under scales 1/2 and 3/4, four codes apart
    weight = torch.tensor([[3.0, 1.5, 0, -3, -1.5, 0, 0, 3] * 2])
    grid, t = Grid(4, "float", "tensor_group", 16, scale_dtype="F8_E4M3"), torch.ones(1)
    for offsets, scale in (((0, 4), 0.5), ((4, 0), 0.75), ((1, 4, 0), 0.75)):
        found = SEARCH_BLOCKS.reference(weight, grid, t, None, offsets) if name == "reference" else run(SEARCH_BLOCKS, name, weight, grid, t, None, offsets)
        assert found[1].float().item() == scale
        assert Quantized(Scheme("", grid), *found, global_scale=t).dequantize().equal(weight)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "scale_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize(("strategy", "size"), [("group", 32), ("group", 24), ("channel", None), ("tensor", None)])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (8, False)])
def test_integers(name, dtype, scale_dtype, strategy, size, bits, symmetric):
    if name == "triton" and strategy == "tensor":
        pytest.skip("not by this kernel")
    weight, grid = weight_of(dtype), Grid(bits, "int", strategy, size, symmetric=symmetric, scale_dtype=scale_dtype)
    assert all(map(same, run(QUANTIZE_GROUPS, name, weight, grid), QUANTIZE_GROUPS.reference(weight, grid)))
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 3

    def error(scale, zero):
        found = Quantized(Scheme("", grid), QUANTIZE_GROUPS.reference(weight, grid, scale, zero)[0], scale, zero).dequantize()
        return (found.sub_(weight.float()).square_() * importance).reshape(*scale.shape, -1).sum(-1)

    chosen = SEARCH_RANGE.reference(weight, grid, importance, SHRINKS)
    check_search(run(SEARCH_RANGE, name, weight, grid, importance, SHRINKS), chosen, error)
    assert float(error(*chosen).sum()) < float(error(*QUANTIZE_GROUPS.reference(weight, grid)[1:]).sum()) or strategy == "tensor" or bits == 8
    assert all(map(same, run(QUANTIZE_GROUPS, name, weight, grid, *chosen), QUANTIZE_GROUPS.reference(weight, grid, *chosen)))
    assert all(map(same, run(SEARCH_RANGE, name, weight, grid, importance, ()), SEARCH_RANGE.reference(weight, grid, importance, ())))


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "scale_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize(("strategy", "block"), [("block", (16, 32)), ("block", (128, 128)), ("block", (8, 24)), ("channel", None), ("tensor", None)])
def test_fp8(name, dtype, scale_dtype, strategy, block):
    weight, grid = weight_of(dtype, (19, 112))[:, :91].contiguous(), Grid(8, "float", strategy, block_structure=block, scale_dtype=scale_dtype)
    weight[13] *= torch.logspace(-6, 0, 91).to(dtype)  # subnormal ones too
    wanted = QUANTIZE_FP8.reference(weight, grid)
    assert all(map(same, run(QUANTIZE_FP8, name, weight, grid), wanted))
    smaller = wanted[1] * 0.7  # some saturate
    assert all(map(same, run(QUANTIZE_FP8, name, weight, grid, smaller), QUANTIZE_FP8.reference(weight, grid, smaller)))


@pytest.mark.parametrize("kernel", [SEARCH_BLOCKS, SEARCH_RANGE, QUANTIZE_GROUPS, QUANTIZE_FP8], ids=lambda k: k.op)
def test_triton_runs_on_gpus_only(kernel):
    weight, grid = torch.zeros(4, 32), Grid(4, "int", "group", 16)
    assert not kernel.implementations[0].supports(weight, grid)[0] and kernel.implementations[1].name == "torch"


def test_wider_channels_than_a_program_holds_go_to_torch():
    from angelslim_quant.kernels import quantize_groups

    class Wide:
        shape, is_cuda = (1, quantize_groups.LARGEST_GROUP + 1), True

    assert not quantize_groups.on_gpu(Wide, Grid(8, "int", "channel"))[0] and quantize_groups.on_gpu(Wide, Grid(8, "int", "group", 128))[0]
