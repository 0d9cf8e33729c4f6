"""Dense decoders with Llama's names: Llama, Mistral, Qwen2, Qwen3, Seed-OSS, Hunyuan dense; Qwen3-VL (its vision tower is left alone)."""

from .base import ATTENTION, MLP, Layout

LAYOUTS = (
    Layout(
        model_types=("llama", "mistral", "qwen2", "qwen3", "seed_oss", "hunyuan_v1_dense", "qwen3_vl"),
        roles=ATTENTION | MLP,
        gguf={"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    ),
)
