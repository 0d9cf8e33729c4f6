"""Time and memory of a distillation loss from hidden states, forward and backward, beside plain torch and Liger-Kernel's fused losses.

    python benchmarks/distill_loss.py --out benchmarks/results/distill_loss.json
    python benchmarks/distill_loss.py --device cpu --tokens 64 --vocabulary 1000 --hidden 64 --dtype float32 --out /tmp/distill_loss.json

Student and teacher have heads of their own and random states; the student is the teacher with a tenth of noise, so that the loss is small, as it is
in training. All compute the mean of KL(teacher, student) and its gradients by states and head, which for Liger-Kernel's JSD is beta 0. `gemms` are
the four matrix products alone, without which none of it can be had: of the rows of a chunk that `ours` would take, in bf16. `naive` is softmax and KL
over whole logits in FP32. `ours` is what a call chooses by itself; the others of ours say what differs: `weight 1/N` has the mean's factor in the
forward pass, so that the backward pass has nothing to multiply by.

Contenders take turns: twice to warm up, in the second of which the peak of memory is read, and then bare. Times are medians between synchronised
ends, `host_ms` those until the call returned, and `asked` is how often the allocator asked the driver in all timed calls: 0, or times are not those of
a warm one. `extra_gib` is what a call adds to the peak of memory, its gradients included; none on a CPU. `error` is the relative norm of what differs
from gradients in FP32 of the same inputs, found in chunks, of the states' and of the head's.

A GPU that is hot or at its limit of power lowers its clock and takes longer for the same kernels, so that there are times of several regimes: `ms` of
calls one after the other, and `rested_ms` of calls each after some seconds in which the device had nothing to do, medians too, between events on the
device.

`kernels_ms` are means over as many calls, one straight after the other, and `busy_ms` their sum: what `ms` has beyond it is no kernel. `first_busy_ms`
is that of a first call after a pause. `row_ms` is the loss kernel alone, in calls one after the other: `_row_held`, which reads logits once, with
other tunings, and `_row`, which reads them twice and does what that one cannot.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import median, table, versions, write
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from angelslim_core.errors import EngineError
from angelslim_distill import KINDS, Hidden, Loss, head_loss

Call = Callable[[], tuple[Tensor, ...]]
PEER = "liger_kernel"
WARM = 2  # turns
KERNELS = {"_row_held": "triton_held", "_row": "triton"}


def made(tokens: int, vocabulary: int, width: int, device: str, dtype: torch.dtype) -> tuple[Hidden, Hidden, Tensor]:
    """Student, teacher and labels."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    states, weight = normal(tokens, width), normal(vocabulary, width).mul_(2 / math.sqrt(width))
    teacher = Hidden(states.to(dtype), weight.to(dtype))
    states = states.add(normal(tokens, width), alpha=0.1)
    weight = weight.add(normal(vocabulary, width), alpha=0.2 / math.sqrt(width))
    student = Hidden(states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())
    return student, teacher, torch.randint(vocabulary, (tokens,), generator=generator, device=device)


def gemms(student: Hidden, teacher: Hidden, rows: int) -> tuple[Tensor, ...]:
    """Four products a chunk; what is multiplied by are logits."""
    with torch.no_grad():
        of_weight, of_states = torch.empty_like(student.weight), torch.empty_like(student.states)
        for start in range(0, len(student.states), rows):
            part = slice(start, start + rows)
            logits = student.states[part] @ student.weight.T
            torch.mm(teacher.states[part], teacher.weight.T, out=torch.empty_like(logits))
            torch.mm(logits, student.weight, out=of_states[part])
            if start:
                of_weight.addmm_(logits.T, student.states[part])
            else:
                torch.mm(logits.T, student.states[part], out=of_weight)
    return of_states, of_weight


def naive(student: Hidden, teacher: Hidden) -> Tensor:
    with torch.no_grad():
        towards = log_softmax((teacher.states @ teacher.weight.T).float(), -1)
    return kl_div(log_softmax((student.states @ student.weight.T).float(), -1), towards, reduction="batchmean", log_target=True)


def ours(student: Hidden, teacher: Hidden, labels: Tensor, loss: Loss, **options: Any) -> Tensor:
    found = head_loss(student, teacher, torch.ones(labels.shape), loss, labels if loss.kind == "cakld" else None, **options)
    return found.total / found.count


def liger(student: Hidden, teacher: Hidden, labels: Tensor, chunked: bool) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    peer = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0) if chunked else LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda: peer(student.states, student.weight, teacher.states, teacher.weight, labels)


