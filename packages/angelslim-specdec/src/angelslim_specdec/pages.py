"""Pages of plots and tables: what `bench` measured, what `check` found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from angelslim_core.plots import colour, svg
from angelslim_core.report import Section, write_page

from .bench import PLAIN

ROWS = ("prompts", "batch", "temperature", "drafter", "k", "tokens/s", "speedup", "acceptance length", "rate per position", "same text", "peak")
TRANSFORMERS = ("prompts", "temperature", "of", "tokens/s")


def cells(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table under `ROWS`."""
    return [
        (
            r["set"], str(r["batch"]), f"{r['temperature']:g}", r["drafter"], str(r["k"] or ""), f"{r['tokens_per_s']:.1f}",
            f"{r['speedup']:.2f}" if "speedup" in r else "", f"{r['acceptance_length']:.2f}" if "acceptance_length" in r else "",
            " ".join(f"{x:.2f}" for x in r.get("rates", ())), f"{100 * r['same_text']:.0f} %" if "same_text" in r else "",
            f"{r['peak_bytes'] / 1e6:.0f} MB" if r.get("peak_bytes") else "",
        )
        for r in rows
    ]  # fmt: skip


def transformers_cells(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table under `TRANSFORMERS`."""
    return [(r["set"], f"{r['temperature']:g}", str(r["prompts"]), f"{r['tokens_per_s']:.1f}") for r in rows]


def bench_page(document: Mapping[str, Any], target: Path) -> None:
    """Speedup over batch size, acceptance over position, and the tables."""
    means = document["means"]
    sections = [
        Section("Speedup", "Tokens per second over plain decoding in the same engine, mean over prompt sets. Below 1 a draft is a loss.", _speedup_plot(means)),
        Section("Acceptance", "Share of rounds in which the proposed token of a position is accepted, mean over prompt sets.", _rate_plot(means)),
        Section("Means over prompt sets", document["note"], "", ROWS, cells(means)),
        Section(
            "Prompt sets",
            "Speeds are medians of repeats taken by turns. Same text: rows whose tokens are those of plain decoding; in 16 bits a near tie may go either way.",
            "", ROWS, cells(document["rows"]),
        ),
    ]  # fmt: skip
    if document["transformers"]:
        sections.append(
            Section("transformers' generate", "Batch 1, over the first prompts of each set.", "", TRANSFORMERS, transformers_cells(document["transformers"]))
        )
    about = f"{document['model']}; {document['machine']['device']}; at most {document['max_new_tokens']} new tokens. {document['note']}"
    write_page(target, "Speculative decoding", about, sections)


def check_page(document: Mapping[str, Any], target: Path) -> None:
    """What was checked, what was caught, and of a pair where its texts part."""
    about = f"{'All is well.' if document['ok'] else 'Something is wrong.'} Greedy text is the target's token by token, sampled text its distribution."
    write_page(target, "Exactness", about, check_sections(document))


def check_sections(document: Mapping[str, Any]) -> list[Section]:
    """A table for each part of what `specdec check` says."""
    sections = []
    if (pair := document.get("pair")) is not None:
        near = pair["near_ties"]
        texts = [
            ("with the draft", near["gaps"]),
            *([("in trees", near["tree_gaps"])] if "tree_gaps" in near else []),
            ("in batches without it", near["control_gaps"]),
        ]
        ties = [
            (who, f"{len(gaps)} of {near['rows']}", f"{len(gaps) / near['rows']:.3f}", f"{max((g['gap'] or 0.0 for g in gaps), default=0.0):.4f}",
             str(sum(not g["near_tie"] for g in gaps)))
            for who, gaps in texts
        ]  # fmt: skip
        gaps = [
            (who, str(g["row"]), str(g["position"]), "one ends" if g["gap"] is None else f"{g['gap']:.4f}", "near tie" if g["near_tie"] else "NOT A TIE")
            for who, found in texts for g in found
        ]  # fmt: skip
        equal = [(c["name"], f"{c['equal']} of {c['rows']}", _verdict(c["ok"])) for c in pair["equality"]]
        sampled = [(c["name"], str(c["tokens"]), f"{c['p']:.3g}", f"{c['p_if_warmer']:.2g}", _verdict(c["ok"])) for c in pair["sampled"]]
        what = f"{Path(pair['draft']).name} with {Path(pair['model']).name}"
        sections += [
            Section(f"{what}: greedy text in fp32", "Rows whose tokens are those of plain decoding; of top-k 1 only the first choice can be drawn.", "",
                    ("verification", "equal", ""), equal),
            Section(f"{what}: sampled text in fp32", "Where drawn tokens stand in the target's own distribution, at temperature 1; and the same texts taken "
                    "for ones of temperature 1.5, which have to be found out.", "", ("rule", "tokens", "p", "p if warmer", ""), sampled),
            Section(f"{what}: near ties in {near['dtype']}", f"Rows that part from plain decoding of single rows, and the widest gap in fp32 between the two "
                    f"tokens where they do. Rounding moves such a gap by up to {near['rounding']:.3f} logits in transformers' own pass; a wider one than that, "
                    f"and than {near['tolerance']:g}, is no tie.", "", ("greedy text", "part", "rate", "widest gap", "no tie"), ties),
        ]  # fmt: skip
        if gaps:
            sections.append(Section("Where they part", "", "", ("greedy text", "row", "position", "gap", ""), gaps))
    checks = [(c["name"], c["detail"], _verdict(c["ok"])) for c in document["checks"]]
    mutants = [(m["name"], f"{m['p']:.2g}", "caught" if m["caught"] else "MISSED") for m in document["mutants"]]
    return [
        *sections,
        Section("A small target", "Every drafter under every rule, in fp32.", "", ("check", "", ""), checks),
        Section("Wrong builds", "Each has to be noticed.", "", ("wrong build", "p", ""), mutants),
    ]


def _verdict(ok: bool) -> str:
    return "ok" if ok else "NOT OK"


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['drafter']}, k = {row['k']}, temperature {row['temperature']:g}"


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["drafter"] != PLAIN:
            found.setdefault(_label(row), []).append(row)
    return found


def _speedup_plot(means: Sequence[Mapping[str, Any]]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (label, rows) in enumerate(_lines(means).items()):
            axes.plot([r["batch"] for r in rows], [r["speedup"] for r in rows], marker=".", linewidth=1, label=label, color=colour(number))
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        sizes = sorted({r["batch"] for r in means})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.minorticks_off()
        axes.set_xlabel("batch")
        axes.set_ylabel("times plain decoding")
        figure.legend(loc="outside right center")

    return svg(draw, 3.4)


def _rate_plot(means: Sequence[Mapping[str, Any]]) -> str:
    smallest = min(r["batch"] for r in means)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (label, rows) in enumerate(_lines([r for r in means if r["batch"] == smallest]).items()):
            rates = rows[0]["rates"]
            axes.plot(range(1, len(rates) + 1), rates, marker=".", linewidth=1, label=label, color=colour(number))
        axes.set_ylim(0, 1)
        axes.set_xlabel("proposed token")
        axes.set_ylabel(f"share accepted, batch {smallest}")
        figure.legend(loc="outside right center")

    return svg(draw, 3.2)
