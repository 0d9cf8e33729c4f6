"""Order of the linears inside a decoder layer, and which of them read one input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from angelslim_core.adapters.base import Site

# roles in the order in which a layer computes them; a stage reads what the stages before it wrote
ORDER = (
    ("q", "k", "v", "q_a", "kv_a", "linear_in", "linear_in_z"),
    ("q_b", "kv_b"),
    ("o", "linear_out"),
    ("gate", "up", "shared_gate", "shared_up", "expert_gate", "expert_up", "other"),
    ("down", "shared_down", "expert_down"),
)


def stages(sites: Iterable[Site], sequential: bool) -> list[tuple[Site, ...]]:
    """Sites of a layer in stages, or all in one."""
    sites = tuple(sites)
    if not sequential:
        return [sites]
    known = {role for roles in ORDER for role in roles}
    found = [tuple(s for s in sites if s.role in roles) for roles in ORDER]
    rest = tuple(s for s in sites if s.role not in known)
    return [stage for stage in (*found, rest) if stage]


def by_input(sites: Iterable[Site]) -> list[list[Site]]:
    """Sets of linears that engines fuse, which read one input; the others alone."""
    sets: dict[str, list[Site]] = {}
    for site in sites:
        sets.setdefault(site.fused or site.name, []).append(site)
    return list(sets.values())


def rows_of(members: Iterable[Site]) -> Iterator[tuple[Site, slice]]:
    """Each linear of a set with its rows in the set's joined weights."""
    start = 0
    for site in members:
        yield site, slice(start, start + site.shape[0])
        start += site.shape[0]
