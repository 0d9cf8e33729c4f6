"""Images and sounds from files, which are hostile input: their sizes are looked at before they are decoded."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import TYPE_CHECKING

from angelslim_core.errors import PluginError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MOST_BYTES, MOST_PIXELS = 64_000_000, 50_000_000
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def read_image(path: Path) -> Image:
    """An image in RGB.

    Raises:
        UsageError: no image, or one that is too large.
        PluginError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise PluginError(880, "--image", "images need Pillow, which is not installed", "pip install 'angelslim-mmprune[show]'") from None
    _check_size(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= MOST_PIXELS:
                return image.convert("RGB")
    except Exception as error:  # whatever a hostile file provokes in a decoder is the file's fault
        raise UsageError(880, str(path), f"is no image that can be read: {type(error).__name__}", f"give one of {', '.join(_FORMATS)}") from error
    raise UsageError(881, str(path), f"has {width} x {height} pixels", f"{MOST_PIXELS} are the most")


def read_sound(path: Path) -> tuple[Tensor, int]:
    """Samples of a WAV file of 16-bit integers, [T], fp32 from -1 to 1, channels averaged; and how many a second has.

    Raises:
        UsageError: no such file, or one that is too large.
    """
    import torch

    _check_size(path)
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            data = file.readframes(count)
    except (wave.Error, EOFError, OSError, RuntimeError) as error:
        raise UsageError(882, str(path), f"is no WAV file that can be read: {error}") from error
    count = len(data) // (2 * max(1, channels))
    if width != 2 or not 0 < channels <= 64 or not 1000 <= rate <= 400_000 or not count:
        what = f"has {channels} channels of {8 * width} bits, {rate} samples a second, {count} in all"
        raise UsageError(883, str(path), what, "give a WAV file of 16-bit integers")
    samples = torch.frombuffer(bytearray(data[: 2 * channels * count]), dtype=torch.int16)
    return samples.view(-1, channels).float().mean(1) / 2**15, rate


def resampled(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """[T'] at another rate, by straight lines between samples; above half of the new rate everything is cut off first."""
    import torch
    from torch.nn.functional import interpolate

    if rate == wanted:
        return samples
    if rate > wanted:
        spectrum = torch.fft.rfft(samples)
        spectrum[int(len(spectrum) * wanted / rate) :] = 0
        samples = torch.fft.irfft(spectrum, n=len(samples))
    return interpolate(samples[None, None], size=max(1, round(len(samples) * wanted / rate)), mode="linear")[0, 0]


def _check_size(path: Path) -> None:
    if not path.is_file():
        raise UsageError(884, str(path), "is no file")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise UsageError(885, str(path), f"has {size} bytes", f"{MOST_BYTES} are the most")
