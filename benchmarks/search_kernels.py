"""Fused quantization: each operation's reference, its torch and its Triton implementation, in GB/s of BF16 weights that are read.

    python benchmarks/search_kernels.py --out benchmarks/results/search_kernels.json

Runs on the GPU where there is one. Every implementation is first held against the reference, computed on the CPU, bit by
bit; blocks whose scale differs must have errors that differ by no more than a sum in another order does. Without a GPU
Triton's implementations are left out, and so is the reference of the large shape. Times are medians, after a first call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import median, table, versions, write
from torch import Tensor

from angelslim_core.kernels import Kernel
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_quant.kernels.quantize_fp8 import QUANTIZE_FP8
from angelslim_quant.kernels.quantize_groups import QUANTIZE_GROUPS
from angelslim_quant.kernels.search_blocks import SEARCH_BLOCKS
from angelslim_quant.kernels.search_range import SEARCH_RANGE
from angelslim_quant.numerics.microscale import weight_scale_of
from angelslim_quant.passes.gptq import SHRINKS

SHAPES = [(4096, 4096), (14336, 4096)]
NVFP4, MXFP4 = Grid(4, "float", "tensor_group", 16, scale_dtype="F8_E4M3"), Grid(4, "float", "group", 32, scale_dtype="U8")
MXFP8 = Grid(8, "float", "group", 32, scale_dtype="U8")
INT4, INT4_ASYMMETRIC = (Grid(4, "int", "group", 128, symmetric=symmetric, scale_dtype="BF16") for symmetric in (True, False))
INT8 = Grid(8, "int", "channel", scale_dtype="BF16")
FP8 = {
    "block": Grid(8, "float", "block", block_structure=(128, 128)),
    "channel": Grid(8, "float", "channel", scale_dtype="BF16"),
    "tensor": Grid(8, "float", "tensor"),
}
NEIGHBOURS = (0, 1, -1, 2, -2, 3, 4, 5, 6)


def cases(weight: Tensor, importance_I: Tensor) -> dict[str, tuple[Kernel, tuple[Any, ...]]]:
    """Name -> operation and its arguments."""
    t = weight_scale_of(weight.abs().amax())
    return {
        "nvfp4 search": (SEARCH_BLOCKS, (weight, NVFP4, t, None, NEIGHBOURS)),
        "nvfp4 search weighted": (SEARCH_BLOCKS, (weight, NVFP4, t, importance_I, NEIGHBOURS)),
        "nvfp4": (SEARCH_BLOCKS, (weight, NVFP4, t, None, (0,))),
        "mxfp4 search": (SEARCH_BLOCKS, (weight, MXFP4, None, None, (0, -1, 1))),
        "mxfp4": (SEARCH_BLOCKS, (weight, MXFP4, None, None, (0,))),
        "mxfp8": (SEARCH_BLOCKS, (weight, MXFP8, None, None, (0,))),
        "int4 g128 search": (SEARCH_RANGE, (weight, INT4, importance_I, SHRINKS)),
        "int4 g128 asym search": (SEARCH_RANGE, (weight, INT4_ASYMMETRIC, importance_I, SHRINKS)),
        "int8 channel search": (SEARCH_RANGE, (weight, INT8, importance_I, SHRINKS)),
        "int4 g128": (QUANTIZE_GROUPS, (weight, INT4)),
        "int4 g128 asym": (QUANTIZE_GROUPS, (weight, INT4_ASYMMETRIC)),
        "int8 channel": (QUANTIZE_GROUPS, (weight, INT8)),
        **{f"fp8 {name}": (QUANTIZE_FP8, (weight, grid)) for name, grid in FP8.items()},
    }


def moved(args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


def errors(kernel: Kernel, args: tuple[Any, ...], found: tuple[Any, ...]) -> Tensor:
    """Weighted squared errors of whatever shares a scale."""
    weight, grid = args[:2]
    if kernel is SEARCH_RANGE:
        result, importance = Quantized(Scheme("", grid), QUANTIZE_GROUPS.reference(weight, grid, *found)[0], *found), args[2]
    else:
        result, importance = Quantized(Scheme("", grid), found[0], found[1], global_scale=args[2]), args[3]
    squares = result.dequantize().sub_(weight.float()).square_()
    return (squares if importance is None else squares * importance).reshape(result.scale.numel(), -1).sum(-1)


def disagreement(kernel: Kernel, args: tuple[Any, ...], found: tuple[Any, ...], wanted: tuple[Any, ...]) -> dict[str, float]:
    """Share of values that are not the reference's; raises SystemExit if they differ by more than ties of sums explain."""
    parts = [(a.cpu(), b) for a, b in zip(found, wanted, strict=True) if b is not None]
    shares = [float((a.view(torch.uint8) != b.view(torch.uint8)).float().mean()) for a, b in parts]
    if not any(shares):
        return {"differ": 0.0}
    if kernel not in (SEARCH_BLOCKS, SEARCH_RANGE):
        raise SystemExit(f"{kernel.op}: differs from its reference in {shares} of its outputs")
    ours, theirs = errors(kernel, args, tuple(None if a is None else a.cpu() for a in found)), errors(kernel, args, wanted)
    worst = float(((ours - theirs).abs() / theirs.clamp_min(1e-30)).max())
    if worst > 1e-5:
        raise SystemExit(f"{kernel.op}: errors of its choice differ by {worst} of the reference's")
    return {"differ": max(shares), "worst_error_ratio": worst}


