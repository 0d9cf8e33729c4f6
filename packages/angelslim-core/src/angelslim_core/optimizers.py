"""What steps fp32 weights: torch's AdamW, and Muon for matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .muon import Muon

if TYPE_CHECKING:
    from .training import TrainingOptions

# what is kept of a parameter between steps
_ADAMW = ("exp_avg", "exp_avg_sq")
_MUON = ("momentum_buffer",)


class Optimizers:
    """Steps of parameters that have gradients.

    Args:
        masters: by name, fp32.
        matrices: names of those that Muon steps; the others are AdamW's.
    """

    def __init__(self, masters: Mapping[str, nn.Parameter], options: TrainingOptions, matrices: Collection[str] = ()) -> None:
        self._masters, self._options, self._matrices = masters, options, frozenset(matrices)
        fused = all(p.is_cuda for p in masters.values())
        adamw, muon = (self._groups(names) for names in (masters.keys() - self._matrices, self._matrices))
        self._all: list[torch.optim.Optimizer] = []
        if adamw:
            self._all.append(torch.optim.AdamW(adamw, lr=options.lr, betas=(options.beta1, options.beta2), fused=fused, foreach=not fused))
        if muon:
            self._all.append(Muon(muon, lr=options.lr))

    def _groups(self, names: Collection[str]) -> list[dict[str, object]]:
        """Of equal highest rate and decay, in the masters' order."""
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, master in self._masters.items():
            if name in names:
                is_decayed = master.ndim > 1 and not any(text in name for text in self._options.undecayed)
                decay = self._options.weight_decay if is_decayed else 0.0
                found.setdefault((self._options.highest(name), decay), []).append(master)
        return [{"params": masters, "highest": highest, "weight_decay": decay} for (highest, decay), masters in found.items()]

    def step(self, rate: Callable[[float], float]) -> None:
        """Move the masters by their gradients, which are then dropped.

        Args:
            rate: of the highest learning rate of a group, that of this step.
        """
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = rate(group["highest"])
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by `NAME.part`; these are made if no step has been taken yet."""
        found: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            is_muon = name in self._matrices
            moments = self._all[-1 if is_muon else 0].state[master]
            if not moments:
                moments |= {part: torch.zeros_like(master) for part in (_MUON if is_muon else _ADAMW)}
                if not is_muon:
                    moments["step"] = torch.zeros((), device=master.device if master.is_cuda else None)
            found[f"{name}.master"] = master.data
            found |= {f"{name}.{part}": moments[part] for part in (_MUON if is_muon else (*_ADAMW, "step"))}
        return found
