"""MXFP4: FP4 values in blocks of 32 under a power of two."""

from __future__ import annotations

from ..microscaled import MXPass


class MXFP4(MXPass):
    """MXFP4 weights and activations: E2M1 in blocks of 32 along the inputs, each under a power of two (E8M0)."""

    id = "quant.mxfp4"
    bits = 4
