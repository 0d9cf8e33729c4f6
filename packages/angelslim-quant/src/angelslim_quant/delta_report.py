"""How much of what training changed a quantized model keeps: `angelslim quant delta`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from angelslim_core.context import Progress, silent
from angelslim_core.errors import ModelError, NumericError
from angelslim_core.source import Source, describe_source, open_any
from angelslim_core.stream import prefetch

from .numerics.delta import THRESHOLD

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Layout, Site
    from angelslim_core.exporters import Exporter

# bins of |d|: from 0, then from each of these
EDGES = (THRESHOLD, 1e-4, 1e-3)
# weights that are looked at together: fp32 copies of that many
_ROWS = 1 << 22
_BINS = ("all", "below 1e-5", "1e-5 to 1e-4", "1e-4 to 1e-3", "from 1e-3")
_OUTCOMES = ("preserved", "flipped", "lost", "noise", "unchanged")
_SUMS = ("learned", "found", "dot", "squared_error", "absolute_error", "post", "out", "base", "post_out", "post_base", "out_base")


def delta_report(
    base: str | Path, post: str | Path, out: str | Path, *, layouts: Iterable[Layout], exporters: Iterable[type[Exporter]], progress: Progress = silent
) -> dict[str, Any]:  # fmt: skip
    """Compare d = POST - BASE with d' = OUT - BASE, tensor by tensor, each dequantized as it is read.

    Of OUT its quantized linears count, or all linears if none is. d counts as a change above 1e-5 (paper, section 3.2).

    Returns:
        `spr`, `cosine`, `mse` over all weights; `weights`, `changed`; `outcomes` and `bins` (see `_entry`); `tensors`, a list
        of the same by linear.

    Raises:
        ModelError: a model lacks a linear, or has it in another shape.
        NumericError: a weight is not finite.
    """
    exporters = list(exporters)
    sources = [open_any(folder, exporters) for folder in (base, post, out)]
    described = [{s.name: s for s in describe_source(source, layouts).sites} for source in sources]
    names = [n for n in described[2] if n in sources[2].quantized] or list(described[2])
    missing = [[n for n in names if n not in sites] for sites in described]
    for folder, lacking, sites in zip((base, post, out), missing, described, strict=True):
        if lacking:
            raise ModelError(413, str(folder), f"has no {lacking[0]} ({len(lacking)} linears are missing)", "give three forms of one model")
        other = next((n for n in names if sites[n].shape != described[2][n].shape), None)
        if other:
            raise ModelError(414, f"{folder}: {other}", f"has shape {list(sites[other].shape)} where {Path(out).name} has {list(described[2][other].shape)}")

    def read(name: str) -> list[Tensor]:
        return [_read(source, sites[name]) for source, sites in zip(sources, described, strict=True)]

    rows, whole = [], _Counts()
    for done, (name, weights) in enumerate(prefetch(names, read), 1):
        counts = _Counts()
        counts.add(name, *weights)
        whole.merge(counts)
        rows.append({"name": name, **counts.entry()})
        progress(done, len(names), name)
    return {**whole.entry(), "tensors": rows}


def _read(source: Source, site: Site) -> Tensor:
    """A linear [out, in]; quantized ones in fp32, not rounded to the model's dtype."""
    if site.name in source.quantized:
        return source.read_quantized(site.name).dequantize()
    return source.read(site.tensor, site.part)


class _Counts:
    """Counts and sums over weights that can be added up."""

    def __init__(self) -> None:
        self.outcomes = [[0] * len(_OUTCOMES) for _ in _BINS[1:]]
        self.sums = dict.fromkeys(_SUMS, 0.0)
        self.weights = 0

    def add(self, name: str, base_OI: Tensor, post_OI: Tensor, out_OI: Tensor) -> None:
        step = max(1, _ROWS // base_OI.shape[1])
        for start in range(0, len(base_OI), step):
            self._add(*(w[start : start + step].float() for w in (base_OI, post_OI, out_OI)))
        bad = next((key for key, value in self.sums.items() if not math.isfinite(value)), None)
        if bad:
            raise NumericError(411, name, "holds NaN or Inf in one of the models")

    def _add(self, base: Tensor, post: Tensor, out: Tensor) -> None:
        import torch

        learned, found, error = post - base, out - base, out - post
        size = learned.abs()
        kept, same = learned.sign() * found.sign(), found == 0
        # which outcome: changed weights keep their sign, take the other, or lose all; unchanged ones may move
        changed = torch.where(same, 2, torch.where(kept > 0, 0, 1))
        outcome = torch.where(size > THRESHOLD, changed, torch.where(same, 4, torch.where(learned == 0, 3, changed)))
        place = torch.bucketize(size, torch.tensor(EDGES), right=False)
        counted = torch.bincount((place * len(_OUTCOMES) + outcome).flatten(), minlength=len(self.outcomes) * len(_OUTCOMES)).tolist()
        for i, row in enumerate(self.outcomes):
            for j in range(len(row)):
                row[j] += counted[i * len(row) + j]
        pairs = ((learned, learned), (found, found), (learned, found), (error, error), None, (post, post), (out, out), (base, base), (post, out), (post, base), (out, base))  # fmt: skip
        for key, pair in zip(_SUMS, pairs, strict=True):
            self.sums[key] += float(error.abs().sum(dtype=torch.float64) if pair is None else (pair[0] * pair[1]).sum(dtype=torch.float64))
        self.weights += base.numel()

    def merge(self, other: _Counts) -> None:
        for row, more in zip(self.outcomes, other.outcomes, strict=True):
            for j, count in enumerate(more):
                row[j] += count
        for key, value in other.sums.items():
            self.sums[key] += value
        self.weights += other.weights

    def entry(self) -> dict[str, Any]:
        """`outcomes`: weights by what became of their change; `bins`: the same by |d|; norms, errors and cosines."""
        sums, changed = self.sums, [sum(column) for column in zip(*self.outcomes[1:], strict=True)]

        def cosine(dot: str, one: str, two: str) -> float:
            return sums[dot] / max(1e-10, math.sqrt(sums[one])) / max(1e-10, math.sqrt(sums[two]))

        return {
            "spr": changed[0] / max(1, sum(changed)),
            "cosine": cosine("dot", "learned", "found"),
            "mse": sums["squared_error"] / max(1, self.weights),
            "mae": sums["absolute_error"] / max(1, self.weights),
            "weights": self.weights,
            "changed": sum(changed),
            "delta_norm": math.sqrt(sums["learned"]),
            "stored_delta_norm": math.sqrt(sums["found"]),
            "cosine_post_out": cosine("post_out", "post", "out"),
            "cosine_post_base": cosine("post_base", "post", "base"),
            "cosine_out_base": cosine("out_base", "out", "base"),
            "outcomes": {name: sum(column) for name, column in zip(_OUTCOMES, zip(*self.outcomes, strict=True), strict=True)},
            "bins": {name: dict(zip(_OUTCOMES, row, strict=True)) for name, row in zip(_BINS[1:], self.outcomes, strict=True)},
        }
