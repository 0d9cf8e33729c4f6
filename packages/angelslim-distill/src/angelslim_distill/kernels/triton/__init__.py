"""Implementations in Triton, one file an operation; imported where one is called."""
