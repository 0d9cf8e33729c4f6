"""A real target with a real draft: greedy text with the draft beside text without it, and how near a tie it was where they part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from angelslim_core.context import Progress, silent

from ..drafters.base import Drafter
from ..target import Target
from .checks import decoded

# logits; in 16 bits a pass over several tokens differs from one over a single token by about 1e-2
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
_CONTROL_BATCH = 4


def check_pair(
    target: Target, make: Callable[[], Drafter], prompts: Sequence[Sequence[int]], *, k: int = 5, max_new_tokens: int = 64, progress: Progress = silent
) -> dict[str, Any]:  # fmt: skip
    """Decode prompts with the draft and without, and without in batches as a control.

    Where texts part, both prefixes being the same, the target reads them once more in fp32: that the two tokens are its first and its second
    choice, and closer than the tolerance, is a near tie, which rounding decides; anything else is a failure.

    Returns:
        `ok`, `detail`, and `rows`, `parted`, `control_parted`, `gaps` [{row, position, gap, near_tie}].
    """
    options: dict[str, Any] = {"stops": target.stop_ids}
    plain, drafted = [], []
    for number, prompt in enumerate(prompts, 1):
        plain += decoded(target, None, [prompt], max_new_tokens, **options).tokens
        drafted += decoded(target, make(), [prompt], max_new_tokens, k=k, **options).tokens
        progress(number, len(prompts), "with the draft and without")
    control = [
        row
        for at in range(0, len(prompts), _CONTROL_BATCH)
        for row in decoded(target, None, prompts[at : at + _CONTROL_BATCH], max_new_tokens, **options).tokens
    ]
    gaps = _gaps(target, prompts, plain, drafted)
    parted = sum(a != b for a, b in zip(plain, control, strict=True))
    widest = max((g["gap"] for g in gaps), default=0.0)
    detail = f"{len(prompts)} rows, {len(gaps)} part from plain decoding, the widest gap {widest:.4f} logits; of batches {parted} do"
    return {"ok": all(g["near_tie"] for g in gaps), "detail": detail, "rows": len(prompts), "parted": len(gaps), "control_parted": parted, "gaps": gaps}


def _gaps(target: Target, prompts: Sequence[Sequence[int]], plain: Sequence[list[int]], drafted: Sequence[list[int]]) -> list[dict[str, Any]]:
    differ = [row for row, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b]
    if not differ:
        return []
    exact = target.model if target.dtype == torch.float32 else copy.deepcopy(target.model).float()
    found = []
    for row in differ:
        a, b = plain[row], drafted[row]
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:  # one text ends where the other goes on: no tie explains that
            found.append({"row": row, "position": min(len(a), len(b)), "gap": float("inf"), "near_tie": False})
            continue
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([[*prompts[row], *a[:at]]], device=target.device)).logits[0, -1].float()
        gap = float(logits.amax() - torch.minimum(logits[a[at]], logits[b[at]]))
        found.append({"row": row, "position": at, "gap": gap, "near_tie": gap < TOLERANCE[target.dtype]})
    return found
