"""One prompt through a model, and what a strategy kept of its image or clip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from angelslim_core.errors import ModelError, UsageError
from angelslim_core.loading import Loaded
from angelslim_core.products import products

from .coupling import attach
from .files import read_image, read_sound, resampled
from .models import Kind, Towers, towers
from .pictures import over_image, over_waveform
from .prompts import around
from .strategies.base import Modality, Strategy

if TYPE_CHECKING:
    from PIL.Image import Image

_MARK = "\ue000"
# of a sound, that a model may ask for: ten minutes of 48000 a second
_MOST_SAMPLES = 28_800_000


def shown(loaded: Loaded, folder: Path, strategy: Strategy, prompt: str, image: Path | None, sound: Path | None) -> dict[str, Any]:
    """Read a prompt and say what was kept.

    Args:
        folder: of the model, with what prepares its media.
        image, sound: one of them.

    Returns:
        `stages`: of each stage `layer` (None: before the language model), `before` and `after` in tokens of the medium, `kept` (their numbers);
        and under `pictures` a title and SVG of each.

    Raises:
        UsageError: a file that cannot be read, or a medium that the model does not take.
        ModelError: the folder lacks what prepares media, or its tokenizer.
    """
    parts, model = towers(loaded.model), loaded.model
    kind = _kind(parts, "vision" if image is not None else "audio")
    if loaded.tokenizer is None:
        raise ModelError(888, str(folder), "has no tokenizer")
    before, after = _texts(loaded.tokenizer, prompt)
    if image is not None:
        picture = read_image(image)
        media = _prepared(_preparer("AutoImageProcessor", folder), image, images=[picture])
    else:
        assert sound is not None
        media, samples, rate = _heard(folder, sound)
    if lacking := [name for name in (kind.inputs, kind.told) if name not in media]:
        raise ModelError(855, str(folder), f"prepares no {lacking[0]}", "it must be what this architecture's media are prepared with")
    wanted = {name: media[name] for name in (kind.inputs, kind.told)}
    grid = kind.sizes(parts.config, parts.encoder, wanted[kind.told])[0].grid
    inputs = around(model, parts, kind, wanted, before, after)
    first = len(before) + (1 if getattr(parts.config, "vision_start_token_id", None) is not None else 0)
    tokens = math.prod(grid)
    with attach(model, strategy) as coupling, torch.no_grad(), products(model.device.type):
        model(**inputs)
    stages, pictures = [], []
    left = tokens
    for applied in coupling.last:
        columns = applied.kept[0].cpu()
        kept = torch.zeros(tokens, dtype=torch.bool)
        kept[columns[(columns >= first) & (columns < first + tokens)] - first] = True
        count = int(kept.sum())
        stages.append({"layer": applied.stage.layer, "before": left, "after": count, "kept": kept.nonzero()[:, 0].tolist()})
        left = count
        title = "before the language model" if applied.stage.layer is None else f"behind layer {applied.stage.layer}"
        if image is not None:
            svg = over_image(_seen(picture, wanted[kind.inputs]), grid, kept)
        else:
            groups = None if applied.pools[0].groups is None else applied.pools[0].groups.cpu()
            svg = over_waveform(samples, rate, len(samples) / rate / tokens, kept, groups)
        pictures.append((f"{title}: {count} of {tokens} tokens", svg))
    return {"tokens": tokens, "stages": stages, "pictures": pictures}


def _kind(parts: Towers, modality: Modality) -> Kind:
    for kind in parts.media.kinds:
        if kind.modality == modality:
            return kind
    raise UsageError(886, "--image" if modality == "vision" else "--audio", f"{type(parts.config).__name__} takes none")


def _texts(tokenizer: Any, prompt: str) -> tuple[list[int], list[int]]:
    """Token numbers before and behind the medium, by the tokenizer's chat template if it has one."""
    text = f"{_MARK}\n{prompt}"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(_MARK)
    return tokenizer.encode(before, add_special_tokens=False), tokenizer.encode(after, add_special_tokens=False)


def _preparer(name: str, folder: Path) -> Any:
    import transformers

    try:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a hostile file provokes in transformers is the model's fault
        what = f"has nothing that prepares media: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ModelError(889, str(folder), what) from error


def _prepared(preparer: Any, file: Path, *given: Any, **options: Any) -> Mapping[str, Tensor]:
    """
    Raises:
        UsageError: a file that the model's own code does not take.
    """
    try:
        found: Mapping[str, Tensor] = preparer(*given, **options, return_tensors="pt")
    except Exception as error:  # such as an image that is too narrow; no file may end it otherwise
        what = f"is not taken by the model's {type(preparer).__name__}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UsageError(853, str(file), what, "give another file") from error
    return found


def _heard(folder: Path, file: Path) -> tuple[Mapping[str, Tensor], Tensor, int]:
    """Features of as much of a sound as the model takes at once, and that part of it at the model's rate.

    Raises:
        ModelError: the model's rate, or the length that it takes, is none.
    """
    samples, given = read_sound(file)
    preparer = _preparer("AutoFeatureExtractor", folder)
    rate, most = (getattr(preparer, name, None) for name in ("sampling_rate", "n_samples"))
    if type(rate) is not int or type(most) is not int or not 1000 <= rate <= 400_000 or not 0 < most <= _MOST_SAMPLES:
        raise ModelError(854, str(folder), f"prepares {most!r:.40} samples at {rate!r:.40} a second", "it must be a model of sound")
    # cut before: a long file of a low rate would become far longer
    samples = resampled(samples[: -(-most * given // rate)], given, rate)[:most]
    found = _prepared(preparer, file, samples.numpy(), sampling_rate=rate, return_attention_mask=True, padding="max_length")
    return {"input_features": found["input_features"], "feature_attention_mask": found["attention_mask"]}, samples, rate


def _seen(picture: Image, pixels: Tensor) -> Tensor:
    """[H, W, 3], uint8: what the model saw, where it cuts a square out of the image; else the image."""
    if pixels.ndim == 4:
        seen = pixels[0].float().permute(1, 2, 0)
        low, high = seen.amin((0, 1)), seen.amax((0, 1))
        return (255 * (seen - low) / (high - low).clamp(min=1e-6)).byte()
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
