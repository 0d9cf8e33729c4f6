"""Quantization: integer and floating-point schemes for angelslim-core."""

__version__ = "0.1.0"
