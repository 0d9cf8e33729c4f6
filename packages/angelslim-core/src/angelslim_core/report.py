"""One HTML file about one or more output folders: no script, no remote address, every name escaped."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ModelError, PluginError
from .io.writer import write_text
from .records import RECORDS, read_records

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0; text-align: left }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto } svg { max-width: 100%; height: auto } .no { color: #a00 }
</style></head><body>
<h1>{{ title }}</h1>
{% if summary %}<p>{{ note }}</p>
<table><tr>{% for head in summary[0] %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in summary %}<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
{% for plot in plots %}{{ plot }}{% endfor %}
{% for a in artifacts %}
<h2>{{ a.name }}</h2>
<table>
<tr><th>weights</th><td>{{ "%.1f" | format(a.bytes_after / 1e6) }} MB of {{ "%.1f" | format(a.bytes_before / 1e6) }} MB</td></tr>
<tr><th>time</th><td>{{ "%.1f" | format(a.seconds) }} s</td></tr>
{% for p in a.passes %}<tr><th>{{ p.id }}</th><td>{% for key, value in p.metrics.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% endfor %}</td></tr>{% endfor %}
{% if a.evaluation %}{% for key, value in a.evaluation.items() %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}
{% else %}<tr><th>perplexity, KL</th><td>not measured by the run</td></tr>{% endif %}
</table>
{{ a.plot }}
{% for plot in a.curves %}{{ plot }}{% endfor %}
<h3>Engines, from the headers</h3>
<table>{% for engine, v in a.engines.items() %}<tr><th>{{ engine }}</th><td class="{{ '' if v.ok else 'no' }}">{{ "loads it" if v.ok else "does not load it" }}</td><td>{{ v.why }}</td></tr>{% endfor %}</table>
{% if a.notes %}<h3>Fallbacks and warnings</h3><ul>{% for note in a.notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
<h3>Recipe</h3><pre>{{ a.recipe }}</pre>
<h3>Made with</h3>
<table>{% for name, version in a.versions.items() %}<tr><th>{{ name }}</th><td>{{ version }}</td></tr>{% endfor %}
{% for p in a.plugins %}<tr><th>plugin {{ p.id }}</th><td>{{ p.dist }} {{ p.version }}, RECORD {{ p.record_sha256[:16] }}</td></tr>{% endfor %}</table>
{% endfor %}
</body></html>
"""


def write_report(folders: Sequence[Path], target: Path, title: str = "AngelSlim report", summary: Sequence[Mapping[str, str]] = (), note: str = "") -> None:
    """Write the report.

    Args:
        folders: outputs of `run`.
        summary: rows of a table on top, with equal keys.
        note: one sentence above that table.

    Raises:
        ModelError: a folder has no records.
        PluginError: matplotlib is not installed.
    """
    import jinja2
    from markupsafe import Markup

    _need_matplotlib()
    artifacts = [_artifact(Path(folder)) for folder in folders]
    for artifact in artifacts:
        artifact["plot"] = Markup(_error_plot(artifact["linears"])) if artifact["linears"] else ""
        artifact["curves"] = [Markup(_curve(curve)) for curve in artifact["curves"]]
    plots = [Markup(_size_plot(artifacts))] if len(artifacts) > 1 else []
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    write_text(target, page.render(title=title, artifacts=artifacts, plots=plots, summary=list(summary), note=note))


def _artifact(folder: Path) -> dict[str, Any]:
    records = read_records(folder)
    if "metrics" not in records or "plan" not in records:
        raise ModelError(96, str(folder), f"has no records under {RECORDS}/", "reports are made of folders that `angelslim run` wrote")
    metrics, plan, provenance = records["metrics"], records["plan"], records.get("provenance", {})
    recipe = folder / RECORDS / "recipe.yaml"
    return {
        "name": folder.resolve().name,
        "bytes_before": metrics["bytes_before"],
        "bytes_after": metrics["bytes_after"],
        "seconds": metrics["seconds"],
        "passes": [{"id": p["id"], "metrics": {k: v for k, v in p["metrics"].items() if k != "curves"}} for p in metrics["passes"]],
        "curves": [curve for p in metrics["passes"] for curve in p["metrics"].get("curves", [])],
        "evaluation": metrics.get("evaluation"),
        "linears": metrics.get("linears", {}),
        "notes": [*metrics.get("fallbacks", []), *metrics.get("warnings", [])],
        "engines": plan["engines"],
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        "versions": provenance.get("versions", {}),
        "plugins": provenance.get("plugins", []),
    }


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PluginError(17, "report", "plots need matplotlib, which is not installed", "pip install 'angelslim-core[report]'") from None


def _svg(draw: Any, width: float = 8, height: float = 2.8) -> str:
    """SVG of what `draw(axes)` draws, without the header and metadata that do not belong inside a page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "angelslim", "font.size": 9, "text.parse_math": False}):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        pyplot.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text


def _error_plot(linears: Mapping[str, Any]) -> str:
    """Weight SQNR over layers, a line per kind of linear."""
    series: dict[str, dict[int, list[float]]] = {}
    for name, entry in linears.items():
        match = re.search(r"\.layers\.(\d+)\.", name)
        if match and isinstance(entry, dict) and isinstance(entry.get("sqnr_db"), int | float):
            series.setdefault(name.rsplit(".", 1)[-1], {}).setdefault(int(match[1]), []).append(float(entry["sqnr_db"]))

    def draw(axes: Any) -> None:
        for kind, points in sorted(series.items()):
            layers = sorted(points)
            axes.plot(layers, [sum(points[i]) / len(points[i]) for i in layers], marker=".", linewidth=1, label=kind)
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("weight SQNR, dB")
        axes.legend(ncols=4, fontsize=7)

    return _svg(draw)


def _curve(curve: Mapping[str, Any]) -> str:
    """A curve that a pass found, as `WeightPass.findings` says."""

    def draw(axes: Any) -> None:
        x, y = zip(*curve["points"], strict=True)
        axes.plot(x, y, marker=".", linewidth=1)
        if "mark" in curve:
            axes.plot(*curve["mark"], marker="o", markersize=9, fillstyle="none", color="#aa3377", linestyle="none", label="chosen")
            axes.legend(fontsize=8)
        axes.set_title(curve["title"])
        axes.set_xlabel(curve["x"])
        axes.set_ylabel(curve["y"])

    return _svg(draw, height=3.4)


def _size_plot(artifacts: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        names = ["source", *(a["name"] for a in artifacts)]
        sizes = [artifacts[0]["bytes_before"] / 1e6, *(a["bytes_after"] / 1e6 for a in artifacts)]
        axes.barh(names[::-1], sizes[::-1], color="#4477aa")
        axes.set_xlabel("weights, MB")

    return _svg(draw, height=0.5 + 0.4 * (len(artifacts) + 1))
