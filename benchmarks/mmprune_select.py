"""What maximal marginal relevance costs beside the prefill that it shortens, against plain torch loops over picks, and how good its picks are.

    python benchmarks/mmprune_select.py --out benchmarks/results/mmprune_select.json
    python benchmarks/mmprune_select.py --device cpu --quick --out /tmp/mmprune_select.json

Random features around a few dozen centres, as tokens of an image repeat each other, width 3584, 8 samples, a quarter of the tokens kept.
`gram` and `streaming` are plain torch, batched over samples and a step a pick: the first makes all cosines beforehand, the second those of
each pick. `ours` is what a call chooses by itself, the look for NaN and the host's part included: from a synchronised start to a
synchronised end, medians. `regret` is the largest amount by which a pick's score, in FP32 and given our earlier picks, is below the best.
On a GPU `kernels_ms` are its times by kernel, `waits` says where the host waits if NaN is not looked for. Prefill is that of a decoder of
8B's shape with random weights, over the samples' tokens alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import median, table, versions, waits, write
from torch import Tensor

from angelslim_mmprune.marginal_relevance import mmr, mmr_order, scaled

LAM = 0.5
MOST_GRAM_BYTES = 16 << 30  # of the plain loop


def tokens_of(batch: int, tokens: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Features, FP32, and importance."""
    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn(batch, 48, width, generator=generator, device=device)
    which = torch.randint(48, (batch, tokens, 1), generator=generator, device=device)
    x = torch.randn(batch, tokens, width, generator=generator, device=device)
    return x.add_(centres.gather(1, which.expand(-1, -1, width)), alpha=1.5), torch.rand(batch, tokens, generator=generator, device=device)


def loop(x: Tensor, importance: Tensor, k: int, gram: bool) -> Tensor:
    """[B, K] in order; a step a pick."""
    x = torch.nn.functional.normalize(x.float(), dim=-1)
    products = x @ x.mT if gram else None
    low, high = importance.aminmax(dim=1, keepdim=True)
    weight = (importance - low) / (high - low + 1e-6)
    row = torch.arange(len(x), device=x.device)
    nearest, taken = torch.full_like(weight, -1), torch.zeros_like(weight, dtype=torch.bool)
    picks = []
    for t in range(k):
        score = weight if t == 0 else LAM * weight - (1 - LAM) * nearest
        best = score.masked_fill(taken, -torch.inf).argmax(1)
        taken[row, best] = True
        cosine = products[row, best] if products is not None else torch.bmm(x, x[row, best][..., None])[..., 0]
        nearest = torch.maximum(nearest, cosine)
        picks.append(best)
    return torch.stack(picks, 1)


def regret(x: Tensor, importance: Tensor, order: Tensor) -> float:
    x = torch.nn.functional.normalize(x.float(), dim=-1)
    weight = scaled(importance, (x.shape[1],) * len(x))
    row = torch.arange(len(x), device=x.device)
    nearest, taken = torch.full_like(weight, -1), torch.zeros_like(weight, dtype=torch.bool)
    worst = torch.zeros(len(x), device=x.device)
    for t in range(order.shape[1]):
        score = (weight if t == 0 else LAM * weight - (1 - LAM) * nearest).masked_fill(taken, -torch.inf)
        worst = worst.maximum(score.amax(1) - score[row, order[:, t]])
        taken[row, order[:, t]] = True
        nearest = torch.maximum(nearest, torch.bmm(x, x[row, order[:, t]][..., None])[..., 0])
    return float(worst.max())


def timed(call: Callable[[], Any], wait: Callable[[], None], budget_s: float) -> dict[str, float]:
    """Milliseconds of a call after a first one; 3 to 20 times, as the budget allows, once where one takes longer than it."""
    call()
    wait()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while not times or (time.perf_counter() < end and len(times) < 20) or (len(times) < 3 and times[-1] < 1e3 * budget_s):
        start = time.perf_counter()
        call()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": median(times), "min_ms": round(min(times), 4), "runs": len(times)}


