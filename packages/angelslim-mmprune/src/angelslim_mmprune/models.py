"""Architectures as data: where a model's media, encoder and language model are, and how many tokens each medium has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from angelslim_core.errors import ModelError, UsageError
from angelslim_core.model import decoder_layers

from .plan import Grid, Need
from .strategies.base import Modality

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Size(NamedTuple):
    """Of one medium.

    Args:
        padded: its tokens in the encoder, where that pads media to one length; 0 where it does not.
    """

    grid: Grid
    padded: int = 0


# of media of one kind, in order: (config, encoder, the argument that tells them)
Sizes = Callable[[Any, Any, Tensor], Sequence[Size]]


@dataclass(frozen=True)
class Kind:
    """Images, videos or clips.

    Args:
        name: transformers' word for it.
        placeholder: the config's key of the token that stands for each of its tokens in a prompt.
        inputs: argument of the forward pass that holds them.
        told: argument of the forward pass that tells their sizes.
        sizes: reads it.
    """

    name: str
    modality: Modality
    placeholder: str
    inputs: str
    told: str
    sizes: Sizes


@dataclass(frozen=True)
class Media:
    """One architecture.

    Args:
        encoder: beside the language model.
        layers: the list of its layers, by the last part of its name.
        attention: in a layer of the encoder.
        kinds: in the order in which the encoder gets them.
        told: argument of the encoder that tells sizes as `Kind.told` does; empty: it has none.
        merge: the config's key of the side of the square of encoder tokens that makes one token.
        pooled: of so many encoder tokens in a row one is made.
        has_class_token: before each image's.
        scales_queries: before attention, which then scales by 1.
        window: the config's keys of a window's side and of a patch's, in pixels, where the encoder computes in the order of windows.
        deepstack: the config's key of the encoder layers whose features are added behind the first layers of the language model.
        features: the config's key of the hidden states that the projector gets, counted as transformers does, embeddings first; empty: the last.
        objects: layer of a vision encoder, from 0, in the middle, whose attention lies on objects.
    """

    encoder: str
    layers: str
    attention: str
    kinds: tuple[Kind, ...]
    told: str = ""
    merge: str = ""
    pooled: int = 1
    has_class_token: bool = False
    scales_queries: bool = False
    window: tuple[str, str] | None = None
    deepstack: str = ""
    features: str = ""
    objects: int = 0


def at(config: Any, path: str) -> Any:
    """The value at a dotted path; the config itself for none."""
    return reduce(getattr, path.split("."), config) if path else config


def _of_patches(config: Any, encoder: Any, images: Tensor) -> Sequence[Size]:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [Size(Grid(1, side, side))] * len(images)


def _of_grids(config: Any, encoder: Any, grids: Tensor) -> Sequence[Size]:
    merge = config.vision_config.spatial_merge_size
    return [Size(Grid(t, h // merge, w // merge)) for t, h, w in grids.tolist()]


def _of_masks(config: Any, encoder: Any, masks: Tensor) -> Sequence[Size]:
    lengths = encoder._get_feat_extract_output_lengths(masks.sum(-1))
    return [Size(Grid(1, 1, tokens), frames) for frames, tokens in zip(*(of.tolist() for of in lengths), strict=True)]


_QWEN_VL = (
    Kind("image", "vision", "image_token_id", "pixel_values", "image_grid_thw", _of_grids),
    Kind("video", "vision", "video_token_id", "pixel_values_videos", "video_grid_thw", _of_grids),
)
_MERGE = "vision_config.spatial_merge_size"

# by the class of the config; layers of objects are HiPrune's for CLIP and Qwen2.5-VL (arXiv 2508.00553: 9 and 16, from 1), for Qwen3-VL the middle of 27
MEDIA: Mapping[str, Media] = MappingProxyType(
    {
        "LlavaConfig": Media(
            "vision_tower", "layers", "self_attn", (Kind("image", "vision", "image_token_id", "pixel_values", "pixel_values", _of_patches),), "pixel_values", has_class_token=True,
            features="vision_feature_layer", objects=8,
        ),
        "Qwen2_5_VLConfig": Media("visual", "blocks", "attn", _QWEN_VL, "grid_thw", _MERGE, window=("vision_config.window_size", "vision_config.patch_size"), objects=15),
        "Qwen3VLConfig": Media("visual", "blocks", "attn", _QWEN_VL, "grid_thw", _MERGE, deepstack="vision_config.deepstack_visual_indexes", objects=13),
        "Qwen2AudioConfig": Media(
            "audio_tower", "layers", "self_attn", (Kind("audio", "audio", "audio_token_id", "input_features", "feature_attention_mask", _of_masks),),
            pooled=2, scales_queries=True,
        ),
    }
)  # fmt: skip


def media_of(config: Any) -> Media:
    """
    Raises:
        ModelError: an architecture that is not in the table.
    """
    name = type(config).__name__
    if name not in MEDIA:
        raise ModelError(804, name, "no media are known of this architecture", f"known are: {', '.join(MEDIA)}")
    return MEDIA[name]


class Towers(NamedTuple):
    """The parts of a model.

    Args:
        root: what gets media and text, and owns encoder and language model.
        encoder_attention: of each of its layers.
        unit: encoder tokens that make one token of the language model.
        window_side: of a window, in tokens of the language model; 0: there are none.
        first_free: the least layer behind which nothing is added to the media's tokens.
    """

    media: Media
    config: Any
    root: nn.Module
    encoder: nn.Module
    encoder_attention: tuple[nn.Module, ...]
    language: nn.Module
    layers: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    unit: int
    window_side: int
    first_free: int

    @property
    def modalities(self) -> frozenset[Modality]:
        return frozenset(kind.modality for kind in self.media.kinds)

    def layer_of(self, need: Need, where: str) -> int:
        """Number of a statistic's layer, from 0.

        Raises:
            UsageError: there is none.
        """
        if need.layer == "features":
            states = at(self.config, self.media.features) if self.media.features else -1
            last: int = states if isinstance(states, int) else states[-1]  # of several that are joined
            layer = last if last < 0 else max(0, last - 1)
        else:
            layer = self.media.objects if need.layer == "objects" else need.layer
        return layer_number(layer, len(self.layers if need.source == "llm" else self.encoder_attention), where)


def towers(model: PreTrainedModel) -> Towers:
    """Find a model's parts.

    Raises:
        ModelError: an unknown architecture, a part that is missing, or attention in windows in the language model.
    """
    config: Any = model.config
    media, text = media_of(config), config.get_text_config()
    if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()):
        raise ModelError(805, "layer_types", "the language model attends in windows, which pruned tokens would shift")
    if getattr(config, "vision_feature_select_strategy", "default") != "default":
        raise ModelError(806, "vision_feature_select_strategy", "only `default` gives a grid of patches")
    if media.has_class_token and type(config.vision_config).__name__ != "CLIPVisionConfig":
        raise ModelError(809, "vision_config", f"{type(config.vision_config).__name__} is of no encoder that is known here", "known is CLIP's")
    path, layers = decoder_layers(model, text.num_hidden_layers)
    language = path.rpartition(".")[0]
    root = language.rpartition(".")[0]
    encoder = _part(model, f"{root}.{media.encoder}".removeprefix("."))
    blocks = [module for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == media.layers]
    if len(blocks) != 1:
        raise ModelError(807, media.encoder, f"has {len(blocks)} lists of layers called {media.layers!r} where one was expected")
    merge = at(config, media.merge) if media.merge else 1
    window, patch = (at(config, key) for key in media.window) if media.window else (0, 1)
    return Towers(
        media, config, _part(model, root), encoder, tuple(_part(block, media.attention) for block in blocks[0]), _part(model, language), tuple(layers),
        tuple(_part(layer, "self_attn") for layer in layers), media.pooled * merge**2, window // patch // merge,
        max(0, len(at(config, media.deepstack)) - 1) if media.deepstack else 0,
    )  # fmt: skip


def _part(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ModelError(808, path, f"{type(module).__name__} has no such part", "this version of transformers builds the model in another way") from error


def layer_number(layer: int, count: int, where: str) -> int:
    """A layer's number from 0, of one that may count from the end.

    Raises:
        UsageError: there is none.
    """
    if not -count <= layer < count:
        raise UsageError(809, where, f"layer {layer!s:.20} of {count}", f"name one from 0 to {count - 1}, or from {-count} to -1")
    return layer % count
