"""Packed linears on a CPU beside what `load(packed=False)` runs: BF16 weights, inputs rounded as the scheme says.

    python benchmarks/packed_linear.py --out benchmarks/results/packed_linear.json

Shapes are those of Llama-3.2-1B. `widened` is the dequantized linear inside `products`, as `angelslim eval` runs it.
Weights are copied until they exceed the caches; times are medians over passes through the copies.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import table, write
from torch import nn

from angelslim_core.emulation import round_inputs
from angelslim_core.packed import PackedLinear
from angelslim_core.products import products, slow_on_cpu
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_quant.numerics import fp8, integer
from angelslim_quant.packed import FP8Linear, INT4Linear, INT8Linear

SHAPES = [(2048, 2048), (8192, 2048), (2048, 8192)]
ROWS = (1, 16, 512)
SCHEMES: dict[str, tuple[type[PackedLinear], Scheme]] = {
    "int8 dynamic": (INT8Linear, Scheme("", Grid(8, "int", "channel", scale_dtype="BF16"), Grid(8, "int", "token", dynamic=True))),
    "int4 g128 sym": (INT4Linear, Scheme("", Grid(4, "int", "group", 128, scale_dtype="BF16"))),
    "int4 g128 asym": (INT4Linear, Scheme("", Grid(4, "int", "group", 128, symmetric=False, scale_dtype="BF16"))),
    "fp8 dynamic": (FP8Linear, Scheme("", Grid(8, "float", "channel", scale_dtype="BF16"), Grid(8, "float", "token", dynamic=True))),
}


def median_ms(calls: list[Callable[[], Any]], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) * 1e3 / len(calls))
    return float(f"{statistics.median(times[1:]):.4g}")


def row(name: str, shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    linear_class, scheme = SCHEMES[name]
    weight = torch.randn(shape).bfloat16() * 0.02
    codes, scale, zero = (*fp8.quantize(weight, scheme.weights), None) if scheme.weights.type == "float" else integer.quantize(weight, scheme.weights)
    plain, packed = [], []
    for _ in range(max(2, 70_000_000 // (weight.nbytes))):
        quantized = Quantized(scheme, codes.clone(), scale.clone(), zero)
        linear = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
        linear.weight.data = quantized.dequantize().bfloat16()
        if scheme.input_activations:
            round_inputs(linear, scheme.input_activations)
        plain.append(linear)
        packed.append(linear_class(quantized, None, torch.bfloat16))
    found: dict[str, Any] = {
        "scheme": name,
        "shape": list(shape),
        "runs": packed[0].name,
        "packed_by_default": linear_class.pays(scheme, torch.bfloat16, "cpu"),
    }
    found["bytes"] = [weight.nbytes, packed[0].packed_bytes()]
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).bfloat16()
        wanted = plain[0](x).float()
        error = float((packed[0](x).float() - wanted).abs().max() / wanted.abs().max())
        assert error < 0.02, (name, shape, rows, error)
        few = len(plain) if rows == 1 else 4 if rows == 16 else 1
        ms = {"dequantized": median_ms([lambda m=m, x=x: m(x) for m in plain[:few]], repeats)}
        with products("cpu"):
            ms["widened"] = median_ms([lambda m=m, x=x: m(x) for m in plain[:few]], repeats)
        ms["packed"] = median_ms([lambda m=m, x=x: m(x) for m in packed[:few]], repeats)
        found[f"rows_{rows}"] = {"ms": ms, "speedup": round(ms["dequantized"] / ms["packed"], 2), "error": float(f"{error:.2g}")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [row(name, shape, given.repeats) for name in SCHEMES for shape in SHAPES]
    document = {"torch": torch.__version__, "threads": given.threads, "capability": torch.backends.cpu.get_cpu_capability()}
    write(Path(given.out), {**document, "slow_dtypes": sorted(map(str, slow_on_cpu())), "rows": rows})
    lines = []
    for r in rows:
        times = ["/".join(f"{r[f'rows_{n}']['ms'][k]:g}" for k in ("dequantized", "widened", "packed")) for n in ROWS]
        lines.append([r["scheme"], str(r["shape"]), r["runs"], *times])
    table(lines, ["scheme", "shape", "runs", *(f"ms at {n} rows: dequantized/widened/packed" for n in ROWS)])


if __name__ == "__main__":
    main()
