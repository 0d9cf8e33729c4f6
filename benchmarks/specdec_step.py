"""Milliseconds and kernels of single rounds of `angelslim specdec`'s engine on a GPU, with our kernels between products and without them.

    python benchmarks/specdec_step.py --model SMOLLM2_135M [--draft DRAFT] --out benchmarks/results/specdec_step.json

Each graph is captured as the engine does it and replayed between two CUDA events; the rows have ended, so that every replay does the
same work on the same lengths. `plain` is a round with nothing proposed, `propose` what the drafter does in a round of k tokens, `step`
what a further token costs it, `round` all of a round: drafting, verification, acceptance, and the draft's reading of what was accepted.
Both kinds take turns; times are medians over the turns, with the least and the greatest. Kernels are those that torch's profiler sees
in one replay. Without --draft it is an EAGLE-3 draft of random weights and 8192 tokens: what is accepted does not matter here.
On a CPU, to try it, functions are called and timed as they are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import gpu_ms, median, table, write

from angelslim_specdec import Engine, Target, engine
from angelslim_specdec.adaptive import Round
from angelslim_specdec.bench import machine, maker
from angelslim_specdec.drafters.base import Drafter
from angelslim_specdec.graphs import Graphs
from angelslim_specdec.kernels import layer

GPU = torch.cuda.is_available()
KINDS = ("apart", "fused")


@contextmanager
def executor(name: str) -> Iterator[None]:
    """Inside, what stands between products is run by this implementation."""
    names = [(layer, key) for key, value in vars(layer).items() if any(value is kernel for kernel in layer.KERNELS)] + [(engine, "SETTLE")]
    before = [getattr(where, key) for where, key in names]
    for (where, key), kernel in zip(names, before, strict=True):
        setattr(where, key, partial(kernel, executor=name))
    try:
        yield
    finally:
        for (where, key), kernel in zip(names, before, strict=True):
            setattr(where, key, kernel)


def random_draft(target: Target) -> Callable[[], Drafter]:
    from angelslim_specdec.drafts.eagle3 import Eagle3

    torch.manual_seed(0)
    draft = Eagle3.from_target(target.shape, draft_vocab_size=8192).to(target.device, target.dtype).eval()
    return lambda: draft.drafter(target.heads())


def functions(target: Target, make: Callable[[], Drafter], given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; each is captured under the executor that is set now."""
    found: dict[str, Callable[[], Any]] = {}
    prompts = torch.randint(min(1000, target.shape.vocab_size), (given.batch, given.length), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((given.batch,), given.length)
    most = max(given.k)
    for drafter in (None, make()):
        made = Engine(target, drafter, given.batch, given.length + 1, k=most, static=True)
        made.cache.clear()
        aux, followers = made.admit(range(given.batch), prompts, lengths, 1, {})  # one token, after which rows have ended
        made._start(prompts, lengths, followers, aux)
        if drafter is None:
            found["plain"] = partial(made._round, Round(0))
            continue
        for k in sorted({1, *given.k}):
            found[f"propose {k}"] = partial(drafter.propose, k)
            found[f"round {k}"] = partial(made._round, Round(k))
    return {name: _ready(function) for name, function in found.items()}


def _ready(function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            function()

    graph = Graphs()(call) if GPU else call
    for _ in range(3 if GPU else 1):
        graph()
    return graph


def milliseconds(function: Callable[[], Any], replays: int) -> float:
    if not GPU:
        start = time.perf_counter()
        for _ in range(replays):
            function()
        return 1e3 * (time.perf_counter() - start) / replays
    return gpu_ms(function, replays)


def kernels(function: Callable[[], Any]) -> int | None:
    """Of one replay; None on a CPU."""
    if not GPU:
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA and not event.name.startswith(("Memset", "Memcpy")) for event in found.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", help="folder of a draft")
    parser.add_argument("--k", default="1,2,3,4,5,6", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--batch", default=1, type=int)
    parser.add_argument("--length", default=300, type=int, help="tokens of each row")
    parser.add_argument("--replays", default=200, type=int)
    parser.add_argument("--turns", default=7, type=int)
    parser.add_argument("--out")
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16 if GPU else torch.float32).eval().to("cuda" if GPU else "cpu")
    targets = {kind: Target(model, fused=kind == "fused") for kind in KINDS}
    make = maker(given.draft, targets["fused"]) if given.draft else random_draft(targets["fused"])
    ready = {}
    for kind, target in targets.items():
        with executor("auto" if kind == "fused" else "reference"):
            ready[kind] = functions(target, make, given)
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in ready["fused"]}
    for turn in range(given.turns):
        for name, by_kind in times.items():
            for kind in KINDS if turn % 2 else KINDS[::-1]:
                by_kind[kind].append(milliseconds(ready[kind][name], given.replays if GPU else 1))
    rows: dict[str, dict[str, Any]] = {
        name: {kind: {"ms": median(ms), "spread": [min(ms), max(ms)], "kernels": kernels(ready[kind][name])} for kind, ms in by_kind.items()}
        for name, by_kind in times.items()
    }
    few, many = (f"propose {k}" for k in (min({1, *given.k}), max(given.k)))
    steps = int(many.split()[1]) - int(few.split()[1])
    for kind in KINDS if steps else ():
        step = {key: None if rows[many][kind][key] is None else (rows[many][kind][key] - rows[few][kind][key]) / steps for key in ("ms", "kernels")}
        rows.setdefault("step", {})[kind] = step
    document = {
        "what": "angelslim specdec, single rounds", "model": Path(given.model).name, "draft": Path(given.draft).name if given.draft else "random eagle3",
        "dtype": str(model.dtype).removeprefix("torch."), "batch": given.batch, "length": given.length, "replays": given.replays, "turns": given.turns,
        "on": machine("cuda" if GPU else "cpu"), "fused_modules": targets["fused"].fused, "rows": rows,
    }  # fmt: skip
    if given.out:
        write(Path(given.out), document)
    cells = [[name, *(f"{row[kind]['ms']:.4f}" for kind in KINDS), *(str(row[kind]["kernels"]) for kind in KINDS)] for name, row in rows.items()]
    table(cells, ["", *(f"ms {kind}" for kind in KINDS), *(f"kernels {kind}" for kind in KINDS)])


if __name__ == "__main__":
    main()
