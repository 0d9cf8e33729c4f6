"""Speed of DAQ's search: gigabytes of resident BF16 weights a minute, on a GPU or on CPU threads.

    python benchmarks/daq_speed.py --device cuda --out benchmarks/results/daq_speed.json

Weights of Llama-3.1-8B's shapes, generated: N(0, 0.02^2), changed by N(0, 3e-4^2). What is timed is the whole of
`numerics.delta.quantize`: tiles, search, codes and totals. GB count the weights, without their base. "8b layer" is one decoder
layer's seven weights, one after another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine, write

from angelslim_core.schemes import Grid
from angelslim_quant.numerics.delta import Search, quantize

SHAPES = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336))
# q, k, v, o, gate, up, down
LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
GRIDS = {
    "fp8 block": Grid(8, "float", "block", block_structure=(128, 128)),
    "fp8 channel": Grid(8, "float", "channel", scale_dtype="BF16"),
    "int4 g128": Grid(4, "int", "group", 128, scale_dtype="BF16"),
    "nvfp4": Grid(4, "float", "tensor_group", 16, scale_dtype="F8_E4M3"),
}
SEARCHES = {
    "joint": Search("joint", 1.0, 1.9),
    "joint dense": Search("joint", 1.0, 1.9, dense=True),
    "mse and delta rounding": Search("mse", 1.0, 1.9, max_projection=1.2),
}


Pair = tuple[torch.Tensor, torch.Tensor]


def pair(shape: tuple[int, int], rows: int, generator: torch.Generator) -> Pair:
    """A weight of at most so many rows and the base it was trained from."""
    base = 0.02 * torch.randn(min(shape[0], rows), shape[1], device=generator.device, generator=generator)
    return (base + 3e-4 * torch.randn(base.shape, device=generator.device, generator=generator)).bfloat16(), base.bfloat16()


def measured(grid: Grid, search: Search, pairs: list[Pair], repeats: int) -> float:
    """Median seconds for all weights."""
    device = pairs[0][0].device
    scale = torch.tensor([2.0**-14], device=device) if grid.strategy == "tensor_group" else None
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for weight, base in pairs:
            quantize(weight, base, grid, search, scale)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1 << 20, help="Rows of each weight, at most.")
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    out = Path(given.out)
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    generator = torch.Generator(given.device).manual_seed(0)
    rows: dict[str, dict[str, float]] = {}
    for shapes in (*((shape,) for shape in SHAPES), LAYER):
        pairs = [pair(shape, given.rows, generator) for shape in shapes]
        of = "8b layer" if shapes is LAYER else "x".join(map(str, pairs[0][0].shape))
        for grid_name, grid in GRIDS.items():
            for name, search in SEARCHES.items():
                seconds = measured(grid, search, pairs, given.repeats)
                rate = sum(weight.nbytes for weight, _ in pairs) / 1e9 / seconds * 60
                rows.setdefault(f"{grid_name}, {name}", {})[of] = round(rate, 1)
                print(f"{of} {grid_name} {name}: {seconds * 1e3:.2f} ms, {rate:.0f} GB a minute", flush=True)
    document[given.device] = {"machine": machine(), "threads": torch.get_num_threads(), "gb_per_minute": rows}
    write(out, document)


if __name__ == "__main__":
    main()
