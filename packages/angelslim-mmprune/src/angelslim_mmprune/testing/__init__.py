"""Tiny random models of every architecture that has media, and prompts for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_IMAGE, _VIDEO, _START, _END = 120, 121, 122, 123
_MROPE = {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 10000.0}
_IDS = {"image_token_id": _IMAGE, "video_token_id": _VIDEO, "vision_start_token_id": _START, "vision_end_token_id": _END}
_QWEN_VISION = {"depth": 4, "num_heads": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
            "patch_size": 4, "projection_dim": 32,
        },
        "image_token_id": _IMAGE, "image_seq_length": 16, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    },
    "qwen2_5_vl": {
        **_IDS, "text_config": {**TEXT, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1, 3]},
    },
    "qwen3_vl": {
        **_IDS, "text_config": {**TEXT, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64},
    },
    "qwen2_audio": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "audio_config": {
            "d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 24,
        },
        "audio_token_index": _IMAGE, "audio_token_id": _IMAGE,
    },
}  # fmt: skip


def tiny_model(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A model of `CONFIGS`, fp32, for evaluation, whose weights are large enough for its attention to choose."""
    from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2AudioForConditionalGeneration

    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **CONFIGS[name])
    if name == "qwen2_audio":
        model: Any = Qwen2AudioForConditionalGeneration(config)
    else:
        model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    return model.float().eval()


def media(name: str, sizes: Sequence[Any], seed: int = 0) -> dict[str, Tensor]:
    """Random media of a model.

    Args:
        sizes: of each: (frames, rows, columns) in tokens, which LLaVA has no choice of, or mel frames of a clip.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "llava":
        return {"pixel_values": torch.randn(len(sizes), 3, 16, 16, generator=generator)}
    if name == "qwen2_audio":
        mask = torch.arange(48) < torch.tensor(list(sizes))[:, None]
        return {"input_features": torch.randn(len(sizes), 8, 48, generator=generator), "feature_attention_mask": mask.long()}
    patches = 3 * 2 * 4 * 4
    kinds: dict[str, Tensor] = {}
    for suffix, grid_name, of in (("", "image_grid_thw", [s for s in sizes if s[0] == 1]), ("_videos", "video_grid_thw", [s for s in sizes if s[0] > 1])):
        if of:
            grid = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in of])
            kinds |= {f"pixel_values{suffix}": torch.randn(int(grid.prod(1).sum()), patches, generator=generator), grid_name: grid}
    return kinds


def tokens_of(name: str, size: Any) -> list[int]:
    """Placeholders of one medium, with the text that must stand between them."""
    if name == "llava":
        return [_IMAGE] * 16
    if name == "qwen2_audio":
        return [_IMAGE] * (((size - 1) // 2 - 1) // 2 + 1)
    t, h, w = size
    if t == 1:
        return [_START, *[_IMAGE] * (h * w), _END]
    if name == "qwen2_5_vl":
        return [_START, *[_VIDEO] * (t * h * w), _END]
    return [token for frame in range(t) for token in (50 + frame, _START, *[_VIDEO] * (h * w), _END)]


def prompt(name: str, rows: Sequence[Sequence[Any]], seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a model: rows of text, as numbers of tokens, and media, padded on the left.

    Args:
        rows: of each row, in order: an int for so many tokens of text, or a medium's size as a tuple.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = []
    sizes: list[Any] = []
    for row in rows:
        ids.append([])
        for part in row:
            if isinstance(part, int):
                ids[-1] += torch.randint(3, 48, (part,), generator=generator).tolist()
            else:
                size = part[0] if name == "qwen2_audio" else part
                sizes.append(size)
                ids[-1] += tokens_of(name, size)
    width = max(map(len, ids))
    found = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
    }
    if name.startswith("qwen") and name.endswith("vl"):
        found["mm_token_type_ids"] = (found["input_ids"] == _IMAGE).int() + 2 * (found["input_ids"] == _VIDEO).int()
    return found | (media(name, sizes, seed) if sizes else {})
