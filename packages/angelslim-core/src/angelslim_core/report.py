"""One HTML file about one or more output folders: no script, no remote address, every name escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ModelError, PluginError
from .io.writer import write_text
from .records import RECORDS, read_records

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 3rem; border-bottom: 2px solid #1f4e79 } h3 { margin: 2rem 0 .2rem } p { margin: .2rem 0 .6rem } .about { color: #555; font-size: 13px }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top }
th { font-weight: 600 } .number { text-align: right; font-variant-numeric: tabular-nums } td { overflow-wrap: anywhere } .name { font-family: monospace; font-size: 13px }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto } svg { display: block; max-width: 100%; height: auto } .no { color: #a00 }
</style></head><body>
<h1>{{ title }}</h1>
"""
_PAGE = (
    _HEAD
    + """{% if summary %}<p>{{ note }}</p>
<table><tr>{% for head in summary[0] %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in summary %}<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
{{ sizes }}
{% for a in artifacts %}
<h2>{{ a.name }}</h2>
<table>
<tr><th>weights</th><td>{{ "%.1f" | format(a.bytes_after / 1e6) }} MB of {{ "%.1f" | format(a.bytes_before / 1e6) }} MB</td></tr>
{% if a.bits %}<tr><th>bits a weight</th><td>{{ "%.3f" | format(a.bits) }} in the linears of the decoder layers, scales included</td></tr>{% endif %}
<tr><th>time</th><td>{{ "%.1f" | format(a.seconds) }} s</td></tr>
{% for p in a.passes %}<tr><th>{{ p.id }}</th><td>{% for key, value in p.metrics.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% endfor %}</td></tr>{% endfor %}
{% if a.evaluation %}{% for key, value in a.evaluation.items() %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}
{% else %}<tr><th>perplexity, KL</th><td>not measured by the run</td></tr>{% endif %}
</table>
{% if a.notes %}<h3>Fallbacks and warnings</h3><ul>{% for note in a.notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
{% for plot in a.plots %}<h3>{{ plot.title }}</h3><p class="about">{{ plot.about }}</p>{{ plot.svg }}
{% endfor %}
{% if a.channels %}<h3>Outlier channels</h3><p class="about">Channels that stand out in most layers: largest value over that of the input's median channel.</p>
<table><tr><th>input</th><th class="number">channel</th><th class="number">layers</th><th class="number">largest ratio</th><th class="number">at layer</th></tr>
{% for c in a.channels %}<tr><td>{{ c.input }}</td><td class="number">{{ c.channel }}</td><td class="number">{{ c.layers }}</td><td class="number">{{ "%.1f" | format(c.ratio) }}</td><td class="number">{{ c.layer }}</td></tr>{% endfor %}</table>{% endif %}
{% if a.worst %}<h3>Linears with the largest error</h3>
<table><tr><th>linear</th><th class="number">SQNR, dB</th><th class="number">bits</th><th class="number">largest / rms weight</th><th class="number">scales</th><th class="number">input scale</th></tr>
{% for w in a.worst %}<tr><td class="name">{{ w.name }}</td>{% for cell in w.cells %}<td class="number">{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
<h3>Engines, from the headers</h3>
<table>{% for engine, v in a.engines.items() %}<tr><th>{{ engine }}</th><td class="{{ '' if v.ok else 'no' }}">{{ "loads it" if v.ok else "does not load it" }}</td><td>{{ v.why }}</td></tr>{% endfor %}</table>
<h3>Recipe</h3><pre>{{ a.recipe }}</pre>
<h3>Made with</h3>
<table>{% for name, version in a.versions.items() %}<tr><th>{{ name }}</th><td>{{ version }}</td></tr>{% endfor %}
{% for p in a.plugins %}<tr><th>plugin {{ p.id }}</th><td>{{ p.dist }} {{ p.version }}, RECORD {{ p.record_sha256[:16] }}</td></tr>{% endfor %}</table>
{% endfor %}
</body></html>
"""
)
_SECTIONS = (
    _HEAD
    + """<p>{{ note }}</p>
{% for s in sections %}<h3>{{ s.title }}</h3><p class="about">{{ s.about }}</p>{{ s.svg }}
{% if s.rows %}<table><tr>{% for head in s.header %}<th{{ ' class="number"' | safe if not loop.first }}>{{ head }}</th>{% endfor %}</tr>
{% for row in s.rows %}<tr>{% for cell in row %}<td{{ ' class="number"' | safe if not loop.first }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% endfor %}
</body></html>
"""
)
# rows of the tables of worst linears and of outlier channels; an outlier channel is this many times the median one
_ROWS = 12
_OUTLIER = 10


