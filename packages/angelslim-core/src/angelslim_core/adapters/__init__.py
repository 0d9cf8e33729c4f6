"""Architectures as tables; one file per family."""
