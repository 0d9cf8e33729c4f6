"""Distillation for angelslim-core. Not built yet."""

__version__ = "0.1.0"
