"""What can be scaled in a layer, together with the linears of a step that it concerns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Fold, Layer


@dataclass(frozen=True)
class SiteFold:
    """A fold and those of its readers that the step treats; they all read one input.

    Args:
        channels: output channels of the source, fewer than the readers' inputs under grouped-query attention.
        head_dim: channels of one head, where that matters.
    """

    fold: Fold
    sites: tuple[Site, ...]
    channels: int
    head_dim: int

    def pool(self, x_I: Tensor, largest: bool = False) -> Tensor:
        """A statistic of the readers' inputs as one of the source's channels [C]: mean (or maximum) over the heads that share one."""
        if x_I.numel() == self.channels:
            return x_I
        heads = x_I.view(self.channels // self.head_dim, -1, self.head_dim)
        return (heads.amax(1) if largest else heads.mean(1)).reshape(-1)


def folds_of(layer: Layer) -> tuple[list[SiteFold], list[Site]]:
    """Folds that reach linears of the running step, and the step's linears that no fold reaches."""
    named = {layer.inner(site): site for site in layer.sites}
    found = []
    left = dict(named)
    for fold in layer.feeds():
        sites = tuple(named[r] for r in fold.readers if r in named)
        if sites:
            channels = layer.module.get_parameter(f"{fold.source}.weight").shape[0]
            head_dim = layer.head_dim if channels != sites[0].shape[1] else 1
            found.append(SiteFold(fold, sites, channels, head_dim))
            for reader in fold.readers:
                left.pop(reader, None)
    return found, list(left.values())
