"""AWQ: input channels that see large activations are scaled up before rounding, and the scale is folded into what feeds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from angelslim_core.passes import LayerPass
from angelslim_core.schemes import Quantized, Scheme

from ..folds import folds_of
from ..grouped import GroupedConfig, grouped_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer

    from ..folds import SiteFold

# shrinks of a group's range that the clip search tries
SHRINKS = tuple(1 - i / 20 for i in range(1, 10))


class AWQ(LayerPass):
    """INT4 weights in groups after a searched scaling of their input channels (AWQ), folded into norms and weights before."""

    id = "quant.awq"

    class Config(GroupedConfig):
        symmetric: bool = Field(False, description="Without a zero point.")
        grid: int = Field(20, ge=1, le=100, description="Exponents tried per family of scales, 0 (no scaling) included.")
        clip: bool = Field(True, description="Shrink each group's range where that lowers its error on the calibration inputs.")
        rounding: Literal["nearest", "none"] = Field("nearest", description="none: only fold the scales; a later step quantizes.")

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        """What this step gives its final form."""
        return frozenset({"linear.weight"}) if self.config.rounding == "nearest" else frozenset()

    def scheme(self, site: Site) -> Scheme | None:
        scheme = grouped_scheme(site, self.config)
        return scheme if self.config.rounding == "nearest" else None

    def run(self, layer: Layer) -> dict[str, Any]:
        import torch

        from ..numerics.compensate import Moments

        folds, alone = folds_of(layer)
        inputs = [*(fold.sites for fold in folds), *((site,) for site in alone)]
        moments = {sites[0]: Moments() for sites in inputs}
        group, device = layer.context.group, layer.context.device
        means = {site: torch.zeros(site.shape[1], device=device) for site in moments}

        def see(site: Site, x_NI: Tensor) -> None:
            moments[site].add(x_NI)
            means[site] += x_NI.abs().sum(0, dtype=torch.float32)

        layer.observe(see, sites=moments)
        for site, found in moments.items():
            found.reduce(group, site.shape[1], device)
            means[site] = group.reduce(means[site])
        report = {"scaled_feeds": 0}
        importance: dict[Site, Tensor] = {}
        for fold in folds:
            first = fold.sites[0]
            hessian = moments[first].hessian
            s_I = self._search(layer, fold, hessian, means[first] / moments[first].rows)
            report["scaled_feeds"] += s_I is not None
            importance[first] = hessian.diagonal() if s_I is None else hessian.diagonal() / s_I.square()
        for site in alone:
            importance[site] = moments[site].hessian.diagonal()
        if self.config.rounding == "nearest":
            for sites in inputs:
                for site in sites:
                    self._round(layer, site, importance[sites[0]])
        return report

    def _search(self, layer: Layer, fold: SiteFold, hessian: Tensor, mean_I: Tensor) -> Tensor | None:
        """Find and fold the scale of least output error, tr(E H E^T) summed over the readers; None if not scaling is best."""
        import torch

        weights = [layer.linear(site).weight.data.float() for site in fold.sites]

        def loss(s_I: Tensor) -> float:
            total = 0.0
            for site, weight in zip(fold.sites, weights, strict=True):
                error = (self._nearest(site, weight * s_I) / s_I).sub_(weight)
                total += float(((error @ hessian) * error).sum())
            return total

        mean_C = fold.pool(mean_I)
        spread = torch.stack([w.abs().mean(0) for w in weights]).mean(0)
        width_C = fold.pool(spread).clamp_min(1e-8)
        best, chosen = loss(torch.ones_like(mean_I)), None
        for step in range(1, self.config.grid):
            ratio = step / self.config.grid
            for s_C in (mean_C.pow(ratio), mean_C.pow(ratio) / width_C.pow(1 - ratio)):
                s_C = s_C.clamp_min(1e-4)
                s_C = s_C / (s_C.max() * s_C.min()).sqrt()
                found = loss(layer.spread(s_C, mean_I.numel()))
                if found < best:
                    best, chosen = found, s_C
        if chosen is None:
            return None
        layer.scale(fold.fold, chosen)
        return layer.spread(chosen, mean_I.numel())

    def _nearest(self, site: Site, weight_OI: Tensor) -> Tensor:
        from angelslim_core.schemes import dequantize

        from ..numerics.integer import quantize

        grid = grouped_scheme(site, self.config).weights
        return dequantize(*quantize(weight_OI, grid), grid)

    def _round(self, layer: Layer, site: Site, importance_I: Tensor) -> None:
        from ..numerics.integer import quantize, search_range

        scheme = grouped_scheme(site, self.config)
        weight = layer.linear(site).weight.data
        chosen = search_range(weight, scheme.weights, importance_I, SHRINKS) if self.config.clip else (None, None)
        layer.store(site, Quantized(scheme, *quantize(weight, scheme.weights, *chosen)))
