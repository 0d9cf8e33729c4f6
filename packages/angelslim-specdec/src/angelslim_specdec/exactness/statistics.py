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


def quantiles(p: Tensor, q: Tensor, tokens: Tensor, chances: Tensor) -> Tensor:
    """Where tokens [...] stand among all by probabilities p [..., V], uniform in [0, 1) if drawn from p: [3, ...], fp64.

    In three orders: the likeliest first, as the draft's q over p has them, which any favour for what is proposed shows in, and as they
    are numbered, in which draws go through them.

    Args:
        q: [..., V], fp32: what a draft proposes by; it may depend on what came before, but on the token only by p.
        chances: [...], fp64 in [0, 1): where within a token's own share.

    Source: the randomized probability integral transform; of one token after another, Rosenblatt's.
    """
    at = tokens[..., None]
    number = torch.arange(p.shape[-1], device=p.device)
    in_order = number < at
    favour, own = q / p.clamp(min=1e-30), p.gather(-1, at)
    likelier = (p > own) | ((p == own) & in_order)
    of_favour = favour.gather(-1, at)
    favoured = (favour > of_favour) | ((favour == of_favour) & likelier)
    before = torch.stack([(p * mask).sum(-1, dtype=torch.float64) for mask in (likelier, favoured, in_order)])
    return (before + chances * own[..., 0]) / p.sum(-1, dtype=torch.float64)


def uniformity(places: Tensor) -> float:
    """p value of numbers in [0, 1), [S, N], N even: each by itself, each with the next of its pair, and their mean; the smallest counts three times.

    The mean alone tells most where all lean to one side, as they do in the order of what a draft favours.
    """
    pairs = places.reshape(-1, 2)
    side = max(2, min(8, int((len(pairs) / (2 * _LEAST)) ** 0.5)))
    cells = side * (pairs[:, 0] * side).long().clamp(max=side - 1) + (pairs[:, 1] * side).long().clamp(max=side - 1)
    single = max(2, min(32, int(places.numel() / (2 * _LEAST))))
    alone = (places.reshape(-1) * single).long().clamp(max=single - 1)
    even = [torch.full((n,), 1 / n, dtype=torch.float64) for n in (single, side**2)]
    lean = (places.double().mean() - 0.5).abs() * (12 * places.numel()) ** 0.5  # of standard deviations
    found = (chi_square(alone[:, None], even[0]), chi_square(cells[:, None], even[1]), float(torch.special.erfc(lean / 2**0.5)))
    return min(1.0, len(found) * min(found))
