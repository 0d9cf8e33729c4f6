"""Exporting a draft: laid out for an engine, read back as that engine reads it, and published only if it is still the draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from angelslim_core.errors import ModelError, PlanError, UsageError
from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.io.hub import resolve
from angelslim_core.io.writer import write_json
from angelslim_core.workdir import Workdir

from .exporters import LAYOUTS, Given, Layout, Served
from .exporters.traps import TRAPS, problems
from .folder import Stored, check_target, open_draft, write_tensors

K = 4


def export_draft(
    draft: str | Path, to: str, out: str | Path, *, model: str | None = None, dtype: str | None = None, k: int | None = None, replace: bool = False,
    check: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a draft's folder in an engine's layout.

    Args:
        draft: folder of the draft.
        to: key of `LAYOUTS`.
        model: folder or hub id of the target, from which come its name, its positions, whether it is FP8 and rows of its head.
        dtype: BF16, F16 or F32; None: as stored, and F16 for SGLang beside an FP8 target.
        k: tokens to propose at a time; None: 4, or what a block holds.
        check: write nothing, compare `out` with the draft.

    Returns:
        The document of `specdec export --json`.

    Raises:
        UsageError: a block has fewer tokens than `k`.
        PlanError: the layout cannot hold the draft.
        ModelError: a folder is no good, the draft is of another target, or the export would not be the draft; names the traps.
    """
    stored, served = open_draft(draft), Served(model, resolve(model)) if model is not None else None
    layout, most = LAYOUTS[to], _most(stored)
    if k is not None and most is not None and k > most:
        raise UsageError(791, "--k", f"is {k}, and a block of this draft holds {most} tokens to propose")
    given = Given(stored, dtype or _dtype(stored, layout, served), k or most or K, served)
    if served is not None:
        check_target(stored.config, stored.where, served.hidden_size, served.vocab_size, served.num_layers)
    refusal = layout.refusal(given)
    if refusal:
        raise PlanError(745, f"{stored.kind.name} to {to}", f"the {to} layout cannot hold this draft: {refusal}")
    folder = Path(out)
    if check:
        _refuse(folder, layout, given)
    else:
        with Workdir(folder, Path(draft), replace) as work:
            write_json(work.stage / "config.json", layout.config(given))
            write_tensors(work.stage, _tensors(layout, given))
            _refuse(work.stage, layout, given)
            work.publish()
    warnings = [] if served else ["without the target's folder its positions and precision are not compared with the draft's"]
    if not served and to == "speculators":
        warnings.append("verifier.name_or_path is empty: `vllm serve` of the folder alone cannot find the target, --speculative-config can")
    if given.left_out:
        warnings.append(f"the rows of fc for {given.left_out} are left out: {to} knows no SpecExit, drafts the same tokens and ends no thought early")
    return {
        "path": str(folder), "draft": stored.kind.name, "to": to, "dtype": given.dtype, "tensors": len(stored.specs) + given.needs_head,
        "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")), "layer_ids": list(stored.config.aux_hidden_state_layer_ids),
        "checks": list(TRAPS), "serve": layout.serve(given, str(folder)), "warnings": warnings,
    }  # fmt: skip


def _refuse(folder: Path, layout: Layout, given: Given) -> None:
    found = problems(folder, layout, given)
    if found:
        raise ModelError(753, ", ".join(dict.fromkeys(p.trap for p in found)), "; ".join(p.what for p in found), "the engine would load it and accept nothing")


def _tensors(layout: Layout, given: Given) -> dict[str, Tensor]:
    kept = {layout.stored_name(given, name): given.tensor(name) for name in given.draft.specs}
    vocabulary = given.draft.vocabulary()
    if vocabulary is not None and given.needs_head:
        assert given.served
        kept["lm_head.weight"] = given.served.head(vocabulary.ids)
    return {name: t.to(torch_dtype(given.dtype)) if t.is_floating_point() else t for name, t in kept.items()}


def _dtype(stored: Stored, layout: Layout, served: Served | None) -> str:
    if layout.name == "sglang" and served is not None and served.fp8:
        return "F16"
    widest = [dtype for dtype in ("F32", "BF16", "F16") if any(spec.dtype == dtype for spec in stored.specs.values())]
    return widest[0] if widest else "F32"


def _most(stored: Stored) -> int | None:
    """Tokens that a block proposes; None: it is no block, and goes on as long as it is asked to."""
    block = getattr(stored.config, "block_size", None)
    return None if block is None else block - (not getattr(stored.config, "sample_from_anchor", False))
