"""Checking an output folder: nothing is taken from the run that made it but its records, which are checked too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .context import Progress, silent
from .errors import AngelslimError, ModelError
from .io.hub import resolve
from .plugins import PluginHost
from .records import RECORDS, read_records
from .source import Source, describe_source, open_any
from .workdir import sha256


def validate(
    out: str | Path, base: str | Path | None = None, *, run: bool = False, progress: Progress = silent, host: PluginHost | None = None
) -> dict[str, Any]:
    """Check a folder.

    Args:
        base: its source; adds SQNR and cosine per linear, and missing or extra tensors.
        run: also load it and generate; with `base` also KL on a sample of the base.
        host: holds third parties' plugins that know the folder.

    Returns:
        `ok`, `problems`, and as asked `linears` [{name, sqnr_db, cosine}], `sample`, `kl`.
    """
    folder = Path(out)
    problems: list[str] = []
    found: dict[str, Any] = {"ok": False, "problems": problems}
    host = host or PluginHost()
    try:
        source = open_any(folder, host.registry.exporters.values())
        records = read_records(folder)
    except AngelslimError as error:
        problems.append(f"{error}; {error.hint}" if error.hint else str(error))
        return found
    problems += _checksums(folder)
    problems += _numbers(source, progress)
    problems += _shared_scales(source, host)
    if "ledger" in records:
        problems += _ledger(records["ledger"], source)
    if base is not None:
        ledger = {n: e for n, e in records.get("ledger", {}).items() if isinstance(e, dict)}
        found["linears"], more = _compare(source, open_any(resolve(base), host.registry.exporters.values()), ledger, host, progress)
        problems += more
    if run and not problems:
        found.update(_run(folder, base, problems, host))
    found["ok"] = not problems
    return found


def _checksums(folder: Path) -> list[str]:
    record = folder / RECORDS / "SHA256SUMS"
    if not record.is_file():
        return []
    problems = []
    for line in record.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            problems.append(f"{name}: listed in SHA256SUMS and missing")
        elif sha256(path) != digest:
            problems.append(f"{name}: differs from SHA256SUMS")
    return problems


def _numbers(source: Source, progress: Progress) -> list[str]:
    """Finite weights; finite scales that are not zero."""
    import torch

    problems = []
    tensors = source.checkpoint.tensors
    for done, name in enumerate(tensors, 1):
        value = source.checkpoint.read(name)
        if value.is_floating_point():
            value = value.float() if value.element_size() == 1 else value
            if not bool(torch.isfinite(value).all()):
                problems.append(f"{name}: holds NaN or Inf")
            elif "scale" in name.rsplit(".", 1)[-1] and bool((value == 0).any()):
                problems.append(f"{name}: a scale is zero")
        progress(done, len(tensors), name)
    return problems


def _shared_scales(source: Source, host: PluginHost) -> list[str]:
    """Linears that engines run as one matmul must agree on per-tensor scales."""
    first: dict[str, Any] = {}
    problems = []
    for site in describe_source(source, host.registry.layouts).sites:
        scheme = source.quantized.get(site.name)
        if scheme is None or site.fused is None or scheme.weights.strategy != "tensor":
            continue
        quantized = source.read_quantized(site.name)
        scales = [float(t) for t in (quantized.scale, quantized.input_scale) if t is not None]
        if first.setdefault(site.fused, scales) != scales:
            problems.append(f"{site.name}: its scales differ from those of its fused set")
    return problems


def _ledger(ledger: dict[str, Any], source: Source) -> list[str]:
    kept = {name for name, entry in ledger.items() if isinstance(entry, dict) and entry.get("fate") in ("copied", "transformed")}
    gone = sorted(name for name in kept if name not in source.dtypes and not any(s.startswith(name.rpartition(".")[0]) for s in source.dtypes))
    return [f"{name}: the ledger says it was kept, and it is not here" for name in gone]


def _compare(source: Source, base: Source, ledger: dict[str, Any], host: PluginHost, progress: Progress) -> tuple[list[dict[str, Any]], list[str]]:
    from .stream import sqnr_db

    rows, problems = [], []
    sites = {s.name: s for s in describe_source(base, host.registry.layouts).sites}
    # a weight in another basis cannot be compared with the base's
    modules = [n for n in source.quantized if n in sites and not ledger.get(sites[n].tensor, {}).get("transformed")]
    for done, name in enumerate(modules, 1):
        site = sites[name]
        weight = base.read(site.tensor, site.part)
        quantized = source.read_quantized(name)
        if tuple(weight.shape) != tuple(quantized.codes.shape):
            problems.append(f"{name}: has shape {list(quantized.codes.shape)}, the base {list(weight.shape)}")
            continue
        restored, reference = quantized.dequantize().flatten(), weight.float().flatten()
        norm = float(restored.norm() * reference.norm())
        rows.append({"name": name, "sqnr_db": sqnr_db(weight, quantized), "cosine": float(restored @ reference) / norm if norm else 1.0})
        progress(done, len(modules), name)
    added = {name for name, entry in ledger.items() if entry.get("transformed")} - base.dtypes.keys()
    problems += [f"{name}: quantized here, unknown in the base" for name in source.quantized if name not in sites and f"{name}.weight" not in added]
    stacked = {s.tensor for s in sites.values() if s.part}
    dropped = {name for name, entry in ledger.items() if entry.get("fate") == "dropped"}
    problems += [f"{name}: in the base, missing here" for name in base.dtypes if name not in source.dtypes and name not in stacked and name not in dropped]
    return rows, problems


def _run(folder: Path, base: str | Path | None, problems: list[str], host: PluginHost) -> dict[str, Any]:
    """Load, write 32 tokens greedily, and compare with the base on tokens the base wrote."""
    import torch

    from .evaluation import compare
    from .loading import load_model

    found: dict[str, Any] = {}
    try:
        loaded = load_model(folder, host=host)
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
        reference = load_model(resolve(base), host=host).model
        with torch.no_grad():
            own = reference.generate(ids, max_new_tokens=64, do_sample=False)
        numbers = compare(model, reference, own)
        found["kl"] = numbers["kl"]
        if numbers["kl"] > 5:
            problems.append(f"collapsed: KL to the base is {numbers['kl']:.2f} nats per token")
    return found
