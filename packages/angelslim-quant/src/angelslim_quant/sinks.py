"""How much the error on each token counts: the first of a text more than others, as most of attention rests on it.

Whatever moves the keys and values of that attention sink moves every token after it; counted alike, it is one row in
hundreds. Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2309.17453), for what sinks are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.layer import LayerBatch

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


def fitting(weight_N: Tensor | None, x_NI: Tensor) -> Tensor | None:
    """The weights where rows are tokens; None for experts that see a part of them."""
    return weight_N.to(x_NI.device) if weight_N is not None and weight_N.shape[0] == x_NI.shape[0] else None
