"""Shared by the multimodal benchmarks: one score a strategy and keep ratio, time to the first token and memory, a file that grows, a picture."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import table, write
from torch import Tensor

from angelslim_core import plots

Measured = dict[str, Any]
BASE = "all tokens"


@dataclass(frozen=True)
class Cell:
    """
    Args:
        label: in tables; the same strategy may come with several sets of options.
        strategy: its name; empty: the model as it is.
        ratio: kept share of the tokens.
    """

    label: str
    strategy: str
    options: Mapping[str, Any]
    ratio: float


def evaluate(
    model: Any,
    cells: Sequence[Cell],
    ask: Callable[[], Measured],
    one: Callable[[], dict[str, Tensor]],
    out: Path,
    *,
    seconds: float,
    head: Mapping[str, Any],
) -> None:
    """Measure the model as it is, then each cell; cells that the file has are not measured again.

    Args:
        ask: scores the model.
        one: arguments of `generate` for one prompt, by which speed and memory are measured.
        seconds: after which no cell is begun.

    Raises:
        SystemExit: with 1 if a cell failed; the others are in the file.
    """
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    rows = [row for row in document.get("rows", []) if "error" not in row]
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    document = {"device": device, "torch": torch.__version__, "dtype": str(model.dtype).removeprefix("torch."), **head, "rows": rows, "left_out": []}
    began = time.perf_counter()
    for cell in [Cell(BASE, "", {}, 1.0), *cells]:
        if any((row["label"], row["keep_ratio"]) == (cell.label, cell.ratio) for row in rows):
            continue
        if time.perf_counter() - began > seconds:
            document["left_out"].append(f"{cell.label} at {cell.ratio:g}")
            continue
        rows.append(measured(model, cell, ask, one))
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items() if k != "by_kind"}), flush=True)
        write(out, document)
    write(out, document)
    show(rows, str(head["score"]))
    if any("error" in row for row in rows):
        raise SystemExit(1)


def measured(model: Any, cell: Cell, ask: Callable[[], Measured], one: Callable[[], dict[str, Tensor]]) -> Measured:
    """A row; of a cell that fails, its error."""
    start = time.perf_counter()
    row: Measured = {"label": cell.label, "keep_ratio": cell.ratio}
    try:
        with torch.inference_mode(), coupled(model, cell) as coupling:
            row |= ask()
            row |= speed(model, one())
            if coupling is not None:
                row |= tokens_by_layer(coupling.last, model.config.get_text_config().num_hidden_layers)
    except Exception as error:  # one strategy's failure may not cost the others their visit to the machine; the exit code says it
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}"[:500]
    return row | {"seconds": time.perf_counter() - start}


def available(strategies: Mapping[str, Mapping[str, Any]], modality: str) -> list[str]:
    """The labels whose strategies the package has for a modality; what it lacks is named."""
    from angelslim_mmprune.strategies import CLASSES, strategy_class

    found = [label for label in strategies if label.split()[0] in CLASSES and modality in strategy_class(label.split()[0]).modalities]
    if lacking := [label for label in strategies if label not in found]:
        print(f"there are no {modality} strategies {', '.join(lacking)}", flush=True)
    return found


def cells_of(strategies: Mapping[str, Mapping[str, Any]], labels: Sequence[str], ratios: Sequence[float]) -> list[Cell]:
    """All labels at the first keep ratio, then at the next; a label's first word is the strategy's name."""
    return [Cell(label, label.split()[0], strategies.get(label, {}), ratio) for ratio in ratios for label in labels]


def coupled(model: Any, cell: Cell) -> Any:
    """The model with the cell's strategy; as it is for none."""
    if not cell.strategy:
        return nullcontext()
    from angelslim_mmprune.coupling import attach
    from angelslim_mmprune.strategies import make_strategy

    return attach(model, make_strategy(cell.strategy, keep_ratio=cell.ratio, **cell.options))


def tokens_by_layer(applied: Sequence[Any], layers: int) -> Measured:
    """Of the last prompt's first row: media tokens it had, those left in the end, and the mean over the language model's layers."""
    had, left, now, per_layer, at = 0, 0, 0, 0, 0
    for number, step in enumerate(applied):
        pools = [pool for pool in step.pools if pool.row == 0]
        before, left = (sum(len(x) for x in xs) for xs in ([p.positions for p in pools], [p.kept for p in pools]))
        had = before if number == 0 else had
        layer = 0 if step.stage.layer is None else step.stage.layer + 1
        per_layer += before * (layer - at)
        at, now = layer, left
    return {"media_tokens": had, "kept_tokens": left, "tokens_a_layer": (per_layer + now * (layers - at)) / layers}


def speed(model: Any, inputs: Mapping[str, Tensor], repeats: int = 7) -> Measured:
    """Milliseconds to the first token of a prompt, median after two runs to warm up, and MB (10**6 bytes) that it takes beside the weights."""
    cuda = model.device.type == "cuda"
    end = model.config.get_text_config().eos_token_id
    times = []
    before = 0
    for number in range(2 + repeats):
        if cuda:
            torch.cuda.synchronize()
            if number == 2:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False, pad_token_id=end)
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    found: Measured = {"ttft_ms": statistics.median(times[2:])}
    if cuda:
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return found


def show(rows: Sequence[Measured], score: str) -> None:
    """Print strategies over keep ratios; shares in percent."""
    factor = 1 if score.endswith("_ms") else 100
    ratios = sorted({row["keep_ratio"] for row in rows}, reverse=True)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    cells = {(row["label"], row["keep_ratio"]): row for row in rows}

    def text(label: str, ratio: float) -> str:
        row = cells.get((label, ratio))
        if row is None:
            return ""
        return "failed" if "error" in row else f"{row[score] * factor:.1f}"

    table([[label, *(text(label, ratio) for ratio in ratios)] for label in labels], [score if factor == 1 else f"{score}, %", *(f"{r:g}" for r in ratios)])


def plot(out: Path, score: str) -> None:
    """Draw the file's score over the keep ratio into an SVG beside it; draws by lot are one line, their mean."""
    rows = [row for row in json.loads(out.read_text())["rows"] if "error" not in row]
    base = next(row[score] for row in rows if row["label"] == BASE)
    lines: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        name = "random" if row["label"].startswith("random") else row["label"]
        if name != BASE:
            lines.setdefault(name, {}).setdefault(row["keep_ratio"], []).append(100 * row[score])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.axhline(100 * base, color="black", linewidth=1, linestyle=":", label=BASE)
        for number, (name, points) in enumerate(lines.items()):
            ratios = sorted(points)
            bold = name in ("idpruner", "samp")
            axes.plot(
                [100 * r for r in ratios], [statistics.fmean(points[r]) for r in ratios], label=name, color=plots.colour(number),
                marker="os^"[number // 10 % 3], markersize=4, linewidth=2.2 if bold else 1, linestyle="--" if name == "random" else "-",
            )  # fmt: skip
        axes.set_xlabel("kept tokens, %")
        axes.set_ylabel(f"{score}, %")
        figure.legend(loc="outside right center")

    out.with_suffix(".svg").write_text(plots.svg(draw, 4.2))
