"""Dense decoders with Llama's names."""

from .base import ATTENTION, MLP, Layout

LAYOUTS = (Layout(model_types=("llama", "mistral"), roles=ATTENTION | MLP),)
