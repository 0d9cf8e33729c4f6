"""tokenizer.json as GGUF metadata: byte-level BPE, with the name llama.cpp gives to the way text is split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AngelslimError, ModelError, PlanError
from ..io.strict_json import read_json

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}|", r"\p{N}|")
# (steps of the pre-tokenizer, whole words before merges) -> name
SPLITTERS = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIALS = {"bos": "bos_token", "eos": "eos_token", "unk": "unk_token", "pad": "pad_token"}


@dataclass
class Vocabulary:
    """A tokenizer as GGUF stores it.

    Args:
        tokens: token texts by id.
        types: kind of each token.
        merges: "left right", best first.
        splitter: name of the pre-tokenizer.
        specials: "bos", "eos", "unk", "pad" -> id.
        add_bos: text starts with the first of them.
        template: chat template, or None.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    splitter: str
    specials: dict[str, int]
    add_bos: bool
    template: str | None


def read_vocabulary(folder: Path, config: Mapping[str, Any], rows: int) -> Vocabulary:
    """The tokenizer of a model folder (hostile input).

    Args:
        rows: rows of the embedding; ids no token has are filled up.

    Raises:
        ModelError: there is none, or it makes no sense.
        PlanError: it is of a kind that this export does not know.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(235, str(folder), "has no tokenizer.json, which a GGUF file holds", "save the tokenizer in its fast form")
    data = read_json(folder / "tokenizer.json", 1 << 28)
    extra = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    try:
        return _vocabulary(data, extra, config, rows, _template(folder, extra))
    except AngelslimError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelError(236, "tokenizer.json", f"makes no sense: {type(error).__name__}: {error}") from error


def _vocabulary(data: dict[str, Any], extra: dict[str, Any], config: Mapping[str, Any], rows: int, template: str | None) -> Vocabulary:
    model = data["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise PlanError(230, "tokenizer.json", "is no byte-level BPE, which is the kind this export knows")
    normalizer = (data.get("normalizer") or {}).get("type", "NFC")
    splitter = SPLITTERS.get((_steps(data.get("pre_tokenizer")), bool(model.get("ignore_merges"))))
    if splitter is None or normalizer != "NFC":
        raise PlanError(231, "tokenizer.json", "splits text in a way for which this export knows no name in llama.cpp")
    ids = {str(text): int(i) for text, i in model["vocab"].items()}
    added = {str(t["content"]): (int(t["id"]), bool(t.get("special"))) for t in data.get("added_tokens") or ()}
    texts = {i: text for text, i in ids.items()} | {i: text for text, (i, _) in added.items()}
    if texts and not 0 <= min(texts) <= max(texts) < rows:
        raise ModelError(237, "tokenizer.json", f"has ids up to {max(texts)}, the embedding {rows} rows")
    kinds = {i: CONTROL if special else USER_DEFINED for i, special in added.values()}
    merges = [m if isinstance(m, str) else f"{m[0]} {m[1]}" for m in model.get("merges") or ()]
    known = ids | {text: i for text, (i, _) in added.items()}
    specials = {}
    for short, key in SPECIALS.items():
        named = extra.get(key)
        text = named.get("content") if isinstance(named, dict) else named
        fallback = config.get(f"{key}_id")
        fallback = fallback[0] if isinstance(fallback, list) and fallback else fallback
        found = known.get(text, fallback) if isinstance(text, str) else fallback
        if type(found) is int and 0 <= found < rows:
            specials[short] = found
    return Vocabulary(
        [texts.get(i, f"[PAD{i}]") for i in range(rows)],
        [kinds.get(i, NORMAL) if i in texts else UNUSED for i in range(rows)],
        merges, splitter, specials, _adds(data.get("post_processor"), specials.get("bos"), texts), template,
    )  # fmt: skip


def _steps(pre_tokenizer: Any) -> tuple[str, ...]:
    """What a pre-tokenizer does, as keys of `SPLITTERS`."""
    steps: list[str] = []
    for step in (pre_tokenizer.get("pretokenizers") or [pre_tokenizer]) if pre_tokenizer else []:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses}:
                steps += ["gpt2"] if uses else []
            case {"type": "Digits", "individual_digits": True}:
                steps.append("digits")
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                steps.append(regex)
            case _:
                steps.append("other")
    return tuple(steps)


def _adds(processor: Any, bos: int | None, texts: Mapping[int, str]) -> bool:
    """Whether the post-processor puts the first token before the text."""
    for step in (processor.get("processors") or [processor]) if processor else []:
        if step.get("type") == "TemplateProcessing":
            first = step["single"][0].get("SpecialToken", {}).get("id")
            return first is not None and bos is not None and first == texts.get(bos)
    return False


def _template(folder: Path, extra: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file() and file.stat().st_size <= 1 << 20:
        return file.read_text(encoding="utf-8", errors="replace")
    found = extra.get("chat_template")
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None
