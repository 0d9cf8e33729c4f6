"""What selection costs on a GPU: each policy's `select` at three lengths, Stem's parts, memory, and whether the host waits.

    python benchmarks/sparse_select.py --out benchmarks/results/sparse_select.json

Random queries, keys and values, 32 query and 8 KV heads, D 128, BF16, one sequence. Times are medians of whole calls with
the host's part in them: from a synchronised start to a synchronised end. `gpu_ms` of Stem's parts is between events of many
calls in a row. A policy that fails is recorded with its error, and the others run. Blocks that Triton's kernels select are
held against the reference's, which runs on the same GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import gpu_ms, median, table, versions, waits, write
from torch import Tensor

from angelslim_sparseattn import BlockIndex, make_policy, select, sparse_attention
from angelslim_sparseattn.estimators import ANTIDIAGONAL_MASS, ANTIDIAGONAL_MEAN, MEAN_KEY_MASS, VALUE_BIAS
from angelslim_sparseattn.kernels.select_rows import SELECT_ROWS, Rule
from angelslim_sparseattn.patterns import causal
from angelslim_sparseattn.prefill import Prefill

POLICIES = ["stem", "xattention", "flashprefill", "cosa", "a_shape", "tri_shape", "dilated", "minference", "flexprefill", "vecattention"]
WAITING = {"vecattention"}  # its lists of keys are allocated by what is found
HEADS, KV_HEADS, WIDTH = 32, 8, 128


def qkv(tokens: int, heads: int = HEADS, kv_heads: int = KV_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((1, heads, tokens, WIDTH), (1, kv_heads, tokens, WIDTH), (1, kv_heads, tokens, WIDTH))
    return tuple(torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes)  # type: ignore[return-value]


def timed(call: Callable[[], Any], budget_s: float) -> dict[str, float]:
    """Milliseconds of a call, host's part included, after a first one; as often as the budget allows, 3 to 30 times."""
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 3 or (len(times) < 30 and time.perf_counter() < end):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        if times[-1] > 1e3 * budget_s:
            break
    return {"ms": round(median(times), 4), "min_ms": round(min(times), 4), "first_ms": round(1e3 * first, 1), "runs": len(times)}


def on_gpu(call: Callable[[], Any], runs: int = 20) -> float:
    """Milliseconds between events, a call."""
    call()
    return round(gpu_ms(call, runs), 4)


def one(name: str, tokens: int, budget_s: float) -> dict[str, Any]:
    q, k, v = qkv(tokens)
    policy = make_policy(name)

    def call() -> BlockIndex:
        return select(q, k, v, policy, check=False)

    density = call().density()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    index = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    found = {"policy": name, "tokens": tokens, "density": round(density, 4), "peak_mb": round(peak / 1e6, 1)}
    del index
    # events are what a stream of layers sees: there the host runs ahead
    return {**found, **timed(call, budget_s), "gpu_ms": on_gpu(call, 3 if name in WAITING else 10), "waits": waits(call)}


def parts_of_stem(tokens: int) -> dict[str, float]:
    from angelslim_sparseattn.kernels.triton.pooled import pool, product

    q, k, v = (x[0] for x in qkv(tokens))
    s = Prefill(q, k, v, WIDTH**-0.5, 128, tokens)
    policy = make_policy("stem")
    rule = Rule("top_k", k=tuple(policy.budget(s).tolist()), n_init=512, n_local=512)  # type: ignore[attr-defined]
    pooled = pool(q, 128, 16, True, 1.0), pool(k, 128, 16, False, 1.0)
    bias = VALUE_BIAS(s, 16)
    score = product(s, *pooled, s.scale / 16, bias, 0.2)
    return {
        "tokens": tokens,
        "pool_q_ms": on_gpu(lambda: pool(q, 128, 16, True, 1.0)),
        "pool_k_ms": on_gpu(lambda: pool(k, 128, 16, False, 1.0)),
        "values_ms": on_gpu(lambda: VALUE_BIAS(s, 16)),
        "gemm_ms": on_gpu(lambda: product(s, *pooled, s.scale / 16, bias, 0.2)),
        "select_ms": on_gpu(lambda: SELECT_ROWS(s, score, rule)),
    }


