"""Text of tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT, _MOST = 8, 64  # tokens: kept, since the next ones may join them, and how long bytes may wait to become a character


class Speech:
    """Decodes the last few tokens only, however long the text is. Bytes of a character that is not whole yet wait for the rest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._said = 0

    def add(self, tokens: Sequence[int]) -> str:
        """What they add to the text."""
        self._tokens += tokens
        text = self._decode()
        whole = text.rstrip("\ufffd") if len(self._tokens) < _MOST else text
        new, self._said = whole[self._said :], max(self._said, len(whole))
        if whole == text and len(self._tokens) > 2 * _CONTEXT:
            self._tokens = self._tokens[-_CONTEXT:]
            self._said = len(self._decode())
        return new

    def _decode(self) -> str:
        found = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        assert isinstance(found, str)
        return found
