"""What a policy costs a model: accuracy on long-context tasks, and perplexity and KL to dense on a text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from angelslim_core.context import Progress, silent
from angelslim_core.errors import NumericError, UsageError

from .config import SparseAttentionConfig
from .coupling import attach
from .tasks import make_task
from .tasks.base import Filler, Sample, sample, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# of a window, tokens whose logits are in fp32 at a time
ROWS = 512
DENSE = "dense"


@dataclass(frozen=True)
class Method:
    """A way to attend and its name in tables; without a configuration the model's own."""

    label: str
    config: SparseAttentionConfig | None


@contextmanager
def following(model: PreTrainedModel, method: Method) -> Iterator[dict[str, Any]]:
    """The model attends so within the block; the dictionary then holds `density` over sparse calls and the number of `sparse_layers`."""
    found: dict[str, Any] = {"density": None, "sparse_layers": 0}
    if method.config is None:
        yield found
        return
    with attach(model, method.config) as attached:
        yield found
        densities = [layer["density"] for layer in attached.stats() if layer["sparse"]]
    found["sparse_layers"] = len(densities)
    found["density"] = statistics.fmean(densities) if densities else None


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, methods: Sequence[Method], tasks: Sequence[str], lengths: Sequence[int], *,
    samples: int = 50, filler: Filler | None = None, seed: int = 0, able: float = 0.5, progress: Progress = silent,
) -> list[dict[str, Any]]:  # fmt: skip
    """Share of answers found, greedy, the dense model first.

    Args:
        lengths: tokens of prompt and answer together.
        able: where the dense model's accuracy is below this no policy is tried.

    Returns:
        rows of `method`, `task`, `length`, `samples`, `accuracy`, `stderr`, `density`, `sparse_layers`; of dense ones also
        `able`.

    Raises:
        UsageError: a length that the model has no positions for, or too short for a task.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max(lengths) > positions:
        raise UsageError(598, "--lengths", f"{max(lengths)} tokens are more than the model's {positions} positions")
    cells = [(task, length) for task in tasks for length in lengths]
    prompts = {
        cell: [sample(cell[0], made, tokenizer, cell[1], seed + i, filler or Filler()) for i in range(samples)]
        for cell in cells
        for made in [make_task(cell[0])]
    }
    total, rows = len(cells) * (len(methods) + 1), []
    for cell in cells:
        rows.append(_cell(model, tokenizer, Method(DENSE, None), cell, prompts[cell]))
        rows[-1]["able"] = rows[-1]["accuracy"] >= able
        progress(len(rows), total, f"{DENSE}, {cell[0]} at {cell[1]}")
    solved = [(row["task"], row["length"]) for row in rows if row["able"]]
    total = len(cells) + len(solved) * len(methods)
    for method in methods:
        for cell in solved:
            rows.append(_cell(model, tokenizer, method, cell, prompts[cell]))
            progress(len(rows), total, f"{method.label}, {cell[0]} at {cell[1]}")
    return rows


def _cell(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method, cell: tuple[str, int], prompts: Sequence[Sample]) -> dict[str, Any]:
    with following(model, method) as found:
        scores = [score(written(model, tokenizer, prompt), prompt.answers) for prompt in prompts]
    spread = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
    named = {"method": method.label, "task": cell[0], "length": cell[1], "samples": len(scores)}
    return {**named, "accuracy": statistics.fmean(scores), "stderr": spread, **found}


def written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sample) -> str:
    """What the model writes after a prompt, greedy; decoding attends to everything."""
    ids = torch.tensor([prompt.ids], device=model.device)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=prompt.new_tokens, do_sample=False, num_beams=1, pad_token_id=fill
        )  # type: ignore[operator]
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def language(model: PreTrainedModel, methods: Sequence[Method], ids: Tensor, progress: Progress = silent) -> list[dict[str, Any]]:
    """Perplexity, and KL(dense, method) in nats a token, on windows [W, T], of dense first.

    Returns:
        rows of `method`, `perplexity`, `kl` and `top1_agreement`, means over all tokens, `kl_stderr` over windows, `kls` of
        each window, `density`, `sparse_layers`, `windows`, `length`; of dense ones without those of KL.

    Raises:
        NumericError: logits are not finite.
    """
    everyone = [Method(DENSE, None), *methods]
    sums: dict[str, list[list[float]]] = {method.label: [] for method in everyone}
    kept: dict[str, list[dict[str, Any]]] = {method.label: [] for method in everyone}
    for number, window in enumerate(ids.to(model.device)):
        dense = logits(model, window)
        for method in everyone:
            with following(model, method) as found:
                sums[method.label].append(divergence(dense, dense if method.config is None else logits(model, window), window))
            kept[method.label].append(found)
            if not all(map(math.isfinite, sums[method.label][-1])):
                raise NumericError(599, f"{method.label}, window {number}", "the model's logits are not finite")
        progress(number + 1, len(ids), f"window {number + 1}")
    return [_means(method, sums[method.label], kept[method.label], ids) for method in everyone]


def _means(method: Method, sums: Sequence[Sequence[float]], kept: Sequence[Mapping[str, Any]], ids: Tensor) -> dict[str, Any]:
    scored = ids.shape[1] - 1
    likelihood, kl, same = ([row[i] / scored for row in sums] for i in range(3))
    row = {"method": method.label, "perplexity": math.exp(statistics.fmean(likelihood)), "windows": len(ids), "length": ids.shape[1]}
    if method.config is None:
        return row
    spread = statistics.stdev(kl) / math.sqrt(len(kl)) if len(kl) > 1 else None
    densities = [k["density"] for k in kept if k["density"] is not None]
    row |= {"kl": statistics.fmean(kl), "kl_stderr": spread, "kls": kl, "top1_agreement": statistics.fmean(same)}
    return row | {"density": statistics.fmean(densities) if densities else None, "sparse_layers": kept[0]["sparse_layers"]}


def logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """[T - 1, V] in the model's dtype, of the positions that predict a token of the window [T]."""
    with torch.no_grad():
        return model(input_ids=window[None], use_cache=False).logits[0, :-1]  # type: ignore[no-any-return]


def divergence(dense: Tensor, other: Tensor, window: Tensor) -> list[float]:
    """Sums over a window of [the other's negative log likelihood, KL(dense, other), equal first choices]."""
    sums = torch.zeros(3, dtype=torch.float64, device=dense.device)
    for start in range(0, len(dense), ROWS):
        log_p, log_q = (x[start : start + ROWS].float().log_softmax(-1) for x in (dense, other))
        target = window[1:][start : start + ROWS, None]
        sums[0] -= log_q.gather(-1, target).sum()
        sums[1] += (log_p.exp() * (log_p - log_q)).sum()
        sums[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return sums.tolist()
