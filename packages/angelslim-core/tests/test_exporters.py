"""Layouts: headers as announced, exact round trips, and agreement with the compressed-tensors library."""

import pytest
import torch

from angelslim_core.errors import ModelError, PlanError
from angelslim_core.exporters.compressed_tensors import CompressedTensors
from angelslim_core.exporters.hf_fp8 import HFFP8, block_scheme
from angelslim_core.exporters.modelopt import nvfp4_scheme
from angelslim_core.io.checkpoint import TensorSpec, dtype_name, torch_dtype
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
    "nvfp4": (CT, nvfp4_scheme(True)),
    "nvfp4 weight only": (CT, nvfp4_scheme(False)),
    "mxfp4": (CT, Scheme("", Grid(4, "float", "group", 32, scale_dtype="U8"), Grid(4, "float", "group", 32, dynamic=True, scale_dtype="U8"))),
    "mxfp8": (CT, Scheme("", Grid(8, "float", "group", 32, scale_dtype="U8"), Grid(8, "float", "group", 32, dynamic=True, scale_dtype="U8"))),
    "w4a8 fp8": (CT, Scheme("", Grid(4, "int", "group", 32, scale_dtype="BF16"), TOKEN_FP8)),
    "w4a8 int8": (CT, Scheme("", Grid(4, "int", "channel", scale_dtype="BF16"), TOKEN_INT)),
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
        if grid.bits == 4:
            codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    scale_shape = grid.scale_shape(shape)
    scale = torch.rand(scale_shape, generator=generator).add(0.1)
    scale = (scale * 20 + 110).to(torch.uint8) if grid.scale_dtype == "U8" else scale.to(torch_dtype(grid.scale_dtype))
    zero = None if grid.symmetric else torch.randint(-half, half, scale_shape, generator=generator, dtype=torch.int8)
    static = scheme.input_activations is not None and scheme.input_activations.dynamic is not True
    two_level = grid.strategy == "tensor_group"
    return Quantized(scheme, codes, scale, zero, torch.tensor([0.5]) if static else None, torch.tensor([2.0**-6]) if two_level else None)


@pytest.mark.parametrize("case", CASES)
def test_headers_and_round_trip(case):
    exporter, scheme = CASES[case]
    original = quantized(scheme)
    packed = exporter.pack(original)
    assert {n: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for n, t in packed.items()} == exporter.layout((40, 64), scheme)
    again = exporter.unpack(packed, scheme)
    assert again.codes.view(torch.uint8).equal(original.codes.view(torch.uint8)) and again.scale.view(torch.uint8).equal(original.scale.view(torch.uint8))
    assert again.input_scale == original.input_scale and again.global_scale == original.global_scale
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
    if original.scale.dtype in (torch.uint8, torch.float8_e4m3fn):
        assert torch.equal(theirs.float(), original.dequantize())  # nothing of it is lost in BF16


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case):
    exporter, scheme = CASES[case]
    config = exporter.config({"a.b": scheme}, ["lm_head"])
    suffixes = tuple(exporter.layout((40, 64), scheme))
    (module, found) = next(iter(exporter.schemes(config, {"a.b": suffixes, "lm_head": ("weight",)}).items()))
    assert module == "a.b"
    narrow = lambda g: g.scale_dtype if g.scale_dtype in ("U8", "F8_E4M3") else None  # noqa: E731
    strip = lambda g: g and (g.bits, g.type, g.strategy, g.group_size, g.block_structure, g.symmetric, g.dynamic, narrow(g))  # noqa: E731
    assert strip(found.weights) == strip(scheme.weights)
    assert exporter is FP8 or strip(found.input_activations) == strip(scheme.input_activations)


def test_grids_without_a_scale_dtype_have_that_of_their_format():
    for case in ("nvfp4", "mxfp4", "mxfp8"):
        scheme = CASES[case][1]
        config = CT.config({"a": scheme}, [])
        for grid in ("weights", "input_activations"):
            del config["config_groups"]["group_0"][grid]["scale_dtype"]
        (found,) = CT.schemes(config, {"a": tuple(CT.layout((40, 64), scheme))}).values()
        assert (found.weights, found.input_activations) == (scheme.weights, scheme.input_activations)


def test_hand_made_fp4_bytes():
    """Two codes a byte, the even input in the low half; scales beside them, global scales as their inverse."""
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]], dtype=torch.uint8)
    scale = torch.tensor([[2.0]]).to(torch.float8_e4m3fn)
    packed = CT.pack(Quantized(CASES["nvfp4"][1], codes, scale, None, torch.tensor([0.5]), torch.tensor([0.25])))
    assert packed["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert packed["weight_global_scale"].tolist() == [4] and packed["input_global_scale"].tolist() == [2]
    values = CT.unpack(packed, CASES["nvfp4"][1]).dequantize()[0].tolist()
    assert values == [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 0, -0.25, -0.5, -0.75, -1, -1.5, -2, -3]
    mx = CT.pack(Quantized(CASES["mxfp4"][1], codes.repeat(1, 2), torch.tensor([[128]], dtype=torch.uint8)))
    assert CT.unpack(mx, CASES["mxfp4"][1]).dequantize()[0, :16].tolist() == [4 * v for v in values]


@pytest.mark.parametrize("change", [{"weight_global_scale": 0.0}, {"weight_global_scale": float("nan")}, {"weight_global_scale": -1.0}, {"weight_scale": None}])
def test_hostile_fp4_tensors(change):
    packed = CT.pack(quantized(CASES["nvfp4"][1]))
    for name, value in change.items():
        packed[name] = packed[name][:, :1] if value is None else torch.tensor([value])
    with pytest.raises(ModelError):
        CT.unpack(packed, CASES["nvfp4"][1])
    with pytest.raises(ModelError):
        CT.weight_shape({"weight_packed": TensorSpec("U8", (3,))}, CASES["nvfp4"][1])


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
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32, "dynamic": "x"}}}},
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
