"""What every strategy is: options, what it must see, and a pure function from that to a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

from pydantic import ConfigDict

from ..budget import Budget
from ..plan import Need, Plan, Pool

Modality = Literal["vision", "audio"]


class Stage(NamedTuple):
    """Where tokens are pruned.

    Args:
        layer: on the output of this layer of the language model; None: before its first.
        share: of the tokens that the budget's whole prompt had, how many stay, where a strategy has several stages; None: the budget's.
    """

    layer: int | None = None
    share: float | None = None


class Strategy(Budget, ABC):
    """Options that all share.

    Attributes:
        modalities: of tokens that it can choose among.
        reads_text: whether it compares them with the prompt's text.
        merges: whether dropped tokens leave something in kept ones.
        weights: files that it must be given, by option; none for most.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    name: ClassVar[str]
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision"})
    reads_text: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Where it prunes, in order."""
        return (Stage(),)

    @property
    def needs(self) -> tuple[Need, ...]:
        """Statistics of attention that it reads, and nothing else is captured; computed from its options."""
        return ()

    @property
    def text_needs(self) -> tuple[Need, ...]:
        """Those of `needs` that it reads of the prompt's text too."""
        return ()

    def at_depth(self, layers: int) -> Strategy:
        """What it is for a language model of so many layers: itself, unless its stages depend on that."""
        return self

    @abstractmethod
    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        """Choose.

        Args:
            pool: features, and the statistics that `needs` names.
            keep: tokens to keep of each pool; never more than it has, and no pool is passed that keeps all of its tokens.

        Raises:
            NumericError: features or statistics are NaN.
        """