def write_report(folders: Sequence[Path], target: Path, title: str = "AngelSlim report", summary: Sequence[Mapping[str, str]] = (), note: str = "") -> None:
    """Write the report.

    Args:
        folders: outputs of `run`.
        summary: rows of a table on top, with equal keys.
        note: one sentence above that table.

    Raises:
        ModelError: a folder has no records, or damaged ones.
        PluginError: matplotlib is not installed.
    """
    import jinja2
    from markupsafe import Markup

    need_matplotlib()
    from .plots import size_plot

    artifacts = []
    for folder in map(Path, folders):
        records = read_records(folder)
        if "metrics" not in records or "plan" not in records:
            raise ModelError(96, str(folder), f"has no records under {RECORDS}/", "reports are made of folders that `angelslim run` wrote")
        try:
            artifacts.append(_artifact(folder, records))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ModelError(391, str(folder), f"has records under {RECORDS}/ that are not as `angelslim run` writes them") from error
    sizes = ""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    try:
        if len(artifacts) > 1:
            names = ["source", *(a["name"] for a in artifacts)]
            sizes = size_plot(names, [n / 1e6 for n in (artifacts[0]["bytes_before"], *(a["bytes_after"] for a in artifacts))])
        page = template.render(title=title, artifacts=artifacts, sizes=Markup(sizes), summary=list(summary), note=note)
    except (jinja2.TemplateError, AttributeError, TypeError, ValueError) as error:
        where = ", ".join(map(str, folders))
        raise ModelError(406, where, f"has records under {RECORDS}/ of which no page can be made") from error
    write_text(target, page)


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        about: a sentence or two.
        svg: as `plots.svg` draws it.
        rows: cells of a table under `header`, all but the first of which are numbers.
    """

    title: str
    about: str = ""
    svg: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def write_page(target: Path, title: str, note: str, sections: Sequence[Section]) -> None:
    """Write a page of plots and tables, as self-contained as a report.

    Raises:
        PluginError: matplotlib is not installed, so that there are no plots.
    """
    import jinja2
    from markupsafe import Markup

    need_matplotlib()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_SECTIONS)
    write_text(target, template.render(title=title, note=note, sections=[replace(s, svg=Markup(s.svg)) for s in sections]))


def _artifact(folder: Path, records: Mapping[str, Any]) -> dict[str, Any]:
    metrics, plan, provenance = records["metrics"], records["plan"], records.get("provenance", {})
    # folders of older runs hold less
    analysis = {"linears": _from_names(metrics.get("linears", {})), "histograms": {}, "inputs": {}, "experts": {}} | records.get("analysis", {})
    linears = analysis["linears"]
    measured = [entry for entry in linears.values() if entry.get("weights")]
    recipe = folder / RECORDS / "recipe.yaml"
    return {
        "name": folder.resolve().name,
        "bytes_before": metrics["bytes_before"],
        "bytes_after": metrics["bytes_after"],
        "bits": sum(e["bits"] * e["weights"] for e in measured) / sum(e["weights"] for e in measured) if measured else None,
        "seconds": metrics["seconds"],
        "passes": [{"id": p["id"], "metrics": {k: v for k, v in p["metrics"].items() if not isinstance(v, list)}} for p in metrics["passes"]],
        "evaluation": metrics.get("evaluation"),
        "plots": _plots(metrics["passes"], analysis),
        "channels": _outlier_channels(analysis["inputs"]),
        "worst": _worst(linears),
        "notes": [*_together(metrics.get("fallbacks", [])), *metrics.get("warnings", [])],
        "engines": plan["engines"],
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        "versions": provenance.get("versions", {}),
        "plugins": provenance.get("plugins", []),
    }


def _from_names(linears: Mapping[str, Any]) -> dict[str, Any]:
    """Layer and role of linears that a run recorded without them."""
    found = {}
    for name, entry in linears.items():
        match = re.search(r"\.layers\.(\d{1,4})\.", name)
        found[name] = {"layer": int(match[1]) if match else None, "role": name.rpartition(".")[2], **entry}
    return found


def _plots(passes: Sequence[Mapping[str, Any]], analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What there is to be drawn, each with a title, a sentence and SVG."""
    from markupsafe import Markup

    from . import plots

    linears, inputs, experts = list(analysis["linears"].values()), analysis["inputs"], analysis["experts"]
    found = []
    for p in passes:
        found += [("Choice" if "mark" in curve else "Course", p["id"], plots.curve_plot(curve)) for curve in p["metrics"].get("curves", [])]
    found.append(("Error", "Signal to quantization noise of weights: 6 dB are one bit.", plots.error_plot(linears)))
    for p in passes:
        lists = {k: v for k, v in p["metrics"].items() if isinstance(v, list) and v and all(isinstance(x, int | float) for x in v)}
        if lists:
            found.append((p["id"], "What the pass reports of each layer.", plots.lists_plot(lists)))
    found += [
        ("Bits", "As stored, with scales and zero points.", plots.bits_plot(linears)),
        ("Scales", "A wide band means channels or groups of very different size; large input scales leave small inputs few bits.", plots.scale_plot(linears)),
        ("Weights", "How magnitudes are spread in each layer, counts relative to the fullest bin.", plots.weight_plot(analysis["histograms"], linears)),
        ("Inputs", "The same for what the quantized model feeds its linears on calibration text, padding left out.", plots.input_plot(inputs)),
        ("Outliers of inputs", "How far the largest channel of an input lies above the median one.", plots.outlier_plot(inputs)),
    ]
    if experts:
        lost = sum(not count for counts in experts.values() for count in counts)
        few = min(count for counts in experts.values() for count in counts)
        what = f"{lost} of {sum(map(len, experts.values()))} experts got no token (red)." if lost else f"Every expert got tokens, {few} at least."
        found.append(("Experts", f"Calibration tokens that the router sent to each expert. {what}", plots.expert_plot(experts)))
    return [{"title": title, "about": about, "svg": Markup(svg)} for title, about, svg in found if svg]


