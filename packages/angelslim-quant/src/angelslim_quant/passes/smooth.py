"""SmoothQuant: the range of activations is moved into the weights, by a scale folded into what feeds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from angelslim_core.device import release_ram
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
        group, device = layer.context.group, layer.context.device
        share = -(-ROWS // int(group.reduce(torch.tensor(len(layer.batches)))))
        first = {fold.sites[0]: fold for fold in folds}
        peaks = {site: torch.zeros(site.shape[1], device=device) for site in first}
        # allocated at once: small pieces kept between large ones that are freed would scatter the heap
        rows = {site: torch.empty(share * len(layer.batches), site.shape[1], dtype=layer.linear(site).weight.dtype, device=device) for site in first}
        kept = dict.fromkeys(first, 0)

        def see(site: Site, x_NI: Tensor) -> None:
            if x_NI.shape[0]:
                peaks[site] = torch.maximum(peaks[site], x_NI.abs().amax(0).float())
                some = x_NI[:: max(1, x_NI.shape[0] // share)][:share]
                rows[site][kept[site] : kept[site] + some.shape[0]] = some
                kept[site] += some.shape[0]

        layer.observe(see, sites=first)
        release_ram()  # pages of the forward passes: the search would come on top of them
        smoothed = 0
        for site, fold in first.items():
            s_C = self._choose(layer, fold, group.reduce(peaks[site], "max"), rows.pop(site)[: kept[site]])
            if s_C is not None:
                layer.scale(fold.fold, s_C)
                smoothed += 1
        return {"smoothed_feeds": smoothed}

    def _choose(self, layer: Layer, fold: SiteFold, peak_I: Tensor, x_NI: Tensor) -> Tensor | None:
        """The scale of a feed [C], or None if leaving it alone is best."""
        import torch

        reach = torch.stack([layer.linear(site).weight.data.abs().amax(0).float() for site in fold.sites]).amax(0)
        peak_C, reach_C = fold.pool(peak_I, largest=True), fold.pool(reach, largest=True)
        if not self.config.search:
            return smoothing(peak_C, reach_C, self.config.alpha)
        tried = [smoothing(peak_C, reach_C, strength) for strength in sorted({*STRENGTHS, self.config.alpha})]
        scales = [torch.ones_like(peak_I), *(layer.spread(s_C, peak_I.numel()) for s_C in tried)]
        losses = torch.zeros(len(scales), dtype=torch.float64)
        x = x_NI.float()
        for site in fold.sites:  # one at a time: their outputs together are large
            losses += torch.tensor(_losses(x, layer.linear(site).weight.data.float(), scales), dtype=torch.float64)
        best = int(layer.context.group.reduce(losses).argmin())
        return tried[best - 1] if best else None


def smoothing(peak_C: Tensor, reach_C: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), within [1e-6, 1e6] (Xiao et al., 2211.10438, equation 4)."""
    return (peak_C.clamp_min(1e-8).pow(alpha) / reach_C.clamp_min(1e-8).pow(1 - alpha)).clamp(1e-6, 1e6)


def _losses(x_NI: Tensor, weight_OI: Tensor, scales: list[Tensor]) -> list[float]:
    """Squared errors of the outputs when rows of both sides, scaled by each of `scales` [I], are rounded to 8 bits."""
    import torch

    exact_NO = x_NI @ weight_OI.T
    # the same memory for each scale: large pieces taken and freed in turn would scatter the heap
    x, weight, out = torch.empty_like(x_NI), torch.empty_like(weight_OI), torch.empty_like(exact_NO)
    found = []
    for s_I in scales:
        _round_rows(torch.div(x_NI, s_I, out=x))
        _round_rows(torch.mul(weight_OI, s_I, out=weight))
        found.append(float(torch.mm(x, weight.T, out=out).sub_(exact_NO).square_().sum()))
    return found


def _round_rows(x: Tensor) -> None:
    """Round the rows of `x` in place."""
    import torch

    scale = (torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True) / 127).clamp_min(1e-12)
    x.div_(scale).round_().mul_(scale)
