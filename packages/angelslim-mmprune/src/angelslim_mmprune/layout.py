"""Where a prompt's media are, and the pools that a strategy chooses among.

Shapes: B rows, L columns of the prompt, P pools, N tokens of the largest, K kept ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from angelslim_core.errors import UsageError

from .budget import Budget, Scope, keep_count, split
from .capture import EncoderCall
from .models import Kind, Towers, at
from .plan import Grid, Plan
from .strategies.base import Modality


class Item(NamedTuple):
    """An image, a video or a clip in a prompt.

    Args:
        columns: [n], of its tokens in the prompt, int64, on the host.
        first: number of its first token among all that the encoder makes.
    """

    kind: Kind
    row: int
    columns: Tensor
    grid: Grid
    first: int


def present(towers: Towers, inputs: Mapping[str, Any]) -> list[Kind]:
    """Kinds of media that a forward pass is given."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    return [kind for kind in towers.media.kinds if inputs.get(kind.inputs) is not None or encoded.get(kind.name) is not None]


def items_of(towers: Towers, inputs: Mapping[str, Any], calls: Mapping[str, EncoderCall]) -> list[Item]:
    """A prompt's media in the order in which the encoder makes their tokens.

    Args:
        calls: the encoder's, by kind, of media that are given as it made them.

    Raises:
        UsageError: no token numbers, or placeholders that are not as many as the media's tokens.
    """
    if inputs.get("input_ids") is None:
        raise UsageError(810, "input_ids", "the prompt's token numbers are needed to find its media")
    ids = inputs["input_ids"].cpu()
    found: list[Item] = []
    start = 0
    for kind in present(towers, inputs):
        call = calls.get(kind.name)
        if call is not None:
            # generation repeats what the encoder made where it tries several continuations
            made = [id(of) for of in inputs["mm_encoder_outputs"][kind.name].pooler_output]
            numbers = [list(dict.fromkeys(made)).index(of) for of in made]
            sizes = call.sizes
        elif inputs.get(kind.told) is not None:
            sizes = kind.sizes(towers.config, towers.encoder, inputs[kind.told])
            numbers = list(range(len(sizes)))
        else:
            raise UsageError(811, kind.told, f"is needed to tell the tokens of each {kind.name}", "pass it with the whole prompt, which may not come in chunks")
        lengths = [grid.frames * grid.rows * grid.columns for grid, _ in sizes]
        firsts = [start + sum(lengths[:i]) for i in range(len(lengths))]
        start += sum(lengths)
        rows, columns = (ids == at(towers.config, kind.placeholder)).nonzero(as_tuple=True)
        wanted = [lengths[i] if i < len(lengths) else 0 for i in numbers]
        if sum(wanted) != len(rows):
            raise UsageError(
                812,
                "input_ids",
                f"{len(rows)} placeholders for {len(wanted)} x {kind.name} of {sum(wanted)} tokens",
                "let the model's processor make the prompt",
            )
        for i, of, where in zip(numbers, rows.split(wanted), columns.split(wanted), strict=True):
            if len(of) and of[0] != of[-1]:
                raise UsageError(813, "input_ids", f"the placeholders of one {kind.name} are in two prompts", "their grids are in another order")
            if len(of):
                found.append(Item(kind, int(of[0]), where, sizes[i].grid, firsts[i]))
    return found


def text_of(items: Sequence[Item], real: Tensor) -> list[Tensor]:
    """Columns of each row's tokens that are of no medium, on the host.

    Args:
        real: [B, L], bool.
    """
    text = real.cpu().clone()
    for item in items:
        text[item.row, item.columns] = False
    return [row.nonzero()[:, 0] for row in text]


