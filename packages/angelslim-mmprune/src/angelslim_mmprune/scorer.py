"""The learned scorer of VisionSelector and IDPruner, what it is stored as, and the soft choice that it is trained through.

Shapes: P pools, N tokens, D width, H hidden.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from angelslim_core.errors import ModelError
from angelslim_core.io.checkpoint import FLOATS, Checkpoint
from angelslim_core.io.writer import write_json, write_tensors
from angelslim_core.workdir import Workdir

INIT_SCALE = 1e-4
ARCHITECTURE = "ImportanceScorer"
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.|visual\.importance_scorer\.)+")
_MOST = 1 << 20


class Scorer(nn.Module):
    """s_i = mean over j of q_i . k_j / sqrt(H), with q = x Wq + bq and k = x Wk + bk.

    Args:
        in_features: D.
        hidden_dim: H.
        init_scale: deviation of the weights that training begins with.

    Source: arXiv:2510.16598 §3.2; arXiv:2602.13315 §3.
    """

    def __init__(self, in_features: int, hidden_dim: int, init_scale: float = INIT_SCALE) -> None:
        super().__init__()
        self.in_features, self.hidden_dim, self.init_scale = in_features, hidden_dim, init_scale
        self.q_proj, self.k_proj = nn.Linear(in_features, hidden_dim), nn.Linear(in_features, hidden_dim)
        for part in (self.q_proj, self.k_proj):
            nn.init.normal_(part.weight, std=init_scale)
            nn.init.zeros_(part.bias)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """fp32 [P, N] of features [P, N, D]; 0 where `valid` [P, N] is not, and nothing there is read.

        As the mean goes over keys alone, so s_i = (x_i . Wq kbar + bq . kbar) / sqrt(H) with kbar = xbar Wk + bk: N D + D H multiplications,
        not N D H for every query, or N**2 H for every pair.
        """
        x = torch.where(valid[..., None], features.float(), 0)
        mean = x.sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        key = torch.nn.functional.linear(mean, self.k_proj.weight.float(), self.k_proj.bias.float())
        direction, shift = key @ self.q_proj.weight.float(), key @ self.q_proj.bias.float()
        scores = ((x @ direction[..., None])[..., 0] + shift[:, None]) / self.hidden_dim**0.5
        return torch.where(valid, scores, 0)


def load_scorer(folder: str | Path) -> Scorer:
    """A scorer from `config.json` and safetensors, on the CPU; neither code nor pickles beside them are looked at.

    Names may carry the prefixes that training in a model leaves, and a `norm` that nothing uses.

    Raises:
        ModelError: config and tensors do not fit each other, or hold something else, or NaN.
    """
    checkpoint = Checkpoint.open(folder)
    width, hidden = (_size(checkpoint.config, name) for name in ("in_features", "hidden_dim"))
    scale = checkpoint.config.get("init_scale", INIT_SCALE)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < 1e3:
        raise ModelError(830, "config.json", f"init_scale is {scale!r:.50}, which is no deviation")
    stored: dict[str, str] = {}
    for name in checkpoint.tensors:
        bare = _PREFIX.sub("", name)
        if bare in stored:
            raise ModelError(831, name[:200], f"is the same as {stored[bare][:200]} but for its prefix")
        if not bare.startswith("norm."):
            stored[bare] = name
    wanted = {f"{part}.{kind}": (hidden, width) if kind == "weight" else (hidden,) for part in ("q_proj", "k_proj") for kind in ("weight", "bias")}
    for bare in sorted(wanted.keys() ^ stored.keys()):
        raise ModelError(832, str(folder), f"has no {bare}" if bare in wanted else f"has {stored[bare]!r:.200}, which no scorer has")
    for bare, shape in wanted.items():
        info = checkpoint.tensors[stored[bare]]
        if info.shape != shape or info.dtype not in FLOATS:
            raise ModelError(833, stored[bare], f"is {info.dtype} {list(info.shape)}, and config.json asks for numbers {list(shape)}")
    state = {bare: checkpoint.read(stored[bare]) for bare in wanted}
    for bare, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(834, stored[bare], "holds NaN or Inf")
    with torch.device("meta"):  # nothing is drawn that would be overwritten
        scorer = Scorer(width, hidden, float(scale))
    scorer.load_state_dict(state, assign=True)
    return scorer.requires_grad_(False)


def save_scorer(scorer: Scorer, folder: str | Path, *, replace: bool = False) -> None:
    """Write a folder that `load_scorer` reads; it appears whole, by one rename.

    Args:
        replace: an existing folder may be replaced.

    Raises:
        OutputError: the folder exists.
    """
    with Workdir(Path(folder), None, replace) as work:
        write_tensors(work.stage / "model.safetensors", scorer.state_dict())
        config = {"in_features": scorer.in_features, "hidden_dim": scorer.hidden_dim, "init_scale": scorer.init_scale, "architecture": ARCHITECTURE}
        write_json(work.stage / "config.json", config)
        work.publish()


def soft_topk(scores: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """sigmoid(s + t), with t so that a row's sum is k; 0 where `valid` is not.

    Args:
        scores: [P, N], fp32 or fp64; the gradient flows through t as well.
        k: [P]; it is kept within 1e-4 and the row's number of tokens less 1e-4.
        valid: [P, N], bool.

    Source: arXiv:2510.16598 §3.3.
    """
    found: Tensor = _SoftTopK.apply(scores, k, valid)
    return found


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        count = valid.sum(1).to(scores.dtype)
        k = torch.minimum(k.to(scores.dtype).clamp(min=1e-4), count - 1e-4)
        low = -torch.where(valid, scores, -torch.inf).amax(1) - 10
        high = -torch.where(valid, scores, torch.inf).amin(1) + 10
        for _ in range(64):
            middle = (low + high) / 2
            enough = torch.where(valid, (scores + middle[:, None]).sigmoid(), 0).sum(1) >= k
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        soft = torch.where(valid, (scores + ((low + high) / 2)[:, None]).sigmoid(), 0)
        ctx.save_for_backward(soft)
        return soft

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (soft,) = ctx.saved_tensors
        slope = soft * (1 - soft)
        flow = gradients[0] * slope
        # the sum stays k, so that t moves against the mean of what the scores do; a row that is saturated has no slope
        share = flow.sum(1, keepdim=True) / slope.sum(1, keepdim=True).clamp(min=torch.finfo(soft.dtype).tiny)
        return flow - slope * share, None, None


def _size(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value <= _MOST:
        raise ModelError(835, "config.json", f"{name} is {value!r:.50}, which is no width", "give a folder that holds a scorer")
    return value
