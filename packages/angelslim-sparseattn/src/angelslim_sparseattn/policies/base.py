"""What every policy is: options, and a rule from queries, keys and values to kept blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import ConfigDict, Field

from angelslim_core.passes import PassConfig

from ..prefill import Kept, Prefill

# sequences are shorter, so that positions fit 32 bits; blocks have at least 16 tokens
MOST_TOKENS = 2**31 - 1
MOST_BLOCKS = 2**27


class Policy(PassConfig, ABC):
    """Options that all share.

    Attributes:
        looks_ahead: whether tokens of later blocks can change what earlier query blocks keep.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    looks_ahead: ClassVar[bool]

    min_len: int = Field(8192, ge=0, le=MOST_TOKENS, description="sequences with fewer keys attend to everything")
    dense_layers: tuple[int, ...] = Field((0, 1), description="layers that attend to everything")

    @property
    def ordered(self) -> bool:
        """Whether lists are in priority order."""
        return False

    def scratch_bytes(self, s: Prefill) -> int:
        """Memory that a query head takes up while it selects: fewer heads at a time where it is much."""
        return 16 * s.rows * s.columns

    @abstractmethod
    def keep(self, s: Prefill) -> Kept:
        """What one sequence keeps, whatever its length."""
