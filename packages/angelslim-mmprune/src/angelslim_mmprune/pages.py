"""Pages of plots and tables about what `bench` measured, and of pictures that `show` made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from angelslim_core.plots import colour, svg
from angelslim_core.report import Section, write_page

SELECTION = ("strategy", "tokens", "kept", "ms", "p90", "MiB beside")
FIRST_TOKEN = ("strategy", "tokens", "kept", "ms", "p90", "MiB beside", "speedup")


def selection_cells(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table under `SELECTION`."""
    return [
        (r["strategy"], str(r["tokens"]), str(r["kept"]), f"{r['ms']:.3f}", f"{r['p90_ms']:.3f}", "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}")
        for r in rows
    ]


def first_token_cells(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table under `FIRST_TOKEN`."""
    return [(*selection_cells([r])[0], f"{r['speedup']:.2f}" if "speedup" in r else "") for r in rows]


def bench_page(document: Mapping[str, Any], target: Path) -> None:
    """Milliseconds over tokens, of choosing and of the whole model."""
    sections = []
    if rows := document["rows"]:
        sections += [
            Section("Choosing", "Milliseconds of a plan and of its application, medians.", _time_plot(rows)),
            Section("Choosing, in numbers", "MiB are beside features and statistics, and counted on GPUs only.", "", SELECTION, selection_cells(rows)),
        ]
    if rows := document["ttft"]:
        about = "From random media and text to the logits of the first new token, encoder included, batch 1."
        sections += [
            Section("Time to the first token", about, _time_plot(rows)),
            Section("Time to the first token, in numbers", "MiB are beside the weights.", "", FIRST_TOKEN, first_token_cells(rows)),
        ]
    write_page(target, "Media token pruning", f"{document['inputs']}; {document['machine']['device']}.", sections)


def _time_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, label in enumerate(dict.fromkeys(r["strategy"] for r in rows)):
            points = [(r["tokens"], r["ms"]) for r in rows if r["strategy"] == label]
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=label, color=colour(number), linestyle=("-", "--", ":")[number // 10 % 3])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = sorted({r["tokens"] for r in rows})
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.set_xlabel("tokens")
        axes.set_ylabel("ms")
        figure.legend(loc="outside right center")

    return svg(draw, max(3.2, 0.6 + 0.2 * len({r["strategy"] for r in rows})))
