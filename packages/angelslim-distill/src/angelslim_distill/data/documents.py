"""Documents of a file: conversations with a mask of what the assistant wrote, or text, all of which counts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from angelslim_core.calibration.chats import read_conversations
from angelslim_core.calibration.render import template_of
from angelslim_core.calibration.rows import Chat, interpret, plain, read_objects
from angelslim_core.calibration.spans import Document, Renderer, Turns
from angelslim_core.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Count = Literal["answers", "all"]
_AT_ONCE = 1024


def read_documents(
    path: Path, tokenizer: PreTrainedTokenizerBase, where: str, *, length: int, count: Count = "answers", turns: Turns = "joined"
) -> list[Document]:
    """Documents of a JSONL file of conversations or text, or of a text file, which is cut into windows of `length` tokens.

    Args:
        where: what the tokenizer is of, for messages.
        count: of conversations count the assistant's tokens, ends of turns included, or all.
        turns: "each": a document for each answer, with the history as the template shows it then.

    Raises:
        RecipeError: no such file, a malformed row, or no answer where these alone count.
    """
    check_form(path, count)
    is_rows = _is_rows(path)
    if count == "answers":
        return list(Renderer(tokenizer, where).documents(read_conversations(path), turns))
    if is_rows:
        return [Document(ids, [True] * len(ids)) for ids in _rows(path, tokenizer, where)]
    if not path.is_file():  # a device or a pipe may never end
        raise RecipeError(911, str(path), "is no file" if path.exists() else "does not exist", "set data")
    try:
        ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(912, str(path), f"cannot be read as text: {error}", "save the file as UTF-8") from error
    windows = [list(ids[start : start + length]) for start in range(0, len(ids), length)]
    return [Document(window, [True] * len(window)) for window in windows]


def check_form(path: Path, count: Count) -> None:
    """Refuse, by its name, a file in which nothing can count.

    Raises:
        RecipeError: it is text, and answers alone count.
    """
    if count == "answers" and path.is_file() and not _is_rows(path):
        raise RecipeError(910, str(path), "is text, in which nothing is an answer", "set count: all, or give a JSONL file of conversations")


def _is_rows(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".json")


def _rows(path: Path, tokenizer: PreTrainedTokenizerBase, where: str) -> Iterator[list[int]]:
    """Tokens of each row: conversations as the template shows them, where there is one, and text with the special tokens that the tokenizer adds."""
    renderer = Renderer(tokenizer, where) if template_of(tokenizer) else None
    samples = _samples(path)
    while part := list(islice(samples, _AT_ONCE)):
        chats = [sample for sample in part if renderer is not None and not isinstance(sample, str)]
        texts = [plain(sample) for sample in part if renderer is None or isinstance(sample, str)]
        shown = iter(renderer.encode_all(renderer.render(chats)) if renderer is not None else [])
        said = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        for sample in part:
            yield list(next(said if renderer is None or isinstance(sample, str) else shown))


def _samples(path: Path) -> Iterator[Chat | str]:
    for number, row in read_objects(path):
        found = interpret(row)
        if found is None:
            raise RecipeError(913, f"{path}:{number}", f"holds neither a conversation nor text; its keys: {', '.join(map(repr, row))[:200] or 'none'}")
        yield found
