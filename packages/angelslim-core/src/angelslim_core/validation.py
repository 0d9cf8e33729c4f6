"""Checking an output folder: nothing is taken from the run that made it but its records, which are checked too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .context import Progress, silent
from .engines import Folder, verdicts
from .errors import AngelslimError, ModelError
from .io.hub import resolve
from .plugins import PluginHost
from .records import RECORDS, read_records
from .source import Source, describe_source, open_any
from .stored_checks import StoredChecks
from .workdir import sha256

if TYPE_CHECKING:
    from .adapters.base import Site

# suffixes of the tensors that hold scales
SCALES = frozenset(
    {"weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale", "scales", "k_scale", "v_scale"}
)

# what the ledger says of tensors that are in the folder under their own names
_KEPT = frozenset({"copied", "transformed", "trained", "added"})


def validate(
    out: str | Path, base: str | Path | None = None, *, run: bool = False, progress: Progress = silent, host: PluginHost | None = None
) -> dict[str, Any]:
    """Check a folder.

    Args:
        base: its source; adds SQNR and cosine per linear, and missing or extra tensors.
        run: also load it and generate; with `base` also KL on a sample of the base.
        host: holds third parties' plugins that know the folder.

    Returns:
        `ok`, `problems`, `engines` {name: {ok, why}}; of a quantized folder `unquantized` [{name, role, ignored}] and
        `readers` {linears, second, differ}: how many linears were read twice, whether the second reader knows the
        layout, and where the two differ; as asked `linears` [{name, sqnr_db, cosine}], `sample`, `kl`.
    """
    folder = Path(out)
    problems: list[str] = []
    found: dict[str, Any] = {"ok": False, "problems": problems}
    host = host or PluginHost()
    try:
        source = open_any(folder, host.registry.exporters.values())
        description = describe_source(source, host.registry.layouts)
        records = read_records(folder)
    except AngelslimError as error:
        problems.append(f"{error}; {error.hint}" if error.hint else str(error))
        return found
    problems += _checksums(folder)
    problems += _numbers(source, progress)
    if "ledger" in records:
        problems += _ledger(records["ledger"], source)
    found["engines"] = verdicts(Folder(source.exporter, source.quantized, description, source.cache, source=source))
    checks = StoredChecks(source, description)
    ledger = {n: e for n, e in records.get("ledger", {}).items() if isinstance(e, dict)}
    base_source = open_any(resolve(base), host.registry.exporters.values()) if base is not None else None
    sites = {s.name: s for s in describe_source(base_source, host.registry.layouts).sites} if base_source else None
    if source.exporter is not None:
        checks.shared()
        checks.kv_cache()
        found["unquantized"] = checks.left_alone()
        # a weight in another basis cannot be compared with the base's
        rotated = frozenset(n for n, s in (sites or {}).items() if ledger.get(s.tensor, {}).get("transformed"))
        checks.read(sites, base_source, rotated, progress)
        found["readers"] = {"linears": len(source.quantized), "second": checks.second.knows, "differ": checks.differ}
    problems += checks.problems
    if base_source is not None and sites is not None:
        found["linears"] = checks.rows
        problems += _accounted(source, base_source, sites, ledger)
    if run and not problems:
        found.update(_run(folder, base, problems, host))
    found["ok"] = not problems
    return found


def _checksums(folder: Path) -> list[str]:
    record = folder / RECORDS / "SHA256SUMS"
    if not record.is_file():
        return []
    problems = []
    for line in record.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name.replace("\0", "\ufffd")
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            problems.append(f"{name}: listed in SHA256SUMS and missing")
        elif sha256(path) != digest:
            problems.append(f"{name}: differs from SHA256SUMS")
    return problems


def _numbers(source: Source, progress: Progress) -> list[str]:
    """Finite weights; finite scales, none zero, and positive where no layout knows negative ones."""
    import torch

    problems = []
    tensors = source.checkpoint.tensors
    for done, name in enumerate(tensors, 1):
        value = source.checkpoint.read(name)
        if value.is_floating_point():
            value = value.float() if value.element_size() == 1 else value
            if not bool(torch.isfinite(value).all()):
                problems.append(f"{name}: holds NaN or Inf")
            elif name.endswith(".scales"):  # of the GPTQ layout, which some programs write with a sign
                if bool((value == 0).any()):
                    problems.append(f"{name}: a scale is zero")
            elif name.rpartition(".")[2] in SCALES and bool((value <= 0).any()):
                problems.append(f"{name}: a scale is not positive")
        elif value.dtype == torch.uint8 and name.rpartition(".")[2] in SCALES and bool((value == 255).any()):
            problems.append(f"{name}: an exponent is NaN")
        progress(done, len(tensors), name)
    return problems


def _ledger(ledger: dict[str, Any], source: Source) -> list[str]:
    kept = {name for name, entry in ledger.items() if isinstance(entry, dict) and entry.get("fate") in _KEPT}
    gone = sorted(name for name in kept if name not in source.dtypes and not any(s.startswith(name.rpartition(".")[0]) for s in source.dtypes))
    return [f"{name}: the ledger says it was kept, and it is not here" for name in gone]


def _accounted(source: Source, base: Source, sites: Mapping[str, Site], ledger: Mapping[str, Any]) -> list[str]:
    """Nothing is here that the base lacks, and nothing of the base is missing."""
    added = {name for name, entry in ledger.items() if entry.get("transformed")} - base.dtypes.keys()
    problems = [f"{name}: quantized here, unknown in the base" for name in source.quantized if name not in sites and f"{name}.weight" not in added]
    stacked = {s.tensor for s in sites.values() if s.part}
    dropped = {name for name, entry in ledger.items() if entry.get("fate") == "dropped"}
    return problems + [
        f"{name}: in the base, missing here" for name in base.dtypes if name not in source.dtypes and name not in stacked and name not in dropped
    ]


def _run(folder: Path, base: str | Path | None, problems: list[str], host: PluginHost) -> dict[str, Any]:
    """Load, write 32 tokens greedily, and compare with the base on tokens the base wrote."""
    import torch

    from .evaluation import compare
    from .loading import load_model

    found: dict[str, Any] = {}
    try:
        loaded = load_model(folder, host=host, packed=False)
    except ModelError as error:
        problems.append(f"does not load: {error}")
        return found
    model, tokenizer = loaded.model, loaded.tokenizer
    start = getattr(model.generation_config, "bos_token_id", None)
    ids = torch.tensor([[start if isinstance(start, int) else 1]], device=model.device)
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=32, do_sample=False)[0]
    found["sample"] = tokenizer.decode(written, skip_special_tokens=True) if tokenizer is not None else written.tolist()
    if base is not None:
        reference = load_model(resolve(base), host=host, packed=False).model
        with torch.no_grad():
            own = reference.generate(ids, max_new_tokens=64, do_sample=False)
        numbers = compare(model, reference, own)
        found["kl"] = numbers["kl"]
        if numbers["kl"] > 5:
            problems.append(f"collapsed: KL to the base is {numbers['kl']:.2f} nats per token")
    return found
