"""Distillation for angelslim-core: a student is trained towards its teacher's distributions."""

__version__ = "0.1.0"
