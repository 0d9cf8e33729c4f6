"""Dense decoders with Llama's names: Llama, Mistral, Qwen2, Qwen3, Seed-OSS, Hunyuan dense.

And those among multimodal models, whose towers are left alone: LLaVA, Qwen2.5-VL, Qwen3-VL, Qwen2-Audio.
"""

from .base import ATTENTION, MLP, Layout

# linears whose outputs stand in the stream of the language model
_PROJECTORS = ("multi_modal_projector.linear_2", "multi_modal_projector.linear", "visual.merger.mlp.2")

_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")

LAYOUTS = (
    Layout(
        model_types=("llama", "mistral", "qwen2", "qwen3", "seed_oss", "hunyuan_v1_dense", "qwen3_vl"),
        roles=ATTENTION | MLP,
        gguf={"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
        biases={
            "llama": {"attention_bias": _ATTENTION, "mlp_bias": _MLP},
            "seed_oss": {"attention_bias": ("q", "k", "v"), "attention_out_bias": ("o",), "mlp_bias": _MLP},
            "qwen3": {"attention_bias": _ATTENTION},
            "hunyuan_v1_dense": {"attention_bias": _ATTENTION},
        },
    ),
    Layout(
        model_types=("llava", "qwen2_audio"),
        roles=ATTENTION | MLP,
        towers=("vision_tower", "audio_tower", "multi_modal_projector"),
        projectors=_PROJECTORS,
        renamed={"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head"},
    ),
    Layout(
        model_types=("qwen2_5_vl",),
        roles=ATTENTION | MLP,
        projectors=_PROJECTORS,
        renamed={"model.layers.": "model.language_model.layers.", "model.embed_tokens": "model.language_model.embed_tokens"},
    ),
)
