"""SpecExit: thoughts end early where a draft's signals say that they have come far enough. NOT lossless: another text is written.

A draft with `exit_signals` (`drafts.exit_signals`) reads them from the features of accepted tokens. Where a paragraph of a thought ends
and all of them pass, what was accepted behind it is dropped and the token that closes a thought comes next, in a round of its own.
All of it is device work of fixed shape on tensors that stay in place, as a round is.

Shapes: B rows, W tokens of a round, n signals, P prompt, s tokens.
Source: arXiv:2509.24248.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

from .drafters.autoregressive import Autoregressive
from .drafters.base import Drafter
from .target import THOUGHT, Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Smoothing = Literal["ewma", "mean", "window", "paragraph"]
# share of the newest round in an exponential mean, and rounds of a window
_SHARE, _WINDOW = 0.1, 10


@dataclass(frozen=True)
class SpecExit:
    """When a thought has come far enough; NOT lossless. A draft must pass for each signal that it has.

    Args:
        confidence: more than this, 0 .. 1.
        progress: more than this, 0 .. 1.
        remain: fewer tokens than this.
        smoothing: over rounds of the thought: exponential mean with a share of .1 for the newest, mean of all, of the last 10, or of
            those since the paragraph began.

    Raises:
        UsageError: a value is out of range.
    """

    confidence: float = 0.8
    progress: float = 0.3
    remain: float = 200.0
    smoothing: Smoothing = "ewma"

    def __post_init__(self) -> None:
        numbers = (self.confidence, self.progress, self.remain)
        wrong = not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers) or self.smoothing not in get_args(Smoothing)
        if wrong or not (0 <= self.confidence <= 1 and 0 <= self.progress <= 1 and self.remain >= 0):
            what = f"confidence {self.confidence!r:.20}, progress {self.progress!r:.20}, remain {self.remain!r:.20}, smoothing {self.smoothing!r:.20}"
            raise _refused(what)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SpecExit:
        """From values by name.

        Raises:
            UsageError: there is no such value, or it is out of range.
        """
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise _refused(f"{min(unknown)!r:.100} is no threshold")
        return cls(**values)


def _refused(what: str) -> UsageError:
    hint = f"confidence and progress are 0 to 1, remain is a number of tokens, smoothing one of {', '.join(get_args(Smoothing))}"
    return UsageError(784, "spec_exit", what, hint)


@dataclass(frozen=True)
class Marks:
    """Tokens that say where a row is.

    Args:
        opens: begins a thought; -1: there is none.
        closes: ends one.
        splits: end a paragraph.
    """

    opens: int
    closes: int
    splits: tuple[int, ...]


@lru_cache(maxsize=8)
def marks_of(tokenizer: PreTrainedTokenizerBase | None) -> Marks:
    """A tokenizer's marks; splits are all single tokens whose text ends with an empty line.

    Raises:
        UsageError: there is none, or it has no token that closes a thought or ends a paragraph.
    """
    known = {} if tokenizer is None else tokenizer.get_vocab()
    opens, closes = (known.get(token, -1) for token in THOUGHT)
    splits = () if tokenizer is None or closes < 0 else tuple(sorted(i for i in known.values() if _ends_a_paragraph(tokenizer, i)))
    if not splits:
        lack = "no tokenizer" if tokenizer is None else f"no token {THOUGHT[1]}" if closes < 0 else "no token that ends a paragraph"
        hint = "give Target(model, tokenizer)" if tokenizer is None else "leave it out: it is for models that think"
        raise UsageError(781, "spec_exit", f"the target has {lack}, so that no thought can be ended", hint)
    return Marks(opens, closes, splits)


def _ends_a_paragraph(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False)).endswith("\n\n")


class Exits:
    """Which rows of a batch think, what their signals are, and where they are made to stop.

    Args:
        signals: signals(aux [B, W, n H]) -> [B, W, n].
        names: of the signals.

    Attributes:
        cuts: [B], int64: thoughts of each row that were ended early.
    """

    def __init__(self, how: SpecExit, signals: Callable[[Tensor], Tensor], names: Sequence[str], marks: Marks, batch: int, device: torch.device) -> None:
        self._signals, self._marks, self._smoothing = signals, marks, how.smoothing
        self._limits = torch.tensor([float(getattr(how, name)) for name in names], device=device)
        self._wants_more = torch.tensor([name != "remain" for name in names], device=device)
        self._splits = torch.tensor(marks.splits, dtype=torch.int64, device=device)
        self._values = torch.zeros(batch, _WINDOW if how.smoothing == "window" else 1, len(names), device=device)
        self._rounds, self.cuts = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self._thinks, self._closing = (torch.zeros(batch, dtype=torch.bool, device=device) for _ in range(2))

    def start(self, prompts: Tensor, lengths: Tensor, first: Tensor) -> None:
        """Begin a batch of prompts [B, P], of lengths [B], each followed by a first token [B]."""
        device = self.cuts.device
        tokens = torch.cat([prompts, prompts[:, :1]], 1).to(device).scatter(1, lengths.to(device)[:, None], first.to(device)[:, None])
        for state in (self._values, self._rounds, self.cuts, self._thinks, self._closing):
            state.zero_()
        self._thinks.copy_(self._within(tokens).gather(1, lengths.to(device)[:, None])[:, 0])

    def closing(self, emitted: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """A round's tokens [B, W] and how many are accepted [B]: in rows whose thought was ended in the round before only what closes it."""
        first = torch.where(self._closing, self._marks.closes, emitted[:, 0])
        return torch.cat([first[:, None], emitted[:, 1:]], 1), torch.where(self._closing, 0, accepted)

    def cut(self, emitted: Tensor, aux: Tensor, kept: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Look at a round, and end thoughts.

        Args:
            emitted: [B, W], int64.
            aux: [B, W, n H]: features of the tokens before each.
            kept: [B], int64: how many of the tokens stay.
            ended: [B], bool: whether the row ends with them.

        Returns:
            kept, ended: now.
        """
        number = torch.arange(emitted.shape[1], device=emitted.device)
        within = self._within(emitted)
        rows = within & (number < kept[:, None])
        took_part = rows.any(1)
        here = self._signals(aux).masked_fill(~rows[..., None], 0).sum(1) / rows.sum(1).clamp(min=1)[:, None]
        value = self._smoothed(here, took_part)
        passes = torch.where(self._wants_more, value > self._limits, value < self._limits).all(1) & took_part
        splits = rows & (emitted[..., None] == self._splits).any(-1)
        at = torch.where(splits, number, len(number)).amin(1)
        exits = passes & splits.any(1) & ~(ended & (at + 1 == kept))
        kept, ended = torch.where(exits, at + 1, kept), ended & ~exits
        last = within.gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]
        self._thinks.copy_(torch.where(kept > 0, last, self._thinks))
        over = ~self._thinks | (splits.any(1) & (self._smoothing == "paragraph"))
        self._rounds.copy_(torch.where(over, 0, self._rounds + took_part))
        self._closing.copy_(exits)
        self.cuts.add_(exits)
        return kept, ended

    def _within(self, tokens: Tensor) -> Tensor:
        """[B, W], bool: whether a thought is open behind each token."""
        opens, closes = tokens == self._marks.opens, tokens == self._marks.closes
        number = torch.arange(tokens.shape[1], device=tokens.device)
        mark = torch.where(opens | closes, number, -1).cummax(1).values
        return torch.where(mark < 0, self._thinks[:, None], opens.gather(1, mark.clamp(min=0)))

    def _smoothed(self, here: Tensor, took_part: Tensor) -> Tensor:
        """[B, n], with a round's mean [B, n] taken in for the rows that had one."""
        seen = self._rounds[:, None]
        if self._smoothing == "window":
            slots = torch.arange(_WINDOW, device=here.device)
            new = (slots == seen % _WINDOW) & took_part[:, None]
            self._values.copy_(torch.where(new[..., None], here[:, None], self._values))
            real = slots < (seen + 1).clamp(max=_WINDOW)
            return (self._values * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        share = torch.where(seen == 0, 1.0, _SHARE) if self._smoothing == "ewma" else 1 / (seen + 1)
        before = self._values[:, 0]
        self._values.copy_(torch.where(took_part[:, None], before + share * (here - before), before)[:, None])
        return self._values[:, 0]


def exits_of(how: SpecExit, drafter: Drafter | None, target: Target, batch: int) -> Exits:
    """What makes an engine end thoughts.

    Raises:
        UsageError: the drafter has no signals, or the target's tokenizer no marks.
    """
    draft: Any = drafter.draft if isinstance(drafter, Autoregressive) else None
    names = getattr(getattr(draft, "config", None), "exit_signals", ())
    if not names:
        hint = "train one that has: specdec train --draft eagle3 --set exit_signals=[confidence,progress,remain]"
        raise UsageError(780, "spec_exit", "this drafter has no signals to end thoughts by", hint)
    return Exits(how, draft.signals, names, marks_of(target.tokenizer), batch, target.device)
