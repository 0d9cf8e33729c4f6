"""Sums of products of codes in two bits with inputs by mma.sync.m16n8k16, in PTX and as definition."""
# ruff: noqa: RUF005  (Triton compiles no unpacking)

import triton
import triton.language as tl


@triton.constexpr_function
def _product(half, a, b, c):
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 {{{c}}}, {{{a}}}, {{{b}}}, {{{c}}};"


@triton.constexpr_function
def _ptx(HALF, WORDS, FIRST, HALVES, PASSES):
    """Sums of products of words, or of these halves of them, with inputs, for PASSES times 8 rows.

    Operands: 4 sums a pass; words, two masks, and inputs by pass, word, half and the two registers of it.
    """
    half, turn, magic = ("bf16", 0, ("0x40804080", "0x41804180")) if HALF == "bf16" else ("f16", 29, ("0x44004400", "0x4C004C00"))
    words, masks = 4 * PASSES, 4 * PASSES + WORDS
    lines = [".reg .b32 a0, a1, a2, a3, turned;", *(f"mov.f32 ${i}, 0f00000000;" for i in range(4 * PASSES))]
    for word in range(WORDS):
        for at in range(HALVES):
            for r in range(2):
                by = (turn + 8 * (FIRST + at) + 4 * r) % 32
                if by:
                    lines.append(f"shf.r.wrap.b32 turned, ${words + word}, ${words + word}, {by};")
                source = "turned" if by else f"${words + word}"
                lines += [f"lop3.b32 a{r + 2 * k}, {source}, ${masks + k}, {magic[k]}, 0xEA;" for k in range(2)]
            for p in range(PASSES):
                c, b = 4 * p, masks + 2 + 2 * (HALVES * (p * WORDS + word) + at)
                lines.append(_product(half, a="a0, a1, a2, a3", b=f"${b}, ${b + 1}", c=f"${c}, ${c + 1}, ${c + 2}, ${c + 3}"))
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _constant_ptx(HALF, INPUTS):
    """Sums of products of constants, alike for all outputs. Operands: the sums of two rows; two constants, and inputs."""
    half = "bf16" if HALF == "bf16" else "f16"
    lines = [".reg .f32 u, v;", "mov.f32 $0, 0f00000000;", "mov.f32 $1, 0f00000000;", "mov.f32 u, 0f00000000;", "mov.f32 v, 0f00000000;"]
    lines += [_product(half, a="$2, $2, $3, $3", b=f"${b}, ${b + 1}", c="$0, $1, u, v") for b in range(4, 4 + INPUTS, 2)]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _constraints(SUMS, INPUTS):
    return ",".join(["=f"] * SUMS + ["r"] * INPUTS)


