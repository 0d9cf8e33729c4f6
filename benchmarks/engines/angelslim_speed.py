"""Tokens per second of a folder in transformers' `generate`, linears packed where `load` does so; run by engine_speed.py.

python angelslim_speed.py FOLDER [--prompt 64] [--new 32]

A streamer takes the times, so that batches are of one prompt.
"""

from __future__ import annotations

import time

import torch
from transformers.generation.streamers import BaseStreamer
from workload import Prompts, arguments, report

from angelslim_core.loading import load_model


class Clock(BaseStreamer):
    """Times at which tokens arrive, the prompt first."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    given = arguments()
    loaded = load_model(given.model, "cpu", packed=given.packed or "auto")

    def run(prompts: Prompts, n: int) -> list[float]:
        clock, ids = Clock(), torch.tensor(prompts)
        loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, streamer=clock)
        return [stamp - clock.stamps[0] for stamp in clock.stamps[1:]]

    report(run, given, backend=loaded.backend)


if __name__ == "__main__":
    main()
