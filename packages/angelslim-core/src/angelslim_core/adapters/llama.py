"""Dense decoders with Llama's names: Llama, Mistral, Qwen2, Qwen3, Seed-OSS, Hunyuan dense."""

from .base import ATTENTION, MLP, Layout

LAYOUTS = (Layout(model_types=("llama", "mistral", "qwen2", "qwen3", "seed_oss", "hunyuan_v1_dense"), roles=ATTENTION | MLP),)
