"""GPTQ, AWQ and Model Optimizer layouts: hand-made words, round trips, what they refuse, and recipes that ask for them."""

import pytest
import torch

from angelslim_core import compress
from angelslim_core.errors import ModelError, PlanError
from angelslim_core.exporters.awq import AWQ
from angelslim_core.exporters.gptq import GPTQ
from angelslim_core.exporters.modelopt import ModelOpt
from angelslim_core.io.checkpoint import TensorSpec, dtype_name
from angelslim_core.loading import OWN_READER, load_model
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_core.source import open_any
from angelslim_core.validation import validate


def word(*nibbles):
    """Eight nibbles, the first in the low bits, as int32."""
    value = sum(n << (4 * i) for i, n in enumerate(nibbles))
    return value - (1 << 32) if value >= 1 << 31 else value


def grid(bits=4, group=8, symmetric=True):
    return Scheme("t", Grid(bits, "int", "group" if group else "channel", group, symmetric=symmetric, scale_dtype="F16"))


def quantized(scheme, shape=(16, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (scheme.weights.bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(scheme.weights.scale_shape(shape), generator=generator).add(0.1).half()
    zero = None if scheme.weights.symmetric else torch.randint(-half, half, scale.shape, generator=generator, dtype=torch.int8)
    return Quantized(scheme, codes, scale, zero)


# codes -8 ... 7 of one output and eight inputs, or the other way round
CODES = torch.tensor([[-8, -7, 0, 1, 2, 3, 6, 7]], dtype=torch.int8)
UNSIGNED = (0, 1, 8, 9, 10, 11, 14, 15)


def test_hand_made_gptq_words():
    codes = CODES.repeat(8, 1)
    scale = torch.ones(8, 1, dtype=torch.float16)
    packed = GPTQ().pack(Quantized(grid(), codes, scale))
    assert packed["qweight"].tolist() == [[word(*UNSIGNED)] * 8]  # input 0 in the low nibble
    assert packed["qzeros"].tolist() == [[0x77777777]]  # zero point 8, stored less one
    assert packed["g_idx"].tolist() == [0] * 8
    zero = torch.tensor([[-8], [-7], [0], [1], [2], [3], [6], [7]], dtype=torch.int8)
    packed = GPTQ().pack(Quantized(grid(symmetric=False), codes, scale, zero))
    assert packed["qzeros"].tolist() == [[word(*UNSIGNED)]]  # gptq_v2: as they are
    assert GPTQ().config({"a": grid(symmetric=False)}, [])["checkpoint_format"] == "gptq_v2"


def test_hand_made_awq_words():
    codes = CODES.T.repeat(1, 8)  # eight outputs, each of eight equal codes
    scale = torch.ones(8, 1, dtype=torch.float16)
    zero = CODES.T.contiguous()
    packed = AWQ().pack(Quantized(grid(symmetric=False), codes, scale, zero))
    wanted = word(*(UNSIGNED[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)))
    assert packed["qweight"].tolist() == [[wanted]] * 8 and packed["qzeros"].tolist() == [[wanted]]
    assert AWQ().pack(Quantized(grid(), codes, scale))["qzeros"].tolist() == [[word(*[8] * 8)]]


def test_zero_points_less_one_are_read():
    """Published folders store asymmetric zero points less one; a zero point of 0 wraps around."""
    scheme = grid(symmetric=False)
    exporter, original = GPTQ(), quantized(scheme)
    packed = exporter.pack(original)
    v2 = packed["qzeros"].view(torch.uint8)
    less = ((v2 & 15) - 1 & 15) | (((v2 >> 4) - 1 & 15) << 4)
    config = {**exporter.config({"a": scheme}, []), "checkpoint_format": "gptq"}
    (found,) = exporter.schemes(config, {"a": tuple(packed)}).values()
    again = exporter.unpack({**packed, "qzeros": less.view(torch.int32)}, found)
    assert bool((original.zero_point == -8).any()) and again.zero_point.equal(original.zero_point)


@pytest.mark.parametrize("exporter", [GPTQ(), AWQ()], ids=["gptq", "awq"])
@pytest.mark.parametrize(
    "scheme", [grid(), grid(symmetric=False), grid(group=None), grid(8), grid(8, symmetric=False)], ids=["sym", "asym", "channel", "8", "8 asym"]
)
def test_headers_round_trip_and_config(exporter, scheme):
    if isinstance(exporter, AWQ) and scheme.weights.bits == 8:
        with pytest.raises(PlanError):
            exporter.layout((16, 32), scheme)
        return
    original = quantized(scheme)
    packed = exporter.pack(original)
    assert {n: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for n, t in packed.items()} == exporter.layout((16, 32), scheme)
    config = exporter.config({"a.b": scheme}, ["lm_head", "c", "re:.*visual.*"])
    (found,) = exporter.schemes(config, {"a.b": tuple(packed), "lm_head": ("weight",)}).values()
    again = exporter.unpack(packed, found)
    assert again.codes.equal(original.codes) and again.scale.equal(original.scale)
    assert again.dequantize().equal(original.dequantize())
    specs = {n: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for n, t in packed.items()}
    assert exporter.weight_shape(specs, found) == (16, 32)


@pytest.mark.parametrize("with_inputs", [True, False])
def test_modelopt(with_inputs):
    inputs = Grid(4, "float", "tensor_group", 16, dynamic="local", scale_dtype="F8_E4M3") if with_inputs else None
    scheme = Scheme("nvfp4", Grid(4, "float", "tensor_group", 16, scale_dtype="F8_E4M3"), inputs)
    codes = torch.arange(16, dtype=torch.uint8).repeat(4, 2)
    scale = torch.tensor([[1.0, 2.0]] * 4).to(torch.float8_e4m3fn)
    original = Quantized(scheme, codes, scale, None, torch.tensor([0.5]) if with_inputs else None, torch.tensor([0.25]))
    exporter = ModelOpt()
    packed = exporter.pack(original)
    assert packed["weight"][0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]  # the even input in the low nibble
    assert {n: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for n, t in packed.items()} == exporter.layout((4, 32), scheme)
    config = exporter.config({"a": scheme}, ["lm_head"])
    (found,) = exporter.schemes(config, {"a": tuple(packed), "lm_head": ("weight",)}).values()
    assert found.weights == scheme.weights and found.input_activations == scheme.input_activations
    again = exporter.unpack(packed, found)
    assert again.codes.equal(codes) and again.dequantize().equal(original.dequantize()) and again.dequantize()[0, 1] == 0.5 * 0.25
    assert exporter.files({"a": scheme}, ["lm_head"])["hf_quant_config.json"]["quantization"]["quant_algo"] == config["quant_algo"]


@pytest.mark.parametrize(
    ("exporter", "scheme", "shape"),
    [
        (GPTQ(), Scheme("s", Grid(4, "int", "group", 8, scale_dtype="BF16")), (16, 32)),
        (GPTQ(), Scheme("s", Grid(3, "int", "group", 8, scale_dtype="F16")), (16, 32)),
        (GPTQ(), Scheme("s", Grid(8, "int", "channel", scale_dtype="F16"), Grid(8, "int", "token", dynamic=True)), (16, 32)),
        (AWQ(), grid(), (12, 32)),
        (ModelOpt(), grid(), (16, 32)),
    ],
)
def test_layouts_refuse_what_they_cannot_hold(exporter, scheme, shape):
    with pytest.raises(PlanError):
        exporter.layout(shape, scheme)


def test_two_grids_in_one_folder_are_refused():
    for exporter in (GPTQ(), AWQ()):
        with pytest.raises(PlanError):
            exporter.config({"a": grid(), "b": grid(group=16)}, [])


@pytest.mark.parametrize(
    ("exporter", "changes"),
    [
        (GPTQ(), {"bits": 3}),
        (GPTQ(), {"bits": True}),
        (GPTQ(), {"group_size": 0}),
        (GPTQ(), {"checkpoint_format": "marlin"}),
        (GPTQ(), {"dynamic": {"+:.*": {"bits": 8}}}),
        (GPTQ(), {"dynamic": ["x"]}),
        (AWQ(), {"version": "gemv"}),
        (AWQ(), {"zero_point": False}),
        (AWQ(), {"bits": "4"}),
        (ModelOpt(), {"quant_algo": "FP8"}),
    ],
)
def test_hostile_configs(exporter, changes):
    config = {"bits": 4, "group_size": 8, "sym": True, "quant_algo": "NVFP4", **changes}
    with pytest.raises(ModelError):
        exporter.schemes(config, {"a": ("qweight",)})


def test_hostile_tensors():
    scheme = grid(symmetric=False)
    packed = GPTQ().pack(quantized(scheme))
    for broken in ({"g_idx": packed["g_idx"].flip(0)}, {"scales": packed["scales"][:1]}, {"qzeros": packed["qzeros"][:, :1]}):
        with pytest.raises(ModelError):
            GPTQ().unpack({**packed, **broken}, scheme)
    with pytest.raises(ModelError):
        GPTQ().weight_shape({"qweight": TensorSpec("I32", (4,))}, scheme)
    packed = AWQ().pack(quantized(scheme))
    with pytest.raises(ModelError):
        AWQ().unpack({**packed, "qzeros": packed["qzeros"][:1]}, scheme)


@pytest.mark.parametrize(("layout", "symmetric"), [("gptq", "true"), ("gptq", "false"), ("awq", "true"), ("awq", "false")])
def test_recipes_ask_for_them(tiny, tmp_path, layout, symmetric):
    options = ["steps[0].with.group_size=32", f"steps[0].with.symmetric={symmetric}", "steps[0].ignore=['layers[0:1].mlp']"]
    result = compress(tiny(), ["quant.int4_rtn"], tmp_path / "out", overrides=[*options, f"export.format={layout}"])
    assert result.plan["engines"]["transformers"]["ok"] is False
    assert result.plan["engines"]["vllm"]["ok"] == ((layout, symmetric) != ("gptq", "false"))
    source = open_any(tmp_path / "out")
    assert source.exporter.name == layout and len(source.quantized) == 4 * 2 + 3
    for module in source.quantized:
        stored = source.read_quantized(module)
        assert stored.scale.dtype == torch.float16
    assert validate(tmp_path / "out", tiny())["ok"]
    loaded = load_model(tmp_path / "out", packed=False)
    assert loaded.backend == OWN_READER
    # what was searched is what is stored: the same grid with F16 scales finds the same numbers
    from angelslim_quant.numerics.integer import quantize

    base = open_any(tiny())
    module = "model.layers.1.mlp.down_proj"
    wanted = Grid(4, "int", "group", 32, symmetric=symmetric == "true", scale_dtype="F16")
    codes, scale, _ = quantize(base.read(f"{module}.weight"), wanted)
    stored = source.read_quantized(module)
    assert stored.codes.equal(codes) and stored.scale.equal(scale)


def test_a_folder_that_names_two_grids_or_another_layout_is_refused(tiny, tmp_path):
    with pytest.raises(PlanError, match="awq layout"):
        compress(tiny(), ["quant.int8_dynamic"], tmp_path / "o", overrides=["export.format=awq"])
    with pytest.raises(PlanError):
        compress(tiny(), ["quant.int4_rtn"], tmp_path / "o", overrides=["export.format=gptq", "steps[0].with.group_size=32", "steps[0].with.bits=3"])
    assert not (tmp_path / "o").exists()
