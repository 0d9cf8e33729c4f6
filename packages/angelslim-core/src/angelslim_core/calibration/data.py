"""Calibration samples as token ids, from JSONL, plain text, or the model itself; seeded, in a fixed order."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from .render import render_chats, template_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Calibration

MAX_LINE = 10_000_000
FIELDS = ("messages", "conversations", "input", "prompt", "turns", "text")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Samples:
    """Token ids of every sample, what was noticed, and a hash over the ids."""

    ids: list[list[int]]
    warnings: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()


@dataclass(frozen=True)
class Batch:
    """input_ids [B, T] int64, padded on the right; mask [B, T] bool, False on padding."""

    input_ids: Tensor
    mask: Tensor


def load_samples(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, seed: int, generate: Callable[[int, int, int], list[list[int]]] | None = None
) -> Samples:  # fmt: skip
    """At most `samples` samples of at most `tokens` tokens.

    Args:
        generate: generate(samples, tokens, seed) -> ids, the model's own samples, for data `self`.

    Raises:
        RecipeError: no such file, a malformed row (with its line), or nothing usable in it.
    """
    wanted, tokens = calibration.samples, calibration.tokens
    warnings: list[str] = []
    if calibration.data == "self":
        if generate is None:
            raise RecipeError(70, "calibration.data", "`self` needs the model, which is not at hand here")
        return Samples(generate(wanted, tokens, seed))
    path = Path(calibration.data)
    text = _read(path)
    if path.suffix in (".jsonl", ".json"):
        rows = list(_rows(text, path, calibration.field))
        random.Random(seed).shuffle(rows)
        texts = _texts(rows[: wanted * 2], calibration.template, tokenizer, warnings)
        special = calibration.template != "chat" or template_of(tokenizer) is None
        ids = [tokenizer(t, add_special_tokens=special, verbose=False)["input_ids"][:tokens] for t in texts]
        ids = [sample for sample in ids if len(sample) > 1][:wanted]
    else:
        # more characters than this are not needed, and a tokenizer is slow on megabytes
        whole = tokenizer(text[: wanted * tokens * 16], add_special_tokens=False, verbose=False)["input_ids"]
        ids = [whole[i : i + tokens] for i in range(0, len(whole) - tokens + 1, tokens)][:wanted]
    if not ids:
        raise RecipeError(71, path.name, "holds no usable sample", f"it needs at least one of {tokens} tokens" if path.suffix not in (".jsonl", ".json") else "")
    if len(ids) < wanted:
        warnings.append(f"calibration: {len(ids)} samples where {wanted} were asked for ({path.name} holds no more)")
    return Samples(ids, warnings)


def self_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num: int, tokens: int, seed: int, batch_size: int = 16) -> list[list[int]]:
    """Samples the model writes itself at temperature 1, each exactly `tokens` long.

    They start from the bos token, or from a random token where there is none.
    """
    import torch

    ids: list[list[int]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        while len(ids) < num:
            count = min(batch_size, num - len(ids))
            bos = tokenizer.bos_token_id
            start = torch.full((count, 1), bos) if bos is not None else torch.randint(len(tokenizer), (count, 1))
            written = model.generate(
                start.to(model.device), attention_mask=torch.ones_like(start).to(model.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=tokens - 1, max_new_tokens=tokens - 1, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )  # fmt: skip
            ids += [row[:tokens] for row in written.tolist()]
    return ids


def batches(ids: Sequence[Sequence[int]], batch_size: int, pad_id: int) -> list[Batch]:
    """Samples in order, `batch_size` at a time, padded on the right to the longest of the batch."""
    import torch

    found = []
    for start in range(0, len(ids), batch_size):
        rows = ids[start : start + batch_size]
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        found.append(Batch(input_ids, mask))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise RecipeError(72, str(path), f"calibration data cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(73, path.name, "is not UTF-8") from error


def _rows(text: str, path: Path, wanted: str | None) -> Iterator[Chat | str]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path.name}:{number}"
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            raise RecipeError(74, where, f"is longer than {MAX_LINE} characters")
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise RecipeError(75, where, f"is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise RecipeError(76, where, "is no JSON object")
        yield _sample(row, where, wanted)


def _sample(row: Mapping[str, Any], where: str, wanted: str | None) -> Chat | str:
    key = wanted or next((f for f in FIELDS if f in row), None)
    value = row.get(key) if key else None
    try:
        if key == "text" or (wanted and isinstance(value, str) and key not in FIELDS):
            return str(value)
        if key in ("messages", "conversations") and value:
            return [_turn(turn) for turn in value]
        if key == "turns" and value:
            return [{"role": "user" if i % 2 == 0 else "assistant", "content": str(turn)} for i, turn in enumerate(value)]
        if key in ("input", "prompt") and isinstance(value, str):
            answer = row.get("output", row.get("response"))
            return [{"role": "user", "content": value}, *([{"role": "assistant", "content": str(answer)}] if answer is not None else [])]
    except (KeyError, TypeError, AttributeError):
        pass  # falls through to the error that names the keys
    keys = ", ".join(map(str, row))
    raise RecipeError(77, where, f"holds no {wanted or 'messages, conversations, input/output, prompt, turns or text'}", f"it has: {keys[:200]}")


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    return {"role": _ROLES[str(role)], "content": content if isinstance(content, str) else "".join(str(p.get("text", "")) for p in content or ())}


def _texts(rows: Sequence[Chat | str], template: str, tokenizer: PreTrainedTokenizerBase, warnings: list[str]) -> list[str]:
    source = template_of(tokenizer) if template == "chat" else None
    chats = [row for row in rows if not isinstance(row, str)]
    if template == "chat" and source is None and chats:
        warnings.append("calibration: the tokenizer has no chat template, so conversations are joined as plain text")
    if source is None:
        return [row if isinstance(row, str) else "\n".join(turn["content"] for turn in row) for row in rows]
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    rendered = iter(render_chats(source, chats, special) if chats else [])
    return [row if isinstance(row, str) else next(rendered) for row in rows]
