"""Stop strings: an answer ends with the token that completes one, as transformers' `stop_strings` has it.

The string stays in the answer, and so does what its last token has behind it. Text is compared, so that it does not matter how a string
is cut into tokens, nor how many of them a round accepts; a string may begin in the prompt. Ending a row changes no other row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from angelslim_core.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# bytes of a character that lack others decode to this; a row of more tokens than that is none that will be whole
_PART, _LONGEST_CHARACTER = "\ufffd", 8
# tokens that are decoded with a new one, since the first of a text may lose its space
_CONTEXT = 6


@dataclass
class _Row:
    """Text of one row, from some tokens before its answer on.

    Args:
        ids: tokens.
        text: of those up to `read`.
        known: tokens from which on what follows is decoded.
        seen: characters that have been searched, the prompt's among them.
    """

    ids: list[int]
    text: str
    known: int
    read: int
    seen: int


class StopStrings:
    """Looks for strings in what rows of a batch say.

    Args:
        strings: at least one, none of them empty.

    Attributes:
        found: of each row the string that ended it; None: none has.
        surplus: characters that the last token of such a row has behind the string, where they are shown.

    Raises:
        UsageError: there is no tokenizer, or a string is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, strings: Sequence[str]) -> None:
        if tokenizer is None or not strings or not all(isinstance(s, str) and s for s in strings):
            what = "need a tokenizer" if tokenizer is None else f"{list(strings)!r:.100} are no strings of at least one character"
            raise UsageError(783, "stop_strings", what, "give Target(model, tokenizer)" if tokenizer is None else "leave them out, or name some")
        self._tokenizer, self.strings = tokenizer, list(dict.fromkeys(strings))
        self._longest, self._special = max(map(len, self.strings)), set(tokenizer.all_special_ids)
        self._rows: list[_Row] = []
        self.found: list[str | None] = []
        self.surplus: list[int] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin a batch of prompts."""
        tails = [list(ids[-self._longest - _CONTEXT :]) for ids in prompts]
        texts = [self._decode(tail) for tail in tails]
        self._rows = [_Row(ids, text, max(0, len(ids) - _CONTEXT), len(ids), len(text)) for ids, text in zip(tails, texts, strict=True)]
        self.found, self.surplus = [None] * len(tails), [0] * len(tails)

    def add(self, row: int, tokens: Sequence[int]) -> int | None:
        """Of a row's next tokens those that stay, where a string ends it or has ended it; None: it goes on with all."""
        if self.found[row] is not None:
            return 0
        at = self._rows[row]
        text = at.text + self._after(at, tokens)
        ends = [(where + len(string), string) for string in self.strings if (where := text.find(string, max(0, at.seen - len(string) + 1))) >= 0]
        if not ends:
            self._take(at, tokens, text)
            return None
        end, self.found[row] = min(ends)
        count = next(n for n in range(1, len(tokens) + 1) if len(text := at.text + self._after(at, tokens[:n])) >= end)
        self.surplus[row] = 0 if tokens[count - 1] in self._special else len(text) - end
        return count

    def shown(self, row: int, text: str, *, whole: bool = False) -> str:
        """What to show of a row's text so far: nothing behind a stop string, and nothing that may yet become the beginning of one.

        Args:
            text: of the new tokens, special ones left out.
            whole: nothing more will come.
        """
        if self.found[row] is not None:
            return text[: len(text) - self.surplus[row]]
        held = (n for n in range(min(self._longest - 1, len(text)), 0, -1) if any(len(s) > n and text.endswith(s[:n]) for s in self.strings))
        return text if whole else text[: len(text) - next(held, 0)]

    def _after(self, at: _Row, tokens: Sequence[int]) -> str:
        """Text of tokens behind what has been read, as far as its characters are whole."""
        return self._decode([*at.ids[at.known :], *tokens])[len(self._decode(at.ids[at.known : at.read])) :].rstrip(_PART)

    def _take(self, at: _Row, tokens: Sequence[int], text: str) -> None:
        at.ids += tokens
        at.seen = max(at.seen, len(text))
        if not self._decode(at.ids[at.known :]).endswith(_PART) or len(at.ids) - at.read > _LONGEST_CHARACTER:
            at.text, at.known, at.read = text, max(0, len(at.ids) - _CONTEXT), len(at.ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
