"""A real target with a real draft: the same text in fp32, the same distribution, and how near a tie it is where texts part in 16 bits.

Shapes: R rows of one prompt, N tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from angelslim_core.context import Progress, silent

from ..drafters.autoregressive import Autoregressive, Tree
from ..drafters.base import Drafter, Warp
from ..engine import Rule
from ..target import Target, recast
from .checks import decoded
from .drafters import Listening
from .statistics import quantiles, uniformity

# logits: between the same sums in another order, and the least that counts as a tie in 16 bits
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
# of texts that are right, how improbable they may be; of those taken for texts of another temperature, how probable
LEAST_P, CAUGHT_P = 1e-4, 1e-6
_TREE = Tree(depth=4, top_k=4, total=16)
_LIKELIEST = 4  # tokens whose rounding is looked at
_ROWS = 4  # of a batch of different prompts
_SAMPLED_TOKENS = 17  # the first token is no draft's business, the others come in pairs
_SAMPLED_ROWS, _AT_ONCE = 256, 1 << 26  # of a batch at most, and its logits
_TEMPERATURE, _OTHER = 1.0, 1.5

Make = Callable[[], Drafter]


@dataclass(frozen=True)
class _Way:
    """A verification: its name, what makes its drafters, and how it samples; where only one token may be drawn, every rule has to be greedy."""

    name: str
    make: Make
    rule: Rule = "auto"
    warp: Warp = field(default_factory=Warp)


def check_pair(
    target: Target, load: Callable[[], Make], prompts: Sequence[Sequence[int]], *, k: int = 5, max_new_tokens: int = 64, texts: int = 64,
    dtype: torch.dtype = torch.bfloat16, tolerance: float | None = None, progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Check a pair; the target is left in fp32, with weights rounded to 16 bits.

    Args:
        load: gives what makes drafters, in the dtype that the target has by then.
        texts: to sample with each rule.
        dtype, tolerance: as for `near_ties`.

    Returns:
        `ok`, and `equality`, `sampled`, `near_ties` as the functions here give them.
    """
    recast(target.model, torch.float32)
    make = load()
    verifications = list(_verifications(make))
    total = len(verifications) + 4
    equality = []
    plain = _texts(target, None, prompts, 1, max_new_tokens)
    progress(1, total, "without the draft")
    greedy = verifications[0]
    for number, (way, rows) in enumerate([(greedy, 1), *((way, _ROWS) for way in verifications)]):
        equality.append(_equality(target, way, prompts, plain, rows, k, max_new_tokens))
        progress(2 + number, total, f"{way.name}, token by token")
    sampled = [check_sampled(target, way.make, prompts, way.rule, k, texts) | {"name": way.name} for way in _sampling(make)]
    progress(total - 1, total, "sampled")
    near = near_ties(target, load, prompts, k=k, max_new_tokens=max_new_tokens, dtype=dtype, tolerance=tolerance)
    progress(total, total, f"near ties in {near['dtype']}")
    return {"ok": all(c["ok"] for c in [*equality, *sampled, near]), "equality": equality, "sampled": sampled, "near_ties": near}


def _verifications(make: Make) -> Iterator[_Way]:
    """Every way to verify whose text has to be the greedy one."""
    one = Warp(_TEMPERATURE, top_k=1)
    yield _Way("greedy", make)
    yield from (_Way(f"{way.name}, top-k 1", way.make, way.rule, one) for way in _sampling(make))
    if isinstance(make(), Autoregressive):
        yield _Way("greedy, tree", partial(_branching, make))


def _sampling(make: Make) -> Iterator[_Way]:
    yield from (_Way(f"{rule} rule", make, rule) for rule in ("ratio", "match"))
    if isinstance(make(), Autoregressive):
        yield _Way("sampled, tree", partial(_branching, make))


def _branching(make: Make) -> Drafter:
    drafter = make()
    assert isinstance(drafter, Autoregressive)
    drafter.tree = _TREE
    return drafter


