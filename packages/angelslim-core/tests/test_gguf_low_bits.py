"""GGUF block types for few levels: bytes by hand, against the gguf library, and against llama.cpp's own dequantizers where they are installed."""

import ctypes
from itertools import product

import pytest
import torch

from angelslim_core.errors import NumericError
from angelslim_core.gguf import low_bits
from angelslim_core.gguf.blocks import AUTO, BLOCKS, FEW, choose, decode, file_type, holding, lay_out, ternary
from angelslim_core.schemes import Grid, Quantized, Scheme

gguf = pytest.importorskip("gguf")

TERNARY, SEQ2 = (-1, 0, 1), (-3, -1, 1, 3)
ONE = [0x00, 0x3C]  # 1 in F16


def weight(levels, columns, group=None, rows=5, seed=0, **more):
    """Random codes of these levels, with scales that F16 and BF16 hold."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(4, "int", "group" if group else "channel", group, levels=levels, scale_dtype="BF16", **more)
    codes = torch.tensor(levels, dtype=torch.int8)[torch.randint(len(levels), (rows, columns), generator=generator)]
    scale = torch.rand(grid.scale_shape((rows, columns)), generator=generator).add(0.1).bfloat16()
    return Quantized(Scheme("t", grid), codes, scale)


def strided(columns, rows=5, seed=0):
    """Ternary codes with one zero in every four that lie 16 apart, by the index of each weight."""
    found = weight((-1, 1), columns, rows=rows, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for row, base, lane in product(range(rows), range(0, columns, 64), range(16)):
        found.codes[row, base + lane + 16 * int(torch.randint(4, (), generator=generator))] = 0
    return found


# bytes by hand -------------------------------------------------------------------------------------------------------


def test_q2_0_by_hand():
    """18 bytes: the scale, then the codes from the lowest bits up; -1 is stored as 0."""
    codes = torch.tensor([[-1, 0, 1, 1, *[0] * 59, -1]], dtype=torch.int8)
    assert low_bits.q2_0(codes, torch.ones(1)).tolist() == [[*ONE, 0b10100100, *[0b01010101] * 14, 0b00010101]]
    blocks = torch.tensor([[*ONE, 0b11100100, *[0] * 15]], dtype=torch.uint8)
    assert low_bits.from_q2_0(blocks)[0, :5].tolist() == [-1, 0, 1, 2, -1]  # its fourth level is 2


def test_stq1_0_by_hand():
    """42 bytes: 64 slots, 64 signs, the scale; quad 0 has the weights 0, 16, 32, 48, quad 16 those from 64 on."""
    codes = torch.zeros(256, dtype=torch.int8).view(4, 4, 16)
    codes[:, 1:] = 1  # quads (0, 1, 1, 1): slot 0, sign 0
    codes[0, :, 0] = torch.tensor([1, 0, 1, -1])  # zero at 1, the third kept differs: 0b01_10, plus: index 6 of the published table, 0x26
    codes[0, :, 1] = torch.tensor([-1, 1, 1, 0])  # zero at 3, second and third differ: 0b11_11, minus
    codes[1, :, 1] = torch.tensor([-1, -1, 0, -1])  # quad 17: zero at 2, none differs: 0b10_00, minus
    found = low_bits.stq1_0(codes.reshape(1, 256), torch.ones(1))
    slots, signs = [0] * 32, [0] * 8
    slots[0], slots[8] = 0b0110 | 0b1111 << 4, 0b1000 << 4
    signs[0], signs[2] = 0b10, 0b10
    assert found.tolist() == [[*slots, *signs, *ONE]]
    assert [(0x26 >> 2 * lane & 3) - 1 for lane in range(4)] == [1, 0, 1, -1]
    assert low_bits.from_stq1_0(found).equal(codes.reshape(1, 256).float())


def test_types_of_the_library_have_its_numbers_and_sizes():
    for kind, block in BLOCKS.items():
        if kind in gguf.GGMLQuantizationType.__members__:
            assert gguf.GGMLQuantizationType[kind] == block.number
            assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (block.size, block.nbytes)
    assert (BLOCKS["Q2_0"].number, file_type("Q2_0"), BLOCKS["STQ1_0"].number, file_type("STQ1_0"), file_type("TQ2_0")) == (42, 41, 43, 42, 37)
    assert 8 * BLOCKS["STQ1_0"].nbytes / BLOCKS["STQ1_0"].size == 1.3125


# round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "group"), [("Q2_0", 64), ("Q2_0", 128), ("Q2_0", None), ("TQ2_0", None), ("TQ2_0", 256), ("TQ1_0", 256), ("TQ1_0", None), ("STQ1_0", None)]
)
def test_codes_keep_their_weights(kind, group):
    for seed, blocks in product(range(3), (2, 4)):
        columns = 256 * blocks
        original = strided(columns, seed=seed) if kind == "STQ1_0" else weight(TERNARY, columns, group, seed=seed)
        assert kind in holding(Grid(**{**vars(original.scheme.weights), "levels": TERNARY}), columns) and choose(original, [kind]) == kind
        data = lay_out(original, kind)
        assert data.shape == (5, columns // BLOCKS[kind].size * BLOCKS[kind].nbytes) and data.dtype == torch.uint8
        assert decode(data.numpy(), kind).equal(original.dequantize())


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_the_library_packs_the_same_bytes(kind):
    original = weight(TERNARY, 512)
    theirs = gguf.quants.quantize(original.dequantize().numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.from_numpy(theirs).equal(lay_out(original, kind))


@pytest.mark.parametrize("levels", [(-2, -1, 0, 1), (-1, 0, 1, 2), (-2, 1)])
def test_two_bit_integers_fit_q2_0_with_a_scale_of_either_sign(levels):
    original = weight(levels, 192, 64)
    assert choose(original, AUTO) == "Q2_0"
    data = lay_out(original, "Q2_0")
    assert decode(data.numpy(), "Q2_0").equal(original.dequantize())
    assert (int(data[0, 1]) >> 7) == (min(levels) == -2)  # the sign bit of the scale


def test_what_a_type_does_not_hold():
    assert choose(weight(SEQ2, 192, 64), (*FEW, *AUTO)) == "Q4_0"  # -3, -1, 1, 3 are no four neighbours: Q2_0 cannot hold them
    assert not set(holding(weight(SEQ2, 256, 64).scheme.weights, 256)) & set(FEW)
    assert choose(weight((-2, 2), 192, 64), FEW) is None
    assert choose(weight(TERNARY, 192, 64), AUTO) == "Q2_0" and "TQ2_0" not in holding(Grid(2, "int", "group", 64), 192)
    assert choose(weight(TERNARY, 96, 32), ("Q4_0",)) == "Q4_0" and "Q2_0" not in holding(Grid(2, "int", "group", 32), 96)
    assert not holding(Grid(2, "int", "group", 64, symmetric=False), 256)
    assert choose(weight(TERNARY, 256), ["STQ1_0"]) is None
    with pytest.raises(NumericError, match="one zero"):
        lay_out(weight(TERNARY, 256), "STQ1_0")
    original = weight(TERNARY, 256)
    original.scale = original.scale.float() * (1 + 2**-20)  # no F16 number
    assert choose(original, AUTO) is None and lay_out(original, "TQ2_0") is None


def test_groups_that_share_a_block_must_share_a_scale():
    original = weight(TERNARY, 256, 64)
    assert choose(original, AUTO) == "Q2_0" and lay_out(original, "TQ2_0") is None
    original.scale = original.scale[:, :1].expand(-1, 4).contiguous()
    assert choose(original, AUTO) == "TQ2_0" and decode(lay_out(original, "TQ2_0").numpy(), "TQ2_0").equal(original.dequantize())
    small = weight(TERNARY, 64, 16)
    small.scale = small.scale[:, :1].expand(-1, 4).contiguous()
    assert choose(small, holding(small.scheme.weights, 64)) == "Q2_0"


def test_a_plain_weight_is_recognised():
    original = weight(TERNARY, 192, 64)
    found = ternary(original.dequantize(torch.bfloat16), 64)
    assert found.codes.equal(original.codes) and decode(lay_out(found, "Q2_0").numpy(), "Q2_0").equal(original.dequantize())


@pytest.mark.parametrize("kind", ["Q2_0", "TQ1_0", "TQ2_0"])
def test_llama_cpp_reads_the_same_numbers(kind):
    """Through the dequantizer that the library of the xllamacpp wheel exports."""
    xllamacpp = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_type_size.restype = ctypes.c_size_t
    assert library.ggml_blck_size(BLOCKS[kind].number) == BLOCKS[kind].size and library.ggml_type_size(BLOCKS[kind].number) == BLOCKS[kind].nbytes
    original = weight((-2, -1, 0, 1) if kind == "Q2_0" else TERNARY, 512)
    data, found = lay_out(original, kind).contiguous(), torch.empty(5, 512)
    getattr(library, f"dequantize_row_{kind.lower()}")(ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(found.data_ptr()), ctypes.c_int64(5 * 512))
    assert found.equal(original.dequantize())
