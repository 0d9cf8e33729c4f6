"""The cheapest policy of each head whose recall on a text suffices.

Recall is the share of dense attention's weight that a policy keeps, exact, from logarithms of denominators; cost is density,
which is what attention over the kept blocks takes. Selection has a cost of its own, which `bench` measures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from angelslim_core.context import Progress, silent
from angelslim_core.errors import UsageError

from .attention import select, sparse_attention
from .candidates import Candidate, real
from .config import SparseAttentionConfig, shape_of
from .recall import Dense, densities

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = "dense"


@dataclass(frozen=True)
class Measured:
    """What candidates keep.

    Args:
        layers: numbers of the layers.
        density: [layers, candidates, Hq], fp64.
        recall: mean over rows, as density.
    """

    layers: tuple[int, ...]
    density: Tensor
    recall: Tensor


def choose(
    model: PreTrainedModel, windows: Tensor, layers: Sequence[int], chosen: Sequence[Candidate],
    *, target: float, dense_layers: Sequence[int] = (), by: Literal["head", "layer"] = "head", min_len: int = 8192, block: int = 128, executor: str = "auto",
    progress: Progress = silent,
) -> tuple[SparseAttentionConfig, dict[str, Any]]:  # fmt: skip
    """A configuration, and what `summary` says of it.

    Args:
        windows: ids [W, T] of the text to measure on.
        layers: those to choose for.
        target: recall, mean over rows and windows, that every head reaches, or by layer the mean over heads.
        dense_layers: layers that attend to everything, beside those for which there is nothing.

    Raises:
        UsageError: nothing is sparse, or a candidate sets what is of the whole configuration.
    """
    for candidate in chosen:
        if {"min_len", "dense_layers"} & candidate.options.keys():
            raise UsageError(594, candidate.label, "min_len and dense_layers are of the whole configuration", "use --min-len and --dense-layers")
    found = measure(model, windows, layers, chosen, executor=executor, block=block, progress=progress)
    choice, text = cheapest(found, target, by), model.config.get_text_config().to_dict()
    config = configuration(choice, found, chosen, dense_layers, min_len=min_len, block=block, executor=executor, chosen_for=shape_of(text))
    return config, summary(choice, found, chosen)


def measure(
    model: PreTrainedModel, windows: Tensor, layers: Sequence[int], chosen: Sequence[Candidate],
    *, executor: str = "auto", block: int = 128, progress: Progress = silent,
) -> Measured:  # fmt: skip
    """Means over windows [W, T] of ids, which the dense model reads; memory is that of a few layers' queries, keys and values."""
    sums: dict[int, Tensor] = {}
    done = 0
    with torch.no_grad():
        for ids in windows:
            for layer in real(model, ids[None], layers):
                q, k, v, scale = layer.q, layer.k, layer.v, layer.scale
                dense = Dense.of(q, k, v, scale, block)
                found = []
                for candidate in chosen:
                    index = select(q, k, v, candidate.policy, scale=scale, block=block)
                    lse = sparse_attention(q, k, v, index, executor, True, scale=scale, check=False)[1]
                    density = densities(index)
                    found.append(torch.stack([density.repeat_interleave(q.shape[1] // len(density)), dense.recall(lse).double().mean(-1)]).cpu())
                assert layer.layer is not None
                sums[layer.layer] = sums.get(layer.layer, 0) + torch.stack(found, 1)
                progress(done := done + 1, len(windows) * len(layers), f"layer {layer.layer}")
    density, recall = torch.stack([sums[n] / len(windows) for n in layers], 1)
    return Measured(tuple(layers), density, recall)


def cheapest(found: Measured, target: float, by: Literal["head", "layer"] = "head") -> Tensor:
    """Number of the candidate [layers, Hq] of least density among those that reach the target, the first of equals; -1: none does, so dense.

    Args:
        by: each head for itself, or all heads of a layer together, by their means.
    """
    density, recall = found.density, found.recall
    if by == "layer":
        density, recall = (x.mean(-1, keepdim=True).expand_as(x) for x in (density, recall))
    cost = density.masked_fill(recall < target, torch.inf)
    best = cost.min(1)
    return best.indices.masked_fill(best.values >= 1, -1)


def configuration(choice: Tensor, found: Measured, chosen: Sequence[Candidate], dense_layers: Sequence[int], **rest: Any) -> SparseAttentionConfig:
    """The choice as a configuration: the policy of most heads, and exceptions by layer and head.

    Args:
        choice: of `cheapest`.
        dense_layers: layers that were not measured and attend to everything.
        rest: `block`, `min_len`, `executor`, `chosen_for`.

    Raises:
        UsageError: nothing is sparse.
    """
    whole = {layer: int(row[0]) for layer, row in zip(found.layers, choice, strict=True) if bool((row == row[0]).all())}
    dense = sorted({*dense_layers, *(layer for layer, number in whole.items() if number < 0)})
    taken = Counter(choice[choice >= 0].tolist())
    if not taken:
        raise UsageError(593, "choose", "no policy reaches the recall at less than full density, in any head", "lower --recall, or give larger budgets")
    most = taken.most_common(1)[0][0]
    others = sorted({n for n in whole.values() if n not in (-1, most)})
    overrides: list[dict[str, Any]] = [{"layers": [layer for layer, n in whole.items() if n == number], **_policy(number, chosen)} for number in others]
    mixed = (
        (layer, row, number) for layer, row in zip(found.layers, choice, strict=True) if layer not in whole for number in sorted(set(row.tolist()) - {most})
    )
    overrides += [{"layers": [layer], "heads": (row == number).nonzero()[:, 0].tolist(), **_policy(number, chosen)} for layer, row, number in mixed]
    try:
        return SparseAttentionConfig.model_validate({**_policy(most, chosen), "dense_layers": dense, "overrides": overrides, **rest})
    except ValidationError as error:
        raise UsageError(592, "choose", error.errors()[0]["msg"], "these policies do not go together in one layer: use --by layer") from error


def _policy(number: int, chosen: Sequence[Candidate]) -> dict[str, Any]:
    if number < 0:
        return {"policy": DENSE, "options": {}}
    return {"policy": chosen[number].name, "options": dict(chosen[number].options)}


def summary(choice: Tensor, found: Measured, chosen: Sequence[Candidate]) -> dict[str, Any]:
    """`density` and `recall` of the choice, means over measured layers, `recall_worst` of a head; `candidates`, and `layers` head by head."""
    density, recall = (_of_choice(x, choice) for x in (found.density, found.recall))
    rows = [
        {
            "policy": c.label, "density": float(found.density[:, i].mean()), "recall": float(found.recall[:, i].mean()),
            "recall_worst": float(found.recall[:, i].min()), "heads": int((choice == i).sum()),
        }
        for i, c in enumerate(chosen)
    ]  # fmt: skip
    layers = [
        {
            "layer": layer,
            "heads": [
                {"policy": DENSE if n < 0 else chosen[n].label, "density": d, "recall": r}
                for n, d, r in zip(choice[i].tolist(), density[i].tolist(), recall[i].tolist(), strict=True)
            ],
        }
        for i, layer in enumerate(found.layers)
    ]
    return {
        "density": float(density.mean()), "recall": float(recall.mean()), "recall_worst": float(recall.min()), "dense_heads": int((choice < 0).sum()),
        "candidates": rows, "layers": layers,
    }  # fmt: skip


def _of_choice(values: Tensor, choice: Tensor) -> Tensor:
    """Values [layers, candidates, Hq] of the chosen candidates [layers, Hq]; 1 where dense attention was chosen."""
    return values.gather(1, choice.clamp(min=0)[:, None])[:, 0].masked_fill(choice < 0, 1.0)


def recipe_of(config: SparseAttentionConfig) -> dict[str, Any]:
    """A recipe whose one step leaves the configuration in an artifact."""
    fields = config.model_dump(mode="json", exclude_defaults=True, exclude={"policy", "options"})
    return {"version": 1, "steps": [{"use": f"sparseattn.{config.policy}", "with": {**config.options, **fields}}]}
