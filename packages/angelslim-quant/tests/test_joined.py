"""Packed linears of a layer that read one input, joined, and gated MLPs of them, beside the same ones apart."""

import copy

import pytest
import torch

from angelslim_core import compress
from angelslim_core.gated import Gated
from angelslim_core.loading import load_model
from angelslim_core.packed import PackedLinear, join
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_quant.numerics import fp8, integer
from angelslim_quant.packed import FP8Linear, INT4Linear, INT8Linear

IDS = torch.arange(2, 34)[None]
TOKEN_INT8, TOKEN_FP8 = Grid(8, "int", "token", dynamic=True), Grid(8, "float", "token", dynamic=True)
G32 = "steps[0].with.group_size=32"
# weights, inputs, class, dtype, rows that fit, rows that do not
KINDS = {
    "int8": (Grid(8, "int", "channel"), TOKEN_INT8, INT8Linear, torch.bfloat16, (33, 16, 7), None),
    "fp8 rows": (Grid(8, "float", "channel"), TOKEN_FP8, FP8Linear, torch.bfloat16, (33, 16, 7), None),
    "fp8 tensors and tokens": (Grid(8, "float", "tensor"), TOKEN_FP8, FP8Linear, torch.bfloat16, (33, 16, 7), None),
    "fp8 blocks": (
        Grid(8, "float", "block", block_structure=(128, 128)), Grid(8, "float", "group", 128, dynamic=True), FP8Linear, torch.bfloat16, (256, 128, 70), (70, 128),
    ),
    "int4": (Grid(4, "int", "group", 32, scale_dtype="BF16"), None, INT4Linear, torch.float32, (48, 32, 16), None),
    "int4 zeros": (Grid(4, "int", "group", 32, symmetric=False, scale_dtype="BF16"), None, INT4Linear, torch.float32, (48, 32, 16), None),
    "int4 and fp8": (Grid(4, "int", "group", 32, scale_dtype="BF16"), TOKEN_FP8, INT4Linear, torch.float16, (48, 32, 16), None),
    "int4 on cpus": (Grid(4, "int", "group", 32, scale_dtype="BF16"), None, INT4Linear, torch.bfloat16, (128, 64, 48), (32, 64)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def quantized(rows, weights, inputs, columns=256):
    weight = torch.randn(rows, columns).bfloat16()
    if weights.type == "float":
        return Quantized(Scheme("", weights, inputs), *fp8.quantize(weight, weights))
    return Quantized(Scheme("", weights, inputs), *integer.quantize(weight, weights))


@pytest.mark.parametrize("kind", KINDS)
def test_joined_rows_are_those_of_the_parts(kind):
    weights, inputs, packed, dtype, fit, ragged = KINDS[kind]
    given = [(quantized(n, weights, inputs), torch.nn.Parameter(torch.randn(n).to(dtype))) for n in fit]
    parts, plain = ([packed(q, b, dtype) for q, b in given] for _ in range(2))
    joined = join(parts)
    assert joined is not None and joined.out_features == sum(fit) and joined.name == plain[0].name
    assert sum(m.packed_bytes() for m in parts) == sum(m.packed_bytes() for m in plain) == joined.packed_bytes()
    with torch.no_grad():
        for rows in (1, 5, 70):
            x = torch.randn(rows, 256).to(dtype)
            wanted = [m(x) for m in plain]
            for m, y, cut in zip(parts, wanted, joined(x).split(fit, -1), strict=True):
                assert m(x).equal(y)
                torch.testing.assert_close(cut, y, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)
    if ragged:
        assert join([packed(quantized(n, weights, inputs), None, dtype) for n in ragged]) is None


def test_a_scale_of_the_input_that_differs_or_weights_of_one_scale_are_not_joined():
    grid = Grid(8, "float", "tensor")

    def made(scale, weight_scale):
        codes = torch.randn(16, 64).to(torch.float8_e4m3fn)
        return FP8Linear(Quantized(Scheme("", grid, grid), codes, torch.tensor([weight_scale]), input_scale=torch.tensor([scale])), None, torch.bfloat16)

    assert join([made(0.5, 1.0), made(0.25, 1.0)]) is None and join([made(0.5, 1.0), made(0.5, 2.0)]) is None
    assert join([made(0.5, 1.0), made(0.5, 1.0)]) is not None
    assert join([made(0.5, 1.0), linear(16)]) is None


def linear(rows):
    return INT8Linear(quantized(rows, Grid(8, "int", "channel"), TOKEN_INT8, 64), None, torch.bfloat16)


def apart(folder, monkeypatch):
    """The model as it would be without joining."""
    with monkeypatch.context() as patched:
        patched.setattr("angelslim_core.packed.join", lambda linears: None)
        return load_model(folder, "cpu", packed=True)


def together(model):
    return [m for m in model.modules() if isinstance(m, PackedLinear) and m.joined is not None]


CASES = {
    "llama int8": ("llama", {}, "quant.int8_dynamic", []),
    "llama fp8": ("llama", {}, "quant.fp8_dynamic", []),
    "llama int4": ("llama", {}, "quant.int4_rtn", [G32]),
    "bf16 int4": ("llama", {"dtype": "bfloat16", "intermediate_size": 192}, "quant.int4_rtn", [G32]),
    "qwen2": ("qwen2", {}, "quant.int8_dynamic", []),
    "gemma3": ("gemma3_text", {}, "quant.int8_dynamic", []),
    "qwen3_moe": ("qwen3_moe", {}, "quant.int8_dynamic", []),
    "shared experts": ("hunyuan_v1_moe", {}, "quant.fp8_dynamic", []),
    "latent attention": ("deepseek_v3", {}, "quant.int8_dynamic", []),
    "linear attention": ("qwen3_next", {}, "quant.int8_dynamic", []),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_computes_the_same_joined_and_apart(tiny, tmp_path, monkeypatch, case):
    architecture, options, pass_id, overrides = CASES[case]
    compress(tiny(architecture, **{"dtype": "float32", **options}), [pass_id], tmp_path / "out", overrides=overrides)
    joined, plain = load_model(tmp_path / "out", "cpu", packed=True), apart(tmp_path / "out", monkeypatch)
    found = together(joined.model)
    assert found and not together(plain.model) and joined.backend == plain.backend
    held = [sum(b.nbytes for b in (*m.model.buffers(), *m.model.parameters())) for m in (joined, plain)]
    assert held[0] == held[1] and [n for n, _ in joined.model.named_modules()] == [n for n, _ in plain.model.named_modules()]
    products, gated = [], [m for m in joined.model.modules() if isinstance(vars(m).get("forward"), Gated)]
    assert len(gated) == sum("down" in n for n, m in joined.model.named_modules() if isinstance(m, PackedLinear))
    others = {m.joined for m in found} - {m.gate_proj.joined for m in gated}
    for whole in others:
        monkeypatch.setattr(whole, "multiply", lambda prepared, multiply=whole.multiply: products.append(1) or multiply(prepared))
    with torch.no_grad():
        wanted = plain.model(IDS).logits
        torch.testing.assert_close(joined.model(IDS).logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert bool(products) == bool(others)
        greedy = [m.model.generate(IDS, max_new_tokens=6, do_sample=False) for m in (joined, plain)]
    assert greedy[0].equal(greedy[1])
    products.clear()
    with torch.inference_mode():
        torch.testing.assert_close(joined.model(IDS).logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert not products


@pytest.mark.parametrize("case", ["qwen2", "llama int4"])
def test_compiled_moved_and_copied(tiny, tmp_path, case):
    architecture, options, pass_id, overrides = CASES[case]
    compress(tiny(architecture, **{"dtype": "float32", **options}), [pass_id], tmp_path / "out", overrides=overrides)
    model = load_model(tmp_path / "out", "cpu", packed=True).model
    with torch.no_grad():
        wanted = model(IDS).logits
        attention = model.model.layers[0].self_attn
        x = torch.randn(1, 3, attention.q_proj.in_features)
        torch.testing.assert_close(attention.v_proj(x), attention.q_proj.joined(x)[..., -attention.v_proj.out_features :])
        copied = copy.deepcopy(model)
        assert copied(IDS).logits.equal(wanted) and model.to("cpu")(IDS).logits.equal(wanted)
        assert copied.model.layers[0].self_attn.q_proj.joined.members[1] is copied.model.layers[0].self_attn.k_proj
        torch.testing.assert_close(torch.compile(model, backend="eager")(IDS).logits, wanted)
        assert copied.to("meta").model.layers[1].mlp.gate_proj.joined.members[0].bias is copied.model.layers[1].mlp.gate_proj.bias
    assert all(t.is_meta for m in together(copied) for t in (*m.buffers(), *m.joined.buffers()))
