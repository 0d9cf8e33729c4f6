"""Weights of at most four levels: their layouts, the kernels that read them, and the linears that run on them."""

from dataclasses import replace

import pytest
import torch

from angelslim_core.adapters import llama
from angelslim_core.adapters.base import describe
from angelslim_core.errors import ModelError
from angelslim_core.loading import load_model
from angelslim_core.packed import join
from angelslim_core.packed_model import Linears, fill
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_quant.kernels.available import lowbit_mma
from angelslim_quant.kernels.int4_matmul import Packed4CPU
from angelslim_quant.kernels.lowbit_matmul import LOWBIT_MATMUL, PackedLow, pack_low, place, unpack_codes, unpack_low
from angelslim_quant.packed import INT4Linear
from angelslim_quant.packed_lowbit import LowBitLinear
from angelslim_quant.plugin import angelslim_register_linears

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the sums as definition are for Triton's interpreter: compiling them takes minutes
PTX = DEVICE == "cuda"
SEQ2, TERNARY, INT2 = (-3, -1, 1, 3), (-1, 0, 1), (-2, -1, 0, 1)
# levels, whether just three of four weights are not zero
KINDS = {"seq2": (SEQ2, False), "ternary": (TERNARY, False), "int2": (INT2, False), "sherry": (TERNARY, True)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def grid(kind, group):
    levels, sparse = KINDS[kind]
    return Grid(4, "int", "group" if group else "channel", group or None, levels=levels, sparsity=(3, 4) if sparse else None)


def made(kind, outputs, inputs, group, dtype=torch.float32):
    levels, sparse = KINDS[kind]
    codes = torch.tensor(levels, dtype=torch.int8)[torch.randint(len(levels), (outputs, inputs))]
    if sparse:
        codes = (torch.randint(2, (outputs, inputs // 4, 4)) * 2 - 1).scatter(2, torch.randint(4, (outputs, inputs // 4, 1)), 0).flatten(1).to(torch.int8)
    scale = torch.rand(outputs, inputs // group if group else 1).to(dtype)
    scale[3] = 0
    return Quantized(Scheme(kind, grid(kind, group)), codes, scale)


def close(found, wanted, tolerance):
    error = (found.cpu().double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert found.dtype == wanted.dtype and found.shape == wanted.shape and float(error) < tolerance, float(error)


def moved(weight):
    return weight._replace(words=weight.words.to(DEVICE), scale=weight.scale.to(DEVICE))


# layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(32, 128, 128), (64, 576, 64), (32, 160, 32), (96, 512, 256), (64, 288, 0)])
def test_words_are_the_weight(kind, outputs, inputs, group):
    quantized = made(kind, outputs, inputs, group)
    weight = pack_low(quantized)
    assert unpack_low(weight, torch.float32).equal(quantized.dequantize())
    assert (weight.outputs, weight.inputs) == (outputs, inputs) and weight.sparse == (kind == "sherry" and group != 32)
    assert weight.words.nbytes * 8 == (1.25 if weight.sparse else 2) * outputs * 128 * weight.chunks
    rows = slice(1, 2)
    assert unpack_low(weight, torch.float32, rows).equal(quantized.dequantize()[32:64])


def test_places_of_codes_share_no_bit():
    places = [place(r, i) for r in range(2) for i in range(8)]
    assert sorted(places) == list(range(1, 32, 2))
    # turned right by 0, 4, 8 and 12, halves of registers lie in bits 3 to 6 of both halves, inputs beside each other in one register
    for r in range(2):
        for i in range(8):
            assert (place(r, i) - 4 * (2 * (i // 4) + r)) % 32 == (5, 3)[i // 2 % 2] + 16 * (i % 2)


def test_every_four_of_five_bits_comes_back():
    fours = torch.tensor([[*s[:z], 0, *s[z:]] for z in range(4) for s in [[1 - 2 * (n >> k & 1) for k in range(3)] for n in range(8)]], dtype=torch.int8)
    quantized = replace(made("sherry", 32, 128, 128), codes=fours.flatten().repeat(32, 1))
    assert unpack_codes(pack_low(quantized)).equal((quantized.codes + 1).to(torch.uint8))


@pytest.mark.parametrize(
    ("kind", "code", "number"), [("seq2", 0, 970), ("seq2", 5, 970), ("seq2", -128, 970), ("ternary", 2, 970), ("sherry", 127, 970), ("sherry", None, 971)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_that_no_level_has_are_refused(kind, code, number, dtype):
    quantized = made(kind, 32, 128, 128)
    quantized.codes[7, 64:68] = torch.tensor([1, 0, 0, 1]) if code is None else code
    with pytest.raises(ModelError) as error:
        LowBitLinear(quantized, None, dtype)
    assert error.value.number == number


# kernels --------------------------------------------------------------------------------------------------------------

FP16, BF16 = torch.float16, torch.bfloat16
CASES = [
    ("seq2", 1, 64, 768, 128, FP16), ("sherry", 1, 32, 1152, 128, BF16), ("ternary", 3, 32, 576, 64, BF16), ("sherry", 3, 32, 576, 64, FP16), ("int2", 16, 64, 160, 32, FP16),
    ("sherry", 16, 64, 160, 0, FP16), ("seq2", 2, 32, 288, 0, BF16), ("sherry", 33, 32, 256, 256, FP16), ("seq2", 100, 32, 128, 128, BF16),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "outputs", "inputs", "group", "half"), CASES)
def test_triton_is_the_reference(kind, rows, outputs, inputs, group, half):
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.lowbit_gemv import gemv, widen
    from angelslim_quant.kernels.triton.lowbit_matmul import SHAPES, Shape, matmul

    quantized = made(kind, outputs, inputs, group, half)
    weight = pack_low(quantized)
    x, bias = torch.randn(rows, inputs).to(half), torch.randn(outputs).to(half)
    wanted = LOWBIT_MATMUL.reference(x, weight, bias, dtype=half)
    close(wanted, (x.double() @ quantized.dequantize().double().T + bias).to(half), 1e-6)
    given = (x.to(DEVICE), moved(weight), bias.to(DEVICE), half)
    step = 4e-3 if DEVICE == "cuda" else 1e-2  # Triton's interpreter cuts numbers off when it makes them BF16
    divided = [Shape(2), Shape(2, wide=outputs // 32, ahead=False, deep=3), Shape(1)]
    for shape in divided if rows < 3 else divided[-1:] if rows < 10 else divided[:1]:
        close(matmul(*given, shape, ptx=PTX), wanted, step)
    if DEVICE == "cuda":
        for shape in SHAPES:
            close(matmul(*given, shape), wanted, step)
    if rows < 10:
        close(gemv(*given, warps=2), wanted, step)
        close(widen(moved(weight), half), unpack_low(weight, half), step)
    assert LOWBIT_MATMUL.choose(x, weight, bias, dtype=half).name == "torch"
    close(LOWBIT_MATMUL(x, weight, bias, dtype=half), wanted, 4e-3)


@pytest.mark.parametrize(("rows", "inputs", "shape"), [(1, 576, (2,)), (2, 384, (1, 1, 128, False, 3)), (9, 288, (2, 1, 128, True, 1))])
def test_steps_in_a_loop_are_those_written_out(rows, inputs, shape):
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.lowbit_matmul import Shape, matmul

    weight, x = moved(pack_low(made("seq2", 32, inputs, 32, FP16))), torch.randn(rows, inputs, device=DEVICE).half()
    loop, written = (matmul(x, weight, None, FP16, Shape(*shape)._replace(written=n), ptx=PTX) for n in (0, 8))
    assert loop.equal(written)


def test_many_outputs_get_smaller_programs():
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.lowbit_matmul import FEW_16, LONG, MANY, MANY_1, MANY_16, SHORT, shape

    asked = ((1, 128, 112), (8, 128, 32), (1, 448, 32), (8, 448, 32), (8, 128, 5), (9, 128, 32), (16, 448, 32))
    assert [shape(*s) for s in asked] == [LONG, SHORT, MANY_1, MANY, MANY, FEW_16, MANY_16]


def run_ptx(text, operands, half):
    """What the threads of a warp hold after a text of the few instructions there are; an operand is [32], by thread."""
    values = {f"${i}": v for i, v in enumerate(operands)}
    number = {"bf16": torch.bfloat16, "f16": torch.float16}[half]

    def pairs(names):  # [32, 2 k] fp32
        return torch.cat([values[n].int()[:, None].contiguous().view(number).float() for n in names], 1)

    for line in text.strip("{}\n ").splitlines():
        name, _, rest = line.rstrip(";").partition(" ")
        args = [a.strip(" {}") for a in rest.split(",")]
        if name == "mov.f32":
            values[args[0]] = torch.zeros(32)
        elif name == "shf.r.wrap.b32":
            assert args[1] == args[2]
            bits, by = values[args[1]].long() & 0xFFFFFFFF, int(args[3])
            values[args[0]] = ((bits >> by | bits << (32 - by)) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        elif name == "lop3.b32":
            assert args[4] == "0xEA"
            values[args[0]] = values[args[1]] & values[args[2]] | int(args[3], 16)
        elif name.startswith("mma.sync.aligned.m16n8k16"):
            assert name == f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32"
            rows = [pairs([args[4 + r], args[6 + r]]).view(8, 16) for r in range(2)]  # of g: k by thread, in the order b has them too
            columns = pairs(args[8:10]).view(8, 16)
            for r in range(2):
                sums = (rows[r] @ columns.T).view(32, 2)
                for e in range(2):
                    values[args[2 * r + e]] = values[args[10 + 2 * r + e]] + sums[:, e]
        else:
            assert name == ".reg", line
    return values


@pytest.mark.parametrize("half", ["bf16", "f16"])
@pytest.mark.parametrize(("first", "halves", "passes", "words", "one"), [(0, 2, 1, 4, True), (0, 2, 2, 1, False), (1, 1, 1, 4, False), (0, 1, 2, 2, False)])
def test_the_text_of_ptx_is_the_product(half, first, halves, passes, words, one):
    """Numbers are small and whole: nothing is rounded."""
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.lowbit_matmul import _MASKS, _twice
    from angelslim_quant.kernels.triton.lowbit_sums import _constraints, _ptx

    dtype, inputs, kept = {"bf16": BF16, "f16": FP16}[half], 2 * halves * words * passes, 2 if one else 4
    kind = "bf16" if half == "bf16" else "fp16"
    held = torch.randint(-(2**31), 2**31 - 1, (2, words, 32), dtype=torch.int32)
    x = torch.randint(-8, 9, (inputs, 32, 2)).to(dtype)
    constants = [_twice(-at - 1.5, dtype) for at in (4, 4, 16, 16)]
    operands = [*held.flatten(0, 1), *(torch.full((32,), m, dtype=torch.int32) for m in (*_MASKS[kind], *constants)), *(r.view(torch.int32)[:, 0] for r in x)]
    found = run_ptx(_ptx(kind, words, first, halves, passes, one), [*torch.zeros(2 * passes * kept, 32), *operands], half)
    assert _constraints(2 * passes * kept, 0, len(operands)).count("r") == len(operands)
    for t in range(2):
        for p in range(passes):
            wanted = torch.zeros(2, 8, 8)  # r, output g, row n
            for at, i in enumerate(range(p * inputs // passes, (p + 1) * inputs // passes)):
                word, m, k = at // (2 * halves), first + at // 2 % halves, at % 2
                for h in range(2):
                    spot = [place(r, 4 * m + 2 * k + h) for r in range(2)]
                    codes = torch.stack([(held[t, word] >> s & 1) + 2 * (held[t, word] >> (s + 1) % 32 & 1) - 1.5 for s in spot])
                    wanted += torch.einsum("rgq,nq->rgn", codes.view(2, 8, 4), x[i, :, h].float().view(8, 4))
            for k in range(kept):
                r, e = (k, 0) if one else divmod(k, 2)
                assert found[f"${(t * passes + p) * kept + k}"].view(8, 4).equal(wanted[r, :, e::2])


def run_shared(text, operands):
    """What threads hold after a text of stores to shared memory, a barrier, and loads; an operand is [threads]."""
    values, memory, waited = {f"${i}": v for i, v in enumerate(operands)}, None, False
    has = torch.ones(len(operands[0]), dtype=torch.bool)

    def places(name):
        base, _, more = name.strip("[]").partition("+")
        at = values[base] + int(more or 0)
        return (at // 4)[has]

    for line in text.strip("{}\n ").splitlines():
        name, _, rest = line.rstrip(";").removeprefix("@has ").partition(" ")
        args = [a.strip(" {}") for a in rest.split(",")]
        if name == ".shared":
            memory = torch.full((int(rest.split("[")[1].rstrip("]")),), torch.nan)
            values["held"] = torch.zeros(len(has), dtype=torch.int32)
        elif name in ("mov.b32", "mov.f32"):
            values[args[0]] = torch.zeros(len(has)) if args[1] == "0f00000000" else values[args[1]]
        elif name in ("add.s32", "add.f32"):
            values[args[0]] = values[args[1]] + values[args[2]]
        elif name in ("setp.ne.s32", "setp.lt.s32"):
            has = values[args[1]] != int(args[2]) if "ne" in name else values[args[1]] < int(args[2])
        elif name == "st.shared.v4.f32":
            at = places(args[0])
            assert not waited and bool((at % 4 == 0).all()) and bool(memory[at].isnan().all()) and len(set(at.tolist())) == len(at)
            for k in range(4):
                memory[at + k] = values[args[1 + k]][has]
        elif name == "bar.sync":
            waited = True
        elif name == "ld.shared.f32":
            assert waited
            values[args[0]] = values[args[0]].clone()
            values[args[0]][has] = memory[places(args[1])]
        else:
            assert name == ".reg", line
    return values


@pytest.mark.parametrize("each", [32, 256])
@pytest.mark.parametrize(("wide", "shares"), [(1, 16), (1, 1), (2, 4), (4, 1), (1, 8), (2, 2)])
def test_the_text_that_adds_over_warps_gives_every_sum_to_a_thread(each, wide, shares):
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.lowbit_sums import _total_ptx

    threads, count = 32 * wide * shares, max(1, each // (32 * shares))
    i = torch.arange(threads, dtype=torch.int32)
    numbers = torch.randint(-100, 100, (4 if each == 32 else 8, threads)).float()
    where = (i // 4 * 16, (i % 4 == 0).int()) if each == 32 else (i // 32 * 1024 + i % 32 * 16, torch.ones_like(i))
    found = run_shared(_total_ptx(each, wide, shares, count), [*torch.zeros(count, threads), *numbers, *where, i * 4])
    held = numbers.view(-1, shares, wide, 32).sum(1)
    wanted = held[:, :, ::4].permute(1, 2, 0) if each == 32 else held.view(2, 4, wide, 32).permute(2, 0, 3, 1)
    assert torch.cat([found[f"${j}"] for j in range(count)])[: wide * each].equal(wanted.flatten())


def test_sums_do_not_lose_small_outputs_to_what_codes_read_as():
    """Codes read 4 or 16 more than they are: outputs that these would swamp are what the reference gives."""
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.lowbit_gemv import gemv
    from angelslim_quant.kernels.triton.lowbit_matmul import Shape, matmul

    quantized = made("ternary", 32, 256, 128)
    quantized.codes.zero_()
    quantized.codes[:, ::64] = 1
    weight, x = pack_low(quantized), (100 + torch.rand(2, 256)).half()
    wanted = LOWBIT_MATMUL.reference(x, weight, dtype=torch.float16)
    close(matmul(x.to(DEVICE), moved(weight), None, torch.float16, Shape(2), ptx=PTX), wanted, 2e-3)
    close(gemv(x.to(DEVICE), moved(weight), None, torch.float16, 2), wanted, 2e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_products_with_many_rows_widen_the_weight():
    quantized = made("seq2", 64, 256, 128, torch.bfloat16)
    weight = moved(pack_low(quantized))
    for rows in (64, 65, 300):
        x = torch.randn(rows, 256, device=DEVICE).bfloat16()
        for name in ("mma", "gemv"):
            close(LOWBIT_MATMUL(x, weight, executor=name).cpu(), LOWBIT_MATMUL.reference(x, weight).cpu(), 1e-2)
    assert lowbit_mma() == (True, "")


def test_the_kernel_takes_a_row_out_of_an_odd_one():
    pytest.importorskip("triton")
    from angelslim_quant.kernels.triton.lowbit_gemv import gemv
    from angelslim_quant.kernels.triton.lowbit_matmul import Shape, matmul

    weight, x = pack_low(made("seq2", 32, 128, 64, torch.float16)), torch.randn(1, 199).half()
    for start in (1, 2):
        row = x[:, start : start + 128]
        wanted = LOWBIT_MATMUL.reference(row, weight, dtype=torch.float16)
        close(matmul(row.to(DEVICE), moved(weight), None, torch.float16, Shape(1), ptx=PTX), wanted, 4e-3)
        close(gemv(row.to(DEVICE), moved(weight), None, torch.float16, 1), wanted, 4e-3)


def test_no_ptx_where_cuda_means_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    assert lowbit_mma.__wrapped__()[0] is False


# linears --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_linear_runs_its_codes_and_nothing_else(kind, group, dtype):
    quantized, bias = made(kind, 64, 320, group), torch.nn.Parameter(torch.randn(64).to(dtype))
    packed = LowBitLinear(quantized, bias, dtype)
    x = torch.randn(2, 3, 320).to(dtype)
    with torch.no_grad():
        close(
            packed(x),
            torch.nn.functional.linear(x.double(), quantized.dequantize().double(), bias.double()).to(dtype),
            2e-2 if dtype == torch.bfloat16 else 2e-3,
        )
        assert packed(x[:0]).shape == (0, 3, 64)
    bits = 4 if dtype == torch.bfloat16 else (1.25 if kind == "sherry" else 2) * 384 / 320  # a CPU's kernel reads four bits; chunks are filled up
    assert packed.words.nbytes * 8 == bits * quantized.codes.numel() and "bits on" in repr(packed)


@pytest.mark.parametrize("kind", ["seq2", "sherry"])
@pytest.mark.parametrize(("group", "dtype", "fit"), [(64, torch.float32, (96, 32, 64)), (0, torch.float16, (32, 64)), (128, torch.bfloat16, (128, 64, 32))])
def test_joined_rows_are_those_of_the_parts(kind, group, dtype, fit):
    given = [(made(kind, n, 256, group), torch.nn.Parameter(torch.randn(n).to(dtype))) for n in fit]
    parts, plain = ([LowBitLinear(q, b, dtype) for q, b in given] for _ in range(2))
    joined = join(parts)
    assert joined is not None and joined.out_features == sum(fit) and joined.packed_bytes() == sum(m.packed_bytes() for m in plain)
    with torch.no_grad():
        for rows in (1, 5):
            x = torch.randn(rows, 256).to(dtype)
            wanted = [m(x) for m in plain]
            for m, y, cut in zip(parts, wanted, joined(x).split(fit, -1), strict=True):
                assert m(x).equal(y)
                close(cut, y, 1e-2)


def test_weights_of_other_levels_are_not_joined():
    a, b = (LowBitLinear(made(kind, 32, 128, 128), None, torch.float32) for kind in ("seq2", "ternary"))
    assert join([a, b]) is None and join([a, LowBitLinear(made("seq2", 32, 128, 128), None, torch.float32)]) is not None


REFUSED = {
    "levels": (Grid(4, "int", "group", 128), (64, 256)),
    "steps": (Grid(4, "int", "group", 128, levels=(-2, -1, 1, 2)), (64, 256)),
    "five": (Grid(4, "int", "group", 128, levels=(-2, -1, 0, 1, 2)), (64, 256)),
    "float": (Grid(4, "float", "group", 128, levels=TERNARY), (64, 256)),
    "asymmetric": (Grid(2, "int", "group", 128, symmetric=False), (64, 256)),
    "groups": (Grid(2, "int", "group", 96), (64, 192)),
    "blocks": (Grid(2, "int", "block", block_structure=(128, 128)), (128, 128)),
    "outputs": (Grid(2, "int", "group", 128), (48, 256)),
    "inputs": (Grid(2, "int", "channel"), (64, 100)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_run_it_refuses(case):
    weights, shape = REFUSED[case]
    ok, why = LowBitLinear.supports(Scheme("", weights), shape, torch.float32, "cpu")
    assert not ok and why
    assert not LowBitLinear.supports(Scheme("", grid("seq2", 128), Grid(8, "int", "token", dynamic=True)), (64, 256), torch.float32, "cpu")[0]


def test_codes_of_few_levels_go_to_it_before_int4(monkeypatch):
    scheme = Scheme("", grid("seq2", 128))
    fitting = [c for c in angelslim_register_linears() if c.supports(scheme, (64, 256), torch.float32, "cpu")[0]]
    assert fitting == [LowBitLinear, INT4Linear]
    assert LowBitLinear.supports(Scheme("", Grid(2, "int", "tensor")), (64, 256), torch.float32, "cpu")[0]
    monkeypatch.setattr("angelslim_quant.packed.slow_on_cpu", lambda: frozenset({torch.bfloat16}))
    assert (
        LowBitLinear.pays(scheme, torch.bfloat16, "cpu")
        and not LowBitLinear.pays(scheme, torch.float32, "cpu")
        and LowBitLinear.pays(scheme, torch.float16, "cuda")
    )


def test_a_cpu_reads_four_bits_and_a_tensor_has_one_scale():
    levels = Grid(2, "int", "tensor")
    quantized = Quantized(Scheme("", levels), torch.randint(-2, 2, (32, 128), dtype=torch.int8), torch.tensor([0.5]))
    packed = LowBitLinear(quantized, None, torch.bfloat16)
    assert LOWBIT_MATMUL.choose(torch.zeros(1, 128).bfloat16(), Packed4CPU(packed.words, packed.weight_scale)).name == "int4pack"
    x = torch.randn(2, 128)
    with torch.no_grad():
        close(packed(x.bfloat16()).float(), x @ quantized.dequantize().T, 2e-2)
        close(LowBitLinear(quantized, None, torch.float32)(x), x @ quantized.dequantize().T, 1e-5)
    assert isinstance(pack_low(quantized), PackedLow)


# models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seq2", "sherry"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_what_the_dequantized_one_does(tiny, kind, dtype):
    model = load_model(tiny("llama", dtype=str(dtype).removeprefix("torch.")), "cpu").model
    weights = model.state_dict()
    description = describe(llama.LAYOUTS[0], model.config.to_dict(), {n: tuple(t.shape) for n, t in weights.items()}, dict.fromkeys(weights, "F32"))
    sites = [s for s in description.sites if s.layer is not None]
    given = {s.name: made(kind, *s.shape, 64 if s.shape[1] % 64 == 0 else 32) for s in sites}
    assert all(LowBitLinear.supports(q.scheme, tuple(q.codes.shape), dtype, "cpu") == (True, "") for q in given.values())
    given = {n: replace(q, scale=(q.scale * 0.1).bfloat16().float()) for n, q in given.items()}  # a CPU's kernel rounds scales to BF16
    with torch.no_grad():
        for name, quantized in given.items():
            model.get_submodule(name).weight.copy_(quantized.dequantize())
        ids = torch.arange(2, 34)[None]
        wanted = model(ids).logits.double()
        said = fill(Linears(model, description), given.__getitem__, dict.fromkeys(given, LowBitLinear), dtype, "cpu")
        found = model(ids).logits.double()
    assert f"{len(sites)} linears packed" in said and all(isinstance(model.get_submodule(n), LowBitLinear) for n in given)
    assert any(m.joined is not None for m in model.modules() if isinstance(m, LowBitLinear))
    assert float((found - wanted).abs().max() / wanted.abs().max()) < (0.05 if dtype == torch.bfloat16 else 1e-4)
