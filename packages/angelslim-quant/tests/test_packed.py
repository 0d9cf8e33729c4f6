"""Kernels of packed linears against their references, and whole models that run packed against dequantized ones."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from angelslim_core import compress, evaluate, loading
from angelslim_core.emulation import round_input
from angelslim_core.errors import EngineError
from angelslim_core.loading import OWN_READER, load_model
from angelslim_core.model import decoder_layers
from angelslim_core.normed import Normed
from angelslim_core.packed import ACTIVATIONS, NORMS, PackedLinear, SharedInput
from angelslim_core.plugins import PluginHost
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_quant.kernels import scaled_matmul as scaled
from angelslim_quant.kernels.available import int4_mma
from angelslim_quant.kernels.gated_rows import GATED_ROWS
from angelslim_quant.kernels.int4_matmul import W4A8_MATMUL, W4A16_MATMUL, Packed4CPU, pack4, pack4_cpu, unpack4
from angelslim_quant.kernels.normed_rows import NORMED_ROWS
from angelslim_quant.kernels.quantize_rows import QUANTIZE_ROWS
from angelslim_quant.packed import FP8Linear, INT4Linear, INT8Linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies no BF16
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
IDS = torch.arange(2, 34)[None]
TOKEN_INT8, TOKEN_FP8 = Grid(8, "int", "token", dynamic=True), Grid(8, "float", "token", dynamic=True)
GROUP_FP8, TENSOR_FP8 = Grid(8, "float", "group", 128, dynamic=True), Grid(8, "float", "tensor")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(found, wanted, tolerance):
    error = (found.cpu().double() - wanted.cpu().double()).abs().max() / wanted.double().abs().max().cpu()
    assert found.dtype == wanted.dtype and found.shape == wanted.shape and float(error) < tolerance, float(error)


# kernels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [TOKEN_INT8, TOKEN_FP8, GROUP_FP8, TENSOR_FP8], ids=lambda g: f"{g.type} {g.strategy}")
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (3, 200), (2, 300)])
def test_rows_are_quantized_as_they_are_emulated(grid, rows, width):
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.quantize_rows import quantize_rows

    x = torch.randn(rows, width).bfloat16()
    x[0, :16] *= torch.logspace(-6, 0, 16)
    x[-1, 20:40] = 0
    x[0] *= rows == 1  # a row of zeros
    scale = torch.tensor([0.003]) if grid.strategy == "tensor" else None
    wanted = QUANTIZE_ROWS.reference(x, grid, scale)
    codes, scales = quantize_rows(x.to(DEVICE), grid, None if scale is None else scale.to(DEVICE))
    assert codes.cpu().float().equal(wanted[0].float()) and scales.cpu().equal(wanted[1]) and codes.dtype == wanted[0].dtype
    values = wanted[0].float() * (scaled.spread(wanted[1], rows, width))
    assert values.to(x.dtype).equal(round_input(x, grid, scale))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("grid", [TOKEN_INT8, TOKEN_FP8, GROUP_FP8, TENSOR_FP8, None], ids=lambda g: f"{g.type} {g.strategy}" if g else "none")
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (3, 200), (2, 2100)])
def test_gated_rows_are_those_of_the_modules(grid, rows, width, activation):
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.quantize_rows import gated_rows

    x = 2 * torch.randn(rows, 2 * width).to(HALF)
    x[-1, 20:40] = 0
    x[0] *= rows == 1  # a row of zeros
    scale = torch.tensor([0.01]) if grid and grid.strategy == "tensor" else None
    product = ACTIVATIONS[activation](x[:, :width]) * x[:, width:]
    wanted = (product, None) if grid is None else QUANTIZE_ROWS.reference(product, grid, scale)
    plain = GATED_ROWS.reference(x, activation, grid, scale)
    assert plain[0].float().equal(wanted[0].float()) and (plain[1] is wanted[1] is None or plain[1].equal(wanted[1]))
    codes, scales = gated_rows(x.to(DEVICE), activation, grid, None if scale is None else scale.to(DEVICE))
    assert codes.dtype == wanted[0].dtype and codes.shape == (rows, width)
    if grid is None:
        torch.testing.assert_close(codes.cpu(), product, rtol=2e-3 if DEVICE == "cpu" else 1e-2, atol=1e-5)
        return
    torch.testing.assert_close(scales.cpu(), wanted[1], rtol=1e-2, atol=0)
    # a product that the exponential puts one step of its dtype aside may become the next code
    differ = codes.cpu().float() != wanted[0].float()
    steps = (codes.cpu().float() - wanted[0].float()).abs() / (1 if grid.type == "int" else wanted[0].float().abs().clamp(min=2**-6) / 8)
    assert float(differ.float().mean()) < 0.02 and float(steps.max()) <= 1.0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("grid", [TOKEN_INT8, TOKEN_FP8, GROUP_FP8, TENSOR_FP8, None], ids=lambda g: f"{g.type} {g.strategy}" if g else "none")
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (3, 200), (2, 2100), (1, 8192)])  # the last is more groups than a tile of codes holds
def test_normed_rows_are_the_norm_and_its_codes(grid, rows, width, norm):
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.quantize_rows import normed_rows

    x, weight = torch.randn(rows, width).to(HALF), torch.randn(width).to(HALF)
    x[-1] *= 1e-3  # eps counts
    x[:, width // 2 :] *= 8
    x[0] *= rows == 1  # a row of zeros
    scale = torch.tensor([0.01]) if grid and grid.strategy == "tensor" else None
    module = LlamaRMSNorm(width, 1e-5) if norm == "weight" else Gemma3RMSNorm(width, 1e-5)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    wanted = module(x)
    plain = NORMED_ROWS.reference(x, weight, 1e-5, norm, grid, scale)
    assert plain[0].equal(wanted)
    moved = None if scale is None else scale.to(DEVICE)
    y, codes, scales = normed_rows(x.to(DEVICE), weight.to(DEVICE), 1e-5, norm, grid, moved)
    torch.testing.assert_close(y.cpu(), wanted, rtol=2e-3 if DEVICE == "cpu" else 1e-2, atol=1e-5)
    assert float((y.cpu() != wanted).float().mean()) < 0.01  # squares are summed in another order
    apart = (y.cpu(), None) if grid is None else QUANTIZE_ROWS.reference(y.cpu(), grid, scale)
    for found, both in ((codes, apart[0]), (scales, apart[1])):
        assert found is both is None or (found.dtype == both.dtype and found.shape == both.shape and found.cpu().float().equal(both.float()))
    assert plain[1].shape == codes.shape and NORMED_ROWS.choose(x, weight, 1e-5, norm, grid, scale).name == "torch"


# rows, group, groups (chunks of 64 inputs: 6, 2 with half of one filled up, 3, 4, 1, 5), whether there are zero points, whether inputs are FP8
INT4 = [(1, 128, 3, False, False), (17, 32, 3, True, False), (3, 64, 3, True, True), (9, 256, 1, True, False), (8, 32, 1, True, True), (1, 32, 10, True, False)]


@pytest.mark.parametrize(("rows", "group", "groups", "zeros", "quantizes"), INT4)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_int4_triton_is_the_reference(rows, group, groups, zeros, quantizes, half):
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.int4_matmul import matmul, widen

    inputs = groups * group
    weight = pack4(int4(48, inputs, group, not zeros, half))
    x, bias = torch.randn(rows, inputs).to(half), torch.randn(48).to(half)
    scale = torch.rand(rows, 1) if quantizes else None
    if quantizes:
        x = x.to(torch.float8_e4m3fn)
    kernel = W4A8_MATMUL if quantizes else W4A16_MATMUL
    wanted = kernel.reference(x, weight, bias, scale, dtype=half)
    moved = type(weight)(*(t if t is None else t.to(DEVICE) for t in weight))
    filled = torch.nn.functional.pad(x.float(), (0, -inputs % 64)).to(x.dtype)
    given = (filled.to(DEVICE), moved, bias.to(DEVICE), None if scale is None else scale.to(DEVICE), half)
    step = 4e-3 if DEVICE == "cuda" else 1e-2  # Triton's interpreter cuts numbers off when it makes them BF16
    for warps in (1, 2):
        close(matmul(*given, warps=warps, ptx=False), wanted, step)
        if DEVICE == "cuda":
            close(matmul(*given, warps=warps), wanted, step)
    if rows == 1:
        close(widen(moved, half), unpack4(weight, half), step)
    assert kernel.choose(x, weight, bias, scale, dtype=half).name == "torch"
    close(kernel(x, weight, bias, scale, dtype=half), wanted, 4e-3)


def test_int4_takes_a_row_out_of_an_odd_one():
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.int4_matmul import matmul

    weight, x = pack4(int4(16, 128, 64, True, torch.float16)), torch.randn(1, 199).half()
    moved = type(weight)(*(t if t is None else t.to(DEVICE) for t in weight))
    for start in (1, 2):
        row = x.to(DEVICE)[:, start : start + 128]
        close(matmul(row, moved, None, None, torch.float16, ptx=False), W4A16_MATMUL.reference(x[:, start : start + 128], weight, dtype=torch.float16), 4e-3)


def test_int4_does_not_try_ptx_where_cuda_means_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    assert int4_mma.__wrapped__()[0] is False


def test_int4_words_are_the_weight():
    quantized = int4(32, 224, 32, False, torch.bfloat16)
    assert unpack4(pack4(quantized), torch.float32)[:, :224].equal(quantized.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_of_torch_on_cpus(symmetric):
    quantized = int4(48, 128, 32, symmetric, torch.bfloat16)
    x = torch.randn(5, 128).bfloat16()
    weight = pack4_cpu(quantized)
    assert isinstance(weight, Packed4CPU) and W4A16_MATMUL.choose(x, weight).name == "int4pack"
    close(W4A16_MATMUL(x, weight), (x.float() @ quantized.dequantize().T).bfloat16(), 1e-2)


def int4(outputs, inputs, group, symmetric, dtype):
    grid = Grid(4, "int", "group", group, symmetric=symmetric)
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    codes[:, :group] = 0
    scale = torch.rand(outputs, inputs // group).to(dtype)
    scale[3] = 0
    zero = None if symmetric else torch.randint(-8, 8, scale.shape, dtype=torch.int8)
    return Quantized(Scheme("", grid), codes, scale, zero)


SCALES = {
    "rows": lambda n, o, i: (torch.rand(n, 1), torch.rand(o, 1)),
    "tensors": lambda n, o, i: (torch.rand(1), torch.rand(1)),
    "blocks": lambda n, o, i: (torch.rand(-(-i // 128), n).T, torch.rand(-(-o // 128), -(-i // 512) * 4)),
}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 37, 48), (17, 130, 272)])
def test_eight_bits_are_the_reference(rows, outputs, inputs, dtype, scales):
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.scaled_matmul import Tile, scaled_matmul

    if dtype == torch.int8 and scales == "blocks":
        pytest.skip("no INT8 scheme has blocks")
    x, w = (torch.randint(-127, 128, shape).float().to(dtype) for shape in ((rows, inputs), (outputs, inputs)))
    x_scale, w_scale = SCALES[scales](rows, outputs, inputs)
    bias = torch.randn(outputs).bfloat16()
    kernel = scaled.INT8_MATMUL if dtype == torch.int8 else scaled.FP8_MATMUL
    wanted = kernel.reference(x, x_scale, w, w_scale, bias)
    close(scaled.pieces(x, x_scale, w, w_scale, bias), wanted, 1e-2)
    moved = [t.to(DEVICE) for t in (x, x_scale, w, w_scale, bias)]
    for tile in (Tile(32, 64, 128, 4, 2), Tile(16, 64, 128, 4, 2, weight_first=True)):
        close(scaled_matmul(*moved, torch.bfloat16, tile), wanted, 1e-2)
    close(kernel(*moved, dtype=torch.bfloat16), wanted, 1e-2)


@pytest.mark.parametrize(("scales", "rows", "runs"), [("rows", 1, "triton"), ("rows", 8, "triton"), ("rows", 9, "torch"), ("tensors", 1, "torch")])
@pytest.mark.parametrize("has_triton", [True, False])
def test_few_rows_of_row_wise_fp8_are_tritons(monkeypatch, scales, rows, runs, has_triton):
    monkeypatch.setattr(scaled, "ROW_WISE_FROM", 9)
    monkeypatch.setattr(scaled, "triton_runs", lambda: (has_triton, ""))
    monkeypatch.setattr(scaled, "_triton", lambda *given: "triton")
    monkeypatch.setattr(torch, "_scaled_mm", lambda *given, **options: "torch")
    x, w = (torch.zeros(n, 128, dtype=torch.float8_e4m3fn) for n in (rows, 256))
    x_scale, w_scale = SCALES[scales](rows, 256, 128)
    assert scaled._scaled_mm(x, x_scale, w, w_scale) == (runs if has_triton else "torch")


def test_a_weight_is_widened_in_pieces(monkeypatch):
    monkeypatch.setattr(scaled, "PIECE", 128)
    x, w = torch.randn(3, 256).to(torch.float8_e4m3fn), torch.randn(300, 256).to(torch.float8_e4m3fn)
    for name in SCALES:
        given = (x, SCALES[name](3, 300, 256)[0], w, SCALES[name](3, 300, 256)[1], torch.randn(300))
        close(scaled.pieces(*given), scaled.reference(*given), 1e-2)


@pytest.mark.parametrize("rows", [5, 70])
def test_int8_of_torch_on_cpus(rows):
    x, w = (torch.randint(-127, 128, s, dtype=torch.int8) for s in ((rows, 64), (24, 64)))
    given = (x, torch.rand(rows, 1), w, torch.rand(24, 1), torch.randn(24).bfloat16())
    assert scaled.INT8_MATMUL.choose(*given).name == "int8pack"
    close(scaled.INT8_MATMUL(*given), scaled.reference(*given), 1e-2)


def test_int_mm_is_the_reference():
    x, w = (torch.randint(-127, 128, s, dtype=torch.int8) for s in ((5, 64), (24, 64)))
    given = (x, torch.rand(5, 1), w, torch.rand(24, 1), torch.randn(24))
    close(scaled._int_mm(*given), scaled.reference(*given), 1e-2)


# linears --------------------------------------------------------------------------------------------------------------


def linear(scheme=None, bias=None, dtype=torch.float32):
    grid = Grid(8, "int", "channel", scale_dtype="BF16")
    quantized = Quantized(scheme or Scheme("", grid, TOKEN_INT8), torch.randint(-128, 128, (24, 32), dtype=torch.int8), torch.rand(24, 1))
    return INT8Linear(quantized, bias, dtype), quantized


def test_a_linear_runs_its_codes_and_nothing_else():
    bias = torch.nn.Parameter(torch.randn(24))
    packed, quantized = linear(bias=bias)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        wanted = torch.nn.functional.linear(round_input(x, TOKEN_INT8), quantized.dequantize(), bias)
        torch.testing.assert_close(packed(x), wanted, rtol=1e-5, atol=1e-4)
        assert packed(x[:0]).shape == (0, 3, 24)
    assert packed.packed_bytes() == 24 * 32 + 24 * 4 + 24 * 4 and "INT8 on" in repr(packed)


@pytest.mark.parametrize("kind", ["int8", "int4", "int4 and fp8"])
def test_inputs_lie_in_memory_as_they_like(kind):
    grid, inputs = (Grid(8, "int", "channel"), TOKEN_INT8) if kind == "int8" else (Grid(4, "int", "group", 32), TOKEN_FP8 if "fp8" in kind else None)
    codes, groups = torch.randint(-8, 8, (32, 64), dtype=torch.int8), 2 if grid.strategy == "group" else 1
    packed = (INT8Linear if kind == "int8" else INT4Linear)(Quantized(Scheme("", grid, inputs), codes, torch.rand(32, groups)), None, torch.bfloat16)
    with torch.no_grad():
        for x in (torch.randn(5, 99).bfloat16()[:, 1:65], torch.randn(64, 5).bfloat16().T, torch.randn(1, 64, 5).bfloat16().transpose(1, 2)):
            assert packed(x).equal(packed(x.clone(memory_format=torch.contiguous_format)))


def test_gradients_casts_and_saving_are_refused():
    packed, _ = linear()
    with pytest.raises(EngineError, match="no gradients"):
        packed(torch.randn(3, 32, requires_grad=True))
    with pytest.raises(EngineError, match="keep their dtype"):
        packed.half()
    with pytest.raises(EngineError, match="cannot be saved"):
        packed.state_dict()
    assert packed.to("cpu") is packed


def test_an_input_is_quantized_once_while_its_layer_runs():
    class Layer(torch.nn.Module):
        def forward(self, x, change=False):
            found = [self.ask(x)]
            if change:
                x += 1
            return [*found, self.ask(x), self.ask(x.clone()), self.ask(x, "other")]

    layer, made = Layer(), []
    shared = SharedInput(layer)
    layer.ask = lambda x, kind="kind": shared(x, kind, lambda x: made.append(float(x.sum())) or len(made))
    x = torch.ones(2)
    assert layer(x) == [1, 1, 2, 3] and layer(x) == [4, 4, 5, 6]  # nothing is left from one forward to the next
    assert layer(x, change=True) == [7, 8, 9, 10] and made[-1] == 4
    assert layer.ask(x) != layer.ask(x)
    with torch.inference_mode():
        assert len({*layer(torch.ones(2))}) == 4
    with contextlib.suppress(AttributeError):
        layer(None)
    assert shared._last is None and not shared._running


# models ---------------------------------------------------------------------------------------------------------------

CASES = {
    "fp8_dynamic": ("quant.fp8_dynamic", [], FP8Linear),
    "fp8_block": ("quant.fp8_block", [], FP8Linear),
    "fp8_static": ("quant.fp8_static", [], FP8Linear),
    "int8_dynamic": ("quant.int8_dynamic", [], INT8Linear),
    "int4_rtn": ("quant.int4_rtn", ["steps[0].with.group_size=32"], INT4Linear),
    "int4_rtn asym": ("quant.int4_rtn", ["steps[0].with.group_size=32", "steps[0].with.symmetric=false"], INT4Linear),
    "int4_rtn gptq": ("quant.int4_rtn", ["steps[0].with.group_size=32", "export.format=gptq"], INT4Linear),
    "w4a8_fp8": ("quant.w4a8_fp8", ["steps[0].with.group_size=32", "steps[0].with.method=rtn"], INT4Linear),
}


def compressed(model, case, folder):
    pass_id, options, _ = CASES[case]
    if case == "fp8_static":
        text = folder.parent / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
        options = [f"calibration.data={text}", "calibration.samples=4", "calibration.tokens=16"]
    compress(model, [pass_id], folder, overrides=options)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_a_model_computes_what_the_dequantized_one_does(tiny, tmp_path, architecture, case):
    out = compressed(tiny(architecture, dtype="float32"), case, tmp_path / "out")
    packed, plain = load_model(out, "cpu", packed=True), load_model(out, "cpu", own_reader=True)
    linears = [m for m in packed.model.modules() if isinstance(m, PackedLinear)]
    assert {type(m) for m in linears} == {CASES[case][2]}
    assert packed.backend == f"transformers, {len(linears)} linears packed ({linears[0].name}) by AngelSlim" and plain.backend == OWN_READER
    assert type(packed.model) is type(plain.model)
    wanted = plain.model(IDS).logits
    torch.testing.assert_close(packed.model(IDS).logits, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    with torch.no_grad():
        assert packed.model.generate(IDS, max_new_tokens=4, do_sample=False).equal(plain.model.generate(IDS, max_new_tokens=4, do_sample=False))


INPUT, MLP, LATENT = "input_layernorm", "post_attention_layernorm", {"self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"}
# routers and what is left alone read the other norms too
NORMED = {
    "llama": [{INPUT, MLP}] * 2,
    "gemma3_text": [{INPUT, "pre_feedforward_layernorm"}] * 2,
    "qwen3_moe": [{INPUT}] * 2,
    "deepseek_v3": [{INPUT, MLP, *LATENT}, {INPUT, *LATENT}],
    "qwen3_5_text": [{MLP}] * 3 + [{INPUT, MLP}],
}


@pytest.mark.parametrize(("architecture", "case"), [*((a, "fp8_dynamic") for a in NORMED), ("llama", "int4_rtn")])
def test_norms_stand_for_what_reads_them(tiny, tmp_path, monkeypatch, architecture, case):
    loaded = load_model(compressed(tiny(architecture), case, tmp_path / "out"), "cpu", packed=True).model
    _, layers = decoder_layers(loaded, len(NORMED[architecture]))
    assert [{n for n, m in layer.named_modules() if isinstance(vars(m).get("forward"), Normed)} for layer in layers] == NORMED[architecture]
    made = []
    for module in loaded.modules():
        if isinstance(module, PackedLinear):
            monkeypatch.setattr(module, "prepare", lambda x, own=module.prepare: made.append(x) or own(x))
            if module.joined is not None and "prepare" not in vars(module.joined):
                monkeypatch.setattr(module.joined, "prepare", lambda x, own=module.joined.prepare: made.append(x) or own(x))
    with torch.no_grad():
        found, fused = loaded(IDS).logits, len(made)
        for layer in layers:
            for norm in layer.modules():
                if isinstance(vars(norm).get("forward"), Normed):
                    del norm.forward
        made.clear()
        assert loaded(IDS).logits.equal(found)
    if case != "int4_rtn":
        # what a model views before it is read is another tensor
        assert len(made) - fused == sum(len(names - {"self_attn.kv_a_layernorm"}) for names in NORMED[architecture])


@pytest.mark.parametrize("case", ["fp8_dynamic", "int8_dynamic", "int4_rtn asym", "w4a8_fp8"])
def test_a_bf16_model_evaluates_alike(tiny, tmp_path, monkeypatch, case):
    out = compressed(tiny(), case, tmp_path / "out")
    text = tmp_path / "eval.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    found, choose = [], loading.choose_packed
    for packed in (True, False):
        monkeypatch.setattr(loading, "choose_packed", lambda *given, packed=packed: choose(*given[:-1], packed))
        found.append(evaluate(out, tiny(), text=text, windows=2, length=32, device="cpu"))
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=0.01) and found[0]["kl"] == pytest.approx(found[1]["kl"], rel=0.2, abs=2e-4)
    assert "packed" in found[0]["backend"] and "packed" not in found[1]["backend"]


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_no_weight_is_expanded(tiny, tmp_path, monkeypatch, architecture):
    monkeypatch.setattr("angelslim_quant.packed._ROWS", 7)  # else the example of an input has the shape of a weight
    out = compressed(tiny(architecture), "int4_rtn", tmp_path / "out")
    floats = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.is_floating_point() and not found.is_meta:
                floats.add(tuple(found.shape))
            return found

    with Watch():
        model = load_model(out, "cpu", packed=True).model
    packed = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, PackedLinear)}
    assert packed and not packed & floats and tuple(model.lm_head.weight.shape) not in packed
    held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert held < 1.02 * sum(f.stat().st_size for f in out.glob("*.safetensors"))


def test_experts_that_are_not_all_packed_fall_back_and_are_counted(tiny, tmp_path, monkeypatch):
    out = compressed(tiny("qwen3_moe", dtype="float32"), "int8_dynamic", tmp_path / "out")
    real = INT8Linear.supports.__func__
    calls = []

    def refuses_one(cls, scheme, shape, dtype, device):
        calls.append(shape)
        return (False, "") if len(calls) == 9 else real(cls, scheme, shape, dtype, device)

    monkeypatch.setattr(INT8Linear, "supports", classmethod(refuses_one))
    loaded = load_model(out, "cpu", packed=True)
    packed = sum(isinstance(m, PackedLinear) for m in loaded.model.modules())
    assert 0 < packed < len(calls) and loaded.backend.endswith(f"{len(calls) - packed} dequantized")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, load_model(out, "cpu", own_reader=True).model(IDS).logits, rtol=1e-3, atol=1e-3)


def test_what_no_executor_knows_is_dequantized(tiny, tmp_path):
    compress(tiny(dtype="float32"), ["quant.mxfp4"], tmp_path / "out")
    assert load_model(tmp_path / "out", "cpu", packed=True).backend == OWN_READER
    other = compressed(tiny(dtype="float32"), "int8_dynamic", tmp_path / "int8")
    assert "packed" not in load_model(other, "cpu", packed=True, host=PluginHost(blocked=["quant"])).backend
    assert "packed" not in load_model(other, "cpu", packed=False).backend and "packed" not in load_model(other, "cpu", packed=True, emulate=False).backend


def test_on_cpus_only_what_is_faster_is_packed(monkeypatch):
    slow = frozenset({torch.bfloat16})
    monkeypatch.setattr("angelslim_quant.packed.slow_on_cpu", lambda: slow)
    scheme = Scheme("", Grid(8, "int", "channel"), TOKEN_INT8)
    assert INT8Linear.pays(scheme, torch.bfloat16, "cpu") and not INT8Linear.pays(scheme, torch.float32, "cpu")
    assert not FP8Linear.pays(scheme, torch.bfloat16, "cpu") and FP8Linear.pays(scheme, torch.bfloat16, "cuda")
    monkeypatch.setattr("angelslim_quant.packed.slow_on_cpu", lambda: frozenset())
    assert not INT4Linear.pays(scheme, torch.bfloat16, "cpu")