def agreement(tokens: int) -> dict[str, Any]:
    """How far scores of BF16 differ from the reference's, and blocks that only one of the two selects from the same scores."""
    q, k, v = (x[0] for x in qkv(tokens, 8, 2))
    s = Prefill(q, k, v, WIDTH**-0.5, 128, tokens)
    seen = causal(s).expand(8, -1, -1)
    bias = VALUE_BIAS(s, 16, executor="reference")
    cases = {
        "stem": (ANTIDIAGONAL_MEAN, (s, 16, bias, 0.2), Rule("top_k", k=(max(1, s.columns // 10),) * s.rows, n_init=512, n_local=512)),
        "xattention": (ANTIDIAGONAL_MASS, (s, 8, False), Rule("top_p", share=0.9, n_init=1)),
        "cosa": (ANTIDIAGONAL_MASS, (s, 8, True), Rule("top_p", share=0.95, n_init=1, ordered=True)),
        "flashprefill": (MEAN_KEY_MASS, (s,), Rule("at_least", share=0.2, n_init=256, n_local=512, n_last=256)),
    }
    result: dict[str, Any] = {"tokens": tokens, "value_bias": float((VALUE_BIAS(s, 16) - bias).abs().max())}
    for name, (estimate, args, rule) in cases.items():
        try:
            found, wanted = estimate(*args, executor="triton"), estimate(*args, executor="reference")
            lists = [SELECT_ROWS(s, each, rule, executor=executor) for each, executor in ((wanted, "triton"), (wanted, "reference"), (found, "triton"))]
            a, b, c = (BlockIndex(each.ptr, each.col, (1, 8, s.rows, s.columns), (tokens,), (tokens,)).to_bool() for each in lists)
            result[name] = {
                "score_error": float((found.abs()[seen] - wanted.abs()[seen]).abs().max() / wanted[seen].abs().max()),
                "blocks": int(b.sum()), "apart_from_same_scores": int((a ^ b).sum()), "apart": int((c ^ b).sum()),
            }  # fmt: skip
        except Exception as error:  # the others are still of use
            result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return result


def attempt(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The result, or the error with what was tried."""
    try:
        return function(*args)
    except Exception as error:  # one failure must not end the run
        return {"tried": [function.__name__, *map(str, args)], "error": f"{type(error).__name__}: {error}"[:800]}
    finally:
        torch.cuda.empty_cache()


def whole_call(tokens: int) -> dict[str, Any]:
    """Whether the host waits between queries and output."""
    q, k, v = qkv(tokens)
    policy = make_policy("stem")
    sparse_attention(q, k, v, policy, check=False)
    return {"tokens": tokens, "waits": waits(lambda: sparse_attention(q, k, v, policy, check=False))}


def long(tokens: int) -> dict[str, Any]:
    """Memory of Stem's selection where the prompt is long, of 8 query heads and 2 KV heads."""
    q, k, v = qkv(tokens, 8, 2)
    policy = make_policy("stem")
    select(q, k, v, policy, check=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    index = select(q, k, v, policy, check=False)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    lists = index.col.numel() * index.col.element_size() + index.row_ptr.numel() * 8
    return {
        "tokens": tokens,
        "heads": 8,
        "peak_mb": round(peak / 1e6, 1),
        "lists_mb": round(lists / 1e6, 1),
        **timed(lambda: select(q, k, v, policy, check=False), 0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", default="8192,32768,131072")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--budget-s", type=float, default=0.3, help="seconds of repeated calls for each policy and length")
    parser.add_argument("--long", type=int, default=1048576, help="tokens of the memory test; 0: none")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    lengths = [int(n) for n in args.lengths.split(",")]
    document: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "versions": versions(sys.executable, ["torch", "triton"]),
        "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": "bfloat16",
    }  # fmt: skip
    document["stem_parts"] = [attempt(parts_of_stem, n) for n in lengths]
    document["whole_call"] = attempt(whole_call, lengths[0])
    document["policies"] = []
    for name in args.policies.split(","):
        for tokens in lengths:
            document["policies"].append(attempt(one, name, tokens, args.budget_s))
            write(args.out, document)
    document["agreement"] = attempt(agreement, lengths[0])
    if args.long:
        document["long"] = attempt(long, args.long)
    write(args.out, document)
    head = ["policy", "tokens", "ms", "gpu_ms", "density", "peak_mb", "waits"]
    table(
        [
            [str(row.get(column, "")) for column in head] if "error" not in row else ["error", str(row["tried"]), row["error"][:120], "", "", "", ""]
            for row in document["policies"]
        ],
        head,
    )
    for key in ("stem_parts", "whole_call", "agreement", "long"):
        print(key, document.get(key))


if __name__ == "__main__":
    main()
