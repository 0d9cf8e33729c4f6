"""What passes may look at while they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import StoppedError
from .parallel import Group

if TYPE_CHECKING:
    from .adapters.base import Description
    from .calibration.data import Samples
    from .source import Source

# progress(done, total, label): called after each finished item
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, label: str) -> None:
    """Report nothing."""


def never() -> bool:
    """Do not stop."""
    return False


@dataclass
class Context:
    """Surroundings of a run.

    Args:
        source: the model's tensors.
        description: its linears and layers.
        device: "cpu" or "cuda".
        seed: the run's seed; a pass draws from its own generator seeded with it.
        workdir: private folder for intermediate files.
        samples: calibration token ids, when a step needs them.
        progress: called after each finished item.
        stop_requested: asked between items; true ends the run safely, so that it can be resumed.
        warnings: one line each, shown to the user and kept in the artifact.
        fallbacks: one line for each thing that was done in another way than asked; their number is reported.
        group: the processes of the run; what a pass gathers over calibration batches must be reduced over them.
        spills: hidden states between layers stay in files.
    """

    source: Source
    description: Description
    device: str
    seed: int
    workdir: Path
    samples: Samples | None = None
    batch_size: int = 1
    progress: Progress = silent
    stop_requested: Callable[[], bool] = never
    warnings: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    group: Group = field(default_factory=Group)
    spills: bool = False

    def check_stop(self, where: str) -> None:
        """Raise StoppedError if the run was asked to stop."""
        if self.stop_requested():
            raise StoppedError(1, where, "stopped as asked; what is finished is kept", "run the same command again to go on")