def _outlier_channels(inputs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Channels far above the median of their input, those of most layers first; experts' own intermediates are left out."""
    seen: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for layer, found in inputs.items():
        for name, numbers in found.items():
            for channel, ratio in (c for c in numbers["channels"] if len(c) == 2 and c[1] >= _OUTLIER):
                seen.setdefault((name, channel), []).append((ratio, int(layer)))
    ordered = sorted(seen.items(), key=lambda item: (-len(item[1]), -max(item[1])[0]))
    return [
        {"input": name, "channel": channel, "layers": len(where), "ratio": max(where)[0], "layer": max(where)[1]} for (name, channel), where in ordered[:_ROWS]
    ]


def _together(fallbacks: Sequence[str]) -> list[str]:
    """What happened to many linears in one line."""
    where: dict[str, list[str]] = {}
    for line in fallbacks:
        name, _, what = line.partition(": ")
        where.setdefault(what, []).append(name)
    return [f"{n[0]}: {what}" if len(n) == 1 else f"{len(n)} times {what}: {', '.join(n[:3])}{', ...' if len(n) > 3 else ''}" for what, n in where.items()]


def _worst(linears: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The linears of least SQNR."""
    rated = sorted((entry["sqnr_db"], name) for name, entry in linears.items() if entry.get("sqnr_db") is not None)
    rows = []
    for sqnr, name in rated[:_ROWS]:
        entry = linears[name]
        peak = f"{entry['amax'] / entry['rms']:.1f}" if entry.get("rms") else ""
        least, _, largest = entry.get("scale", (0, 0, 0))
        scales = "" if not largest else f"{largest:.3g}" if least == largest else f"{least:.3g} to {largest:.3g}"
        bits = f"{entry['bits']:.3g}" if "bits" in entry else ""
        rows.append({"name": name, "cells": [f"{sqnr:.2f}", bits, peak, scales, f"{entry['input_scale']:.3g}" if "input_scale" in entry else ""]})
    return rows


def need_matplotlib() -> None:
    """Plots can be drawn.

    Raises:
        PluginError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PluginError(17, "report", "plots need matplotlib, which is not installed", "pip install 'angelslim-core[report]'") from None
