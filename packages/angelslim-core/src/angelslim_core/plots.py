"""Pictures of the report as SVG, drawn from the numbers that `analysis.summarized` describes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .adapters.base import GROUPS

_WIDTH = 9.6
# a record that asks for more is not one of ours
_MOST_LAYERS = 2000
# share of a histogram's counts below which its lower tail is cut
_TAIL = 2e-3
_STYLE = {
    "svg.hashsalt": "angelslim", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9, "text.parse_math": False, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e8", "legend.frameon": False,
}  # fmt: skip
_DARK, _ACCENT = "#1f4e79", "#c0392b"

# role -> layer -> value
Table = dict[str, dict[int, Any]]


def by_role(linears: Iterable[Mapping[str, Any]], key: str) -> Table:
    """The values of a number, all experts of a role together; linears outside layers are left out."""
    table: Table = {}
    for entry in linears:
        if entry.get("layer") is not None and entry.get(key) is not None:
            table.setdefault(str(entry["role"]), {}).setdefault(int(entry["layer"]), []).append(entry[key])
    return _sorted(table)


def _sorted(table: Mapping[str, Any]) -> dict[str, Any]:
    order = list(GROUPS)

    def place(name: str) -> tuple[int, str]:
        first = name.split("+")[0]
        return (order.index(first) if first in order else len(order), name)

    return {name: table[name] for name in sorted(table, key=place)}


def error_plot(linears: Iterable[Mapping[str, Any]]) -> str:
    """Weight SQNR over layers, a line a role; of experts the mean, and a band from the worst to the best."""
    table = by_role(linears, "sqnr_db")

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (role, layers) in enumerate(table.items()):
            index = sorted(layers)
            tint = colour(number)
            axes.plot(index, [sum(layers[i]) / len(layers[i]) for i in index], marker=".", linewidth=1, label=role, color=tint)
            if any(len(layers[i]) > 1 for i in index):
                axes.fill_between(index, [min(layers[i]) for i in index], [max(layers[i]) for i in index], color=tint, alpha=0.15, linewidth=0)
        _layers_below(axes)
        low, high = axes.get_ylim()
        if high - low < 2:  # less is noise
            axes.set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)
        axes.set_ylabel("weight SQNR, dB")
        figure.legend(loc="outside right center")

    return svg(draw, 3) if table else ""


def bits_plot(linears: Iterable[Mapping[str, Any]]) -> str:
    """Stored bits a weight, a row a role and a column a layer."""
    table = by_role(linears, "bits")

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        columns, rows = _columns(table.values()), list(table)
        values = [[_mean(table[role].get(layer)) for layer in columns] for role in rows]
        image = axes.imshow(values, aspect="auto", cmap="viridis_r", vmin=0, vmax=16, interpolation="nearest", extent=_extent(columns, len(rows), 0))
        axes.set_yticks([len(rows) - 0.5 - i for i in range(len(rows))], rows)
        axes.grid(False)
        _layers_below(axes)
        figure.colorbar(image, ax=axes, label="bits a weight", ticks=range(0, 17, 4), pad=0.01)

    return svg(draw, 0.9 + 0.24 * len(table)) if table else ""


def scale_plot(linears: Sequence[Mapping[str, Any]]) -> str:
    """Scales of weights (least, median, largest) and of inputs over layers, a panel a role."""
    table = by_role(linears, "scale")
    inputs = by_role(linears, "input_scale")

    def panel(axes: Any, role: str) -> None:
        layers = table[role]
        index = sorted(layers)
        low, middle, high = ([pick(s[part] for s in layers[i]) for i in index] for part, pick in ((0, min), (1, _median), (2, max)))
        axes.fill_between(index, low, high, color=_DARK, alpha=0.2, linewidth=0)
        axes.plot(index, middle, color=_DARK, linewidth=1.2, label="weights: median; least to largest shaded")
        if role in inputs:
            axes.plot(sorted(inputs[role]), [max(inputs[role][i]) for i in sorted(inputs[role])], color=_ACCENT, linewidth=1.2, label="inputs")

    return _panels(list(table), panel, "scale", logarithmic=True) if table else ""


def weight_plot(histograms: Mapping[str, Mapping[str, Any]], linears: Sequence[Mapping[str, Any]]) -> str:
    """How magnitudes of weights are spread, a panel a role, a column a layer; the line is the largest."""
    table = {role: {int(i): h for i, h in layers.items() if i != "None"} for role, layers in _sorted(histograms).items()}
    table = {role: layers for role, layers in table.items() if layers}
    if not table:
        return ""
    largest = by_role(linears, "amax")
    span = _span(h for layers in table.values() for h in layers.values())
    columns = _columns(table.values())

    def panel(axes: Any, role: str) -> None:
        _density(axes, table[role], columns, span)
        layers = largest.get(role, {})
        axes.plot(sorted(layers), [_octave(max(layers[i])) for i in sorted(layers)], color=_ACCENT, linewidth=1, label="largest")

    return _panels(list(table), panel, "|weight|")


def input_plot(inputs: Mapping[str, Mapping[str, Any]]) -> str:
    """How magnitudes of inputs are spread; lines: the largest, and what the median channel reaches."""
    table = _by_input(inputs)
    if not table:
        return ""
    span = _span(numbers["histogram"] for layers in table.values() for numbers in layers.values())
    columns = _columns(table.values())

    def panel(axes: Any, name: str) -> None:
        layers = table[name]
        index = sorted(layers)
        _density(axes, {i: layers[i]["histogram"] for i in index}, columns, span)
        axes.plot(index, [_octave(layers[i]["amax"]) for i in index], color=_ACCENT, linewidth=1, label="largest")
        axes.plot(index, [_octave(layers[i]["median"]) for i in index], color="black", linewidth=1, linestyle=":", label="largest of the median channel")

    return _panels(list(table), panel, "|input|")


def outlier_plot(inputs: Mapping[str, Mapping[str, Any]]) -> str:
    """The largest channel of each input, as a multiple of the median channel, over layers."""
    table = _by_input(inputs)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (name, layers) in enumerate(table.items()):
            index = sorted(i for i in layers if layers[i]["channels"])
            axes.plot(index, [layers[i]["channels"][0][-1] for i in index], marker=".", linewidth=1, label=name, color=colour(number))
        _plain_log(axes)
        _layers_below(axes)
        axes.set_ylabel("largest / median channel")
        figure.legend(loc="outside right center")

    return svg(draw, 2.8) if table else ""


def expert_plot(experts: Mapping[str, Sequence[int]]) -> str:
    """Calibration tokens that the router sent to each expert, a row a layer, relative to an even spread."""
    rows = {int(layer): counts for layer, counts in experts.items()}

    def draw(figure: Any) -> None:
        from matplotlib.colors import LogNorm

        axes = figure.subplots()
        order = sorted(rows)
        most = max(len(counts) for counts in rows.values())
        values = [[count * len(rows[i]) / max(1, sum(rows[i])) or math.nan for count in rows[i]] + [math.nan] * (most - len(rows[i])) for i in order]
        axes.set_facecolor(_ACCENT)  # seen where there is no token
        image = axes.imshow(values, aspect="auto", cmap="Blues", norm=LogNorm(1 / 8, 8), interpolation="nearest")
        axes.grid(False)
        step = max(1, len(order) // 12)
        axes.set_yticks(range(0, len(order), step), order[::step])
        axes.set_xlabel("expert")
        axes.set_ylabel("decoder layer")
        bar = figure.colorbar(image, ax=axes, label="tokens, even spread = 1", extend="both", pad=0.01, ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8])
        bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        bar.ax.minorticks_off()

    return svg(draw, min(7.0, 1.6 + 0.12 * len(rows))) if rows else ""


def lists_plot(lists: Mapping[str, Sequence[float]]) -> str:
    """Numbers that a pass gives per layer, a line each."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (name, values) in enumerate(lists.items()):
            axes.plot(range(len(values)), values, marker=".", linewidth=1, label=name, color=colour(number))
        if all(v > 0 for values in lists.values() for v in values):
            _plain_log(axes)
        _layers_below(axes, "decoder layers that the pass treats")
        figure.legend(loc="outside right center")

    return svg(draw, 2.4)


