"""The passes' numerics against their definitions, and every pass through the conformance kit."""

import pytest
import torch

import angelslim_quant.plugin as plugin
from angelslim_core import compress
from angelslim_core.errors import PlanError
from angelslim_core.schemes import Grid, dequantize
from angelslim_core.source import open_any
from angelslim_core.testing.conformance import check_pass, tiny_site
from angelslim_core.testing.models import TINY
from angelslim_quant.numerics import fp8, integer
from angelslim_quant.passes.int4_rtn import INT4RTN


@pytest.mark.parametrize(
    ("pass_id", "options"),
    [
        ("quant.int8_dynamic", {}),
        ("quant.fp8_dynamic", {}),
        ("quant.fp8_block", {"block_size": 24}),
        ("quant.int4_rtn", {"group_size": 32}),
        ("quant.int4_rtn", {"group_size": 32, "symmetric": False, "bits": 3}),
        ("quant.fp8_static", {}),
    ],
)
def test_conformance(tmp_path, pass_id, options):
    check_pass("quant", plugin, pass_id, tmp_path, **options)


def test_all_256_fp8_codes_round_trip_and_casts_saturate():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = codes.float()
    finite = ~values.isnan()
    assert fp8.cast_e4m3(values[finite]).float().equal(values[finite])
    assert fp8.cast_e4m3(torch.tensor([1e4, -1e4, 449.0])).float().tolist() == [448, -448, 448]
    assert fp8.cast_e4m3(torch.tensor([17.0, 19.0])).float().tolist() == [16, 20]  # halfway: to even


def test_ragged_fp8_blocks():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    weight[:128, 128:256] = 0
    grid = Grid(8, "float", "block", block_structure=(128, 128))
    codes, scale = fp8.quantize(weight, grid)
    assert scale.shape == (2, 3) and scale[0, 1] == 1 and bool(torch.isfinite(scale).all())
    error = (dequantize(codes, scale, None, grid) - weight).abs()
    assert bool((error <= weight.abs() * 2**-4 + scale.max() * 2**-10).all())
    assert scale[1, 2] == weight[128:, 256:].abs().max() / 448


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_error_is_half_a_step(bits, symmetric):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(bits))
    grid = Grid(bits, "int", "group", 32, symmetric=symmetric)
    codes, scale, zero = integer.quantize(weight, grid)
    step = scale.repeat_interleave(32, 1)
    slack = 0.5001 if symmetric else 1.0  # the zero point is rounded too
    assert bool(((dequantize(codes, scale, zero, grid) - weight).abs() <= slack * step).all())
    assert int(codes.min()) >= -(1 << (bits - 1)) and int(codes.max()) < 1 << (bits - 1)


def test_symmetric_scale_keeps_both_ends():
    grid = Grid(4, "int", "group", 8)
    codes, scale, _ = integer.quantize(torch.tensor([[-8.0, 1, 2, 3, 4, 5, 6, 7]]), grid)
    assert scale.item() == 1 and codes.tolist() == [[-8, 1, 2, 3, 4, 5, 6, 7]]


def test_a_group_that_does_not_divide_names_those_that_do():
    with pytest.raises(PlanError) as caught:
        INT4RTN(INT4RTN.Config(group_size=128)).scheme(tiny_site((8, 192)))
    assert "96, 64" in caught.value.hint


@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture(tiny, tmp_path, architecture):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    recipe = {"steps": [{"use": "quant.fp8_static"}], "calibration": {"data": str(text), "samples": 3, "tokens": 16}}
    static = compress(tiny(architecture), out=tmp_path / "static", recipe=recipe)
    plain = compress(tiny(architecture), ["quant.int8_dynamic"], tmp_path / "int8")
    assert static.metrics["linears"] == plain.metrics["linears"] > 0 and static.metrics["sqnr_db_min"] > 25


def test_static_scales_are_shared_and_independent_of_padding_and_batching(tiny, tmp_path):
    rows = ["a b c d", "the quick brown fox jumps", "over"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    scales = []
    for size in (1, 3):
        recipe = {"steps": [{"use": "quant.fp8_static"}], "calibration": {"data": str(data), "samples": 3, "tokens": 32, "batch_size": size}}
        compress(tiny(dtype="float32"), out=tmp_path / f"o{size}", recipe=recipe)
        source = open_any(tmp_path / f"o{size}")
        scales.append({n: (float(source.read_quantized(n).scale), float(source.read_quantized(n).input_scale)) for n in source.quantized})
    assert all(scales[0][n] == pytest.approx(scales[1][n], rel=1e-5) for n in scales[0])
    q, k, v = (scales[0][f"model.layers.0.self_attn.{r}_proj"] for r in "qkv")
    assert q == k == v and scales[0]["model.layers.0.mlp.down_proj"] != scales[0]["model.layers.0.mlp.up_proj"]
