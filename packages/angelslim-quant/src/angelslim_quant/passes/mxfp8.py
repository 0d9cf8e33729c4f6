"""MXFP8: FP8 values in blocks of 32 under a power of two."""

from __future__ import annotations

from ..microscaled import MXPass


class MXFP8(MXPass):
    """MXFP8 weights and activations: E4M3 in blocks of 32 along the inputs, each under a power of two (E8M0)."""

    id = "quant.mxfp8"
    bits = 8
