"""Static FP8 whose input scales isolate outliers: they may be cut off where the block's output gains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from ..experts import input_ranges
from .fp8_static import FLOOR, FP8Static, FP8StaticConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer

    from ..numerics.magnitudes import Magnitudes

# shares of the largest inputs that are cut off
CLIPPED = (1e-4, 2e-4, 5e-4, 1e-3)
# places in the order of magnitudes that the other form brings onto the largest one
PLACES = tuple(0.999 + 5e-5 * r for r in range(8, 21))


class Feed(NamedTuple):
    """Inputs that are searched together.

    Args:
        block: module inside the layer whose output shows the effect.
        sets: linears that read one input each; those of all experts are here together.
        ranges: what FP8 may reach of each set's input, the candidates; the first is the largest |x|.
    """

    block: str
    sets: list[Sequence[Site]]
    ranges: list[list[float]]


class Lepto(FP8Static):
    """FP8 as quant.fp8_static stores it, its input scales searched by the block's output so that outliers may be cut off.

    Each input is rounded with every candidate scale, weights as they are; the scale of least squared error of the
    attention's or the feed-forward part's output is kept, that of the largest input among them. Experts of a layer
    choose together.
    """

    id = "quant.lepto"

    class Config(FP8StaticConfig):
        variant: Literal["clip", "ratio"] = Field(
            "clip", description="clip: candidates cut off the largest 1e-4 to 1e-3 of the inputs; ratio: candidates shift the grid and cut nothing."
        )

    def input_ranges(self, layer: Layer, sets: Sequence[Sequence[Site]]) -> tuple[dict[Site, float], dict[str, Any]]:
        from ..numerics.fp8 import E4M3_MAX

        feeds = self._feeds(layer, sets)
        losses = layer.context.group.reduce(_losses(layer, feeds))
        ranges: dict[Site, float] = {}
        changed = 0
        for feed, row in zip(feeds, losses.tolist(), strict=True):
            best = row.index(min(row))
            changed += best > 0
            ranges |= {members[0]: candidates[best] for members, candidates in zip(feed.sets, feed.ranges, strict=True)}
        found, lent = input_ranges(layer, ranges, E4M3_MAX)
        return found, {"input_scales_of_siblings": lent, "feeds_with_outliers_isolated": changed}

    def _feeds(self, layer: Layer, sets: Sequence[Sequence[Site]]) -> list[Feed]:
        from ..numerics.magnitudes import Magnitudes

        seen = {members[0]: Magnitudes() for members in sets}
        layer.observe(lambda site, x_NI: seen[site].add(f"input of {site.name}", x_NI), self.config.calibrate_all_experts, sites=seen)
        candidates = clipped if self.config.variant == "clip" else shifted
        feeds: dict[str, Feed] = {}
        for members in sets:
            first = members[0]
            feed = feeds.setdefault(first.name if first.expert is None else first.role, Feed(layer.inner(first).partition(".")[0], [], []))
            feed.sets.append(members)
            feed.ranges.append(candidates(seen[first].reduced(layer.context.group.reduce)))
        return list(feeds.values())


def clipped(seen: Magnitudes) -> list[float]:
    """Ranges that cut off nothing, and ever more of the largest inputs (arXiv 2602.21233)."""
    peak = float(seen.peak)
    return [peak, *(min(seen.quantile(1 - share), peak) or peak for share in CLIPPED)]


def shifted(seen: Magnitudes) -> list[float]:
    """Ranges that cut off nothing and shift the grid by the FP8 code, under the largest's scale, of ever smaller inputs (as AngelSlim ships it)."""
    import torch

    from ..numerics.fp8 import E4M3_MAX, cast_e4m3

    peak = float(seen.peak)
    if not peak:
        return [0.0] * (1 + len(PLACES))
    codes = cast_e4m3(torch.tensor([seen.quantile(p) for p in PLACES]) / peak * E4M3_MAX).double()
    return [peak, *(peak * E4M3_MAX / code if code else peak for code in codes.tolist())]


def _losses(layer: Layer, feeds: Sequence[Feed]) -> Tensor:
    """Squared error of the block's output by feed and candidate, fp64."""
    import torch

    losses = torch.zeros(len(feeds), len(feeds[0].ranges[0]), dtype=torch.float64)
    mask = torch.ones(0)

    def look(block: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            def output() -> Tensor:
                out = module.forward(*args, **kwargs)  # without this hook
                return (out[0] if isinstance(out, tuple) else out)[mask].float()

            exact = output()
            for row, feed in enumerate(feeds):
                if feed.block == block:
                    for column in range(losses.shape[1]):
                        with _rounded(layer, feed, column):
                            losses[row, column] += output().sub_(exact).square_().sum().double().cpu()

        return hook

    handles = [layer.module.get_submodule(block).register_forward_pre_hook(look(block), with_kwargs=True) for block in dict.fromkeys(f.block for f in feeds)]
    try:
        for batch in layer.batches:
            mask = batch.mask.to(layer.context.device)
            layer.forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return losses


@contextlib.contextmanager
def _rounded(layer: Layer, feed: Feed, column: int) -> Iterator[None]:
    """Inside, the inputs of a feed are rounded with one of its candidates."""
    import torch

    from angelslim_core.emulation import round_inputs

    from ..numerics.fp8 import E4M3_MAX

    handles = []
    for members, ranges in zip(feed.sets, feed.ranges, strict=True):
        scale = torch.tensor([max(ranges[column], FLOOR) / E4M3_MAX])
        grid = Lepto().scheme(members[0]).input_activations
        assert grid
        handles += [round_inputs(layer.linear(site), grid, scale) for site in members]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
