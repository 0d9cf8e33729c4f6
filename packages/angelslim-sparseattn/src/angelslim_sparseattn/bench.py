"""What policies cost and keep: time of selection and of attention, beside dense attention; recall; time to the first token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from angelslim_core.context import Progress, silent
from angelslim_core.kernels import triton_runs
from angelslim_core.products import products

from .attention import select, sparse_attention
from .candidates import Attention, Candidate
from .kernels.block_sparse import BLOCK_SPARSE
from .recall import Dense, densities, low
from .timing import Spread, dense_peers, fastest_sdpa, timed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

RANDOM = "random queries, keys and values are near uniform: recall, and densities of policies that look at them, say nothing about text"


def machine(device: str) -> dict[str, Any]:
    """Where it was measured: device, versions of libraries and of this package."""
    from angelslim_core.artifact import versions

    from . import __version__

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    triton = {"triton": metadata.version("triton")} if triton_runs()[0] else {}
    return {"device": name, "threads": torch.get_num_threads(), "versions": {"angelslim-sparseattn": __version__, **versions(), **triton}}


def bench(
    inputs: Callable[[int], Iterable[Attention]], sizes: Sequence[int], chosen: Sequence[Candidate],
    *, executor: str = "auto", device: str = "cpu", repeats: int = 30, block: int = 128, layers: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Attention alone, a row a length and policy.

    Args:
        inputs: gives, for a length, what one or more layers read.
        sizes: lengths, tokens.
        layers: how many layers `inputs` gives.

    Returns:
        `dense` and `rows`; times in ms, median and p90 of single calls, recall over all heads and rows: over layers the mean of each.
    """
    dense_rows, rows, done = [], [], 0
    for length in sizes:
        peers: dict[str, list[Spread] | str] = {}
        found: dict[str, list[dict[str, Any]]] = {c.label: [] for c in chosen}
        for layer in inputs(length):
            _time_peers(peers, layer, repeats, device)
            everything = Dense.of(layer.q, layer.k, layer.v, layer.scale, block)
            for candidate in chosen:
                found[candidate.label].append(_measured(candidate, layer, everything, executor, device, repeats, block))
                progress(done := done + 1, len(sizes) * layers * len(chosen), f"{candidate.label}, {length} tokens")
        dense = {name: _mean(times) for name, times in peers.items() if not isinstance(times, str)}
        dense_rows += [
            {"length": length, "name": name, **({"why": times} if isinstance(times, str) else {"ms": dense[name].median, "p90_ms": dense[name].p90})}
            for name, times in peers.items()
        ]
        rows += [{"length": length, "policy": label, **_together(of_layers, dense)} for label, of_layers in found.items()]
    return {"dense": dense_rows, "rows": rows}


def _time_peers(peers: dict[str, list[Spread] | str], layer: Attention, repeats: int, device: str) -> None:
    """Add the times of a layer's dense attention, or why there are none."""
    for name, call in dense_peers(device).items():
        if call is None:
            peers[name] = "not installed"
            continue
        try:
            spread = timed(lambda call=call: call(layer.q, layer.k, layer.v, layer.scale), repeats, device)  # type: ignore[misc]
        except RuntimeError as error:  # the backend does not take these tensors
            peers[name] = str(error).splitlines()[0][:200]
            continue
        times = peers.setdefault(name, [])
        assert isinstance(times, list)
        times.append(spread)


def _measured(candidate: Candidate, layer: Attention, dense: Dense, executor: str, device: str, repeats: int, block: int) -> dict[str, Any]:
    q, k, v, scale = layer.q, layer.k, layer.v, layer.scale

    def chosen() -> Any:
        return select(q, k, v, candidate.policy, scale=scale, block=block, check=False)

    def attended(index: Any) -> tuple[Tensor, Tensor]:
        return sparse_attention(q, k, v, index, executor, True, scale=scale, check=False)  # type: ignore[no-any-return]

    index = chosen()
    out, lse = attended(index)
    recall = dense.recall(lse).flatten()
    return {
        "density": float(densities(index).mean()), "recall_mean": float(recall.mean()), "recall_p5": float(low(recall)), "output_error": dense.error(out),
        "select": timed(chosen, repeats, device), "kernel": timed(lambda: attended(index), repeats, device),
        "total": timed(lambda: attended(chosen()), repeats, device), "executor": BLOCK_SPARSE.choose(q, k, v, index, scale, executor=executor).name,
    }  # fmt: skip


def _mean(times: Iterable[Spread]) -> Spread:
    medians, p90 = zip(*times, strict=True)
    return Spread(sum(medians) / len(medians), sum(p90) / len(p90))


def _together(layers: Sequence[dict[str, Any]], dense: dict[str, Spread]) -> dict[str, Any]:
    """A row from what was measured of each layer."""
    row: dict[str, Any] = {key: sum(m[key] for m in layers) / len(layers) for key in ("density", "recall_mean", "recall_p5", "output_error")}
    for key in ("select", "kernel", "total"):
        row[f"{key}_ms"], row[f"{key}_p90_ms"] = _mean(m[key] for m in layers)
    row["speedup"] = {name: spread.median / row["total_ms"] for name, spread in dense.items()}
    return {**row, "executor": ", ".join(sorted({m["executor"] for m in layers})), "layers": len(layers)}


def config_of(candidate: Candidate) -> dict[str, Any]:
    """Fields of `SparseAttentionConfig` that say what a candidate says."""
    options = {k: v for k, v in candidate.options.items() if k not in ("min_len", "dense_layers")}
    policy = candidate.policy
    return {"policy": candidate.name, "options": options, "min_len": policy.min_len, "dense_layers": list(policy.dense_layers)}


def first_token(
    model: PreTrainedModel, ids: Callable[[int], Tensor], sizes: Sequence[int], chosen: Sequence[Candidate],
    *, executor: str = "auto", device: str = "cpu", repeats: int = 5, block: int = 128, progress: Progress = silent,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time from token ids to the logits of the first new token, with a KV cache, batch 1; a row a length for dense, and for each policy.

    Policies' own `min_len` and `dense_layers` hold. Dense attention, which some layers keep, is torch's: cuDNN where it takes the call.

    Args:
        ids: gives, for a length, token ids [1, T].
    """
    from .config import SparseAttentionConfig
    from .coupling import attach

    rows: list[dict[str, Any]] = []
    with torch.no_grad(), fastest_sdpa(device), products(device):
        for length in sizes:
            prompt = ids(length).to(device)

            def prefill(prompt: Tensor = prompt) -> None:
                model(input_ids=prompt, use_cache=True, logits_to_keep=1)

            dense = timed(prefill, repeats, device)
            rows.append({"length": length, "policy": "dense", "ms": dense.median, "p90_ms": dense.p90})
            for candidate in chosen:
                config = SparseAttentionConfig(**config_of(candidate), block=block, executor=executor)
                with attach(model, config) as attached:
                    spread = timed(prefill, repeats, device)
                    stats = attached.stats()
                kept = [s["density"] for s in stats if s["density"] is not None]
                rows.append({
                    "length": length, "policy": candidate.label, "ms": spread.median, "p90_ms": spread.p90, "speedup": dense.median / spread.median,
                    "sparse_layers": sum(bool(s["sparse"]) for s in stats), "layers": len(stats), "density": sum(kept) / len(kept) if kept else None,
                })  # fmt: skip
                progress(len(rows), len(sizes) * (1 + len(chosen)), f"{candidate.label}, {length} tokens")
    return rows
