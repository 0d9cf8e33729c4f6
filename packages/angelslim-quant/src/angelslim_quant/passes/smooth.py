"""SmoothQuant: the range of activations is moved into the weights, by a scale folded into what feeds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from angelslim_core.passes import LayerPass, PassConfig

from ..folds import folds_of

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer

    from ..folds import SiteFold

# calibration rows per feed on which strengths are compared
ROWS = 1024
STRENGTHS = tuple(0.3 + 0.1 * i for i in range(8))


class Smooth(LayerPass):
    """Activation outliers moved into the weights (SmoothQuant), for a later step that quantizes both; quantizes nothing itself."""

    id = "quant.smooth"

    class Config(PassConfig):
        alpha: float = Field(0.5, ge=0, le=1, description="Strength of the smoothing where none is searched; 0 leaves weights as they are.")
        search: bool = Field(True, description="Choose each feed's strength, none at all included, by the error of 8-bit rounding on calibration rows.")
        feeds: Literal["norms", "all"] = Field("all", description="norms: only what reads a norm; all: also o behind v, and down behind up.")

    def run(self, layer: Layer) -> dict[str, Any]:
        import torch

        folds, _ = folds_of(layer)
        if self.config.feeds == "norms":
            folds = [f for f in folds if layer.module.get_parameter(f"{f.fold.source}.weight").dim() == 1]
        peaks: dict[Site, Tensor] = {}
        rows: dict[Site, list[Tensor]] = {fold.sites[0]: [] for fold in folds}
        share = -(-ROWS // len(layer.batches))

        def see(site: Site, x_NI: Tensor) -> None:
            peak = x_NI.abs().amax(0).float() if x_NI.shape[0] else x_NI.new_zeros(x_NI.shape[1]).float()
            peaks[site] = torch.maximum(peaks[site], peak) if site in peaks else peak
            rows[site].append(x_NI[:: max(1, x_NI.shape[0] // share)][:share].clone())

        layer.observe(see, sites=rows)
        smoothed = 0
        for fold in folds:
            s_C = self._choose(layer, fold, peaks[fold.sites[0]], torch.cat(rows[fold.sites[0]]))
            if s_C is not None:
                layer.scale(fold.fold, s_C)
                smoothed += 1
        return {"smoothed_feeds": smoothed}

    def _choose(self, layer: Layer, fold: SiteFold, peak_I: Tensor, x_NI: Tensor) -> Tensor | None:
        """The scale of a feed [C], or None if leaving it alone is best."""
        import torch

        weights = [layer.linear(site).weight.data.float() for site in fold.sites]
        reach = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        peak_C, reach_C = fold.pool(peak_I, largest=True), fold.pool(reach, largest=True)
        if not self.config.search:
            return smoothing(peak_C, reach_C, self.config.alpha)
        x = x_NI.float()
        exact = [x @ w.T for w in weights]
        best, chosen = _loss(x, weights, exact), None
        for strength in sorted({*STRENGTHS, self.config.alpha}):
            s_C = smoothing(peak_C, reach_C, strength)
            s_I = layer.spread(s_C, x.shape[1])
            found = _loss(x / s_I, [w * s_I for w in weights], exact)
            if found < best:
                best, chosen = found, s_C
        return chosen


def smoothing(peak_C: Tensor, reach_C: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), within [1e-6, 1e6] (Xiao et al., 2211.10438, equation 4)."""
    return (peak_C.clamp_min(1e-8).pow(alpha) / reach_C.clamp_min(1e-8).pow(1 - alpha)).clamp(1e-6, 1e6)


def _loss(x_NI: Tensor, weights: list[Tensor], exact: list[Tensor]) -> float:
    """Squared error of the outputs when rows of both sides are rounded to 8 bits."""
    rounded = _int8_rows(x_NI)
    return sum(float((rounded @ _int8_rows(w).T).sub_(y).square_().sum()) for w, y in zip(weights, exact, strict=True))


def _int8_rows(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return (x / scale).round_().mul_(scale)
