"""FP8 KV cache: scales of keys and values from calibration, fixed at quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from angelslim_core.passes import LayerPass, PassConfig
from angelslim_core.schemes import CacheScheme, Grid

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.kv_cache import Attend
    from angelslim_core.layer import Layer, LayerBatch

GRID = Grid(8, "float", "tensor")
# what a searched scale may be of absmax / 448: 1, and from .8 to 16
MULTIPLIERS = (1.0, *(0.8 * 20 ** (i / 49) for i in range(50)))
# calibration samples on which multipliers are compared
SAMPLES = 64


class KVFP8(LayerPass):
    """Keys (after RoPE) and values cached as FP8 (E4M3), scales fixed from calibration; weights stay as they are.

    Combines with any step that quantizes linears. Layers without a cache of keys and values (linear attention) are left
    alone; models that cache a latent (MLA) are refused.
    """

    id = "quant.kv_fp8"
    default_targets = ("k", "v")

    class Config(PassConfig):
        granularity: Literal["tensor", "head"] = Field("tensor", description="What shares a scale: an attention, or each key-value head of it.")
        search: bool = Field(False, description="Try 50 multiples of absmax / 448, .8 to 16, and keep those of least error of the attention output.")

    @property
    def cache(self) -> CacheScheme:
        return CacheScheme("tensor" if self.config.granularity == "tensor" else "attn_head")

    def run(self, layer: Layer) -> dict[str, Any]:
        from ..numerics.fp8 import scale_of

        site = layer.sites[0]
        amax_2H = self._amax(layer, site)
        if self.config.granularity == "tensor":
            amax_2H = amax_2H.amax(1, keepdim=True)
        scales = list(scale_of(amax_2H, GRID))
        report: dict[str, Any] = {}
        if self.config.search:
            chosen = search(scales, lambda tried: self._losses(layer, site, tried))
            report = {f"{name}_multiplier": (new / old).tolist() for name, new, old in zip("kv", chosen, scales, strict=True)}
            scales = chosen
        layer.store_cache(site, *(scale.cpu() for scale in scales))
        return {**report, "k_scale": float(scales[0].max()), "v_scale": float(scales[1].max())}

    def _amax(self, layer: Layer, site: Site) -> Tensor:
        """Largest magnitudes of keys and of values, [2, H] fp32; padding left out."""
        import torch

        from angelslim_core.kv_cache import num_heads
        from angelslim_core.stream import check_finite

        found = torch.zeros(2, num_heads(layer.context.source.config), device=layer.context.device)

        def see(batch: LayerBatch, _: Tensor, key: Tensor, value: Tensor, __: Attend) -> None:
            mask = batch.mask.to(key.device)
            for row, x_BHTD in enumerate((key, value)):
                x_NHD = x_BHTD.transpose(1, 2)[mask]
                check_finite(f"{'value' if row else 'key'} of {site.name}", x_NHD)
                if x_NHD.numel():
                    found[row] = found[row].maximum(x_NHD.abs().amax((0, 2)).float())

        layer.observe_attention(site, see)
        return layer.context.group.reduce(found, "max")

    def _losses(self, layer: Layer, site: Site, tried: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Squared error of the attention output, [tried, scales] fp64.

        Args:
            tried: scales of keys and values.
        """
        import torch

        from angelslim_core.kv_cache import round_heads

        losses = torch.zeros(len(tried), tried[0][0].numel(), dtype=torch.float64)

        def see(batch: LayerBatch, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> None:
            mask = batch.mask.to(key.device)
            exact = attend(query, key, value)[0][mask].float()
            for row, (k_scale, v_scale) in enumerate(tried):
                out = attend(query, round_heads(key, k_scale), round_heads(value, v_scale))[0][mask].float()
                # queries of one key-value head lie together
                error = (out - exact).square_().sum((0, 2)).view(losses.shape[1], -1).sum(1)
                losses[row] += error.double().cpu()

        group = layer.context.group
        share = -(-SAMPLES // group.size)
        count = -(-share // max(1, layer.context.batch_size))
        layer.observe_attention(site, see, layer.batches[:count])
        return group.reduce(losses)


def search(scales: list[Tensor], losses: Callable[[list[tuple[Tensor, Tensor]]], Tensor]) -> list[Tensor]:
    """Multiples of the scales of keys and of values that give the least loss, never more than the scales as they are.

    Args:
        scales: of keys and of values, [S] each.
        losses: of pairs of scales, [pairs, S].
    """
    import torch

    k_scale, v_scale = scales
    multipliers = torch.tensor(MULTIPLIERS, device=k_scale.device)[:, None]
    # first the keys, then the values with the keys as chosen: neither step raises the loss
    k_scale = _least(multipliers * k_scale, losses([(m * k_scale, v_scale) for m in multipliers]))
    v_scale = _least(multipliers * v_scale, losses([(k_scale, m * v_scale) for m in multipliers]))
    return [k_scale, v_scale]


def _least(candidates_MS: Tensor, losses_MS: Tensor) -> Tensor:
    """Of each column the candidate of least loss, the first on a tie."""
    import torch

    best = torch.stack([(column == column.min()).nonzero()[0, 0] for column in losses_MS.T])
    return candidates_MS.gather(0, best.to(candidates_MS.device)[None])[0]
