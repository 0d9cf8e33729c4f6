"""Largest magnitudes of a weight, per whatever shares a scale."""

from ..kernels.amax import amax_of, grouped

__all__ = ["amax_of", "grouped"]