def by_kernel(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a call on the GPU, by kernel; those that take less than 1% together."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    found = {e.key[:60]: e.self_device_time_total / 1e3 for e in seen.key_averages() if e.self_device_time_total}
    whole = sum(found.values())
    large = {name: round(ms, 4) for name, ms in sorted(found.items(), key=lambda item: -item[1]) if ms >= whole / 100}
    return {**large, "others": round(whole - sum(large.values()), 4)}


def prefill(batch: int, tokens: int, quick: bool, device: str, wait: Callable[[], None], budget_s: float) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaModel

    hidden, layers, heads, kv_heads, inner = (64, 2, 4, 2, 128) if quick else (4096, 32, 32, 8, 14336)
    config = LlamaConfig(
        vocab_size=128, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner
    )
    dtype, before = torch.float32 if device == "cpu" else torch.bfloat16, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaModel(config).eval()
    finally:
        torch.set_default_dtype(before)
    x = torch.randn(batch, tokens, hidden, device=device, dtype=dtype)
    with torch.inference_mode():
        found = timed(lambda: model(inputs_embeds=x, use_cache=True), wait, budget_s)
    return {"hidden": hidden, "layers": layers, "batch": batch, "tokens": tokens, **found}


def one(batch: int, tokens: int, width: int, dtype: torch.dtype, device: str, wait: Callable[[], None], budget_s: float, loops: bool) -> dict[str, Any]:
    x, importance = tokens_of(batch, tokens, width, device)
    x = x.to(dtype)
    k = tokens // 4
    order = mmr_order(x, importance, k, LAM)
    row: dict[str, Any] = {"tokens": tokens, "k": k, "width": width, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    row["regret"] = regret(x, importance, order)
    row["ours"] = timed(lambda: mmr(x, importance, k, LAM), wait, budget_s)
    if device != "cpu":
        row["kernels_ms"] = by_kernel(lambda: mmr(x, importance, k, LAM))
        row["waits"] = waits(lambda: mmr(x, importance, k, LAM, check=False))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mmr(x, importance, k, LAM)
        row["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    if loops:
        names = ["streaming"] if 4 * batch * tokens * tokens > MOST_GRAM_BYTES else ["gram", "streaming"]
        for name in names:
            same = loop(x, importance, k, name == "gram")
            row[f"samples_as_{name}"] = sum(set(a.tolist()) == set(b.tolist()) for a, b in zip(order, same, strict=True))
            row[name] = timed(lambda gram=name == "gram": loop(x, importance, k, gram), wait, budget_s)  # type: ignore[misc]
        row["loop_over_ours"] = round(min(row[name]["ms"] for name in names) / row["ours"]["ms"], 2)
    return row


def attempt(*args: Any) -> dict[str, Any]:
    """The row, or the error with what was tried."""
    try:
        return one(*args)
    except Exception as error:  # one failure must not end the run
        return {"tried": [str(a) for a in args[:4]], "error": f"{type(error).__name__}: {error}"[:800]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see whether all runs")
    parser.add_argument("--tokens", default="", help="of a sample; by default 576,1024,4096,16384")
    parser.add_argument("--budget-s", type=float, default=2.0, help="seconds of repeated calls for each number")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU, or --device cpu")
    torch.backends.cuda.matmul.allow_tf32 = False  # the loops and the regret are FP32's
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    batch, width = (2, 64) if args.quick else (8, 3584)
    sizes = [int(n) for n in (args.tokens or ("64,160" if args.quick else "576,1024,4096,16384")).split(",")]
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "versions": versions(sys.executable, ["torch", "triton", "transformers"]),
        "lam": LAM, "quick": args.quick, "rows": [],
    }  # fmt: skip
    for tokens in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            # the loops compute in FP32 whatever they are given
            document["rows"].append(attempt(batch, tokens, width, dtype, args.device, wait, args.budget_s, dtype == torch.float32))
            write(args.out, document)
    for tokens in [n for n in sizes if n <= 4096]:
        found = prefill(batch, tokens, args.quick, args.device, wait, args.budget_s)
        for row in document["rows"]:
            if row.get("tokens") == tokens:
                row["prefill"], row["of_prefill"] = found, round(row["ours"]["ms"] / found["ms"], 5)
        write(args.out, document)
    head = ["tokens", "k", "dtype", "ours ms", "gram ms", "streaming ms", "loop/ours", "of prefill", "regret"]
    lines = []
    for row in document["rows"]:
        if "error" in row:
            lines.append(["error", *row["tried"][1:4], row["error"][:160], "", "", "", ""])
            continue
        times = [str(row.get(name, {}).get("ms", "")) for name in ("ours", "gram", "streaming")]
        lines.append(
            [
                str(row["tokens"]),
                str(row["k"]),
                row["dtype"],
                *times,
                str(row.get("loop_over_ours", "")),
                str(row.get("of_prefill", "")),
                f"{row['regret']:.1e}",
            ]
        )
    table(lines, head)
    for row in document["rows"]:
        if "kernels_ms" in row:
            print(row["tokens"], row["dtype"], row["kernels_ms"], "waits:", row["waits"], "peak MB:", row["peak_mb"])
    bad = [row for row in document["rows"] if row.get("regret", 1.0) > 1e-3]
    if bad:
        raise SystemExit(f"{len(bad)} rows failed, or picked what is more than 1e-3 below the best")


if __name__ == "__main__":
    main()
