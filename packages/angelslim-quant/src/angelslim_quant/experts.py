"""Ranges of inputs where some experts saw no token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer


def input_ranges(layer: Layer, found: Mapping[Site, float], otherwise: float) -> tuple[dict[Site, float], int]:
    """The largest |x| of each input, and how many experts got that of others.

    An expert that no token reached takes the largest of its siblings (same role), each noted as a fallback.

    Args:
        found: by the first linear that reads the input; 0 where nothing was seen.
        otherwise: the range of experts none of whose siblings saw a token.
    """
    largest: dict[str, float] = {}
    for site, amax in found.items():
        if site.expert is not None:
            largest[site.role] = max(amax, largest.get(site.role, 0.0))
    ranges, lent = dict(found), 0
    for site, amax in found.items():
        if site.expert is not None and not amax:
            ranges[site] = largest[site.role] or otherwise
            what = "is the largest of its siblings'" if largest[site.role] else "is 1, as of all its siblings"
            layer.context.fallbacks.append(f"{site.name}: no token reached it, its input scale {what}")
            lent += 1
    return ranges, lent
