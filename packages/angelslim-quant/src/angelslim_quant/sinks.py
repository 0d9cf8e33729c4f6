"""How much the error on each token counts: the first of a text more than others, as most of attention rests on it.

Whatever moves the keys and values of that attention sink moves every token after it; counted alike, it is one row in
hundreds. Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2309.17453), for what sinks are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer, LayerBatch

SINK_WEIGHT = 1 / 16


def token_weights(batch: LayerBatch, sink_weight: float) -> Tensor | None:
    """Weights [N] of the batch's real tokens, fp32; None if all count 1.

    Args:
        sink_weight: what a sample's first token counts, in parts of the sample's other tokens; it never counts less than they do.
    """
    import torch

    if not sink_weight:
        return None
    mask = batch.mask
    weights = torch.ones(mask.shape)
    first = mask.int().argmax(1, keepdim=True)
    return weights.scatter_(1, first, (mask.sum(1, keepdim=True) * sink_weight).clamp_min(1))[mask]


def observe(
    layer: Layer,
    see: Callable[[Site, Tensor, Tensor | None], None],
    sink_weight: float,
    all_experts: bool = True,
    *,
    sites: Iterable[Site],
    batches: Sequence[LayerBatch] | None = None,
) -> None:
    """As `Layer.observe`, but `see` also gets the weights [N] of the rows; None where all count 1, and for experts that see a part of the tokens."""
    sites = tuple(sites)
    for batch in layer.batches if batches is None else batches:
        weight_N = token_weights(batch, sink_weight)

        def look(site: Site, x_NI: Tensor, weight_N: Tensor | None = weight_N) -> None:
            see(site, x_NI, weight_N.to(x_NI.device) if weight_N is not None and weight_N.shape[0] == x_NI.shape[0] else None)

        layer.observe(look, all_experts, sites=sites, batches=[batch])
