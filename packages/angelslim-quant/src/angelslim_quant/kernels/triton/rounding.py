"""Rounding inside Triton kernels, by fp32 and integer arithmetic only: exact on every GPU and in the interpreter."""

import triton
import triton.language as tl

# x + MAGIC - MAGIC rounds fp32 to the nearest whole number, ties to even, for |x| < 2^22
MAGIC = tl.constexpr(12582912.0)

# least and largest power of two below a value, its steps in parts of that, largest value; of whole numbers none
FORMATS = {"int": (0.0, 0.0, 0.0, 0.0), "e2m1": (1.0, 4.0, 0.5, 6.0), "e4m3": (2.0**-6, 256.0, 0.125, 448.0)}


@triton.jit
def whole(x):
    """The whole number nearest to each |x| < 2^22."""
    return (x + MAGIC) - MAGIC


@triton.jit
def divided(x, by):
    """x / by, rounded as IEEE 754 says; `by` may be a number."""
    return tl.div_rn(x, by + tl.zeros_like(x))


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """What is left, fp32, of numbers that are not negative when they are stored as `dtype`."""
    if dtype == tl.bfloat16:  # the interpreter's cast cuts bits off
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def power_below(x, LEAST: tl.constexpr, MOST: tl.constexpr):
    """The power of two below |x|, between two others."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(power, LEAST), MOST)


@triton.jit
def nearest(size, LEAST: tl.constexpr, MOST: tl.constexpr, PART: tl.constexpr, LARGEST: tl.constexpr):
    """The value of a float format nearest to each magnitude.

    Args:
        LEAST, MOST: powers of two below its least and largest normal value.
        PART: steps in parts of the power of two below.
        LARGEST: where it saturates.
    """
    size = tl.minimum(size, LARGEST)
    magic = power_below(size, LEAST, MOST) * (PART * 12582912.0)
    return (size + magic) - magic


@triton.jit
def e4m3_byte(size):
    """Bytes, int32, of values of E4M3 that are not negative: as fp32 with 3 bits of mantissa, less 120 in the exponent."""
    return tl.where(size < 0.015625, (size * 512.0).to(tl.int32), (size.to(tl.int32, bitcast=True) >> 20) - 960)


@triton.jit
def e4m3_value(byte):
    """fp32 of int32 bytes without a sign."""
    normal = ((byte + 960) << 20).to(tl.float32, bitcast=True)
    return tl.where(byte < 8, byte.to(tl.float32) * 0.001953125, normal)


@triton.jit
def e2m1_index(size):
    """Index, int32, of values of E2M1 that are not negative."""
    return tl.where(size < 1.0, (size * 2.0).to(tl.int32), (size.to(tl.int32, bitcast=True) >> 22) - 252)
