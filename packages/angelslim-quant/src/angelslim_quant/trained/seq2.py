"""Stretched elastic quantization to 2 bits: four levels about zero, none of them zero, under learnt ranges.

Shapes: O out features, I in features, G groups along `in` (one for channels).
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from angelslim_core.schemes import Scheme

from ..kernels.amax import grouped
from ..kernels.round_levels import Levels
from .scaled import ScaledQuantizer, searched

# +-1 and +-3 quarters of the range a; a weight beyond .99 a is cut off
LEVELS = Levels(step=2, shift=1, low=-4 * 0.99, high=4 * 0.99)
UNIT = 1 / 4
# of a range
BOUNDS = (1e-5, inf)
# parts of the largest magnitude that are tried as range
RATIOS = tuple(1 - i / 20 for i in range(15))


class Seq2Quantizer(ScaledQuantizer):
    """w' = a q, q = (round(2 u - .5) + .5) / 2, u = clip(w / a, -.99, .99): a is learnt, a / 4 as it is stored is the scale.

    Gradients: dw = dy where |w / a| <= .99, else 0; da = dy (q - w / a) there, elsewhere dy q, over the square root of how many
    weights share a.

    Args:
        weight_OI: what training begins with.
        search: begin with the range of least squared error, else with the largest magnitude.

    Source: Liu et al., "ParetoQ" (2502.02631), section 4.
    """

    def __init__(self, scheme: Scheme, weight_OI: Tensor, search: bool = True) -> None:
        super().__init__(scheme, _first(scheme, weight_OI, search), None, LEVELS, UNIT, BOUNDS, largest=1.0)


@torch.no_grad()
def _first(scheme: Scheme, weight_OI: Tensor, search: bool) -> Tensor:
    if search:
        return searched(weight_OI, scheme.weights, LEVELS, UNIT, BOUNDS, RATIOS)
    return grouped(weight_OI, scheme.weights).abs().amax(-1).float()
