"""What choosing tokens costs, and what it saves: time of each strategy over random features, and a model's time to its first token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from angelslim_core.context import Progress, silent
from angelslim_core.errors import AngelslimError
from angelslim_core.products import products

from .budget import keep_count
from .candidates import Candidate
from .plan import Grid, Need, Pool
from .timing import peak_mib, timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .strategies.base import Strategy

# of keys and hidden states, and tokens of text
_WIDTH, _TEXT = 128, 32
# of the language model whose layers strategies name
_LAYERS = 28
_WIDE = ("keys", "hidden", "raw_keys")


def machine(device: str) -> dict[str, Any]:
    """Where it was measured: device, versions of libraries and of this package."""
    from angelslim_core.artifact import versions

    from . import __version__

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "versions": {"angelslim-mmprune": __version__, **versions()}}


def drawn(tokens: int, width: int, strategy: Strategy, batch: int, device: str, seed: int = 0) -> Pool:
    """Pools of one image each, with features from N(0, 1), and of attention what a strategy needs, from U(0, 1); text stands behind them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    grid = Grid(1, rows, tokens // rows)

    def statistics(needs: Sequence[Need], count: int) -> dict[Need, torch.Tensor]:
        return {
            need: normal(batch, count, _WIDTH) if need.statistic in _WIDE else torch.rand(batch, count, generator=generator, device=device) for need in needs
        }

    text = normal(batch, _TEXT, width) if strategy.reads_text else None
    counts = (_TEXT,) * batch if strategy.reads_text or strategy.text_needs else ()
    segments = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    features = normal(batch, tokens, width)
    if device == "cuda":
        features = features.bfloat16()
    return Pool(
        features, (tokens,) * batch, segments, ((grid,),) * batch, statistics(strategy.needs, tokens), text, counts,
        statistics(strategy.text_needs, _TEXT), (0,) * len(counts),
    )  # fmt: skip


def selection(
    sizes: Sequence[int], chosen: Sequence[Candidate], *, width: int, batch: int = 1, device: str = "cpu", repeats: int = 10, progress: Progress = silent
) -> list[dict[str, Any]]:
    """Time of a plan and of its application, a row a size and strategy; of one with several stages that of the first.

    Args:
        sizes: tokens of an image.
        width: of the language model.
        batch: images at once.

    Returns:
        `ms`, `p90_ms`: of all images together; `peak_mib`: beside features and statistics, None on a CPU.
    """
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for tokens in sizes:
            for candidate in chosen:
                strategy = candidate.strategy.at_depth(_LAYERS)
                share = strategy.stages[0].share
                kept = strategy.count(tokens) if share is None else keep_count(tokens, share, strategy.compat)
                pool = drawn(tokens, width, strategy, batch, device)

                def plan(strategy: Strategy = strategy, pool: Pool = pool, kept: int = kept) -> None:
                    strategy.plan(pool, [kept] * len(pool.counts)).apply(pool.features)

                row: dict[str, Any] = {"strategy": candidate.label, "tokens": tokens, "kept": kept, "batch": batch}
                if 0 < kept < tokens:
                    spread = timed(plan, repeats, device)
                    row |= {"ms": spread.median, "p90_ms": spread.p90, "peak_mib": peak_mib(plan, device)}
                    rows.append(row)
                progress(len(rows), len(sizes) * len(chosen), f"{candidate.label}, {tokens} tokens")
    return rows


def first_token(
    model: PreTrainedModel, sizes: Sequence[int], chosen: Sequence[Candidate], *, device: str = "cpu", repeats: int = 5, progress: Progress = silent
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time from random media and 64 tokens of text to the logits of the first new token, batch 1, encoder included.

    Args:
        sizes: tokens of media, as near as the model's sizes allow.

    Returns:
        a row a size without pruning and with each strategy, and strategies that do not fit the model.
    """
    from .coupling import attach
    from .models import towers
    from .prompts import around, synthetic

    parts = towers(model)
    kind = parts.media.kinds[0]
    fits, without = [], []
    for candidate in chosen:
        try:
            with attach(model, candidate.strategy):
                fits.append(candidate)
        except AngelslimError as error:
            without.append(f"{candidate.label}: {error.what}")
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), products(device):
        for size in sizes:
            inputs = around(model, parts, kind, synthetic(parts, kind, size), range(3, 35), range(35, 67))
            tokens = sum(math.prod(size.grid) for size in kind.sizes(parts.config, parts.encoder, inputs[kind.told]))

            def prefill(inputs: dict[str, Any] = inputs) -> None:
                model(**inputs, use_cache=True, **last)

            whole = _measured(prefill, repeats, device)
            rows.append({"strategy": "none", "tokens": tokens, "kept": tokens, **whole})
            for candidate in fits:
                with attach(model, candidate.strategy) as coupling:
                    found = _measured(prefill, repeats, device)
                    kept = tokens - coupling.last[0].before[0] + coupling.last[-1].after[0]
                rows.append({"strategy": candidate.label, "tokens": tokens, "kept": kept, **found, "speedup": whole["ms"] / found["ms"]})
                progress(len(rows), len(sizes) * (1 + len(fits)), f"{candidate.label}, {tokens} tokens")
    return rows, without


def _measured(call: Callable[[], None], repeats: int, device: str) -> dict[str, Any]:
    spread = timed(call, repeats, device)
    return {"ms": spread.median, "p90_ms": spread.p90, "peak_mib": peak_mib(call, device)}
