"""Sums of products of codes in two bits with inputs by mma.sync.m16n8k16, in PTX and as definition."""
# ruff: noqa: RUF005  (Triton compiles no unpacking)

import triton
import triton.language as tl


@triton.constexpr_function
def _product(half, a, b, c, d):
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 {{{d}}}, {{{a}}}, {{{b}}}, {{{c}}};"


@triton.constexpr_function
def _ptx(HALF, WORDS, FIRST, HALVES, PASSES, ONE):
    """Sums of products of words, or of these halves of them, with inputs, for two times 16 outputs and PASSES times 8 rows.

    What codes read more than they are is taken off first: products of constants are what the sums begin with.
    Operands: by tile and pass 4 sums, or where ONE the two of a thread's first row; words by tile, two masks, four constants,
    and inputs by pass, word, half and the two registers of it.
    """
    half, turn, magic = ("bf16", 0, ("0x40804080", "0x41804180")) if HALF == "bf16" else ("f16", 29, ("0x44004400", "0x4C004C00"))
    kept = (0, 2) if ONE else (0, 1, 2, 3)
    words = 2 * PASSES * len(kept)
    masks = words + 2 * WORDS
    inputs = masks + 6
    names = [[[f"${(t * PASSES + p) * len(kept) + kept.index(k)}" if k in kept else f"c{t}{p}{k}" for k in range(4)] for p in range(PASSES)] for t in range(2)]
    begun = [", ".join(f"t{p}{k}" for k in range(4)) for p in range(PASSES)]
    lines = [".reg .b32 a0, a1, a2, a3, turned;"]
    lines += [f".reg .f32 {begun[p]};" for p in range(PASSES)]
    lines += [f".reg .f32 {name};" for tile in names for one in tile for name in one if name[0] == "c"]
    lines += [f"mov.f32 t{p}{k}, 0f00000000;" for p in range(PASSES) for k in range(4)]
    for p in range(PASSES):
        for at in range(HALVES * WORDS):
            b = inputs + 2 * (p * WORDS * HALVES + at)
            constant = ", ".join(f"${masks + 2 + k}" for k in range(4))
            lines.append(_product(half, a=constant, b=f"${b}, ${b + 1}", c=begun[p], d=begun[p]))
    for word in range(WORDS):
        for at in range(HALVES):
            for t in range(2):
                for r in range(2):
                    by = (turn + 8 * (FIRST + at) + 4 * r) % 32
                    source = f"${words + t * WORDS + word}"
                    if by:
                        lines.append(f"shf.r.wrap.b32 turned, {source}, {source}, {by};")
                        source = "turned"
                    lines += [f"lop3.b32 a{r + 2 * k}, {source}, ${masks + k}, {magic[k]}, 0xEA;" for k in range(2)]
                for p in range(PASSES):
                    b = inputs + 2 * (HALVES * (p * WORDS + word) + at)
                    own = ", ".join(names[t][p])
                    lines.append(_product(half, a="a0, a1, a2, a3", b=f"${b}, ${b + 1}", c=own if word + at else begun[p], d=own))
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _total_ptx(EACH, WIDE, SHARES, COUNT):
    """Adds what warps hold, in their order, by shared memory.

    Operands: COUNT sums; 4 numbers of EACH = 32, or 8 of 256, of a warp; where a thread's are in bytes, whether it has any, and where it reads.
    """
    total, step = WIDE * EACH, 32 * WIDE * SHARES
    lines = [f".shared .align 16 .b32 held[{SHARES * total}];", ".reg .b32 base, at;", ".reg .pred has;"]
    given = COUNT + (4 if EACH == 32 else 8)
    lines += ["mov.b32 base, held;", f"add.s32 at, base, ${given};", f"setp.ne.s32 has, ${given + 1}, 0;"]
    lines += [
        f"@has st.shared.v4.f32 [at+{512 * t}], {{${COUNT + 4 * t}, ${COUNT + 4 * t + 1}, ${COUNT + 4 * t + 2}, ${COUNT + 4 * t + 3}}};"
        for t in range((given - COUNT) // 4)
    ]
    lines += ["bar.sync 0;", f"add.s32 at, base, ${given + 2};", f"setp.lt.s32 has, ${given + 2}, {4 * total};"]
    # all are asked for before any is added
    held = [[f"${j}" if share == 0 else f"h{j}_{share}" for share in range(SHARES)] for j in range(COUNT)]
    lines += [f".reg .f32 {name};" for names in held for name in names[1:]]
    lines += [f"mov.f32 {name}, 0f00000000;" for names in held for name in names]
    lines += [f"@has ld.shared.f32 {held[j][share]}, [at+{4 * (share * total + step * j)}];" for j in range(COUNT) for share in range(SHARES)]
    lines += [f"add.f32 {names[0]}, {names[0]}, {name};" for names in held for name in names[1:]]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _constraints(SUMS, NUMBERS, INPUTS):
    return ",".join(["=&f"] * SUMS + ["f"] * NUMBERS + ["r"] * INPUTS)


@triton.constexpr_function
def _numbers(COUNT):
    return (tl.float32,) * COUNT


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
def _plain_sums(words, masks, inputs, c, FROM: tl.constexpr, FIRST: tl.constexpr, HALVES: tl.constexpr, HALF: tl.constexpr, BW: tl.constexpr):
    """Adds one pass of a tile, whose inputs begin at FROM."""
    TURN: tl.constexpr = 0 if HALF == "bf16" else 29
    HIGH: tl.constexpr = 0x40804080 if HALF == "bf16" else 0x44004400
    LOW: tl.constexpr = 0x41804180 if HALF == "bf16" else 0x4C004C00
    for word in tl.static_range(len(words)):
        for at in tl.static_range(HALVES):
            one = turned(words[word], TURN + 8 * (FIRST + at))
            two = turned(words[word], TURN + 8 * (FIRST + at) + 4)
            b0, b1 = inputs[FROM + 2 * (word * HALVES + at)], inputs[FROM + 2 * (word * HALVES + at) + 1]
            c = _plain_product((one & masks[0]) | HIGH, (two & masks[0]) | HIGH, (one & masks[1]) | LOW, (two & masks[1]) | LOW, b0, b1, c, HALF, BW)
    return c


@triton.jit
def sums(
    first, second, masks, constants, inputs,
    FIRST: tl.constexpr, HALVES: tl.constexpr, HALF: tl.constexpr, PASSES: tl.constexpr, ONE: tl.constexpr, PTX: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Products of words of two tiles, or of halves of them, with inputs, by tile and pass: 4 registers of a thread as mma.sync names them, or two."""
    WORDS: tl.constexpr = len(first)
    SUMS: tl.constexpr = 2 * PASSES * (2 if ONE else 4)
    if PTX:
        return tl.inline_asm_elementwise(
            _ptx(HALF, WORDS, FIRST, HALVES, PASSES, ONE), _constraints(SUMS, 0, 2 * WORDS + 6 + 2 * PASSES * HALVES * WORDS),
            first + second + masks + constants + inputs, _numbers(SUMS), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        EACH: tl.constexpr = 2 * HALVES * WORDS
        none = tl.zeros([BW], tl.float32)
        found = ()
        for t in tl.static_range(2):
            for p in tl.static_range(PASSES):
                c = (none, none, none, none)
                for i in tl.static_range(EACH // 2):
                    b0, b1 = inputs[p * EACH + 2 * i], inputs[p * EACH + 2 * i + 1]
                    c = _plain_product(constants[0], constants[1], constants[2], constants[3], b0, b1, c, HALF, BW)
                c = _plain_sums(second if t else first, masks, inputs, c, p * EACH, FIRST, HALVES, HALF, BW)
                found = found + ((c[0], c[2]) if ONE else c)
        return found


@triton.jit
def totals(numbers, i, EACH: tl.constexpr, WIDE: tl.constexpr, SHARES: tl.constexpr, PTX: tl.constexpr):
    """Adds the numbers of the warps that share out inputs; thread i has, of WIDE * EACH sums, those i, i + BW, and so on.

    Of EACH = 32 the thread 4 g holds four, as they follow; of 256 each holds four of 128, and four of 128 more.
    """
    BW: tl.constexpr = 32 * WIDE * SHARES
    COUNT: tl.constexpr = max(1, EACH // (32 * SHARES))
    if PTX:
        if EACH == 32:
            at, has = i // 4 * 16, (i % 4 == 0).to(tl.int32)
        else:
            at, has = i // 32 * 1024 + i % 32 * 16, i * 0 + 1
        found = tl.inline_asm_elementwise(
            _total_ptx(EACH, WIDE, SHARES, COUNT), _constraints(COUNT, len(numbers), 3), numbers + (at, has, i * 4), _numbers(COUNT), is_pure=False, pack=1
        )
        return found
    else:
        if EACH == 32:
            first = tl.reshape(_rows(numbers, 0), [SHARES, WIDE * 8, 4, 4])
            total = tl.sum(tl.where(tl.arange(0, 4)[None, None, :, None] == 0, first, 0.0), 2)
        else:
            both = tl.join(tl.reshape(_rows(numbers, 0), [BW // 32, 128]), tl.reshape(_rows(numbers, 4), [BW // 32, 128]))
            total = tl.permute(both, [0, 2, 1])
        total = tl.sum(tl.reshape(total, [SHARES, WIDE * EACH]), 0)
        if WIDE * EACH <= BW:
            return (tl.reshape(tl.broadcast_to(total[None, :], [BW // (WIDE * EACH), WIDE * EACH]), [BW]),)
        else:
            several = tl.reshape(total, [COUNT, BW])
            found = ()
            for j in tl.static_range(COUNT):
                found = found + (tl.sum(tl.where(tl.arange(0, COUNT)[:, None] == j, several, 0.0), 0),)
            return found


@triton.jit
def _rows(numbers, FROM: tl.constexpr):
    """[BW, 2, 2] of four numbers a thread, in their order."""
    return tl.join(tl.join(numbers[FROM], numbers[FROM + 2]), tl.join(numbers[FROM + 1], numbers[FROM + 3]))
