"""Second moments of what linears read, gathered while a layer runs its calibration batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .sinks import observe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer

    from .numerics.compensate import Moments


def second_moments(
    layer: Layer,
    sets: Sequence[Sequence[Site]],
    sink_weight: float,
    all_experts: bool,
    stored: Callable[[Site, Tensor], Tensor] | None = None,
) -> dict[Site, Moments]:
    """Of all processes' batches, for each set of linears that read one input, by its first member.

    Args:
        sink_weight: see `token_weights`.
        all_experts: see `Layer.observe`.
        stored: rows [N, I] as the quantized linear reads them; unchanged if not given.
    """
    from .numerics.compensate import Moments

    moments = {members[0]: Moments() for members in sets}

    def see(site: Site, x_NI: Tensor, weight_N: Tensor | None) -> None:
        moments[site].add(stored(site, x_NI) if stored else x_NI, None, weight_N)

    observe(layer, see, sink_weight, all_experts, sites=moments)
    for site, seen in moments.items():
        seen.reduce(layer.context.group, site.shape[1], layer.context.device)
    return moments
