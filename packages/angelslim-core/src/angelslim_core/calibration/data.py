"""Calibration samples as token ids, from JSONL, plain text, or the model itself; seeded, in a fixed order."""

from __future__ import annotations

import hashlib
import os
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import ModelError, RecipeError
from .render import render_chats, special_tokens_of, template_of
from .rows import Chat, RowFile, plain

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SELF_BATCH = 16
# of text read first; a tokenizer is slow on megabytes it will not need, and takes many times their size
_CHARS_PER_TOKEN = 6


class CalibrationOptions(Protocol):
    """What is read of a recipe's `calibration` section."""

    @property
    def data(self) -> str: ...
    @property
    def field(self) -> str | None: ...
    @property
    def template(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class Samples:
    """Token ids of each sample, and one line for each thing the user should know."""

    ids: list[list[int]]
    warnings: list[str] = field(default_factory=list)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for sample in self.ids:
            digest.update(array("q", [len(sample), *sample]).tobytes())
        object.__setattr__(self, "fingerprint", digest.hexdigest())


@dataclass(frozen=True)
class Batch:
    """input_ids [B, T] int64, padded on the right; mask [B, T] bool, False on padding."""

    input_ids: Tensor
    mask: Tensor


def load_samples(
    calibration: CalibrationOptions,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    generate: Callable[[int, int, int], list[list[int]]] | None = None,
) -> Samples:
    """At most `samples` samples of at most `tokens` tokens.

    Rows of a JSONL file are shuffled; any other file is text, cut into consecutive windows of `tokens` without special
    tokens (a text shorter than one window is one sample). A rendered chat is tokenized as it stands, other rows with
    the special tokens the tokenizer adds.

    Args:
        seed: of the shuffle, and of `generate`.
        generate: generate(samples, tokens, seed) -> ids, for data `self`.

    Raises:
        RecipeError: no such file, a malformed row (with its line), or nothing usable in it.
        ModelError: the chat template fails or costs too much.
    """
    warnings: list[str] = []
    if calibration.data == "self":
        if generate is None:
            raise RecipeError(70, "calibration.data", "self needs the model, which cannot write text here", "name a file")
        ids = generate(calibration.samples, calibration.tokens, seed)
    else:
        path = Path(calibration.data)
        if not os.path.isfile(path):  # a device or a pipe may never end
            raise RecipeError(
                72, str(path), "calibration data is no file" if os.path.exists(path) else "calibration data does not exist", "set calibration.data"
            )
        try:
            is_rows = path.suffix.lower() in (".jsonl", ".json")
            ids = _from_rows(path, calibration, tokenizer, seed, warnings) if is_rows else _from_text(path, calibration, tokenizer)
        except OSError as error:
            raise RecipeError(78, str(path), f"calibration data cannot be read: {error.strerror}", "set calibration.data") from error
    if not ids:
        raise RecipeError(71, str(calibration.data), "holds no usable sample", "give rows or text that are not empty")
    if len(ids) < calibration.samples:
        warnings.append(f"calibration: {len(ids)} samples, {calibration.samples} were asked for; {calibration.data} holds no more")
    return Samples(ids, warnings)


def self_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num: int, tokens: int, seed: int, temperature: float = 1.0) -> list[list[int]]:
    """Samples the model writes itself, each exactly `tokens` long; no global random state changes.

    They start from the bos token, or from a random token where there is none.

    Raises:
        ModelError: the model stops early.
    """
    import torch

    ids: list[list[int]] = []
    first = _first_tokens(tokenizer, num, seed)
    at = model.device
    devices = [torch.cuda.current_device() if at.index is None else at.index] if at.type == "cuda" else []
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    with torch.random.fork_rng(devices), torch.no_grad():
        # the plain seed call would reach devices that are not forked, and those of other processes
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        for start in range(0, num, _SELF_BATCH):
            written = torch.tensor(first[start : start + _SELF_BATCH]).unsqueeze(1).to(model.device)
            if tokens > 1:
                written = model.generate(  # type: ignore[operator]
                    input_ids=written,
                    attention_mask=torch.ones_like(written),
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    top_p=1.0,
                    num_beams=1,
                    num_return_sequences=1,
                    min_new_tokens=tokens - 1,
                    max_new_tokens=tokens - 1,
                    pad_token_id=padding,
                )
            if written.shape[1] != tokens:
                raise ModelError(64, "calibration", f"the model wrote samples of {written.shape[1]} tokens, not {tokens}", "give calibration.data a file")
            ids += written.tolist()
    return ids


def batches(ids: Sequence[Sequence[int]], batch_size: int, pad_id: int) -> list[Batch]:
    """Samples in order, `batch_size` at a time, padded on the right to the longest of their batch."""
    import torch

    found = []
    for start in range(0, len(ids), batch_size):
        rows = ids[start : start + batch_size]
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = True
        found.append(Batch(input_ids, mask))
    return found


def _from_rows(path: Path, calibration: CalibrationOptions, tokenizer: PreTrainedTokenizerBase, seed: int, warnings: list[str]) -> list[list[int]]:
    rows = RowFile(path, None if calibration.field == "auto" else calibration.field)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    chosen: list[Chat | str] = []
    for sample in rows.read(order):
        if len(chosen) == calibration.samples:
            break
        if plain(sample).strip():
            chosen.append(sample)
    chats = [sample for sample in chosen if not isinstance(sample, str)]
    template = template_of(tokenizer) if calibration.template == "chat" else None
    if chats and template is None and calibration.template == "chat":
        warnings.append("calibration: the tokenizer has no chat template, so conversations are joined as plain text")
    rendered = iter(render_chats(template, chats, special_tokens_of(tokenizer)) if template and chats else ())
    ids = []
    for sample in chosen:
        is_chat = template is not None and not isinstance(sample, str)
        text = next(rendered) if is_chat else plain(sample)
        ids.append(_encode(tokenizer, text, special=not is_chat)[: calibration.tokens])
    return [sample for sample in ids if sample]


def _from_text(path: Path, calibration: CalibrationOptions, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    needed, tokens = calibration.samples * calibration.tokens, calibration.tokens
    text, ids = "", list[int]()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while len(ids) <= needed and (more := file.read(max(needed * _CHARS_PER_TOKEN, len(text)))):
                text += more
                ids = _encode(tokenizer, text, special=False)
    except UnicodeError as error:
        raise RecipeError(85, str(path), "is not UTF-8", "give UTF-8 text, or rows in a .jsonl file") from error
    windows = [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
    return (windows or [ids] * bool(ids))[: calibration.samples]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    # not verbose: a text longer than the model's context is cut later
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _first_tokens(tokenizer: PreTrainedTokenizerBase, num: int, seed: int) -> list[int]:
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id] * num
    special = set(tokenizer.all_special_ids)
    return random.Random(seed).choices([i for i in range(len(tokenizer)) if i not in special], k=num)
