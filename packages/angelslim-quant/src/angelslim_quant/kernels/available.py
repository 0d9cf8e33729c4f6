"""What this machine can run, each with the reason why not."""

from __future__ import annotations

from functools import cache

import torch

from angelslim_core.kernels import triton_runs


@cache
def fp8_tensor_cores() -> tuple[bool, str]:
    """Whether there is a GPU that multiplies FP8."""
    ok = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    return ok, "" if ok else "no GPU that multiplies FP8 (compute capability 8.9 or above)"


@cache
def block_scaled_mm() -> tuple[bool, str]:
    """Whether `torch.nn.functional.scaled_mm` multiplies FP8 with scales of 1x128 and 128x128 blocks (torch 2.10, Hopper, cuBLAS 12.9)."""
    ok, why = fp8_tensor_cores()
    if not ok:
        return ok, why
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return False, "this torch has no scaled_mm with blocks"
    from .scaled_matmul import block_mm

    try:  # cuBLAS says itself what it does not do
        codes = torch.zeros(128, 512, device="cuda", dtype=torch.float8_e4m3fn)
        scale = torch.ones(4, 128, device="cuda")
        found = block_mm(codes, scale.T, codes, torch.ones(1, 4, device="cuda").T, None, torch.bfloat16)
        return bool((found == 0).all()), "scaled_mm with blocks computes something else"
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return False, f"scaled_mm with blocks: {str(error).splitlines()[0]}"


@cache
def int4_mma() -> tuple[bool, str]:
    """Whether the INT4 kernel's threads hold what mma.sync expects of them: Triton decides that, and does not promise it."""
    ok, why = triton_runs()
    if not ok:
        return ok, why
    if torch.version.cuda is None or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):  # ROCm's GPUs are "cuda" too
        return False, "no GPU with mma.sync for BF16 (compute capability 8.0 or above)"
    from .int4_matmul import Packed4
    from .triton.int4_matmul import WARPS, matmul

    generator = torch.Generator("cuda").manual_seed(0)
    words = torch.randint(-(2**31), 2**31 - 1, (2, 8, 32, 4), device="cuda", dtype=torch.int32, generator=generator)
    weight = Packed4(words, torch.ones(2, 4, 8, 2, device="cuda", dtype=torch.bfloat16), None)
    x = torch.randint(-4, 5, (9, 512), device="cuda", generator=generator).float()
    try:
        for dtype in (torch.bfloat16, torch.float16):  # whole numbers: every order of the sums gives the same
            wanted = matmul(x, weight, None, None, dtype, ptx=False)
            if not all(matmul(x, weight, None, None, dtype, warps).equal(wanted) for warps in WARPS):
                return False, "this Triton lays threads out otherwise than mma.sync expects"
    except Exception as error:  # whatever a compiler refuses with; weights are widened then
        return False, f"the INT4 kernel does not compile: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return True, ""


@cache
def lowbit_mma() -> tuple[bool, str]:
    """As `int4_mma`, for the kernel of two bits and below."""
    ok, why = triton_runs()
    if not ok:
        return ok, why
    if torch.version.cuda is None or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False, "no GPU with mma.sync for BF16 (compute capability 8.0 or above)"
    from .lowbit_matmul import PackedLow, reference
    from .triton.lowbit_matmul import SHAPES, matmul

    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randint(-4, 5, (9, 1024), device="cuda", generator=generator).float()
    try:
        pairs, planes = (4, 8, 2, 32, 4), (4, 8, 160)
        for words, rows, dtype in ((pairs, 1, torch.bfloat16), (pairs, 5, torch.bfloat16), (planes, 9, torch.float16)):
            random = torch.randint(-(2**31), 2**31 - 1, words, device="cuda", dtype=torch.int32, generator=generator)
            weight = PackedLow(random, torch.ones(4, 8, 8, 4, device="cuda", dtype=torch.bfloat16), 1.5, 1024, 128)
            wanted = reference(x[:rows], weight, None, dtype)  # whole numbers, as INT4's
            if not all(matmul(x[:rows], weight, None, dtype, shape).equal(wanted) for shape in SHAPES):
                return False, "this Triton lays threads out otherwise than mma.sync expects"
    except Exception as error:  # whatever a compiler refuses with; other kernels run then
        return False, f"the kernel of two bits does not compile: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return True, ""
