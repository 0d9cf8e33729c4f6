"""Ways to train the rounding of one decoder layer, by its output's error on held-out tokens.

    python benchmarks/rounding_layer.py --model MODEL --text TEXT --out benchmarks/results/rounding_layer.json

The layer's linears are rounded to nearest or by GPTQ (inputs of the unquantized model), then roundings and ranges are
trained by signed gradients or by Adam. The error is the mean over tokens of the output's squared error relative to the
token's mean square.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import table, versions, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_quant.numerics.compensate import Moments, compensate
from angelslim_quant.numerics.integer import quantize, search_range, steps
from angelslim_quant.passes.gptq import SHRINKS
from angelslim_quant.passes.learned_rounding import Rounder

# start, optimizer, symmetric, first step for roundings (of a code) and for ranges; "signed" divides by the number of steps
TRIALS = [
    ("nearest", "", True, 0, 0),
    ("nearest", "signed", True, 1, 1),
    ("nearest", "adam", True, 0.02, 0.001),
    ("gptq", "", True, 0, 0),
    ("gptq", "signed", True, 1, 1),
    ("gptq", "signed", True, 0.25, 0.25),
    ("gptq", "adam", True, 0.02, 0.001),
    ("gptq", "adam", True, 0.01, 0.001),
    ("gptq", "adam", True, 0.005, 0.0005),
    ("gptq", "", False, 0, 0),
    ("gptq", "adam", False, 0.005, 0.0005),
]


class Bench:
    """One layer, its inputs, and what it makes of them unquantized."""

    def __init__(self, given: argparse.Namespace) -> None:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).eval().requires_grad_(False)
        text = Path(given.text).read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(given.model)(text[len(text) // 2 :], add_special_tokens=False)["input_ids"]
        self.layer = model.model.layers[given.layer]
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        handle = self.layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True)
        size, batches = 8 * given.tokens, given.batches + given.held_out
        with torch.no_grad():
            for i in range(batches):
                model.model(torch.tensor(ids[i * size : (i + 1) * size]).view(8, given.tokens), use_cache=False)
            handle.remove()
            self.batches = [(x, {k: v for k, v in kwargs.items() if "past" not in k}, self.run(x, kwargs, {})) for x, kwargs in seen]
        self.train, self.test = self.batches[: given.batches], self.batches[given.batches :]
        self.weights = {n: m.weight.data for n, m in self.layer.named_modules() if isinstance(m, nn.Linear)}
        self.steps = given.steps

    def run(self, x: Tensor, kwargs: dict[str, Any], weights: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(self.layer, weights, (x,), kwargs)
        return out[0] if isinstance(out, tuple) else out

    def error(self, batch: tuple[Tensor, dict[str, Any], Tensor], weights: dict[str, Tensor]) -> Tensor:
        x, kwargs, target = batch
        wrong = (self.run(x, kwargs, weights).float() - target.float()).square().mean(-1)
        return (wrong / target.float().square().mean(-1).clamp_min(1e-12)).mean()

    @torch.no_grad()
    def held_out(self, results: dict[str, Quantized]) -> float:
        weights = {f"{n}.weight": r.dequantize().to(torch.bfloat16) for n, r in results.items()}
        return sum(float(self.error(batch, weights)) for batch in self.test) / len(self.test)

    def start(self, kind: str, grid: Grid) -> dict[str, tuple[Quantized, Tensor]]:
        """Name -> the rounded weight, and what rounds to it."""
        moments = {n: Moments() for n in self.weights}

        def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, args: moments[name].add(args[0].flatten(0, 1))

        handles = [self.layer.get_submodule(n).register_forward_pre_hook(look(n)) for n in self.weights]
        with torch.no_grad():
            for x, kwargs, _ in self.train:
                self.run(x, kwargs, {})
        for handle in handles:
            handle.remove()
        found = {}
        for name, weight in self.weights.items():
            hessian = moments[name].hessian
            chosen = search_range(weight, grid, hessian.diagonal(), SHRINKS)
            codes, before = quantize(weight, grid, *chosen)[0], weight.float()
            if kind == "gptq":
                levels, before, _ = compensate(weight, hessian, steps(*chosen, grid), grid.group_size)
                codes = levels.to(torch.int8)
            found[name] = (Quantized(Scheme("", grid), codes, *chosen), before)
        return found

    def trained(self, start: dict[str, tuple[Quantized, Tensor]], optimizer: str, rate: float, range_rate: float) -> dict[str, Quantized]:
        rounders = {n: Rounder(before, quantized) for n, (quantized, before) in start.items()}
        groups = [{"params": [getattr(r, part) for r in rounders.values()], "lr": step} for part, step in (("shift", rate), ("factor", range_rate))]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(1)
        for done in range(self.steps):
            weights = {f"{n}.weight": r.weight().to(torch.bfloat16) for n, r in rounders.items()}
            self.error(self.train[int(torch.randint(len(self.train), (1,), generator=generator))], weights).backward()
            left = 1 - done / self.steps
            for group, step in zip(adam.param_groups, (rate, range_rate), strict=True):
                group["lr"] = step * left
                for parameter in group["params"] if optimizer == "signed" else ():
                    parameter.data.sub_(parameter.grad.sign(), alpha=step / self.steps * left)
            if optimizer == "adam":
                adam.step()
            adam.zero_grad()
            for rounder in rounders.values():
                rounder.clamp()
        return {n: r.result() for n, r in rounders.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("layer", 10), ("tokens", 256), ("batches", 8), ("held-out", 3), ("steps", 100), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bench = Bench(given)
    rows = []
    for kind, optimizer, symmetric, rate, range_rate in TRIALS:
        begun = time.process_time()
        start = bench.start(kind, Grid(4, "int", "group", 64, symmetric=symmetric, scale_dtype="BF16"))
        results = bench.trained(start, optimizer, rate, range_rate) if optimizer else {n: quantized for n, (quantized, _) in start.items()}
        row = {"start": kind, "optimizer": optimizer, "symmetric": symmetric, "rate": rate, "range_rate": range_rate}
        rows.append({**row, "held_out_error": round(bench.held_out(results), 7), "cpu_s": round(time.process_time() - begun, 1)})
    sample = {key: getattr(given, key) for key in ("layer", "tokens", "batches", "held_out", "steps", "threads")}
    write(Path(given.out), {"sample": sample, "versions": versions(sys.executable, ["torch", "transformers", "angelslim-quant"]), "rows": rows})
    table([[str(v) for v in row.values()] for row in rows], list(rows[0]))


if __name__ == "__main__":
    main()
