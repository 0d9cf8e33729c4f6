"""Layouts: headers as announced, exact round trips, and agreement with the compressed-tensors library."""

import pytest
import torch

from angelslim_core.errors import ModelError, PlanError
from angelslim_core.exporters.compressed_tensors import CompressedTensors
from angelslim_core.exporters.hf_fp8 import HFFP8, block_scheme
from angelslim_core.io.checkpoint import TensorSpec, dtype_name
from angelslim_core.schemes import Grid, Quantized, Scheme

TOKEN_INT, TOKEN_FP8 = Grid(8, "int", "token", dynamic=True), Grid(8, "float", "token", dynamic=True)
CT, FP8 = CompressedTensors(), HFFP8()
CASES = {
    "int8": (CT, Scheme("", Grid(8, "int", "channel", scale_dtype="BF16"), TOKEN_INT)),
    "fp8": (CT, Scheme("", Grid(8, "float", "channel", scale_dtype="BF16"), TOKEN_FP8)),
    "fp8 static": (CT, Scheme("", Grid(8, "float", "tensor"), Grid(8, "float", "tensor"))),
    "int4": (CT, Scheme("", Grid(4, "int", "group", 32, scale_dtype="BF16"))),
    "int4 asym": (CT, Scheme("", Grid(4, "int", "group", 32, symmetric=False, scale_dtype="BF16"))),
    "int3": (CT, Scheme("", Grid(3, "int", "group", 32, scale_dtype="BF16"))),
    "int8 weight only": (CT, Scheme("", Grid(8, "int", "group", 32, scale_dtype="BF16"))),
    "block": (FP8, block_scheme((16, 16))),
    "ragged block": (FP8, block_scheme((24, 40))),
    "block in compressed-tensors": (CT, block_scheme((16, 16))),
}


def quantized(scheme, shape=(40, 64)):
    generator = torch.Generator().manual_seed(0)
    grid = scheme.weights
    half = 1 << (grid.bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    if grid.type == "float":
        codes = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale_shape = grid.scale_shape(shape)
    scale = torch.rand(scale_shape, generator=generator).add(0.1).to(torch.bfloat16 if grid.scale_dtype == "BF16" else torch.float32)
    zero = None if grid.symmetric else torch.randint(-half, half, scale_shape, generator=generator, dtype=torch.int8)
    static = scheme.input_activations is not None and scheme.input_activations.dynamic is False
    return Quantized(scheme, codes, scale, zero, torch.tensor([0.5]) if static else None)


@pytest.mark.parametrize("case", CASES)
def test_headers_and_round_trip(case):
    exporter, scheme = CASES[case]
    original = quantized(scheme)
    packed = exporter.pack(original)
    assert {n: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for n, t in packed.items()} == exporter.layout((40, 64), scheme)
    again = exporter.unpack(packed, scheme)
    assert again.codes.view(torch.uint8).equal(original.codes.view(torch.uint8)) and again.scale.equal(original.scale)
    assert (again.zero_point is None) == (original.zero_point is None)
    assert original.zero_point is None or again.zero_point.equal(original.zero_point)


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("ragged") and CASES[c][0] is CT])
def test_the_library_decompresses_to_the_same_numbers(case):
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    exporter, scheme = CASES[case]
    original = quantized(scheme)
    group = exporter.config({"m": scheme}, [])["config_groups"]["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    theirs = compressor.decompress(exporter.pack(original), QuantizationScheme.model_validate(group))["weight"]
    assert torch.equal(theirs.float(), original.dequantize().to(theirs.dtype).float())


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case):
    exporter, scheme = CASES[case]
    config = exporter.config({"a.b": scheme}, ["lm_head"])
    suffixes = tuple(exporter.layout((40, 64), scheme))
    (module, found) = next(iter(exporter.schemes(config, {"a.b": suffixes, "lm_head": ("weight",)}).items()))
    assert module == "a.b"
    strip = lambda g: g and (g.bits, g.type, g.strategy, g.group_size, g.block_structure, g.symmetric, g.dynamic)  # noqa: E731
    assert strip(found.weights) == strip(scheme.weights)
    assert exporter is FP8 or strip(found.input_activations) == strip(scheme.input_activations)


def test_config_is_what_the_library_accepts():
    from compressed_tensors.quantization import QuantizationConfig

    for exporter, scheme in CASES.values():
        if exporter is CT:
            QuantizationConfig.model_validate(CT.config({"m": scheme}, ["lm_head"]))


def test_two_schemes_name_their_modules():
    config = CT.config({"a": CASES["int8"][1], "b": CASES["int4"][1]}, [])
    assert config["format"] == "mixed-precision"
    assert [g["targets"] for g in config["config_groups"].values()] == [["a"], ["b"]]


def test_ragged_blocks_are_spread_and_cut():
    scheme = block_scheme((2, 2))
    codes = torch.ones(3, 3).to(torch.float8_e4m3fn)
    found = Quantized(scheme, codes, torch.tensor([[1.0, 2.0], [3.0, 4.0]])).dequantize()
    assert found.tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"config_groups": []},
        {"config_groups": {"g": {"targets": ["Linear"]}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": "x", "type": "int"}}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "spiral"}}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": -1}}}},
        {"config_groups": {"g": {"targets": ["other"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}},
        {"config_groups": {"g": {"targets": [r"re:(\w+)+(\w+)+(\w+)+(\w+)+(\w+)+#"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}},
    ],
)
def test_hostile_configs(config):
    with pytest.raises((ModelError, PlanError)):
        CT.schemes(config, {"model.layers.0.self_attn.q_projaaaaaaaaaaaaaaaaaaaaaaaaaaa": ("weight_scale", "weight_packed")})


@pytest.mark.parametrize("block", [None, [128], [0, 128], ["128", 128], [True, 1]])
def test_hostile_block_size(block):
    with pytest.raises(ModelError, match="weight_block_size"):
        FP8.schemes({"weight_block_size": block}, {})
