"""Tokens per second and acceptance of drafts on one machine, in cells that come in the order of their worth: a short lease ends somewhere.

    python benchmarks/specdec_decode.py --model M --draft D --prompts FOLDER --out benchmarks/results/specdec_decode.json

A cell is what `angelslim specdec bench` measures, plain decoding in the same engine beside every draft; the last cells are of
transformers' own `generate`. The file is written after every cell; those that did not fit into --seconds are named in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from angelslim_core.calibration.spans import Renderer
from angelslim_core.io.writer import write_json
from angelslim_specdec import bench
from angelslim_specdec.bench import Contender
from angelslim_specdec.cli.opening import open_target

SETS = ("mt_bench", "gsm8k", "humaneval", "alpaca")


@dataclass(frozen=True)
class Cell:
    """Contenders at one batch size and temperature.

    Args:
        ways: (k, adaptive, tree) of the first draft.
        others: whether the other drafts and n-gram lookup run, too.
        prompts: of each set.
    """

    batch: int
    temperature: float
    ways: tuple[tuple[int, bool, tuple[int, int] | None], ...]
    others: bool
    prompts: int


CELLS = (
    Cell(1, 0.0, ((5, False, None), (5, False, (8, 32))), True, 12),
    Cell(64, 0.0, ((4, False, None), (5, False, None), (6, False, None)), False, 64),
    Cell(16, 0.0, ((5, False, None), (6, True, None)), False, 16),
    Cell(256, 0.0, ((5, False, None), (5, True, None)), False, 80),
    Cell(1, 1.0, ((5, False, None),), False, 12),
    Cell(16, 1.0, ((5, False, None), (5, True, None)), False, 16),
    Cell(64, 1.0, ((5, False, None), (5, True, None)), False, 64),
    Cell(1, 0.0, ((4, False, None), (6, False, None), (6, True, None), (6, False, (8, 48))), False, 12),
)

TREES = (Cell(1, 0.0, ((5, False, None), *((k, False, tree) for k, tree in ((5, (8, 32)), (5, (4, 16)), (6, (4, 24)), (6, (8, 48)), (8, (4, 32))))), True, 12),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", required=True, action="append", help="the first is measured in all ways, further ones at batch 1")
    parser.add_argument("--prompts", required=True, type=Path, help="folder of mt_bench.jsonl, gsm8k.jsonl, humaneval.jsonl, alpaca.jsonl")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-new-tokens", default=256, type=int)
    parser.add_argument("--repeats", default=1, type=int)
    parser.add_argument("--seconds", default=1e9, type=float, help="after which no cell is begun")
    parser.add_argument("--most", default=80, type=int, help="prompts of a set, at most")
    parser.add_argument("--rows", default=256, type=int, help="of a batch, at most")
    parser.add_argument("--transformers", default=2, type=int, help="prompts of each set for transformers' generate")
    parser.add_argument("--trees", action="store_true", help="only batch 1, greedily: the chain, and trees of several shapes")
    given = parser.parse_args()
    began = time.perf_counter()
    target = open_target(given.model, given.device, given.dtype)
    renderer = Renderer(target.tokenizer, given.model)
    sets = {name: renderer.prompts(bench.questions(given.prompts / f"{name}.jsonl", given.most)) for name in SETS}
    names = [Path(draft).name for draft in given.draft]
    makers = {name: bench.maker(draft, target) for name, draft in zip(names, given.draft, strict=True)} | {"ngram": bench.maker("ngram", target)}
    capacity = max(len(ids) for prompts in sets.values() for ids in prompts) + given.max_new_tokens
    decode = bench.Decoder(target, makers, capacity, given.max_new_tokens)
    document: dict[str, Any] = {
        "machine": bench.machine(target.device.type), "model": Path(given.model).name, "dtype": str(target.dtype).removeprefix("torch."), "drafts": names,
        "max_new_tokens": given.max_new_tokens, "repeats": given.repeats, "note": bench.NOTE, "opened_in_s": time.perf_counter() - began,
        "rows": [], "means": [], "transformers": [], "left_out": [], "failed": [], "fused_modules": target.fused,
    }  # fmt: skip
    for cell in TREES if given.trees else CELLS:
        if time.perf_counter() - began > given.seconds - 40 * bool(given.transformers):
            document["left_out"].append(f"batch {cell.batch}, temperature {cell.temperature:g}, {len(cell.ways)} ways")
            continue
        start = time.perf_counter()
        contenders = [Contender(names[0], k, adaptive, tree) for k, adaptive, tree in cell.ways]
        if cell.others:
            contenders += [Contender(name, most_tokens(makers[name])) for name in names[1:]] + [Contender("ngram", 5)]
        try:
            found = bench.bench(
                {name: prompts[: cell.prompts] for name, prompts in sets.items()}, contenders, decode, sizes=(min(cell.batch, given.rows),),
                temperatures=(cell.temperature,), repeats=given.repeats, device=target.device.type,
            )  # fmt: skip
        except Exception as error:  # the cells before and after it are worth having; the exit code says that one failed
            document["failed"].append(f"batch {cell.batch}, temperature {cell.temperature:g}: {type(error).__name__}: {error}"[:500])
            print(document["failed"][-1], flush=True)
            write_json(given.out, document)
            continue
        document["rows"] += found["rows"]
        document["means"] += found["means"]
        for mean in found["means"]:
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in mean.items() if k != "rates"}, flush=True)
        print(f"{time.perf_counter() - start:.1f} s, {time.perf_counter() - began:.1f} s in all", flush=True)
        write_json(given.out, document)
    if time.perf_counter() - began < given.seconds and given.transformers:
        document["transformers"] = bench.transformers_speed(target.model, sets, (0.0,), given.max_new_tokens, given.transformers)
        print(document["transformers"], flush=True)
    write_json(given.out, document)
    if document["failed"]:
        raise SystemExit(1)


def most_tokens(make: Callable[[], Any]) -> int:
    """Tokens that a draft of a block gives; 5 of one that drafts them one by one."""
    return int(getattr(make().draft.config, "num_tokens", 5))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
