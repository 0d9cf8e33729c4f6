"""Perplexity, KL to the base and top-1 agreement, measured on the saved folder.

Windows are consecutive cuts of the tokenized text; the first token of a window is not scored. The forward runs in the
stored dtype, the metrics in fp32, in rows, so that no second copy of the logits is made.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .context import Progress, silent
from .errors import NumericError, RecipeError, UsageError
from .products import products

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .io.checkpoint import Checkpoint
    from .plugins import PluginHost
    from .recipe import Recipe

ROWS = 256


def evaluate(
    out: str | Path,
    base: str | Path | None = None,
    *,
    text: str | Path,
    windows: int = 32,
    length: int = 1024,
    device: str = "auto",
    progress: Progress = silent,
    host: PluginHost | None = None,
) -> dict[str, Any]:
    """Evaluate a folder on a text.

    Returns:
        `perplexity`, `perplexity_stderr`, `tokens`, `windows`, `length`, `backend`, and with `base` also
        `base_perplexity`, `kl` (mean KL(base, out) per token, nats), `kl_stderr` (over windows), `top1_agreement`.

    Raises:
        UsageError: the text is missing or too short.
        NumericError: logits are not finite.
    """
    from .io.hub import resolve
    from .loading import load_model

    loaded = load_model(resolve(out), device, host=host, packed=False)  # the same figures whatever a machine runs packed
    ids = text_windows(loaded.tokenizer, out, text, windows, length)
    reference = load_model(resolve(base), device, host=host, packed=False).model if base is not None else None
    numbers = compare(loaded.model, reference, ids, progress)
    return {**numbers, "windows": ids.shape[0], "length": ids.shape[1], "backend": loaded.backend}


def check_evaluation(recipe: Recipe, source: Checkpoint) -> None:
    """What a recipe's evaluation needs, which comes last, is checked before the work that it would throw away.

    Raises:
        RecipeError: the text cannot be used.
    """
    from .loading import load_tokenizer

    if recipe.eval is None:
        return
    tokenizer = load_tokenizer(source.folder) if source.has_tokenizer else None
    try:
        text_windows(tokenizer, source.folder, recipe.eval.text, recipe.eval.windows, recipe.eval.length)
    except UsageError as error:
        raise RecipeError(400, recipe.where("eval"), f"{error.where} {error.what}", error.hint) from error


def text_windows(tokenizer: PreTrainedTokenizerBase | None, folder: str | Path, text: str | Path, windows: int, length: int) -> Tensor:
    """The windows [W, T] of a text file that `evaluate` scores.

    Raises:
        UsageError: the folder has no tokenizer, or the text is missing or too short.
    """
    if tokenizer is None:
        raise UsageError(30, str(folder), "has no tokenizer, so no text can be evaluated")
    return cut_windows(tokenizer, read_text(Path(text)), windows, length, str(text))


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UsageError: there is none, or it is no text.
    """
    if path.exists() and not path.is_file():  # a device or a pipe may never end
        raise UsageError(402, str(path), "is no text file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(31, str(path), f"cannot be read as text: {why}") from error


def cut_windows(tokenizer: PreTrainedTokenizerBase, text: str, num: int, length: int, where: str) -> Tensor:
    """int64 [W, length]: the text without special tokens, cut from its start; W is at most `num`."""
    import torch

    # a tokenizer is slow on megabytes it will not need; characters per token are above 1 in any real text
    ids = tokenizer(text[: num * length * 16], add_special_tokens=False, verbose=False)["input_ids"]
    count = min(num, len(ids) // length)
    if count == 0:
        raise UsageError(32, where, f"has {len(ids)} tokens, less than one window of {length}", "give a longer text or a smaller --length")
    return torch.tensor(ids[: count * length]).view(count, length)


def compare(model: PreTrainedModel, base: PreTrainedModel | None, ids: Tensor, progress: Progress = silent) -> dict[str, Any]:
    """Metrics over windows [W, T]; see `evaluate`."""
    import torch

    rows: list[list[float]] = []
    with torch.no_grad():
        for index, window in enumerate(ids):
            hidden = _logits(model, window)
            reference = _logits(base, window) if base is not None else None
            rows.append(_window(hidden, reference, window))
            if not all(map(math.isfinite, rows[-1])):
                raise NumericError(6, f"window {index}", "the model's logits are not finite")
            progress(index + 1, len(ids), f"window {index + 1}")
    table = torch.tensor(rows, dtype=torch.float64)
    scored = ids.shape[1] - 1
    means = table.mean(0) / scored
    errors = (table / scored).std(0, unbiased=True) / math.sqrt(len(ids)) if len(ids) > 1 else torch.full((4,), math.nan)
    perplexity = math.exp(float(means[0]))
    spread = float(errors[0])
    numbers: dict[str, Any] = {
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * spread if math.isfinite(spread) else None,
        "tokens": scored * len(ids),
    }
    if base is not None:
        numbers["base_perplexity"] = math.exp(float(means[1]))
        numbers["kl"] = float(means[2])
        numbers["kl_stderr"] = float(errors[2]) if math.isfinite(float(errors[2])) else None
        numbers["top1_agreement"] = float(means[3])
    return numbers


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """[T - 1, V] in the model's dtype, the positions that predict a scored token."""
    with products(model.device.type):
        return model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]  # type: ignore[no-any-return]


def _window(logits: Tensor, reference: Tensor | None, window: Tensor) -> list[float]:
    """Sums over the window: [NLL, base NLL, KL, equal first choices]."""
    sums = [0.0, 0.0, 0.0, 0.0]
    targets = window[1:].to(logits.device)
    for start in range(0, logits.shape[0], ROWS):
        target = targets[start : start + ROWS, None]
        log_q = logits[start : start + ROWS].float().log_softmax(-1)
        sums[0] -= float(log_q.gather(-1, target).sum())
        if reference is None:
            continue
        log_p = reference[start : start + ROWS].float().log_softmax(-1)
        sums[1] -= float(log_p.gather(-1, target).sum())
        sums[3] += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        sums[2] += float(log_p.exp().mul_(log_p.sub_(log_q)).sum())
    return sums
