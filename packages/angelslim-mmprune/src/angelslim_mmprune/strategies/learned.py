"""What strategies with a learned scorer share."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from angelslim_core.errors import ModelError

from ..plan import Pool
from ..scorer import Scorer, load_scorer
from .base import Strategy


class Learned(Strategy):
    """Options of a strategy whose tokens are scored by what was learned for the model."""

    scorer: Path | None = Field(None, description="folder of the scorer that was trained for this model: config.json and safetensors")

    @cached_property
    def _by_device(self) -> dict[torch.device, Scorer]:
        """Read where it is used first, and once."""
        return {}

    def scores(self, pool: Pool) -> Tensor:
        """Raw scores, fp32 [P, N]; 0 behind a pool's tokens.

        Raises:
            ModelError: the folder holds no scorer, or one of another width.
        """
        assert self.scorer is not None
        device, width = pool.features.device, pool.features.shape[-1]
        if device not in self._by_device:
            self._by_device[device] = load_scorer(self.scorer).to(device)
        scorer = self._by_device[device]
        if scorer.in_features != width:
            raise ModelError(
                836, str(self.scorer), f"scores tokens of {scorer.in_features} numbers, and the model's have {width}", "give the model's own scorer"
            )
        with torch.no_grad():
            return scorer(pool.features, pool.valid)
