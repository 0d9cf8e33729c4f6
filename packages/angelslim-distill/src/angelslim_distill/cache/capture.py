"""A teacher's most likely tokens at each position of a batch.

Shapes: B rows, T positions, H hidden size, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from angelslim_core.errors import NumericError, UsageError

from ..heads import logits_of
from ..targets import Batch, Hidden, Teacher, TopK

_ROWS = 256  # positions of which all log-probabilities are held in fp32 at once


def keeping(teacher: Teacher, top_k: int) -> Callable[[Batch], TopK]:
    """What asks a teacher that knows its whole distribution, and keeps the most likely tokens."""

    def kept(batch: Batch) -> TopK:
        found = teacher(batch)
        assert isinstance(found, Hidden)
        return top_k_of(found, batch.labels, top_k)

    return kept


@torch.no_grad()
def top_k_of(hidden: Hidden, labels_BT: Tensor, top_k: int) -> TopK:
    """The most likely tokens, of temperature 1: losses divide by theirs; normalized in fp32, over the whole vocabulary, without what pads it.

    Args:
        labels_BT: tokens whose log-probability is kept; 0 is kept of what is none.

    Raises:
        UsageError: `top_k` is larger than the vocabulary.
        NumericError: a log-probability is not finite.
    """
    hidden = hidden.of_first(hidden.tokens or len(hidden.weight))
    vocabulary = len(hidden.weight)
    if not 1 <= top_k <= vocabulary:
        raise UsageError(930, "top_k", f"{top_k} tokens are to be kept of a vocabulary of {vocabulary}", f"give 1 to {vocabulary}")
    labels_BT = labels_BT.to(hidden.states.device)
    known = (labels_BT >= 0) & (labels_BT < vocabulary)
    states, labels = hidden.states.flatten(0, 1), (labels_BT * known).flatten()
    ids, logp, label_logp = [], [], []
    for start in range(0, len(states), _ROWS):
        every = logits_of(hidden, states[start : start + _ROWS]).log_softmax(-1)
        most, at = every.topk(top_k, dim=-1)
        ids.append(at)
        logp.append(most)
        label_logp.append(every.gather(-1, labels[start : start + _ROWS, None])[:, 0])
    shape = labels_BT.shape
    found = TopK(torch.cat(ids).view(*shape, top_k), torch.cat(logp).view(*shape, top_k), torch.cat(label_logp).view(shape) * known, vocabulary)
    if not bool(found.logp.isfinite().all() & found.label_logp.isfinite().all()):
        raise NumericError(930, "teacher", "its log-probabilities are not finite", "evaluate the teacher: angelslim eval")
    return found
