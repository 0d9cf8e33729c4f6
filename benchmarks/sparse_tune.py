"""Times every configuration of block-sparse attention, and its peers, over the same random index.

    python benchmarks/sparse_tune.py --out sparse_tune.json [--lengths 8192,32768] [--densities 0.1,0.25] [--only 64,flash]

One sequence, 32 query heads, 8 KV heads, 128 wide, bf16; blocks of 128 at random per head, block 0 and the last two of each row. Each
configuration is first compiled and compared with fp64 in a process of its own, all at once; what fails or hangs there is recorded and
not timed. TFLOP/s count kept blocks only: 2 * heads * length^2 * width * density / time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from angelslim_sparseattn import BlockIndex
from angelslim_sparseattn.kernels.block_sparse import BLOCK_SPARSE
from angelslim_sparseattn.kernels.triton.block_sparse import CONFIGS, block_sparse
from angelslim_sparseattn.timing import timed

HEADS, KV_HEADS, WIDTH, BLOCK = 32, 8, 128, 128
PEERS = ("flex", "flash")
CHECK_S, TIME_S = 90, 60


def attention(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """(q, k, v, index, scale) -> (out, lse) of a configuration or a peer."""
    if name in PEERS:
        return partial(BLOCK_SPARSE, executor=name)
    return partial(block_sparse, config=CONFIGS[name])


def qkv(queries: int, keys: int, heads: int = HEADS, kv_heads: int = KV_HEADS) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (1, heads, queries, WIDTH), (1, kv_heads, keys, WIDTH), (1, kv_heads, keys, WIDTH)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for shape in shapes]


def random_index(queries: int, keys: int, heads: int, share: float) -> BlockIndex:
    """Blocks at random, block 0 and the last two."""
    generator = torch.Generator("cuda").manual_seed(1)
    cells = torch.rand(1, heads, -(-queries // BLOCK), -(-keys // BLOCK), device="cuda", generator=generator) < share
    i, j = (torch.arange(n, device="cuda") for n in cells.shape[2:])
    first, last = ((i * BLOCK + keys - queries) // BLOCK)[:, None], (((i + 1) * BLOCK).clamp(max=queries) - 1 + keys - queries)[:, None] // BLOCK
    return BlockIndex.from_bool((cells | (j == 0) | (j >= first - 1)) & (j <= last), (queries,), (keys,))


def check(name: str) -> dict[str, Any]:
    """Largest error relative to fp64, of outputs over SDPA's own in bf16, and of LSE, over shapes with tails and offsets."""
    worst: dict[str, Any] = {"error": 0.0, "ratio": 0.0, "lse": 0.0}
    for queries, keys in ((1024, 1024), (1000, 1000), (640, 1792)):
        q, k, v = qkv(queries, keys, 8, 2)
        for share in (0.3, 1.0):
            index = random_index(queries, keys, 8, share)
            out, lse = attention(name)(q, k, v, index, WIDTH**-0.5)
            keep = index.to_bool().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :queries, :keys]
            keep = keep & torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)
            wide = [x.double() for x in (q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1))]
            scores = (wide[0] @ wide[1].mT * WIDTH**-0.5).masked_fill(~keep, -torch.inf)
            wanted, wanted_lse = scores.softmax(-1) @ wide[2], scores.logsumexp(-1)
            own = scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
            error, of_sdpa = (float((x.double() - wanted).norm() / wanted.norm()) for x in (out, own))
            found = {"error": error, "ratio": error / of_sdpa, "lse": float((lse - wanted_lse).abs().max())}
            worst = {key: max(worst[key], value) if value == value else float("inf") for key, value in found.items()}
    q, k, v = qkv(4096, 4096)
    index = random_index(4096, 4096, HEADS, 0.3)
    outs = [attention(name)(q, k, v, index, WIDTH**-0.5)[0] for _ in range(3)]
    worst["same"] = all(out.equal(outs[0]) for out in outs)
    worst["ok"] = worst["error"] <= 8e-3 and worst["ratio"] <= 1.5 and worst["lse"] < 1e-2 and worst["same"]
    return worst


def times(names: list[str], lengths: list[int], densities: list[float], done: Callable[[dict[str, Any]], None]) -> None:
    """Hands over one row for dense attention at each length and one for each name, length and density."""
    for length in lengths:
        q, k, v = qkv(length, length)
        flops = 2 * HEADS * length**2 * WIDTH
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            dense = timed(lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 10, "cuda").median
        done({"name": "dense cuDNN", "length": length, "ms": dense, "tflops": flops / dense / 1e9})
        for share in densities:
            index = random_index(length, length, HEADS, share)
            density = index.density()
            for name in names:
                row = {"name": name, "length": length, "share": share, "density": density}
                try:
                    ms = timed(partial(attention(name), q, k, v, index, WIDTH**-0.5), 10, "cuda").median
                except Exception as error:  # the next one may run; what happened is in the record
                    done({**row, "failed": f"{type(error).__name__}: {error}"[:300]})
                else:
                    done({**row, "ms": ms, "tflops": flops * density / ms / 1e9, "speedup": dense / ms})


def child(arguments: list[str], timeout: float) -> list[dict[str, Any]]:
    """The JSON lines that this script prints in a process of its own, with why it ended early, if it did."""
    with subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout)
            why = None if process.returncode == 0 else (err.strip().splitlines() or [f"ended with {process.returncode}"])[-1][:300]
        except subprocess.TimeoutExpired:
            process.kill()
            out, why = process.communicate()[0], f"no end after {timeout} s"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return rows if why is None else [*rows, {"ok": False, "failed": why}]


def show(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--densities", default="0.1,0.25")
    parser.add_argument("--only", default=",".join([*CONFIGS, *PEERS]), help="configurations and peers, comma separated")
    parser.add_argument("--check", action="store_true", help="only compare with fp64, in this process")
    parser.add_argument("--time", action="store_true", help="only time, in this process")
    args = parser.parse_args()
    names = args.only.split(",")
    if args.check:
        for name in names:
            show({"name": name, **check(name)})
        return
    if args.time:
        times(names, [int(n) for n in args.lengths.split(",")], [float(d) for d in args.densities.split(",")], show)
        return
    start = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        checked = dict(zip(names, pool.map(lambda name: child(["--check", "--only", name], CHECK_S)[-1], names), strict=True))
    right = [name for name in names if checked[name]["ok"]]
    checks_s = time.perf_counter() - start
    document = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": checked, "checks_s": checks_s}
    rows: list[dict[str, Any]] = []
    # kernels that synchronise by hand come last, in a process of their own: one that hangs takes no other with it
    by_hand = [name for name in right if name in CONFIGS and CONFIGS[name].hopper]
    for group in filter(None, ([name for name in right if name not in by_hand], by_hand)):
        rows += child(["--time", "--only", ",".join(group), "--lengths", args.lengths, "--densities", args.densities], TIME_S)
        if args.out:
            write(args.out, {**document, "rows": rows})
    for row in sorted(rows, key=lambda row: (row.get("length", 0), row.get("share", 0), row.get("ms", 1e9))):
        show(row)
    for name, found in checked.items():
        if not found["ok"]:
            show({"name": name, **found})


if __name__ == "__main__":
    main()