def _texts(target: Target, make: Make | None, prompts: Sequence[Sequence[int]], rows: int, tokens: int, **options: Any) -> list[list[int]]:
    """Answers, so many in a batch."""
    found = []
    for at in range(0, len(prompts), rows):
        drafter = None if make is None else make()
        found += decoded(target, drafter, prompts[at : at + rows], tokens, stops=target.stop_ids, **options).tokens
    return found


def _equality(
    target: Target, way: _Way, prompts: Sequence[Sequence[int]], plain: Sequence[list[int]], rows: int, k: int, tokens: int
) -> dict[str, Any]:  # fmt: skip
    """A verification in fp32: `name`, `ok`, `rows`, how many are `equal`, and `gaps` of the others."""
    found = _texts(target, way.make, prompts, rows, tokens, k=k, rule=way.rule, warp=way.warp)
    gaps = _gaps(target, prompts, plain, found, TOLERANCE[torch.float32])
    name = f"{way.name}, {'one row' if rows == 1 else f'batches of {rows}'}"
    return {"name": name, "ok": all(g["near_tie"] for g in gaps), "rows": len(prompts), "equal": len(prompts) - len(gaps), "gaps": gaps}


def near_ties(
    target: Target, load: Callable[[], Make], prompts: Sequence[Sequence[int]], *, k: int = 5, max_new_tokens: int = 64, dtype: torch.dtype = torch.bfloat16,
    tolerance: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Greedy text in 16 bits, with the draft, in trees where it grows any, and without; and without in batches as a control: batches alone part as well.

    Where texts part, both prefixes being the same, the target reads them in fp32. Two passes in 16 bits, each of which is off by no more than
    some number in the difference between two tokens, agree on their order unless they are closer than that: then it is a near tie, which
    rounding decides. The number is what transformers' own pass over the plain texts is off by, at worst and among the likeliest tokens.

    Args:
        tolerance: logits that count as a tie whatever that is; None: of `TOLERANCE`.

    Returns:
        `ok`, `dtype`, `tolerance`, `rounding`, `rows`, `tokens`, `parted`, `rate` (of rows), `gaps` [{row, position, gap, near_tie}], `within_tolerance`
        of them, and `control_parted`, `control_rate`, `control_gaps`, and `tree_parted`, `tree_rate`, `tree_gaps`, which trees must pass, too.
    """
    recast(target.model, dtype)
    make = load()
    ways = [(None, 1), (make, 1), (None, _ROWS), *([(partial(_branching, make), 1)] if isinstance(make(), Autoregressive) else [])]
    plain, drafted, control, *trees = (_texts(target, way, prompts, rows, max_new_tokens, k=k) for way, rows in ways)
    said = [_read(target, prompt, text).topk(_LIKELIEST) for prompt, text in zip(prompts, plain, strict=True)]
    recast(target.model, torch.float32)  # the same weights: what 16 bits can hold, 32 can
    least = TOLERANCE[dtype] if tolerance is None else tolerance
    rounding = 0.0
    for prompt, text, (values, ids) in zip(prompts, plain, said, strict=True):
        off = values.float() - _read(target, prompt, text).gather(1, ids)
        rounding = max(rounding, float((off - off[:, :1]).abs().max()))
    gaps, of_control, *of_trees = (_gaps(target, prompts, plain, found, max(least, rounding)) for found in (drafted, control, *trees))
    also = {f"tree_{key}": value for of in of_trees for key, value in (("parted", len(of)), ("rate", len(of) / len(prompts)), ("gaps", of))}
    return {
        "ok": all(g["near_tie"] for g in [*gaps, *(g for of in of_trees for g in of)]), "dtype": str(dtype).removeprefix("torch."), "tolerance": least, "rounding": rounding, "rows": len(prompts),
        "tokens": sum(map(len, plain)), "parted": len(gaps), "rate": len(gaps) / len(prompts), "gaps": gaps,
        "within_tolerance": sum(g["gap"] is not None and g["gap"] < least for g in gaps),
        "control_parted": len(of_control), "control_rate": len(of_control) / len(prompts), "control_gaps": of_control, **also,
    }  # fmt: skip


@torch.no_grad()
def _read(target: Target, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """Logits [n, V] that the target, without a cache, has for each token of a text."""
    logits: Tensor = target.model(input_ids=torch.tensor([[*prompt, *text]], device=target.device)).logits[0, len(prompt) - 1 : -1]
    return logits


def _gaps(target: Target, prompts: Sequence[Sequence[int]], plain: Sequence[list[int]], found: Sequence[list[int]], tolerance: float) -> list[dict[str, Any]]:
    """Of rows that differ, where they part, and how far the less likely of the two tokens is from the likeliest, in logits; None: one ends."""
    gaps = []
    for row, (a, b) in enumerate(zip(plain, found, strict=True)):
        if a == b:
            continue
        at, x, y = next((i, x, y) for i, (x, y) in enumerate(zip_longest(a, b)) if x != y)
        gap = None  # one text ends where the other goes on: no tie explains that
        if x is not None and y is not None:
            logits = _read(target, prompts[row], [*a[:at], x])[-1]
            gap = float(logits.amax() - torch.minimum(logits[x], logits[y]))
        gaps.append({"row": row, "position": at, "gap": gap, "near_tie": gap is not None and gap < tolerance})
    return gaps


def check_sampled(target: Target, make: Make, prompts: Sequence[Sequence[int]], rule: Rule, k: int, texts: int, seed: int = 1) -> dict[str, Any]:
    """Texts drawn in fp32 at temperature 1, against the distribution that the target states for each token when it reads them.

    Where drawn tokens stand in that distribution is uniform, whatever the vocabulary and the prompts are, and independent from token to
    token. Taken for texts of a higher temperature, the same ones have to be found improbable: there are enough of them to tell.

    Returns:
        `ok`, `texts`, `tokens` that were tested, `p`, and `p_if_warmer`.
    """
    each = -(-texts // len(prompts))
    places: dict[float, list[Tensor]] = {_TEMPERATURE: [], _OTHER: []}
    for number, prompt in enumerate(prompts):
        batch = min(_SAMPLED_ROWS, max(1, _AT_ONCE // ((len(prompt) + _SAMPLED_TOKENS) * target.shape.vocab_size)))
        for first in range(0, each, batch):
            rows = min(batch, each - first)
            start = seed + number * each + first
            listening = Listening(make())
            drawn = torch.tensor(
                decoded(target, listening, [prompt] * rows, _SAMPLED_TOKENS, start, tell=listening.hear, k=k, rule=rule, warp=Warp(_TEMPERATURE)).tokens
            ).to(target.device)  # fmt: skip
            with torch.no_grad():
                ids = torch.cat([torch.tensor([list(prompt)], device=target.device).expand(rows, -1), drawn], 1)
                logits = target.model(input_ids=ids).logits[:, len(prompt) : -1]
            q = listening.proposed(_SAMPLED_TOKENS, logits.shape[-1])[:, 1:]
            chances = torch.rand(rows, _SAMPLED_TOKENS - 1, generator=torch.Generator().manual_seed(start), dtype=torch.float64).to(target.device)
            for temperature, found in places.items():
                found.append(quantiles(Warp(temperature)(logits), q, drawn[:, 1:], chances).cpu())
    p, warmer = (min(1.0, len(found[0]) * min(map(uniformity, torch.cat(found, 1)))) for found in places.values())
    count = each * len(prompts)
    return {"ok": p >= LEAST_P and warmer < CAUGHT_P, "texts": count, "tokens": count * (_SAMPLED_TOKENS - 1), "p": p, "p_if_warmer": warmer}