def graded(student: Hidden, loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    """Gradients of states and head, and the loss."""
    value = loss()
    return *torch.autograd.grad(value, (student.states, student.weight)), value.detach()


def contenders(student: Hidden, teacher: Hidden, labels: Tensor, rows: list[int], kinds: list[str]) -> dict[str, Call]:
    """By name, what finds gradients of states and head, and the loss last where there is one."""
    mine = partial(partial, ours, student, teacher, labels)
    losses: dict[str, Callable[[], Tensor]] = {"naive": partial(naive, student, teacher), "ours": mine(Loss())}
    losses |= {f"ours, {n} rows": mine(Loss(), rows=n) for n in rows}
    if student.states.dtype == torch.bfloat16:
        losses["ours, bf16 logits"] = mine(Loss(), logits_dtype=torch.bfloat16)
    losses |= {f"ours, {kind}": mine(Loss(kind)) for kind in kinds if kind not in ("kl", "kd")}
    if student.states.is_cuda:
        losses["ours, logits read twice"] = mine(Loss(), executor="triton")
    losses["ours, weight 1/N"] = lambda: head_loss(student, teacher, torch.ones(labels.shape), Loss(), kd_weight=1 / len(labels)).total
    frozen = Hidden(student.states, student.weight.detach())
    if importlib.util.find_spec(PEER) is None:
        print(f"{PEER} is not installed, and is left out: pip install --no-deps liger-kernel==0.8.5", file=sys.stderr)
    elif not student.states.is_cuda:
        print(f"{PEER} runs on GPUs, and is left out", file=sys.stderr)
    else:
        losses |= {"liger fused jsd": liger(student, teacher, labels, False), "liger chunked jsd": liger(student, teacher, labels, True)}
    found: dict[str, Call] = {name: partial(graded, student, loss) for name, loss in losses.items()}
    found["ours, frozen head"] = lambda: torch.autograd.grad(ours(frozen, teacher, labels, Loss()), student.states)
    return {"gemms": partial(gemms, student, teacher, min(2048, len(labels))), **found}


def exact(student: Hidden, teacher: Hidden, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Gradients in FP32."""
    weight, other = student.weight.detach().float(), teacher.weight.float()
    of_states, of_weight = torch.empty(student.states.shape, device=weight.device), torch.zeros_like(weight)
    for start in range(0, len(student.states), chunk):
        states = student.states.detach()[start : start + chunk].float()
        asked = ((states @ weight.T).softmax(-1) - (teacher.states[start : start + chunk].float() @ other.T).softmax(-1)) / len(student.states)
        of_states[start : start + chunk] = asked @ weight
        of_weight.addmm_(asked.T, states)
    return of_states, of_weight


def error(found: Tensor, wanted: Tensor) -> float:
    return float(f"{float((found.detach().float() - wanted).norm() / wanted.norm()):.3g}")


def asked() -> int:
    """How often the allocator has gone to the driver."""
    found = torch.cuda.memory_stats()
    return sum(found.get(name, 0) for name in ("num_device_alloc", "num_device_free", "num_alloc_retries"))


def measured(calls: dict[str, Call], repeats: int, cuda: bool) -> dict[str, dict[str, Any]]:
    """Of each, or why it failed."""
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    rows: dict[str, dict[str, Any]] = {name: {} for name in calls}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(-WARM, repeats):
        for name, call in calls.items():
            if "failed" in rows[name]:
                continue
            wait()
            before, had = (torch.cuda.memory_allocated(), asked()) if cuda else (0, 0)
            if cuda and turn == -1:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            try:
                found = call()
            except (torch.OutOfMemoryError, RuntimeError) as failure:
                rows[name] = {"failed": str(failure).splitlines()[0][:200]}
                continue
            returned = time.perf_counter()
            wait()
            if turn >= 0:
                times[name].append((1e3 * (time.perf_counter() - start), 1e3 * (returned - start)))
            if cuda and turn == -1:
                rows[name] |= {"extra_gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 3), "asked": 0}
            elif cuda and turn >= 0:
                rows[name]["asked"] += asked() - had
            del found
    for name, row in rows.items():
        if times[name] and "failed" not in row:
            whole, host = zip(*times[name], strict=True)
            row |= {"ms": median(whole), "min_ms": round(min(whole), 3), "host_ms": median(host), "runs": len(whole)}
    return rows


def rested(calls: dict[str, Call], repeats: int, pause: float) -> dict[str, float]:
    """Milliseconds of each on the GPU, a median of calls before each of which it had nothing to do for a while."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            time.sleep(pause)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: median(each) for name, each in times.items() if each}


def by_kernel(call: Call, repeats: int) -> dict[str, float]:
    """Milliseconds of a call on the GPU, by kernel, a mean over calls one straight after the other."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        found[event.key[:80]] += event.self_device_time_total / 1e3 / repeats
    return dict(sorted(((kernel, ms) for kernel, ms in found.items() if ms), key=lambda item: -item[1]))


def profiled(calls: dict[str, Call], repeats: int) -> dict[str, dict[str, Any]]:
    """Of `gemms` and `ours`; kernels that take less than 1% together."""
    rows: dict[str, dict[str, Any]] = {}
    for name in ("gemms", "ours"):
        torch.cuda.synchronize()
        time.sleep(1)
        first = sum(by_kernel(calls[name], 1).values())
        for _ in range(repeats):
            calls[name]()
        found = by_kernel(calls[name], repeats)
        busy = sum(found.values())
        large = {kernel: round(ms, 3) for kernel, ms in found.items() if ms >= busy / 100}
        kernels = {**large, "others": round(busy - sum(large.values()), 3)}
        rows[name] = {"first_busy_ms": round(first, 3), "busy_ms": round(busy, 3), "kernels_ms": kernels}
    return rows


def tuned(calls: dict[str, Call], tunings: list[str], repeats: int) -> dict[str, dict[str, float | str]]:
    """Milliseconds of both loss kernels in a call, of the one that holds rows by tokens of a slice, warps of a program and registers of a thread."""
    from triton.runtime.errors import OutOfResources

    from angelslim_distill.kernels.triton import held

    found: dict[str, dict[str, float | str]] = {kernel: {} for kernel in KERNELS}
    own = held.TUNING
    for kernel, name in [*((kernel, "own") for kernel in KERNELS), *(("_row_held", name) for name in tunings)]:
        block, warps, registers = own if name == "own" else (int(n) for n in name.split("x"))
        held.TUNING = block, warps, registers
        try:
            calls[kernel]()
            found[kernel][name] = round(by_kernel(calls[kernel], repeats)[kernel], 3)
        except (OutOfResources, EngineError) as failure:
            found[kernel][name] = str(failure).splitlines()[0][:200]
        finally:
            held.TUNING = own
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rows", default="", help="other sizes of chunks, such as 1024,4096")
    parser.add_argument("--kinds", default="kl", help=f"kinds of ours, of {','.join(KINDS)}, or all")
    parser.add_argument("--tunings", default="", help="others of the loss kernel: tokens x warps x registers, such as 4096x4x128,2048x1x168")
    parser.add_argument("--rests", type=int, default=5, help="calls of each after a pause; 0: none")
    parser.add_argument("--pauses", default="0.1,1", help="seconds")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU, or --device cpu")
    torch.backends.cuda.matmul.allow_tf32 = False  # what is exact is FP32's
    student, teacher, labels = made(args.tokens, args.vocabulary, args.hidden, args.device, getattr(torch, args.dtype))
    kinds = list(KINDS) if args.kinds == "all" else args.kinds.split(",")
    calls = contenders(student, teacher, labels, [int(n) for n in args.rows.split(",") if n], kinds)
    rows = measured(calls, args.repeats, cuda)
    if cuda:
        for pause in args.pauses.split(",") if args.rests else ():
            for name, ms in rested({name: call for name, call in calls.items() if "failed" not in rows[name]}, args.rests, float(pause)).items():
                rows[name].setdefault("rested_ms", {})[pause] = ms
    of_states, of_weight = exact(student, teacher)
    for name, row in rows.items():
        if "failed" in row or name == "gemms" or any(name == f"ours, {kind}" for kind in kinds):
            continue
        found = calls[name]()
        row["error"] = [error(found[0], of_states), *([error(found[1], of_weight)] if len(found) > 1 else [])]
        if len(found) > 2:
            row["loss"] = float(f"{found[2].item():.6g}")
        del found
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu", "versions": versions(sys.executable, ["torch", "triton", "liger-kernel"]),
        "tokens": args.tokens, "vocabulary": args.vocabulary, "hidden": args.hidden, "dtype": args.dtype, "rows": rows,
    }  # fmt: skip
    if cuda and "failed" not in rows["ours"]:
        document["profiles"] = profiled(calls, args.repeats)
        both: dict[str, Call] = {
            name: partial(graded, student, partial(ours, student, teacher, labels, Loss(), executor=executor)) for name, executor in KERNELS.items()
        }
        document["row_ms"] = tuned(both, [name for name in args.tunings.split(",") if name], args.repeats)
    write(args.out, document)
    keys = ["ms", "min_ms", "rested_ms", "host_ms", "asked", "extra_gib", "loss", "error"]
    table([[name, *(row["failed"] if k == "ms" and "failed" in row else str(row.get(k, "")) for k in keys)] for name, row in rows.items()], ["", *keys])
    for name, row in document.get("profiles", {}).items():
        print(f"{name}: {row['busy_ms']} ms of kernels a call, {row['first_busy_ms']} of a first one")
        for kernel, ms in row["kernels_ms"].items():
            print(f"{ms:9.3f} ms  {kernel}")
    for kernel, times in document.get("row_ms", {}).items():
        for name, ms in times.items():
            print(f"{ms:>9} ms  {kernel}, {name}")
    if "failed" in rows["ours"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
