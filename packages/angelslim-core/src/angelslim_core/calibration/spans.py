"""Conversations as token ids, with a mask of what the assistant wrote, found in any chat template by rendering it.

A template is rendered with a stand-in for an answer, which shows where the answer begins and what closes it, and with the answer
itself, which must then lie between just these. No template's headers need to be known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ModelError, RecipeError
from .chats import Conversation
from .render import render_chats, special_tokens_of, template_of
from .rows import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Literal["joined", "each"]
STAND_IN = "\u2603stand-in\u2603"
_AT_ONCE = 1024  # conversations a process renders
_PROCESSES = 4  # that render at once, at most


@dataclass(frozen=True)
class Document:
    """A conversation to train on.

    Args:
        ids: its tokens.
        mask: which of them the assistant wrote, ends of turns included.
    """

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class Span:
    """Characters of an answer in the rendered text, its end of turn included; `ids` where these are known to differ."""

    start: int
    content_end: int
    end: int
    ids: list[int] | None = None


@dataclass(frozen=True)
class _Turn:
    """An answer, message `index` of its conversation, as the template shows it.

    Args:
        whole: the conversation up to it; `prompt`: up to where it begins; `stand`: with a stand-in for it.
    """

    index: int
    whole: str
    prompt: str
    stand: str


class Renderer:
    """A tokenizer with its chat template.

    Raises:
        ModelError: there is no template, or the tokenizer does not say where its tokens lie.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, where: str) -> None:
        template = template_of(tokenizer) if tokenizer is not None else None
        if tokenizer is None or template is None:
            raise ModelError(730, where, "has no tokenizer with a chat template, which conversations need")
        if not tokenizer.is_fast:
            raise ModelError(731, where, "has a tokenizer that does not say where in the text its tokens lie", "convert it to tokenizer.json")
        self.tokenizer, self.template = tokenizer, template
        self._specials = special_tokens_of(tokenizer)
        self._added = sorted({str(t) for t in tokenizer.get_added_vocab()}, key=len, reverse=True)

    def render(self, chats: Sequence[Chat], prompt: bool = False) -> list[str]:
        """Text of each conversation; `prompt`: with what makes the assistant speak."""
        plain = [[{k: v for k, v in m.items() if k != "token_ids"} for m in chat] for chat in chats]
        return render_chats(self.template, plain, self._specials, add_generation_prompt=prompt)

    def prompts(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Tokens that the target continues with its answer to each conversation."""
        found: list[list[int]] = []
        for start in range(0, len(chats), 4 * _AT_ONCE):
            found += self.encode_all(self.render(chats[start : start + 4 * _AT_ONCE], prompt=True))
        return found

    def encode(self, text: str) -> list[int]:
        """Tokens of rendered text: the template has written all special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]] if texts else []

    def differs(self, ids: list[int], text: str) -> bool:
        """Whether the text of an answer is tokenized to other tokens than those it was made of."""
        return self.encode(text) != ids

    def documents(self, conversations: Sequence[Conversation], turns: Turns = "joined") -> Iterator[Document]:
        """One document a conversation; `turns="each"`: one an answer, with the history as the template shows it then.

        Raises:
            RecipeError: an answer cannot be found, or the template rewrites earlier turns and `turns` is "joined".
        """
        parts = list(_each(conversations)) if turns == "each" else list(conversations)
        groups = [parts[start : start + _AT_ONCE] for start in range(0, len(parts), _AT_ONCE)]
        with ThreadPoolExecutor(min(_PROCESSES, os.cpu_count() or 1)) as pool:
            for group, rendered in zip(groups, pool.map(lambda g: self._rendered(g, turns == "each"), groups), strict=True):
                yield from self._documents(group, rendered)

    def _rendered(self, conversations: Sequence[Conversation], last_only: bool) -> list[list[_Turn]]:
        """Of each conversation its answers, or the last one alone, as the template shows them."""
        answers = [[i for i, m in enumerate(c.messages) if m["role"] == "assistant"][-1 if last_only else 0 :] for c in conversations]
        upto, before, stands = [], [], []
        for conversation, indices in zip(conversations, answers, strict=True):
            for i in indices:
                messages = conversation.messages
                upto.append(messages[: i + 1])
                before.append(messages[:i])
                stands.append([*messages[:i], {**messages[i], "content": STAND_IN}])
        found = iter(zip(self.render(upto), self.render(before, prompt=True), self.render(stands), strict=True))
        return [[_Turn(i, *next(found)) for i in indices] for indices in answers]

    def _documents(self, conversations: Sequence[Conversation], rendered: Sequence[Sequence[_Turn]]) -> Iterator[Document]:
        texts, everywhere = [turns[-1].whole for turns in rendered], []
        for conversation, text, turns in zip(conversations, texts, rendered, strict=True):
            spans = []
            for number, turn in enumerate(turns):
                span = self._span(conversation.id, conversation.messages[turn.index], turn)
                if not text.startswith(turn.whole[: span.end]):
                    raise RecipeError(
                        732, f"conversation {conversation.id!r:.100}, answer {number + 1}", "the chat template shows this turn otherwise once others follow",
                        "give --turns each: every answer is trained on with the history as it stood",
                    )  # fmt: skip
                spans.append(span)
            if not conversation.finished:  # what was cut has no end of turn to learn
                last = spans[-1]
                spans[-1] = Span(last.start, last.content_end, last.content_end, last.ids)
            everywhere.append(spans)
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for ids, offsets, spans in zip(encoded["input_ids"], encoded["offset_mapping"], everywhere, strict=True):
            yield _document(list(ids), offsets, spans)

    def _span(self, name: str, message: dict[str, Any], turn: _Turn) -> Span:
        """Where an answer lies in `turn.whole`, which ends with it."""
        content, whole, prompt, stand = str(message["content"]), turn.whole, turn.prompt, turn.stand
        at = stand.rfind(STAND_IN)
        tail = stand[at + len(STAND_IN) :]
        starts = ([at] if at >= 0 and whole[:at] == stand[:at] else []) + ([len(prompt)] if whole.startswith(prompt) else [])
        for start in starts if at >= 0 else []:
            end = len(whole) - len(tail)
            if whole.endswith(tail) and end >= start and whole[start:end].strip() == content.strip():
                return Span(start, end, end + self._end_of_turn(tail), message.get("token_ids"))
        raise RecipeError(
            733, f"conversation {name!r:.100}", f"the chat template does not show the answer {content!r:.80} as it is",
            "the template changes or drops what the assistant says; use one that does not",
        )  # fmt: skip

    def _end_of_turn(self, tail: str) -> int:
        """Characters of what closes an answer: up to its first special token, or all there is."""
        found = [(tail.find(token), len(token)) for token in self._added if token in tail]
        return min((at + length for at, length in found), default=len(tail)) if found else len(tail)


def _document(ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> Document:
    mask = [False] * len(ids)
    edits: list[tuple[int, int, list[int]]] = []
    position = 0
    for span in spans:
        while position < len(ids) and offsets[position][1] <= span.start:
            position += 1
        first = position
        while position < len(ids) and offsets[position][0] < span.end:
            mask[position] = True
            position += 1
        if span.ids is not None:
            closes = next((i for i in range(first, position) if offsets[i][0] >= span.content_end), position)
            edits.append((first, closes, list(span.ids)))
    for first, stop, new in reversed(edits):
        ids[first:stop], mask[first:stop] = new, [True] * len(new)
    return Document(ids, mask)


def _each(conversations: Sequence[Conversation]) -> Iterator[Conversation]:
    for conversation in conversations:
        ends = [i + 1 for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        for end in ends:
            last = end == ends[-1]
            yield Conversation(conversation.id, conversation.messages[:end], conversation.finished or not last)
