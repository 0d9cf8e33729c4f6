"""Gemma 3, text only and multimodal (its vision tower and projector are left alone)."""

from .base import ATTENTION, MLP, Layout

LAYOUTS = (Layout(model_types=("gemma3_text", "gemma3"), roles=ATTENTION | MLP),)
