"""A pass's sequence while tokens leave it, and what is known of a cache between passes.

Shapes: B rows, L columns of a pass before pruning, W after, T tokens of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

# transformers renamed the argument
_CACHES = ("cache", "past_key_values")
# attribute of a cache
_STATE = "_mmprune_state"


def cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a forward pass, whatever its name; None for none."""
    return next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)


def columns_of(mask: Any, last: int, batch: int, device: torch.device) -> Tensor:
    """[B, last], bool: which of a pass's tokens are real, by the mask that came with it.

    Raises:
        UsageError: the mask is not one of tokens.
    """
    if mask is None:
        return torch.ones(batch, last, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < last:
        raise UsageError(815, "attention_mask", "pruning needs a mask of tokens, [batch, tokens]", "use a cache that grows, and no ready-made mask")
    return mask[:, mask.shape[1] - last :].to(device, torch.bool)


@dataclass(frozen=True)
class State:
    """What is known of a cache.

    Args:
        seen: tokens that the passes had before pruning, those of padding included.
        next: [B], position of the next token.
        masks: of each group of layers, [B, T], bool: which of the cached tokens are real.
        padded: of each group: whether there are any that are not.
    """

    seen: int
    next: Tensor
    masks: tuple[Tensor, ...]
    padded: tuple[bool, ...]

    @classmethod
    def fresh(cls, groups: int, past: int, mask: Any, batch: int, length: int, device: torch.device) -> State:
        """Of a cache that holds `past` tokens of which none was pruned, before a pass of `length` more."""
        real = columns_of(mask, past + length, batch, device)[:, :past]
        return cls(past, real.new_full((batch,), past, dtype=torch.int64), (real,) * groups, (bool(past) and not bool(real.all()),) * groups)

    def write(self, cache: Any) -> None:
        """To the cache itself, so that its copies have it too."""
        setattr(cache, _STATE, self)

    def check(self, cache: Any, firsts: Sequence[int], batch: int) -> None:
        """
        Raises:
            UsageError: the cache or the batch is another than the last pass left.
        """
        if batch != len(self.next):
            raise UsageError(816, "cache", f"holds pruned prompts of {len(self.next)} rows, and {batch} go on")
        if len(firsts) != len(self.masks):
            raise UsageError(852, "cache", "was pruned behind other layers", "go on with the strategy that read its prompt")
        for first, mask in zip(firsts, self.masks, strict=True):
            if cache.get_seq_length(first) != mask.shape[1]:
                raise UsageError(817, "cache", f"layer {first} holds {cache.get_seq_length(first)} tokens where pruning left {mask.shape[1]}", "do not crop it")


def state_of(cache: Any) -> State | None:
    """What a pass wrote; None: nothing was pruned in the cache."""
    found: State | None = getattr(cache, _STATE, None)
    return found


@dataclass
class Tokens:
    """The tokens of a pass, fewer and fewer.

    Args:
        numbers: [B, W], their columns before pruning.
        real: [B, W], bool.
        lengths: real tokens of each row.
        width: L.
    """

    numbers: Tensor
    real: Tensor
    lengths: list[int]
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = self.numbers.shape[1]

    @classmethod
    def of(cls, real: Tensor) -> Tokens:
        batch, width = real.shape
        numbers = torch.arange(width, device=real.device).expand(batch, -1)
        # one new token is taken to be real in every row, so that decoding waits for nothing
        return cls(numbers, real, [1] * batch if width == 1 else real.sum(1).tolist())

    @property
    def padded(self) -> bool:
        return any(n < self.numbers.shape[1] for n in self.lengths)

    def slots(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Where tokens are now, of their columns before pruning."""
        where = torch.zeros(len(self.numbers), self.width, dtype=torch.int64, device=self.numbers.device)
        where.scatter_(1, self.numbers, torch.arange(self.numbers.shape[1], device=where.device).expand_as(self.numbers))
        return where[rows, columns]

    def shorten(self, alive: Tensor, lengths: list[int]) -> Tensor:
        """Keep tokens, padded on the left.

        Args:
            alive: [B, W], bool.
            lengths: of each row, how many these are.

        Returns:
            [B, most]: where the kept ones were.
        """
        width = self.numbers.shape[1]
        order = alive.byte().argsort(dim=1, stable=True)[:, width - max(lengths) :]
        self.numbers, self.real, self.lengths = self.numbers.gather(1, order), alive.gather(1, order), lengths
        return order


def gathered(values: Tensor, order: Tensor) -> Tensor:
    """[B or 1, W, ...] -> [B, most, ...]"""
    return values.expand(len(order), *values.shape[1:]).gather(1, order.view(*order.shape, *(1,) * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))


def positions_of(positions: Tensor | None, state: State, real: Tensor, fresh: bool) -> Tensor:
    """Of a pass's tokens, [B, L] or [3, B, L], as they would be if nothing had been pruned.

    Args:
        positions: what the pass was given: [B or 1, L], or MRoPE's three rows, with or without the text's before them.
        fresh: nothing was pruned before, so that what was given holds; so it does where new media come with rows of their own.
    """
    batch, length = real.shape
    if positions is not None and (fresh or positions.ndim == 3):
        return positions[-3:].expand(-1, batch, -1) if positions.ndim == 3 else positions.expand(batch, -1)
    if fresh:
        return torch.arange(state.seen, state.seen + length, device=real.device).expand(batch, -1)
    return (state.next[:, None] + real.cumsum(1) - 1).masked_fill(~real, 0)


def cut(inputs: dict[str, Any], state: State) -> None:
    """Take away tokens that a cache has seen: transformers counts them by what is left of them there.

    Raises:
        UsageError: a mask that is not of all tokens, dropped ones included.
    """
    mask, ids, positions = (inputs.get(name) for name in ("attention_mask", "input_ids", "position_ids"))
    if ids is None or ids.shape[1] == 1:
        return
    if isinstance(mask, Tensor) and mask.ndim == 2:
        new = mask.shape[1] - state.seen
    elif positions is not None:  # generation leaves a mask without padding out; its first of four rows counts tokens
        counted = positions.ndim == 3 and len(positions) == 4
        new = int(((positions[0] if positions.ndim == 3 else positions) >= (state.seen if counted else state.next[:, None])).sum(1).max())
    else:
        return
    if new < 1:
        raise UsageError(828, "attention_mask", f"{state.seen} tokens went before, and it tells of no new one", "give it for all tokens, dropped ones included")
    if new < ids.shape[1]:
        for name in ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name][..., inputs[name].shape[-1] - new :]
