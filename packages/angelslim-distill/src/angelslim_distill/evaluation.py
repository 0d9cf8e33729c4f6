"""How near a student is to its teacher on rows that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from angelslim_core.calibration.packing import Row, chunks
from angelslim_core.errors import NumericError
from angelslim_core.parallel import Group

from .data.rows import collate, moved
from .heads import Reader
from .objective import measures
from .targets import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Held:
    """Means over the tokens that count.

    Args:
        kl: KL(teacher, student), nats.
        top1_agreement: share of equal first choices.
    """

    kl: float
    perplexity: float
    teacher_perplexity: float
    top1_agreement: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(model: PreTrainedModel, teacher: Teacher, rows: Sequence[Row], batch: int, group: Group | None = None, multiple: int = 1) -> Held:
    """Over all rows, each counted once, however many processes share them.

    Args:
        batch: rows a process runs at once.

    Raises:
        NumericError: a mean is not finite.
    """
    group, reader = group or Group(), Reader(model)
    was = model.training
    totals = torch.zeros(5, dtype=torch.float64, device=model.device)
    try:
        model.eval()
        own = list(chunks(range(group.rank, len(rows), group.size), batch))
        for at in range(len(list(chunks(range(0, len(rows), group.size), batch)))):
            # all processes run both equally often, as those must that hold parts of them
            part = collate([rows[i] for i in (own[at] if at < len(own) else [0])], multiple)
            part = moved(part if at < len(own) else replace(part, counted=torch.zeros_like(part.counted)), model.device)
            totals += measures(reader(part), teacher(part), part)
    finally:
        model.train(was)
    kl, nll, theirs, same, tokens = group.reduce(totals).tolist()
    means = torch.tensor([kl, nll, theirs, same], dtype=torch.float64) / max(tokens, 1)
    if not bool(means.isfinite().all()):
        raise NumericError(
            910, "held-out rows", "the student's or the teacher's distributions are not finite", "lower the learning rates; an earlier state is kept"
        )
    return Held(float(means[0]), float(means[1].exp()), float(means[2].exp()), float(means[3]), int(tokens))
