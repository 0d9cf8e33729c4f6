"""Kernels in Triton; nothing here is imported before one is run."""
