"""What Samp costs beside the prefill that it shortens, against plain torch loops, in parts, and how good the DPP's picks are.

    python benchmarks/mmprune_samp.py --out benchmarks/results/mmprune_samp.json
    python benchmarks/mmprune_samp.py --device cpu --quick --out /tmp/mmprune_samp.json

Clips of random features that stay alike for a few tokens, as speech does. `loop` is plain torch, clip by clip and token by token, as
published code is written; `steps` is torch over all clips at once, a launch an operation; `ours` is what a call chooses by itself. All
include everything from features and attention's statistics to a plan, the look for NaN and the host's part: from a synchronised start
to a synchronised end, medians. `regret` is the largest relative amount by which a pick's factor of the determinant, in FP64 and given the
picks before it, is below the best. Prefill is that of a decoder of 8B's shape with random weights, over the clips' tokens alone.
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

from angelslim_mmprune.dpp import DPP, unit
from angelslim_mmprune.merging import SAMP_GROUPS, SAMP_MERGE, THRESHOLD, samp_plan
from angelslim_mmprune.plan import Plan, of_host


def clips(batch: int, tokens: int, width: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features whose direction changes after 1 to 3 tokens, and what they receive and give themselves."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.rand(batch, tokens, generator=generator) < 0.6
    kind = turn.cumsum(1)
    base = torch.randn(batch, tokens + 1, width, generator=generator).gather(1, kind[..., None].expand(-1, -1, width))
    x = base + 0.3 * torch.randn(batch, tokens, width, generator=generator)
    weight, relevance = (torch.rand(batch, tokens, generator=generator) ** 3 / tokens for _ in range(2))
    return x.to(device, dtype), weight.to(device), relevance.to(device)


def loop(x: Tensor, weight: Tensor, relevance: Tensor, keep: int) -> list[list[int]]:
    """One clip, [N, D], as published code is written; clips that merge below the budget are not thought of."""
    h = torch.nn.functional.normalize(x.float(), dim=1)
    cosines = h @ h.T
    groups = [[0]]
    for j in range(1, len(x)):
        if cosines[j, groups[-1]].mean() >= THRESHOLD:
            groups[-1].append(j)
        else:
            groups.append([j])
    merged = torch.stack([(weight[group, None] * x[group].float()).sum(0) / weight[group].sum() for group in groups])
    r = torch.stack([relevance[group].mean() for group in groups])
    h = torch.nn.functional.normalize(merged, dim=1)
    r = r / r.max()
    kernel = r[:, None] * (h @ h.T) * r
    left = kernel.diagonal().clone()
    factor = torch.zeros(keep, len(merged), device=x.device)
    picks = []
    for i in range(min(keep, len(groups))):
        j = int(left.argmax())
        factor[i] = (kernel[j] - factor[:i, j] @ factor[:i]) / left[j].sqrt()
        left = left - factor[i] ** 2
        left[j] = -torch.inf
        picks.append(j)
    return [groups[j] for j in sorted(picks)]


def timed(call: Callable[[], Any], wait: Callable[[], None], budget_s: float) -> dict[str, float]:
    """Milliseconds of a call after a first one, 3 to 30 times as the budget allows; one of them where one takes longer than it."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    first = 1e3 * (time.perf_counter() - start)
    if first > 1e3 * budget_s:
        return {"ms": round(first, 3), "runs": 1}
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 3 or (len(times) < 30 and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": round(median(times), 3), "min_ms": round(min(times), 3), "runs": len(times)}


def regret(x: Tensor, relevance: Tensor, picks: Tensor, counts: Tensor) -> float:
    """Replay picks [B, K] of features [B, N, D] in FP64."""
    h = unit(torch.nan_to_num(x).double())
    r = relevance.double()
    left = torch.where(torch.arange(h.shape[1], device=h.device) < counts[:, None], 1.0, 0.0).double()
    factor = torch.zeros(len(h), picks.shape[1], h.shape[1], dtype=torch.float64, device=h.device)
    worst = torch.zeros((), dtype=torch.float64, device=h.device)
    for t in range(picks.shape[1]):
        real = picks[:, t] >= 0
        j = picks[:, t].clamp(min=0)[:, None]
        score = r * r * left
        best = score.amax(1)
        worst = torch.maximum(worst, torch.where(real, 1 - score.gather(1, j)[:, 0] / best, 0).max())
        row = (h * h.gather(1, j[..., None].expand(-1, 1, h.shape[2]))).sum(2)
        row = row - (factor[:, :t] * factor[:, :t].gather(2, j[:, None].expand(-1, t, 1))).sum(1)
        factor[:, t] = row * left.gather(1, j).clamp(min=1e-12).rsqrt()
        left = (left - factor[:, t] ** 2).clamp(min=0).scatter(1, j, 0)
    return float(worst)


def prefill(batch: int, tokens: int, quick: bool, device: str, dtype: torch.dtype, wait: Callable[[], None], budget_s: float) -> dict[str, Any]:
    """Of Qwen2-Audio's language model without its head."""
    from transformers import Qwen2Config, Qwen2Model

    sizes = (64, 2, 4, 128) if quick else (4096, 32, 32, 11008)
    config = Qwen2Config(
        vocab_size=128, hidden_size=sizes[0], num_hidden_layers=sizes[1], num_attention_heads=sizes[2], num_key_value_heads=sizes[2],
        intermediate_size=sizes[3],
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2Model(config).eval()
    finally:
        torch.set_default_dtype(before)
    x = torch.randn(batch, tokens, sizes[0], device=device, dtype=dtype)
    with torch.inference_mode():
        found = timed(lambda: model(inputs_embeds=x, use_cache=True), wait, budget_s)
    return {"hidden": sizes[0], "layers": sizes[1], "batch": batch, "tokens": tokens, **found}


def whole(x: Tensor, weight: Tensor, relevance: Tensor, keep: int, time_of: Callable[[Callable[[], Any]], dict[str, float]]) -> dict[str, Any]:
    """From features to plans, three ways, and how many clips they agree on."""
    batch, tokens = weight.shape

    def plan(executor: str = "auto") -> Plan:
        return samp_plan(x, weight, relevance, [tokens] * batch, [keep] * batch, THRESHOLD, executor=executor)

    def loops() -> list[list[list[int]]]:
        return [loop(x[b], weight[b], relevance[b], keep) for b in range(batch)]

    ours, firsts = plan(), [[group[0] for group in groups] for groups in loops()]
    row: dict[str, Any] = {
        "keep": keep,
        "clips_as_loop": sum(first == kept[kept >= 0].tolist() for first, kept in zip(firsts, ours.keep.cpu(), strict=True)),
        "clips_as_steps": int((ours.keep == plan("steps").keep).all(1).sum()),
        "ours": time_of(plan),
        "steps": time_of(lambda: plan("steps")),
        "loop": time_of(loops),
    }
    row["loop_over_ours"] = round(row["loop"]["ms"] / row["ours"]["ms"], 1)
    row["steps_over_ours"] = round(row["steps"]["ms"] / row["ours"]["ms"], 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="sizes that a CPU has time for")
    parser.add_argument("--ratios", default="0.6,0.5,0.25")
    parser.add_argument("--budget-s", type=float, default=1.0, help="seconds of repeated calls for each figure")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU, or --device cpu")
    batch, tokens, width = (2, 60, 64) if args.quick else (32, 750, 4096)
    dtype = torch.bfloat16 if gpu else torch.float32
    wait = torch.cuda.synchronize if gpu else (lambda: None)
    x, weight, relevance = clips(batch, tokens, width, args.device, dtype)
    counts = [tokens] * batch
    document: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if gpu else None, "versions": versions(sys.executable, ["torch", "triton", "transformers"]),
        "batch": batch, "tokens": tokens, "width": width, "dtype": str(dtype).removeprefix("torch."), "threshold": THRESHOLD,
    }  # fmt: skip
    document["prefill"] = prefill(batch, tokens, args.quick, args.device, dtype, wait, args.budget_s)
    if gpu:
        torch.cuda.empty_cache()
    document["rows"] = []
    for ratio in map(float, args.ratios.split(",")):
        keep = max(1, round(tokens * ratio))
        row = whole(x, weight, relevance, keep, lambda call: timed(call, wait, args.budget_s))
        row["of_prefill"] = round(row["ours"]["ms"] / document["prefill"]["ms"], 5)
        document["rows"].append(row)
        write(args.out, document)

    keep = max(1, round(tokens * 0.5))
    on_device, budget = of_host(counts, x.device), of_host([keep] * batch, x.device)
    scores = SAMP_GROUPS(x, on_device, THRESHOLD)
    group = scores.isinf().cumsum(1) - 1
    found = group[:, -1] + 1
    shares = torch.rand(batch, tokens, device=x.device)
    merged = SAMP_MERGE(x, group, shares, on_device)
    mean = torch.rand(batch, tokens, device=x.device)
    picks = DPP(merged, mean, budget.minimum(found), found, keep)
    document["groups"] = {"mean": float(found.float().mean()), "least": int(found.min()), "most": int(found.max())}
    document["regret"] = regret(merged, mean, picks, found)
    document["parts"] = {
        "groups": timed(lambda: SAMP_GROUPS(x, on_device, THRESHOLD), wait, args.budget_s),
        "merge": timed(lambda: SAMP_MERGE(x, group, shares, on_device), wait, args.budget_s),
        "dpp": timed(lambda: DPP(merged, mean, budget.minimum(found), found, keep), wait, args.budget_s),
    }
    if gpu:
        document["kernels_wait"] = waits(lambda: (SAMP_GROUPS(x, on_device, THRESHOLD), DPP(merged, mean, budget, found, keep)))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        samp_plan(x, weight, relevance, counts, [keep] * batch, THRESHOLD)
        torch.cuda.synchronize()
        document["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    write(args.out, document)
    head = ["keep", "ours ms", "steps ms", "loop ms", "loop/ours", "of prefill", "as loop", "as steps"]
    table(
        [
            [
                str(value)
                for value in (
                    r["keep"], r["ours"]["ms"], r["steps"]["ms"], r["loop"]["ms"], r["loop_over_ours"], r["of_prefill"],
                    f"{r['clips_as_loop']}/{batch}", f"{r['clips_as_steps']}/{batch}",
                )
            ]
            for r in document["rows"]
        ],
        head,
    )  # fmt: skip
    print({key: document.get(key) for key in ("prefill", "groups", "parts", "regret", "kernels_wait", "peak_mb")})


if __name__ == "__main__":
    main()