def seconds(run: Callable[[], object], device: str, limit: float) -> float:
    """Of one call: the median of up to nine, while `limit` seconds last."""
    found: list[float] = []
    begun = time.perf_counter()
    while not found or (len(found) < 9 and time.perf_counter() - begun < limit):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", type=int, default=512, help="of the weight on which agreement is checked")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*SHAPES[-1], generator=generator).mul_(0.02).bfloat16()
    weight[5, 64:256], weight[7, 3] = 0, 3.0
    importance = torch.rand(SHAPES[-1][1], generator=generator) ** 3
    names = ["torch", *(["triton"] if device == "cuda" else [])]
    agreement: dict[str, dict[str, Any]] = {}
    for case, (kernel, args) in cases(weight[: given.rows], importance).items():
        wanted = kernel.reference(*args)
        functions = {i.name: i.function for i in kernel.implementations}
        agreement[case] = {name: disagreement(kernel, args, functions[name](*moved(args, device)), wanted) for name in names}
    rows = []
    for shape in SHAPES:
        for case, (kernel, args) in cases(weight[: shape[0]].to(device), importance.to(device)).items():
            functions = {i.name: i.function for i in kernel.implementations if i.name in names}
            if device == "cuda" or shape == SHAPES[0]:
                functions = {"reference": kernel.reference, **functions}
            row: dict[str, Any] = {"case": case, "op": kernel.op, "shape": list(shape)}
            for name, function in functions.items():
                if device == "cuda":
                    function(*args)  # compiles
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                took = seconds(lambda function=function, args=args: function(*args), device, 0.3)
                row[name] = {"ms": round(took * 1e3, 3), "gb_per_s": float(f"{2 * shape[0] * shape[1] / took / 1e9:.4g}")}
                if device == "cuda":
                    row[name]["extra_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)
            rows.append(row)
    document = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(sys.executable, ["torch", "triton"]),
        "agreement": agreement,
        "rows": rows,
    }
    write(Path(given.out), document)
    head = ["case", "shape", *(f"{name} ms" for name in ("reference", *names)), *(f"{name} GB/s" for name in names)]
    columns = [("ms", name) for name in ("reference", *names)] + [("gb_per_s", name) for name in names]
    table([[r["case"], f"{r['shape'][0]}x{r['shape'][1]}", *(str(r.get(name, {}).get(key, "")) for key, name in columns)] for r in rows], head)


if __name__ == "__main__":
    main()
