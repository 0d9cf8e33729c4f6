"""Whether tokens come as they should: the exact distribution of a small target's next tokens, and how likely what was seen is under it.

Shapes: S samples, N tokens of each, V vocabulary, P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEAST = 5.0  # expected samples of a cell, below which cells are pooled
_AT_ONCE = 4096


def joint(model: PreTrainedModel, prompt: Sequence[int], tokens: int, warp: Callable[[Tensor], Tensor]) -> Tensor:
    """Probability of each continuation of a prompt: [V] * tokens, fp64, by running the model on all of them, without a cache."""
    found = torch.ones((), dtype=torch.float64)
    for length in range(tokens):
        vocabulary = model.config.vocab_size
        prefixes = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).view(-1, length) if length else torch.zeros(1, 0, dtype=torch.int64)
        ids = torch.cat([torch.tensor([list(prompt)]).expand(len(prefixes), -1), prefixes], 1)
        with torch.no_grad():
            parts = [warp(model(input_ids=part).logits[:, -1]).double() for part in torch.split(ids, _AT_ONCE)]
        found = found[..., None] * torch.cat(parts).view(*[vocabulary] * (length + 1))
    return found


def chi_square(samples: Tensor, expected: Tensor) -> float:
    """p value of samples [S, N], int64, under probabilities [V] * N; cells that expect few are taken together. 0 if what cannot be was seen."""
    vocabulary, wanted = expected.shape[0], expected.flatten() * len(samples)
    cell = torch.zeros(len(samples), dtype=torch.int64)
    for column in samples.T:
        cell = cell * vocabulary + column
    seen = torch.bincount(cell, minlength=len(wanted)).double()
    if seen[wanted == 0].any():
        return 0.0
    rare = wanted < _LEAST
    wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    wanted, seen = wanted[wanted > 0], seen[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64), statistic / 2))


def agreement(samples: Tensor, expected: Tensor) -> float:
    """p value over the first three tokens together and the last two, of [S, N] with N of at least 4; the smaller counts twice."""
    last = expected.sum(tuple(range(expected.dim() - 2)))
    first = expected.sum(tuple(range(3, expected.dim())))
    return min(1.0, 2 * min(chi_square(samples[:, :3], first), chi_square(samples[:, -2:], last)))