@triton.jit
def number(pair, UPPER: tl.constexpr, HALF: tl.constexpr):
    """Half of a register as fp32."""
    bits = ((pair >> 16) if UPPER else pair) & 0xFFFF
    if HALF == "bf16":
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _four(a, b, c, d, WARPS: tl.constexpr):
    """[warps, 8, 16] of four numbers a thread; the last axis is thread by thread."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [WARPS, 8, 16])


@triton.jit
def turned(word, BITS: tl.constexpr):
    """Turned right."""
    if BITS % 32 == 0:
        return word
    else:
        bits = word.to(tl.uint32, bitcast=True)
        return ((bits >> (BITS % 32)) | (bits << (32 - BITS % 32))).to(tl.int32, bitcast=True)


@triton.jit
def _plain_product(a0, a1, a2, a3, b0, b1, c, HALF: tl.constexpr, BW: tl.constexpr):
    """mma.sync as definition."""
    WARPS: tl.constexpr = BW // 32
    first = _four(number(a0, False, HALF), number(a0, True, HALF), number(a2, False, HALF), number(a2, True, HALF), WARPS)
    second = _four(number(a1, False, HALF), number(a1, True, HALF), number(a3, False, HALF), number(a3, True, HALF), WARPS)
    x = _four(number(b0, False, HALF), number(b0, True, HALF), number(b1, False, HALF), number(b1, True, HALF), WARPS)
    d0, d1 = tl.split(tl.reshape(tl.sum(first[:, :, None, :] * x[:, None, :, :], 3), [BW, 2]))
    d2, d3 = tl.split(tl.reshape(tl.sum(second[:, :, None, :] * x[:, None, :, :], 3), [BW, 2]))
    return c[0] + d0, c[1] + d1, c[2] + d2, c[3] + d3


@triton.jit
def _plain_sums(words, masks, inputs, FROM: tl.constexpr, FIRST: tl.constexpr, HALVES: tl.constexpr, HALF: tl.constexpr, BW: tl.constexpr):
    """`sums` of one pass, whose inputs begin at FROM, as definition, for Triton's interpreter."""
    TURN: tl.constexpr = 0 if HALF == "bf16" else 29
    HIGH: tl.constexpr = 0x40804080 if HALF == "bf16" else 0x44004400
    LOW: tl.constexpr = 0x41804180 if HALF == "bf16" else 0x4C004C00
    none = tl.zeros([BW], tl.float32)
    c = (none, none, none, none)
    for word in tl.static_range(len(words)):
        for at in tl.static_range(HALVES):
            one = turned(words[word], TURN + 8 * (FIRST + at))
            two = turned(words[word], TURN + 8 * (FIRST + at) + 4)
            b0, b1 = inputs[FROM + 2 * (word * HALVES + at)], inputs[FROM + 2 * (word * HALVES + at) + 1]
            c = _plain_product((one & masks[0]) | HIGH, (two & masks[0]) | HIGH, (one & masks[1]) | LOW, (two & masks[1]) | LOW, b0, b1, c, HALF, BW)
    return c


@triton.jit
def _plain_constants(high, low, inputs, HALF: tl.constexpr, BW: tl.constexpr):
    none = tl.zeros([BW], tl.float32)
    c = (none, none, none, none)
    for i in tl.static_range(len(inputs) // 2):
        c = _plain_product(high, high, low, low, inputs[2 * i], inputs[2 * i + 1], c, HALF, BW)
    return c[0], c[1]


@triton.jit
def sums(words, masks, inputs, FIRST: tl.constexpr, HALVES: tl.constexpr, HALF: tl.constexpr, PASSES: tl.constexpr, PTX: tl.constexpr, BW: tl.constexpr):
    """Products of words, or of halves of them, with inputs: 4 sums a pass, registers of a thread as mma.sync names them."""
    WORDS: tl.constexpr = len(words)
    if PTX and PASSES == 1:
        return tl.inline_asm_elementwise(
            _ptx(HALF, WORDS, FIRST, HALVES, 1), _constraints(4, WORDS + 2 + 2 * HALVES * WORDS), words + masks + inputs,
            (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    elif PTX:
        return tl.inline_asm_elementwise(
            _ptx(HALF, WORDS, FIRST, HALVES, 2), _constraints(8, WORDS + 2 + 4 * HALVES * WORDS), words + masks + inputs,
            (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        EACH: tl.constexpr = 2 * HALVES * WORDS
        found = ()
        for p in tl.static_range(PASSES):
            found = found + _plain_sums(words, masks, inputs, p * EACH, FIRST, HALVES, HALF, BW)
        return found


@triton.jit
def constants(high, low, inputs, HALF: tl.constexpr, PTX: tl.constexpr, BW: tl.constexpr):
    """Of a pass, the products of constants with inputs, for a thread's two rows."""
    if PTX:
        return tl.inline_asm_elementwise(
            _constant_ptx(HALF, len(inputs)), _constraints(2, 2 + len(inputs)), (high, low) + inputs, (tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        return _plain_constants(high, low, inputs, HALF, BW)
