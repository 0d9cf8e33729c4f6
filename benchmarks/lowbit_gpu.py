"""Products with weights of 2 and of 1.25 bits on a GPU, beside BF16 on cuBLAS and, where it is installed, GemLite's A16W2.

    python benchmarks/lowbit_gpu.py --out benchmarks/results/lowbit_gpu.json
    python benchmarks/lowbit_gpu.py --tune few,many,wide   # the best ways to divide products, as JSON, for kernels/triton/lowbit_matmul

Weights are random. Each product is compared with its reference before it is timed, in a CUDA graph over copies of the weight that
together exceed the L2 cache, so that it is read from memory in every call; all alike. Ternary weights in 2 bits run as any in 2 bits.
From Hopper on a kernel of ours begins while the one before it ends, and asks for weights meanwhile (programmatic dependent launch);
`after one another` are the same without it. Kernels are compiled by processes beside each other first; GemLite's are tuned as it
tunes them ("fast"). Times are medians.
"""
# ruff: noqa: B023  (closures are called before their variables change)

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measure import table, write
from packed_gpu import copies, in_graph
from torch import Tensor
from torch.nn.functional import linear

from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_quant.kernels import lowbit_matmul
from angelslim_quant.kernels.lowbit_matmul import PackedLow, pack_low
from angelslim_quant.kernels.triton.lowbit_gemv import gemv, widen
from angelslim_quant.kernels.triton.lowbit_matmul import Shape, matmul

SHAPES = [(4096, 14336), (4096, 4096), (14336, 4096)]
BATCHES = (1, 2, 4, 8, 16)
HALF = torch.bfloat16
# bytes a second, of the vendor
PEAK = {"H200": 4.8e12, "H100": 3.35e12}
# the same kernel, but begun when the one before it has ended
APART = "after one another"
# levels, whether three of four weights are not zero, bits a weight
FORMATS = {"2 bits": ((-3, -1, 1, 3), False, 2.0), "1.25 bits": ((-1, 0, 1), True, 1.25)}

# warps, warps beside each other, registers, inputs a step ahead, steps that weights are ahead, steps written out
FEW = [
    *(Shape(16, 1, 128, False, deep) for deep in (1, 2, 3, 4, 7)), *(Shape(16, 1, 64, False, deep) for deep in (1, 2, 3)), Shape(16, 1, 96, False, 3),
    Shape(16, 1, 128, True, 1), Shape(16, 1, 128, True, 3), Shape(32, 1, 64, False, 1), Shape(32, 1, 64, False, 3),
    *(Shape(8, 1, 128, False, deep, 14) for deep in (1, 3, 5, 8)), Shape(8, 1, 64, False, 2, 14), Shape(8, 1, 168, True, 3), Shape(8, 1, 128, True, 2, 0),
    Shape(4, 1, 128, False, 3), Shape(4, 1, 128, False, 5, 8), Shape(4, 1, 128, True, 3), Shape(2, 1, 128, False, 5, 16),
]  # fmt: skip
MANY = [
    Shape(16, 1, 128, False, 1), Shape(16, 1, 128, False, 2), Shape(16, 1, 128, False, 3), Shape(8, 1, 128, False, 1), Shape(8, 1, 128, False, 3),
    Shape(8, 1, 255, False, 4), Shape(8, 1, 168, True, 2), Shape(8, 2, 128, False, 2), Shape(4, 1, 128, False, 1), Shape(4, 1, 128, False, 3), Shape(4, 1, 255, False, 4),
]  # fmt: skip


