"""GPTAQ: GPTQ that also makes up for how far the quantized layers before it have moved the inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import Field

from ..sinks import observe
from ..stages import by_input
from .gptq import GPTQ, CompensatedConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer

    from ..numerics.compensate import Moments


class GPTAQ(GPTQ):
    """INT4 weights in groups, error-compensated against the inputs of the unquantized model (GPTAQ, asymmetric calibration)."""

    id = "quant.gptaq"
    needs_reference = True

    class Config(CompensatedConfig):
        alpha: float = Field(0.5, ge=0, le=1, description="Part of the inputs' drift that is made up for; with few tokens most of it is noise.")

    @contextmanager
    def on(self, layer: Layer) -> Iterator[None]:
        self._original: nn.Module = copy.deepcopy(layer.module)
        try:
            yield
        finally:
            del self._original

    def collect(self, layer: Layer, sites: tuple[Site, ...]) -> dict[Site, Moments]:
        from ..numerics.compensate import Moments

        moments = {members[0]: Moments() for members in by_input(sites)}
        expected: dict[Site, Tensor] = {}

        def see(site: Site, x_NI: Tensor, weight_N: Tensor | None) -> None:
            moments[site].add(x_NI, expected[site], weight_N)

        # every expert sees every token: routing may differ between the two streams, rows may not
        for batch in layer.batches:
            layer.observe(expected.__setitem__, sites=moments, batches=[batch], reference=self._original)
            observe(layer, see, self.config.sink_weight, sites=moments, batches=[batch])
        for site, found in moments.items():
            found.reduce(layer.context.group, site.shape[1], layer.context.device, drifts=True)
        return moments

    def drift(self, moments: Moments) -> Tensor | None:
        drift = moments.drift
        return None if drift is None else drift * self.config.alpha