@dataclass
class Pools:
    """Pools of one scope, as what is left of them.

    Args:
        rows: of each pool.
        modalities, grids: of each pool.
        original: tokens of each pool before any was dropped.
        counts: tokens of each pool now.
        lasts: of each pool, the column of its last token before any was dropped.
        columns: [P, N], in the prompt.
        segments: [P, N]: image, video, clip or frame within the pool.
        index: [P, N]: number among all tokens that the encoder makes.
    """

    rows: tuple[int, ...]
    modalities: tuple[Modality, ...]
    grids: tuple[tuple[Grid, ...], ...]
    original: tuple[int, ...]
    counts: tuple[int, ...]
    lasts: tuple[int, ...]
    columns: Tensor
    segments: Tensor
    index: Tensor

    @classmethod
    def of(cls, items: Sequence[Item], scope: Scope, modalities: frozenset[Modality], device: torch.device) -> Pools:
        parts: list[tuple[int, Modality, Grid, Tensor, Tensor]] = []
        for item in items:
            if item.kind.modality in modalities:
                frames = item.grid.frames if scope == "frame" else 1
                grid = Grid(item.grid.frames // frames, item.grid.rows, item.grid.columns)
                index = item.first + torch.arange(len(item.columns))
                parts += [(item.row, item.kind.modality, grid, c, i) for c, i in zip(item.columns.chunk(frames), index.chunk(frames), strict=True)]
        parts.sort(key=lambda part: (part[0], part[1], int(part[3][0])))
        pools = [list(group) for _, group in groupby(parts, lambda part: part[:2])] if scope == "prompt" else [[part] for part in parts]

        def joined(values: list[Tensor]) -> Tensor:
            return pad_sequence(values, batch_first=True).to(device)

        counts = tuple(sum(len(part[3]) for part in pool) for pool in pools)
        return cls(
            tuple(pool[0][0] for pool in pools), tuple(pool[0][1] for pool in pools), tuple(tuple(part[2] for part in pool) for pool in pools), counts, counts, tuple(int(pool[-1][3][-1]) for pool in pools),
            joined([torch.cat([part[3] for part in pool]) for pool in pools]),
            joined([torch.cat([torch.full((len(part[3]),), i) for i, part in enumerate(pool)]) for pool in pools]),
            joined([torch.cat([part[4] for part in pool]) for pool in pools]),
        )  # fmt: skip

    def budget(self, budget: Budget, share: float | None) -> list[int]:
        """Tokens that each pool keeps of those it had at first.

        Args:
            share: instead of the budget's own.
        """
        if budget.keep_tokens is not None and share is None:
            return [budget.count(n) for n in self.original]
        kept: list[int] = []
        for _, group in groupby(range(len(self.rows)), lambda i: (self.rows[i], self.modalities[i])):
            sizes = [self.original[i] for i in group]
            total = sum(sizes)
            kept += split(budget.count(total) if share is None else keep_count(total, share, budget.compat), sizes)
        return kept

    @cached_property
    def row_of(self) -> Tensor:
        """[P, 1]"""
        return torch.tensor(self.rows, device=self.columns.device)[:, None]

    def after(self, plan: Plan, counts: Sequence[int]) -> Pools:
        """What is left by a plan."""
        kept = plan.keep.clamp(min=0)
        return self._with(self.columns.gather(1, kept), self.segments.gather(1, kept), self.index.gather(1, kept), counts)

    def without(self, alive: Tensor) -> Pools:
        """What is left where others have dropped tokens; waits for the device.

        Args:
            alive: [B, L], bool, of the prompt.
        """
        valid = torch.arange(self.columns.shape[1], device=alive.device) < torch.tensor(self.counts, device=alive.device)[:, None]
        kept = alive[self.row_of, self.columns] & valid
        counts = kept.sum(1).tolist()
        order = (~kept).byte().argsort(dim=1, stable=True)[:, : max(counts, default=0)]
        return self._with(self.columns.gather(1, order), self.segments.gather(1, order), self.index.gather(1, order), counts)

    def _with(self, columns: Tensor, segments: Tensor, index: Tensor, counts: Sequence[int]) -> Pools:
        return Pools(self.rows, self.modalities, self.grids, self.original, tuple(counts), self.lasts, columns, segments, index)

    def cut(self, values: Tensor, numbers: Sequence[int], width: int) -> Tensor:
        """[len(numbers), width, ...] of values [P, N, ...], those of some pools."""
        whole = list(numbers) == list(range(len(self.rows)))
        return (values if whole else values[torch.tensor(numbers, device=values.device)])[:, :width]


def whole_plan(part: Plan | None, numbers: Sequence[int], pools: Pools, keep: Sequence[int]) -> Plan:
    """A plan of all pools from that of some of them; the others keep all or nothing.

    Args:
        part: of the pools `numbers`.
        keep: tokens of each pool.
    """
    device, most = pools.columns.device, max(keep, default=0)
    counts = torch.tensor([[k] for k in keep], device=device)
    count = torch.arange(max([most, *pools.counts]), device=device)
    kept = torch.where(count[:most] < counts, count[:most], -1)
    if part is None:
        return Plan(kept)
    where = torch.tensor(numbers, device=device)
    kept[where] = pad(part.keep, (0, most - part.keep.shape[1]), value=-1)
    if part.groups is None or part.weights is None:
        return Plan(kept)
    tokens = pools.columns.shape[1]
    groups, weights = torch.where(count[:tokens] < counts, count[:tokens], -1), torch.ones(len(keep), tokens, device=device)
    groups[where] = pad(part.groups, (0, tokens - part.groups.shape[1]), value=-1)
    weights[where] = pad(part.weights.float(), (0, tokens - part.weights.shape[1]))
    return Plan(kept, groups, weights)


def applied(plan: Plan, pools: Pools, keep: Sequence[int], slots: Tensor, real: Tensor, states: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """States with what is merged in the tokens that stand for it, and which tokens are left, [B, W]."""
    alive = real.clone()
    some = [i for i, n in enumerate(pools.counts) if n]
    valid = torch.arange(slots.shape[1], device=slots.device) < torch.tensor(pools.counts, device=slots.device)[:, None]
    # what stands behind a pool's tokens points at its first
    alive[pools.row_of[some], torch.where(valid, slots, slots[:, :1])[some]] = False
    some = [i for i, k in enumerate(keep) if k]
    if some:
        rows, kept = pools.row_of[some], plan.keep[some]
        stays = slots[some].gather(1, torch.where(kept < 0, kept[:, :1], kept))
        alive[rows, stays] = True
        if plan.groups is not None:
            merged = [plan.apply(state[pools.row_of, slots])[some] for state in states]
            merged = [torch.where((kept < 0)[..., None], values[:, :1], values) for values in merged]
            states = [state.index_put((rows, stays), values) for state, values in zip(states, merged, strict=True)]
    return states, alive
