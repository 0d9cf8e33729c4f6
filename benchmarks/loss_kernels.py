"""The two kernels that find losses towards whole distributions and their gradients, by rows and vocabulary: where the one that reads logits once is faster.

    python benchmarks/loss_kernels.py --out benchmarks/results/loss_kernels.json

Microseconds a call, a mean of calls one after the other, launches by the host included: `twice` reads logits two or three times, `once` holds rows in
registers. `apart` is the relative norm of what gradients, in BF16, differ by, `kd_apart` the largest difference of losses.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import gpu_ms, table, versions, write
from torch import Tensor

from angelslim_distill import Loss
from angelslim_distill.kernels.gradient import Losses, Task

SHAPES = (
    (512, 151_936), (1536, 49_152), (2432, 32_000), (608, 128_256), (256, 262_144), (512, 50_257), (4096, 8192), (4096, 4096), (64, 151_936), (16, 151_936),
    (256, 32_000), (64, 32_000),
)  # fmt: skip


def empty(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Rows that begin where `head_loss` lets them begin."""
    return torch.empty(rows, -(-vocabulary // 64) * 64, dtype=dtype, device="cuda")[:, :vocabulary]


def compared(rows: int, vocabulary: int, dtype: torch.dtype, kind: str, repeats: int) -> dict[str, Any]:
    from angelslim_distill.kernels.triton.held import towards_whole_held
    from angelslim_distill.kernels.triton.whole import towards_whole

    x, teacher, into = empty(rows, vocabulary, dtype), empty(rows, vocabulary, dtype), empty(rows, vocabulary, torch.bfloat16)
    teacher.normal_(generator=torch.Generator("cuda").manual_seed(0)).mul_(2)
    x.normal_(generator=torch.Generator("cuda").manual_seed(1)).mul_(0.2).add_(teacher)
    times: dict[str, Any] = {}
    found: dict[str, tuple[Tensor, Losses]] = {}
    for name, kernel in (("twice", towards_whole), ("once", towards_whole_held)):
        call = partial(kernel, x, teacher, None, Task(Loss(kind)), into.fill_(torch.nan))
        losses = call()
        found[name] = into.float(), losses
        call()
        times[name] = round(1e3 * gpu_ms(call, repeats), 1)
    (old, was), (new, is_now) = found["twice"], found["once"]
    apart, kd_apart = float((new - old).norm() / old.norm()), float((is_now.kd - was.kd).abs().max())
    return times | {"ratio": round(times["twice"] / times["once"], 2), "apart": float(f"{apart:.1e}"), "kd_apart": float(f"{kd_apart:.1e}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    asked = [(*SHAPES[0], torch.bfloat16), *((*shape, torch.float32) for shape in SHAPES)]
    found = {
        f"{rows} x {vocabulary}, {str(dtype).removeprefix('torch.')}, {kind}": compared(rows, vocabulary, dtype, kind, args.repeats)
        for rows, vocabulary, dtype in asked
        for kind in ("kl", "rkl")
    }
    document = {"device": torch.cuda.get_device_name(), "versions": versions(sys.executable, ["torch", "triton"]), "microseconds": found}
    write(args.out, document)
    keys = ["twice", "once", "ratio", "apart", "kd_apart"]
    table([[name, *(str(row[key]) for key in keys)] for name, row in found.items()], ["", *keys])


if __name__ == "__main__":
    main()
