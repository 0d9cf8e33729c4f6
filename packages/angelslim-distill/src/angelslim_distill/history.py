"""What a training has shown and the best it has been, kept beside its states, so that one that goes on ends with the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from angelslim_core.io.checkpoint import read_bytes, read_header, torch_dtype
from angelslim_core.io.strict_json import read_json
from angelslim_core.io.writer import keep_tensors, write_json

_HISTORY, _BEST, _PARAMETERS = "history-{:08d}.json", "best.json", "best-{:08d}.safetensors"


@dataclass
class History:
    """What steps have shown.

    Args:
        losses: (step, mean loss since the entry before).
        looks: what was measured on held-out rows, each with its step.
        sums: of the loss since the last of `losses`, and steps it is of.
        tokens: that counted, over all processes.
        seconds: of training, looks not counted.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)
    sums: tuple[float, int] = (0.0, 0)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, loss: float, steps: int) -> None:
        """A mean loss of some steps."""
        self.sums = (self.sums[0] + loss * steps, self.sums[1] + steps)

    def point(self, step: int) -> None:
        """Close the point of the curve of losses."""
        if self.sums[1]:
            self.losses.append((step, self.sums[0] / self.sums[1]))
            self.sums = (0.0, 0)

    def write(self, folder: Path, step: int) -> None:
        """Keep it as it is after a step, beside what is kept of earlier ones."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _HISTORY.format(step), vars(self))

    @staticmethod
    def forget(folder: Path, step: int) -> None:
        """Let go of what is kept of other steps."""
        for path in folder.glob("history-*.json"):
            if path.name != _HISTORY.format(step):
                path.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path, step: int) -> History:
        """As it was after a step."""
        document = read_json(folder / _HISTORY.format(step))
        losses = [(int(at), float(loss)) for at, loss in document["losses"]]
        return cls(losses, list(document["looks"]), (float(document["sums"][0]), int(document["sums"][1])), int(document["tokens"]), float(document["seconds"]))

    def curves(self) -> list[dict[str, Any]]:
        """What a report draws: the loss of training, and on held-out rows KL to the teacher, by step."""
        found: list[dict[str, Any]] = []
        if len(self.losses) > 1:
            found.append({"title": "Training loss", "x": "step", "y": "loss", "points": [[step, loss] for step, loss in self.losses]})
        points = [[look["step"], look["kl"]] for look in self.looks]
        if len(points) > 1:
            curve = {"title": "KL to the teacher on held-out rows", "x": "step", "y": "nats a token", "points": points}
            found.append({**curve, "mark": min(points, key=lambda point: point[1])})
        return found


def write_best(folder: Path, step: int, kl: float, parameters: Mapping[str, Tensor]) -> None:
    """Keep parameters in place of those kept before; whole or not at all."""
    path = folder / _PARAMETERS.format(step)
    folder.mkdir(parents=True, exist_ok=True)
    keep_tensors(path, parameters)
    write_json(folder / _BEST, {"step": step, "kl": kl})
    for earlier in folder.glob("best-*"):
        if earlier != path:
            earlier.unlink(missing_ok=True)


def best_of(folder: Path) -> tuple[int, float] | None:
    """Step and KL of the parameters that are kept; None: there are none."""
    path = folder / _BEST
    if not path.is_file():
        return None
    document = read_json(path)
    return int(document["step"]), float(document["kl"])


@torch.no_grad()
def read_best(folder: Path, step: int, parameters: Mapping[str, Tensor]) -> None:
    """Put the parameters that are kept of a step into their places."""
    header = read_header(folder / _PARAMETERS.format(step))
    for name, parameter in parameters.items():
        info = header[name]
        parameter.copy_(read_bytes(info.file, info.offset, info.nbytes).view(torch_dtype(info.dtype)).reshape(parameter.shape))
