"""Multimodal token pruning for angelslim-core: fewer vision and audio tokens in the language model."""

__version__ = "0.1.0"