def quantized(name: str, shape: tuple[int, int], group: int) -> Quantized:
    levels, sparse, _ = FORMATS[name]
    codes = torch.tensor(levels, dtype=torch.int8, device="cuda")[torch.randint(len(levels), shape, device="cuda")]
    if sparse:
        signs = torch.randint(2, (shape[0], shape[1] // 4, 4), device="cuda") * 2 - 1
        codes = signs.scatter(2, torch.randint(4, (*signs.shape[:2], 1), device="cuda"), 0).flatten(1).to(torch.int8)
    grid = Grid(4, "int", "group" if group else "channel", group or None, levels=levels, sparsity=(3, 4) if sparse else None)
    return Quantized(Scheme(name, grid), codes, (torch.rand(shape[0], shape[1] // group if group else 1, device="cuda") * 0.02 + 0.01).to(HALF))


def format_of(name: str) -> str:
    return next((f for f in FORMATS if name.startswith(f)), "2 bits")


def cloned(weight: PackedLow) -> PackedLow:
    return weight._replace(words=weight.words.clone(), scale=weight.scale.clone())


def error(found: Tensor, wanted: Tensor) -> float:
    value = float((found.float() - wanted).abs().max() / wanted.abs().max())
    assert value < 0.02, f"differs from the reference by {value}"
    return round(value, 5)


def gemlite_linear(given: Quantized, dtype: torch.dtype) -> Any:
    """GemLite's linear of two bits, for codes and the scale of a group; with zero points, as it packs any."""
    from gemlite import DType, GemLiteLinear

    kind = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    outputs, inputs = given.codes.shape
    found = GemLiteLinear(2, group_size=inputs // given.scale.shape[1], in_features=inputs, out_features=outputs, input_dtype=kind, output_dtype=kind)
    codes, scale = ((given.codes + 3) // 2).to(torch.uint8), (given.scale * 2).to(dtype)
    found.pack(codes, scale, torch.full_like(scale, 1.5), None)
    return found


def measured(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape, batch in itertools.product(given.shapes, given.batches):
        x = torch.randn(batch, shape[1], device="cuda").to(HALF)
        for name in ("bf16 cuBLAS", *FORMATS, *(f"{f} {way}" for f in FORMATS for way in (APART, "gemv") if batch == 1), *given.peers):
            row: dict[str, Any] = {"shape": shape, "rows": batch, "kernel": name}
            try:
                row |= timed(name, shape, x, given.group)
            except Exception as problem:  # one that fails must not hide the others
                row["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
            print(row, flush=True)
            yield row


def timed(name: str, shape: tuple[int, int], x: Tensor, group: int) -> dict[str, Any]:
    if name == "bf16 cuBLAS":
        weights = [torch.randn(shape, device="cuda").to(HALF) for _ in range(copies(shape, 16))]
        calls: list[Callable[[], Any]] = [lambda w=w: linear(x, w) for w in weights]
        return {"us": round(in_graph(calls), 2), "bytes": weights[0].nbytes}
    given = quantized(format_of(name), shape, group)
    number = copies(shape, 1.25 if name.startswith("1.25") else 2)
    if "GemLite" in name:
        x = x.to(torch.float16 if "fp16" in name else HALF)
        layer = gemlite_linear(given, x.dtype)
        layers = [copy.deepcopy(layer) for _ in range(number)]
        calls, size = [lambda m=m: m(x) for m in layers], sum(t.nbytes for t in (layer.W_q, layer.scales, layer.zeros))
    else:
        weight = pack_low(given)
        weights_ = [cloned(weight) for _ in range(number)]
        run = gemv if name.endswith("gemv") else functools.partial(matmul, early=not name.endswith(APART))
        calls, size = [lambda w=w: run(x, w, None, HALF) for w in weights_], weight.words.nbytes + weight.scale.nbytes
    off = error(calls[0](), x.float() @ given.dequantize().T)
    return {"us": round(in_graph(calls), 2), "error": off, "bytes": size}


def compared(rows: list[dict[str, Any]]) -> None:
    """Speedups over cuBLAS, and the share of the memory's peak that weights are read with."""
    name = torch.cuda.get_device_name()
    peak = next((p for n, p in PEAK.items() if n in name), None)
    plain = {(r["shape"], r["rows"]): r["us"] for r in rows if r["kernel"] == "bf16 cuBLAS" and "us" in r}
    for row in rows:
        if "us" in row:
            row["speedup"] = round(plain.get((row["shape"], row["rows"]), 0) / row["us"], 2)
            row["of_peak"] = round(row["bytes"] / row["us"] * 1e6 / peak, 3) if peak else None


def divisions(part: str, shape: tuple[int, int]) -> list[Shape]:
    tiles, chunks = shape[0] // 32, shape[1] // 128
    return [s for s in (FEW if part == "few" else MANY) if tiles % s.wide == 0 and s.warps // s.wide <= chunks]


def tune(given: argparse.Namespace) -> dict[str, Any]:
    best: dict[str, Any] = {}
    rows = {"few": (1, 8), "many": (16,), "wide": (32, 64, 96)}
    for part, shape, name in itertools.product(given.tune.split(","), given.shapes, FORMATS):
        source = quantized(name, shape, given.group)
        weights = [cloned(pack_low(source)) for _ in range(copies(shape, FORMATS[name][2]))]
        for batch in rows[part]:
            x = torch.randn(batch, shape[1], device="cuda").to(HALF)
            wanted, found = x.float() @ source.dequantize().T, []
            if part == "wide":
                found.append((round(in_graph([lambda w=w: linear(x, widen(w, HALF)) for w in weights], 3), 2), "widened"))
                found.append((round(in_graph([lambda w=w: matmul(x, w, None, HALF) for w in weights], 3), 2), "mma"))
            for divided in divisions(part, shape) if part != "wide" else []:
                try:
                    calls = [lambda w=w: matmul(x, w, None, HALF, divided) for w in weights]
                    error(calls[0](), wanted)
                    found.append((round(in_graph(calls, 3), 2), tuple(divided)))
                except Exception as problem:  # too many registers, for instance
                    print(name, shape, batch, divided, f"{type(problem).__name__}: {str(problem)[:80]}", flush=True)
            best[f"{name} {shape} rows {batch}"] = sorted(found, key=lambda f: f[0])[:6]
            print(f"{name} {shape} rows {batch}", best[f"{name} {shape} rows {batch}"], flush=True)
    return best


Case = tuple[str, tuple[int, int], int, int, Shape | None]


def compile_case(case: Case) -> float:
    """Call a kernel once, in a process of its own, so that Triton's cache holds it."""
    name, shape, batch, group, divided = case
    start = time.perf_counter()
    with torch.no_grad():
        source = quantized(format_of(name), shape, group)
        x = torch.randn(batch, shape[1], device="cuda").to(torch.float16 if "fp16" in name else HALF)
        if "GemLite" in name:
            gemlite_linear(source, x.dtype)(x)
        elif name.endswith("gemv"):
            gemv(x, pack_low(source), None, HALF)
        elif name.endswith(APART):
            matmul(x, pack_low(source), None, HALF, early=False)
        elif batch >= lowbit_matmul.WIDE_ROWS:
            widen(pack_low(source), HALF)
        else:
            matmul(x, pack_low(source), None, HALF, divided)
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compile_all(given: argparse.Namespace) -> dict[str, Any]:
    cases: list[Case] = []
    for shape in {inputs: (outputs, inputs) for outputs, inputs in given.shapes}.values():  # kernels do not depend on how many outputs there are
        if given.tune:
            rows = {"few": 1, "many": 16}
            cases += [(f, shape, rows[p], given.group, s) for p in given.tune.split(",") if p in rows for f in FORMATS for s in divisions(p, shape)]
        else:
            cases += [(f"{f} {way}", shape, 1, given.group, None) for f in FORMATS for way in (APART, "gemv")]
            cases += [(name, shape, batch, given.group, None) for name in given.peers for batch in given.batches]
        cases += [(f, shape, batch, given.group, None) for f in FORMATS for batch in (1, 16, lowbit_matmul.WIDE_ROWS)]
    start = time.perf_counter()
    with ProcessPoolExecutor(given.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        seconds, failed = [], 0
        for future in [pool.submit(compile_case, case) for case in cases]:
            try:
                seconds.append(future.result())
            except Exception as problem:  # seen again, with its case, when it is timed
                failed += 1
                print(f"{type(problem).__name__}: {str(problem)[:120]}", flush=True)
    found = {"cases": len(cases), "failed": failed, "seconds": round(time.perf_counter() - start, 1), "of_one_process": round(sum(seconds), 1)}
    print("compiled", found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale; 0: all")
    parser.add_argument("--shapes", default=",".join(f"{o}x{i}" for o, i in SHAPES), help="outputs x inputs")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--tune", default="", help="of few, many, wide: try all ways to divide products instead")
    parser.add_argument("--peers", default="GemLite bf16,GemLite fp16", help="what of GemLite is measured where it is installed")
    parser.add_argument("--processes", type=int, default=14, help="that compile beside one another")
    given = parser.parse_args()
    given.shapes = [(int(o), int(i)) for o, _, i in (shape.partition("x") for shape in given.shapes.split(","))]
    given.batches = [int(b) for b in given.batches.split(",")]
    given.peers = [p for p in given.peers.split(",") if p]
    if given.peers and not given.tune and importlib.util.find_spec("gemlite") is None:
        print("GemLite is not installed (pip install gemlite): it is left out")
        given.peers = []
    torch.manual_seed(0)
    document: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "group": given.group, "compiled": compile_all(given)}
    start = time.perf_counter()
    with torch.no_grad():
        if given.tune:
            document["tune"] = tune(given)
            print(json.dumps(document["tune"]))
        else:
            document["rows"] = []
            for row in measured(given):
                document["rows"].append(row)
            compared(document["rows"])
            keys = ["us", "speedup", "of_peak", "error"]
            table(
                [[str(r["shape"]), str(r["rows"]), r["kernel"], *(str(r.get(k, "")) for k in keys), r.get("failed", "")[:60]] for r in document["rows"]],
                ["shape", "rows", "kernel", *keys, "failed"],
            )
    document["seconds"] = round(time.perf_counter() - start, 1)
    print(f"{document['seconds']} s", flush=True)
    if given.out:
        write(Path(given.out), document)


if __name__ == "__main__":
    main()
