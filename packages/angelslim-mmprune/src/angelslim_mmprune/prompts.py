"""Prompts of one kind of media with text around them, as the model's forward pass takes them; and random media of a given size."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .models import Kind, Towers, at

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def around(model: PreTrainedModel, towers: Towers, kind: Kind, media: Mapping[str, Tensor], before: Sequence[int], after: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of a forward pass, batch 1.

    Args:
        media: what the encoder reads, by name of the argument.
        before, after: token numbers of the text.
    """
    sizes = kind.sizes(towers.config, towers.encoder, media[kind.told])
    start, end = ([n] if (n := getattr(towers.config, f"vision_{side}_token_id", None)) is not None else [] for side in ("start", "end"))
    placeholder = at(towers.config, kind.placeholder)
    shown = [number for size in sizes for number in (*start, *[placeholder] * math.prod(size.grid), *end)]
    ids = torch.tensor([[*before, *shown, *after]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == placeholder).int()
    return {name: value.to(model.device, model.dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def synthetic(towers: Towers, kind: Kind, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random media of about so many tokens, at least one image or clip where their size is fixed."""
    generator = torch.Generator().manual_seed(seed)
    media: dict[str, Tensor] = _SYNTHETIC[kind.told](towers.config, towers.encoder, tokens, generator)
    return media


def _images(config: Any, encoder: Any, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    side = config.vision_config.image_size
    number = max(1, round(tokens / (side // config.vision_config.patch_size) ** 2))
    return {"pixel_values": torch.randn(number, config.vision_config.num_channels, side, side, generator=generator)}


def _one_image(config: Any, encoder: Any, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    merge = config.vision_config.spatial_merge_size
    rows = max(1, round(math.sqrt(tokens)))
    grid = (1, merge * rows, merge * max(1, round(tokens / rows)))
    width = encoder.patch_embed.proj.weight[0].numel()
    return {"pixel_values": torch.randn(math.prod(grid), width, generator=generator), "image_grid_thw": torch.tensor([grid])}


def _clips(config: Any, encoder: Any, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    audio = config.audio_config
    frames = 2 * audio.max_source_positions
    number = max(1, round(tokens / (frames // 4)))
    features = torch.randn(number, audio.num_mel_bins, frames, generator=generator)
    return {"input_features": features, "feature_attention_mask": torch.ones(number, frames, dtype=torch.int64)}


# by the argument that tells their sizes
_SYNTHETIC = {"pixel_values": _images, "image_grid_thw": _one_image, "feature_attention_mask": _clips}