def curve_plot(curve: Mapping[str, Any]) -> str:
    """A curve that a pass found, as `WeightPass.findings` says, or of a training."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        x, y = zip(*curve["points"], strict=True)
        axes.plot(x, y, marker=".", linewidth=1, color=_DARK)
        if "mark" in curve:
            axes.plot(*curve["mark"], marker="o", markersize=9, fillstyle="none", color=_ACCENT, linestyle="none", label="chosen")
            axes.legend()
        axes.set_title(curve["title"])
        axes.set_xlabel(curve["x"])
        axes.set_ylabel(curve["y"])

    return svg(draw, 3.2)


def size_plot(names: Sequence[str], megabytes: Sequence[float]) -> str:
    """Sizes as bars."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        bars = axes.barh(names[::-1], megabytes[::-1], color=_DARK, height=0.6)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.margins(x=0.08)
        axes.grid(False)
        axes.set_xlabel("weights, MB")

    return svg(draw, 0.6 + 0.3 * len(names))


def _by_input(inputs: Mapping[str, Mapping[str, Any]]) -> Table:
    table: Table = {}
    for layer, found in inputs.items():
        for name, numbers in found.items():
            table.setdefault(name, {})[int(layer)] = numbers
    return _sorted(table)


def _panels(names: Sequence[str], panel: Callable[[Any, str], None], label: str, logarithmic: bool = False) -> str:
    """Small multiples with equal axes."""

    def draw(figure: Any) -> None:
        columns = min(4, len(names))
        rows = -(-len(names) // columns)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, name in zip(grid.flat, names, strict=False):
            panel(axes, name)
            axes.set_title(name)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        for number, axes in enumerate(grid.flat[: len(names)]):
            _layers_below(axes, "")
            axes.xaxis.set_tick_params(labelbottom=number + columns >= len(names))
        figure.supxlabel("decoder layer", fontsize="medium")
        for axes in grid[:, 0]:
            axes.set_ylabel(label)
        if logarithmic:
            _plain_log(grid[0, 0])  # shared by all
        named: dict[str, Any] = {}
        for axes in grid.flat[: len(names)]:
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(text, handle)
        figure.legend(named.values(), named.keys(), loc="outside upper right", ncols=len(named))

    rows = -(-len(names) // 4)
    return svg(draw, 0.9 + 1.5 * rows)


def _span(histograms: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """From the lowest bin that holds a share worth showing in any of them to the highest of all."""
    low, high = [], []
    for histogram in histograms:
        first, counts = histogram["first"], histogram["counts"]
        if not -300 < first < 300 or len(counts) > 100:
            raise ValueError("a histogram out of range")
        low.append(first + next((i for i, count in enumerate(counts) if count > _TAIL * sum(counts)), 0))
        high.append(first + len(counts))
    return min(low), max(high)


def _density(axes: Any, layers: Mapping[int, Mapping[str, Any]], columns: range, span: tuple[int, int]) -> None:
    """Histograms as columns of an image over log2 of the magnitude."""
    import numpy as np

    low, high = span
    image = np.full((high - low, len(columns)), np.nan)
    for layer, histogram in layers.items():
        for number, count in enumerate(histogram["counts"], histogram["first"]):
            if count and number >= low:
                image[number - low, layer - columns[0]] = count / max(histogram["counts"])
    axes.imshow(image, origin="lower", aspect="auto", cmap="Blues", vmin=-0.1, vmax=1, interpolation="nearest", extent=_extent(columns, high / 2, low / 2))
    axes.grid(False)
    decades = range(math.ceil(low / 2 / math.log2(10)), math.floor(high / 2 / math.log2(10)) + 1)
    decades = decades[:: max(1, len(decades) // 4)]
    axes.set_yticks([d * math.log2(10) for d in decades], [f"1e{d}" for d in decades])


def _octave(value: float) -> float:
    return math.log2(value) if value > 0 else math.nan


def _columns(tables: Iterable[Mapping[int, Any]]) -> range:
    layers = [layer for table in tables for layer in table]
    columns = range(min(layers), max(layers) + 1)
    if columns[0] < 0 or columns[-1] >= _MOST_LAYERS:
        raise ValueError("layer numbers out of range")
    return columns


def _extent(columns: range, top: float, bottom: float) -> tuple[float, float, float, float]:
    return (columns[0] - 0.5, columns[-1] + 0.5, bottom, top)


def _layers_below(axes: Any, label: str = "decoder layer") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(label)


def _plain_log(axes: Any) -> None:
    """A logarithmic axis with ticks as plain text: mathematical notation is off, names may hold anything."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def colour(number: int) -> str:
    """Colour of a line, by its number."""
    return f"C{number % 10}"


def _mean(values: Sequence[float] | None) -> float:
    return sum(values) / len(values) if values else math.nan


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def svg(draw: Callable[[Any], None], height: float) -> str:
    """SVG of what `draw(figure)` draws, `height` inches high, without the header and metadata that do not belong inside a page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        figure = pyplot.figure(figsize=(_WIDTH, height), layout="constrained")
        try:
            draw(figure)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        finally:
            pyplot.close(figure)
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
