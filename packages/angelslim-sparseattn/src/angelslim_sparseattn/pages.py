"""Pages of plots and tables about what `bench` and `choose` measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from angelslim_core.plots import colour, svg
from angelslim_core.report import Section, write_page

_ATTENTION = ("policy", "tokens", "density", "recall", "p5", "error", "select ms", "kernel ms", "total ms", "p90", "executor")
DENSE = ("attention", "tokens", "ms", "p90")
FIRST_TOKEN = ("policy", "tokens", "ms", "p90", "speedup", "sparse layers", "density")
CHOICES = ("policy", "density", "recall", "worst head", "heads that took it")


def attention_table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells, the speedup over each dense attention last."""
    peers = list(dict.fromkeys(name for r in rows for name in r["speedup"]))
    cells = [
        (
            r["policy"], str(r["length"]), f"{r['density']:.3f}", f"{r['recall_mean']:.4f}", f"{r['recall_p5']:.4f}", f"{r['output_error']:.4f}",
            f"{r['select_ms']:.3f}", f"{r['kernel_ms']:.3f}", f"{r['total_ms']:.3f}", f"{r['total_p90_ms']:.3f}", r["executor"],
            *(f"{r['speedup'][name]:.2f}" if name in r["speedup"] else "" for name in peers),
        )
        for r in rows
    ]  # fmt: skip
    return (*_ATTENTION, *(f"x {name}" for name in peers)), cells


def first_token_cells(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table under `FIRST_TOKEN`."""
    return [
        (
            r["policy"], str(r["length"]), f"{r['ms']:.1f}", f"{r['p90_ms']:.1f}", f"{r['speedup']:.2f}", f"{r['sparse_layers']} of {r['layers']}",
            "" if r["density"] is None else f"{r['density']:.3f}",
        )
        if "speedup" in r
        else (r["policy"], str(r["length"]), f"{r['ms']:.1f}", f"{r['p90_ms']:.1f}", "", "", "")
        for r in rows
    ]  # fmt: skip


def dense_cells(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table under `DENSE`."""
    return [(r["name"], str(r["length"]), *((f"{r['ms']:.3f}", f"{r['p90_ms']:.3f}") if "ms" in r else (r["why"], ""))) for r in rows]


def choice_cells(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table under `CHOICES`."""
    return [(r["policy"], f"{r['density']:.3f}", f"{r['recall']:.4f}", f"{r['recall_worst']:.4f}", str(r["heads"])) for r in rows]


def bench_page(document: Mapping[str, Any], target: Path) -> None:
    """Speed over length, and recall over density."""
    rows, sections = document["rows"], []
    if rows:
        fastest = _fastest(document["dense"], rows)
        sections += [
            Section("Speed", f"Times {fastest}, dense: selection and attention together. Below 1 the policy is slower.", _speed_plot(rows, fastest)),
            Section("Recall", "Share of dense attention's weight that is kept, mean over rows, heads and layers.", _recall_plot(rows)),
            Section("Attention", "Medians of single calls; error is |out - dense| / |dense|.", "", *attention_table(rows)),
            Section("Dense attention", "", "", DENSE, dense_cells(document["dense"])),
        ]
    if document["ttft"]:
        about = "Token ids to the logits of the first new token, batch 1."
        sections.append(Section("Time to the first token", about, "", FIRST_TOKEN, first_token_cells(document["ttft"])))
    write_page(target, "Sparse attention", f"{document['inputs']}; {document['machine']['device']}. {document['note']}", sections)


def choice_page(document: Mapping[str, Any], target: Path) -> None:
    """Recall over density of every candidate, and of what was chosen."""
    sections = [
        Section(
            "Recall over density",
            f"Means over all heads and layers on {document['tokens']} tokens of text; the cross is the choice, each head's own: recall of "
            f"at least {document['target']} at the least density.",
            _choice_plot(document),
        ),
        Section("Candidates", "", "", CHOICES, choice_cells(document["candidates"])),
        Section("Density of the choice", "A row a layer, a column a query head.", _density_plot(document["layers"])),
    ]
    write_page(target, "Choice of sparse attention", f"{document['model']}, {document['length']} tokens.", sections)


def _fastest(dense: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """The dense attention that is fastest at the largest length, of those that ran at all."""
    shared = set.intersection(*(set(r["speedup"]) for r in rows))
    timed = [r for r in dense if r["name"] in shared]
    return str(min(timed, key=lambda r: (-r["length"], r["ms"]))["name"])


def _families(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by the name of their policy, whatever its options."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["policy"].partition(":")[0], []).append(row)
    return found


def _speed_plot(rows: Sequence[Mapping[str, Any]], dense: str) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        labels = list(dict.fromkeys(r["policy"] for r in rows))
        for number, label in enumerate(labels):
            points = [(r["length"], r["speedup"][dense]) for r in rows if r["policy"] == label]
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=label, color=colour(number))
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        lengths = sorted({r["length"] for r in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"times {dense}")
        figure.legend(loc="outside right center")

    return svg(draw, 3.2)


def _recall_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    length = max(r["length"] for r in rows)
    return _points([{**r, "recall": r["recall_mean"]} for r in rows if r["length"] == length], None, f"recall at {length} tokens")


def _choice_plot(document: Mapping[str, Any]) -> str:
    return _points(document["candidates"], (document["density"], document["recall"]), "recall")


def _points(rows: Iterable[Mapping[str, Any]], mark: tuple[float, float] | None, label: str) -> str:
    """Recall over density, a line a policy through its options."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (name, members) in enumerate(_families(rows).items()):
            points = sorted((r["density"], r["recall"]) for r in members)
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=name, color=colour(number))
        if mark:
            axes.plot(*mark, marker="x", markersize=9, markeredgewidth=2, color="black", linestyle="none", label="choice")
        axes.set_xlabel("density")
        axes.set_ylabel(label)
        figure.legend(loc="outside right center")

    return svg(draw, 3.2)


def _density_plot(layers: Sequence[Mapping[str, Any]]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        values = [[head["density"] for head in layer["heads"]] for layer in layers]
        image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        step = max(1, len(layers) // 12)
        axes.set_yticks(range(0, len(layers), step), [str(layer["layer"]) for layer in layers[::step]])
        axes.grid(False)
        axes.set_xlabel("query head")
        axes.set_ylabel("decoder layer")
        figure.colorbar(image, ax=axes, label="density", pad=0.01)

    return svg(draw, min(7.0, 1.6 + 0.12 * len(layers)))
