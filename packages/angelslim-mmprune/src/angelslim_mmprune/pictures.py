"""Kept tokens drawn over the image, or over the waveform, that they are of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from angelslim_core.plots import svg

from .plan import Grid

if TYPE_CHECKING:
    from torch import Tensor

# columns of a waveform
_COLUMNS = 1200


def over_image(image: Tensor, grid: Grid, kept: Tensor) -> str:
    """SVG of an image in which dropped tokens are covered.

    Args:
        image: [H, W, 3], uint8.
        grid: of the image's tokens, one frame.
        kept: [rows * columns], bool.
    """
    import torch

    height, width = image.shape[:2]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        step = max(1, max(height, width) // 1024)
        axes.imshow(image[::step, ::step].numpy(), extent=(0, grid.columns, grid.rows, 0), aspect=(height / grid.rows) / (width / grid.columns))
        cover = kept.view(grid.rows, grid.columns, 1).logical_not() * torch.tensor([0.13, 0.13, 0.2, 0.85])
        axes.imshow(cover.numpy(), extent=(0, grid.columns, grid.rows, 0), aspect=axes.get_aspect(), interpolation="nearest")
        axes.grid(False)
        axes.set_axis_off()

    return svg(draw, min(9.0, max(2.0, 7 * height / width)))


def over_waveform(samples: Tensor, rate: int, token_seconds: float, kept: Tensor, groups: Tensor | None) -> str:
    """SVG of a waveform over time; behind it what each kept token stands for: its own time, or where tokens were merged that of its group.

    Args:
        samples: [T].
        token_seconds: of one token before any went.
        kept: [N], bool.
        groups: [N]: number of the kept token that each went into, -1 none; None: nothing was merged.
    """
    import torch

    length = max(1, -(-len(samples) // _COLUMNS))
    padded = torch.nn.functional.pad(samples, (0, -len(samples) % length)).view(-1, length)
    seconds = (torch.arange(len(padded)) * length / rate).tolist()
    own = kept.long().cumsum(0) - 1
    of = torch.where(kept, own, -1) if groups is None else groups

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for token, group in enumerate(of.tolist()):
            if group >= 0:
                axes.axvspan(token * token_seconds, (token + 1) * token_seconds, color=("#9ec5e8", "#f3c69a")[group % 2], alpha=0.8, linewidth=0)
        axes.fill_between(seconds, padded.amin(1).tolist(), padded.amax(1).tolist(), color="#222222", linewidth=0)
        axes.set_xlim(0, max(len(samples) / rate, len(kept) * token_seconds))
        axes.grid(False)
        axes.set_xlabel("seconds")
        axes.set_yticks([])

    return svg(draw, 2.6)
