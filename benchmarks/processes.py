"""Several processes under torchrun, a GPU each, beside one: what of speed they gain, and whether they end where one does.

    python benchmarks/processes.py --model MODEL --data answers.jsonl --text TEXT --work FOLDER --out benchmarks/results/processes.json

Each job is run as its user runs it, by the command line: 2-bit training (`qad`), GPTQ (`gptq`), a draft (`eagle3`); by one process, by all of them
with whole weights, and with weights in parts (FSDP2). Rows a step are the same for all, of all processes together.

`tokens_per_second` and what a training reports are its own report's, `wall_s` is the whole command, start of processes included. `apart` is the
relative norm by which the tensors of a saved folder differ from those of one process, over all floating-point ones; `codes_apart` is the share of
packed integers that differ, of words of eight codes. Two runs of one process are beside them (`one, again`): what is no larger is no matter of
processes. Processes that wait for each other for ever are ended after `--patience` seconds, and are a row that failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import table, versions, write
from safetensors import safe_open

RUN = {"qad": "run two_bit", "gptq": "run {work}/gptq.json", "eagle3": "specdec train --draft eagle3"}
# job -> way -> what its command has beside the job's own
WAYS: dict[str, dict[str, str]] = {
    "qad": {
        "one": "", "one, again": "", "one, plain": "--set steps[1].with.compile=false --set steps[1].with.attention=masked",
        "all": "", "all, in parts": "--set steps[1].with.shard=true",
    },
    "gptq": {"one": "", "one, again": "", "all": ""},
    "eagle3": {"one": "", "one, again": "", "all": "", "all, draft in parts": "--shard draft", "all, all in parts": "--shard all"},
}  # fmt: skip
SHOWN = (
    "tokens_per_second", "peak_gpu_bytes", "settling_seconds", "way", "kl_before", "kl", "perplexity", "trained_tokens", "loss", "accuracy", "expected_acceptance_length",
)  # fmt: skip


def command(job: str, way: str, given: argparse.Namespace, out: Path) -> list[str]:
    """The whole command line of a job in a way."""
    words = [word.format(work=given.work) for word in RUN[job].split()]
    words += [*WAYS[job][way].split(), "--model", given.model, "--out", str(out), "--device", given.device, "--replace", "--json"]
    if job == "qad":
        with_ = {
            "data": given.data, "steps": given.steps, "batch": given.batch, "length": given.length, "held_out": 0.02, "lr": given.lr,
            "quantizer_lr": given.lr, "every": given.steps,
        }  # fmt: skip
        words += [part for key, value in with_.items() for part in ("--set", f"steps[1].with.{key}={value}")]
    if job == "eagle3":
        words += ["--data", given.data, "--steps", str(given.steps), "--every", str(given.steps), "--batch", str(given.batch), "--length", str(given.length)]
        words += ["--draft-vocab", str(given.draft_vocab), "--validation", "0.01", "--keep", "nowhere"]
    else:
        words += ["--set", f"eval.text={given.text}"]
    start = [sys.executable, "-m"]
    if way.startswith("all"):
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(given.processes), "-m"]
    return [*start, "angelslim_core", *words]


def found_in(value: Any) -> dict[str, Any]:
    """What a command's JSON says of the names that are shown, the last of each name."""
    found: dict[str, Any] = {}
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= {key: inner} if key in SHOWN and not isinstance(inner, dict) else found_in(inner)
    if isinstance(value, list):
        for inner in value:
            found |= found_in(inner)
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {f"{path.relative_to(folder)}/{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def apart(first: Path, second: Path) -> dict[str, float]:
    """How far two saved folders are from each other."""
    ours, theirs = tensors(first), tensors(second)
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        raise RuntimeError(f"{first} and {second} hold other tensors")
    square, of, differing, words = 0.0, 0.0, 0, 0
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            square += float((tensor.double() - theirs[name].double()).square().sum())
            of += float(tensor.double().square().sum())
        else:
            differing += int((tensor != theirs[name]).sum())
            words += tensor.numel()
    return {"apart": (square / of) ** 0.5 if of else 0.0, **({"codes_apart": differing / words} if words else {})}


def measured(job: str, way: str, given: argparse.Namespace) -> dict[str, Any]:
    out = Path(given.work) / f"{job}, {way}".replace(",", "").replace(" ", "_")
    began = time.perf_counter()
    log = out.with_suffix(".log")
    with log.open("w") as errors, subprocess.Popen(command(job, way, given, out), stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            said, _ = process.communicate(timeout=given.patience)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends those that it started
            process.communicate()
            return {"failed": f"not done after {given.patience} s", "log": log.read_text()[-2000:]}
    if process.returncode:
        return {"failed": f"ended with {process.returncode}", "log": (said + log.read_text())[-3000:]}
    row = {"wall_s": round(time.perf_counter() - began, 1), **found_in(json.loads(said))}
    first = Path(given.work) / f"{job}_one"
    return row if way == "one" or not first.exists() else {**row, **apart(first, out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="what the model answered, as `specdec regen` writes it")
    parser.add_argument("--text", required=True, help="that is evaluated on; its second half calibrates")
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(RUN), choices=list(RUN))
    known = list(dict.fromkeys(way for ways in WAYS.values() for way in ways))
    parser.add_argument("--ways", nargs="+", choices=known, default=known, help="only these; what the file has of others, at the same settings, stays")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-4, help="of qad; at rates that are right for long trainings, short ones are chaos")
    parser.add_argument("--batch", type=int, default=32, help="rows a step, of all processes")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=128, help="that calibrate")
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--patience", type=int, default=150)
    parser.add_argument("--keep", action="store_true", help="leave the folders there")
    given = parser.parse_args()
    work = Path(given.work)
    work.mkdir(parents=True, exist_ok=True)
    text = Path(given.text).read_text(encoding="utf-8")
    (work / "calibration.txt").write_text(text[len(text) // 2 :], encoding="utf-8")
    calibration = {"data": str(work / "calibration.txt"), "samples": given.samples, "tokens": given.length}
    recipe = {"version": 1, "steps": [{"use": "quant.gptq", "with": {"group_size": 64}}], "calibration": calibration}
    (work / "gptq.json").write_text(json.dumps(recipe), encoding="utf-8")
    settings = {key: getattr(given, key) for key in ("processes", "steps", "lr", "batch", "length", "samples")}
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu", "versions": versions(sys.executable, ["torch", "triton", "transformers"]),
        **settings, "jobs": {},
    }  # fmt: skip
    if given.out.exists():
        earlier = json.loads(given.out.read_text())
        if differing := [key for key in settings if earlier[key] != settings[key]]:
            parser.error(f"{given.out} is of another {', '.join(differing)}: name another file")
        document["jobs"] = earlier["jobs"]
    for job in given.only:
        rows = document["jobs"].setdefault(job, {})
        for way in filter(given.ways.__contains__, WAYS[job]):
            rows[way] = measured(job, way, given)
            print(job, way, {key: value for key, value in rows[way].items() if key != "log"}, flush=True)
            write(given.out, document)
    if not given.keep:
        for job in given.only:
            for path in work.glob(f"{job}_*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    keys = ["wall_s", "tokens_per_second", "kl", "apart", "codes_apart"]
    named = [(f"{job}, {way}", row) for job, rows in document["jobs"].items() for way, row in rows.items()]
    table([[name, *(str(row.get(key, "")) for key in keys)] for name, row in named], ["", *keys])


if __name__ == "__main__":
    main()
