"""Shared by the training scripts of small multimodal models: batches made by processes, and a loop that has so many seconds.

Weights compute in the model's dtype; the optimizer has FP32 copies of them (masters), from which they are rounded after every step.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Numbers = np.ndarray[Any, np.dtype[Any]]
Make = Callable[[int], dict[str, Numbers]]

_made: list[Make] = []  # what a child process makes batches with


def _begin(make: Make) -> None:
    torch.set_num_threads(1)
    _made[:] = [make]


def _one(number: int) -> dict[str, Numbers]:
    return _made[0](number)


class Feed:
    """Batches 0, 1, 2... of each source, made ahead by processes that are forked when this is built: do it before the first use of a GPU.

    Args:
        makers: sources by name.
        workers: processes of each; 0: batches are made where they are asked for.
        pins: whether batches lie in pinned memory, from which a GPU reads them while the processor goes on.
    """

    def __init__(self, makers: Mapping[str, Make], workers: int, pins: bool = False) -> None:
        self._makers, self._pins = makers, pins
        context = multiprocessing.get_context("fork")
        self._pools = {name: context.Pool(workers, _begin, (make,)) for name, make in makers.items() if workers}
        self._ahead = 3 * workers

    def batches(self, name: str, first: int) -> Iterator[dict[str, Tensor]]:
        """From batch `first` on, without end."""
        waiting: deque[Any] = deque()
        number = first
        while True:
            if name not in self._pools:
                made = self._makers[name](number)
                number += 1
            else:
                while len(waiting) < self._ahead:
                    waiting.append(self._pools[name].apply_async(_one, (number,)))
                    number += 1
                made = waiting.popleft().get()
            tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in made.items()}
            yield {key: tensor.pin_memory() for key, tensor in tensors.items()} if self._pins else tensors

    def close(self) -> None:
        for pool in self._pools.values():
            pool.terminate()


@dataclass(frozen=True)
class Phase:
    """A part of training.

    Args:
        share: of all seconds.
        source: of its batches.
        rates: peak learning rate of the parameters of each submodule, by the beginning of their names; others are frozen.
        loss: of a batch, and numbers to show.
        decays: whether the learning rate falls to a hundredth by a cosine, or stays at its peak after warming up.
    """

    name: str
    share: float
    source: str
    rates: Mapping[str, float]
    loss: Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
    decays: bool = True


def train(module: nn.Module, phases: Sequence[Phase], feed: Feed, *, seconds: float, folder: Path, every: float = 10.0, save_every: float = 150.0) -> None:
    """Train for so many seconds in all, going on from folder/state.pt where it exists, and write folder/weights.pt and training.json.

    Args:
        every: seconds between lines of progress.

    Raises:
        SystemExit: the loss is no number.
    """
    state_file = folder / "state.pt"
    folder.mkdir(parents=True, exist_ok=True)
    stored = torch.load(state_file, weights_only=True, map_location="cpu") if state_file.exists() else None
    begun = 0
    if stored:
        module.load_state_dict(stored["module"])
        begun = stored["phase"]
        print(f"going on with {phases[begun].name}, batch {stored['number']}", flush=True)
    for index in range(begun, len(phases)):
        _phase(module, phases, index, feed, seconds, state_file, stored if index == begun else None, every, save_every)
    torch.save(dict(module.state_dict()), folder / "weights.pt")
    state_file.unlink(missing_ok=True)


def _phase(
    module: nn.Module, phases: Sequence[Phase], index: int, feed: Feed, seconds: float, state_file: Path, stored: Any, every: float, save_every: float
) -> None:
    phase = phases[index]
    masters = Masters(module, phase.rates)
    number, spent = 0, 0.0
    if stored and stored["optimizer"] is not None:
        number, spent = stored["number"], stored["spent"]
        masters.load(stored["optimizer"])
    batches = feed.batches(phase.source, number)
    budget = seconds * phase.share
    last = shown_at = saved_at = time.perf_counter()
    shown_number = number
    module.train()
    while True:
        rise = min(1.0, (number + 1) / 100)
        fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, spent / budget)) if phase.decays else 1.0
        loss, numbers = phase.loss(next(batches))
        masters.step(loss, rise * max(fall, 0.01))
        number += 1
        now = time.perf_counter()
        spent, last = spent + now - last, now
        if now - shown_at >= every or spent >= budget:
            if not math.isfinite(float(loss.detach())):
                raise SystemExit(f"{phase.name}: the loss is {float(loss.detach())} at batch {number}")
            details = ", ".join(f"{name} {float(value.detach()):.3f}" for name, value in numbers.items())
            rate = (number - shown_number) / (time.perf_counter() - shown_at)
            left = budget - spent + seconds * sum(p.share for p in phases[index + 1 :])
            print(f"{phase.name}: batch {number}, loss {float(loss.detach()):.3f}, {details}; {rate:.2f} batches/s, {left:.0f} s left", flush=True)
            shown_at, shown_number = time.perf_counter(), number
        if now - saved_at >= save_every:
            _save(state_file, module, index, number, spent, masters.state())
            saved_at = time.perf_counter()
        if spent >= budget:
            break
    record_file = state_file.with_name("training.json")
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    record[phase.name] = {"batches": number, "seconds": round(spent, 1), "loss": float(loss.detach())} | {k: float(v.detach()) for k, v in numbers.items()}
    record_file.write_text(json.dumps(record, indent=2))
    if index + 1 < len(phases):
        _save(state_file, module, index + 1, 0, 0.0, None)


def _save(file: Path, module: nn.Module, phase: int, number: int, spent: float, optimizer: Any) -> None:
    part = file.with_suffix(".part")
    torch.save({"module": module.state_dict(), "phase": phase, "number": number, "spent": spent, "optimizer": optimizer}, part)
    os.replace(part, file)


class Masters:
    """AdamW on FP32 copies of some of a module's parameters; the others do not train."""

    def __init__(self, module: nn.Module, rates: Mapping[str, float]) -> None:
        self._low: list[nn.Parameter] = []
        self._high: list[Tensor] = []
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, parameter in module.named_parameters():
            prefix = max((p for p in rates if name.startswith(p)), key=len, default=None)
            parameter.requires_grad_(prefix is not None)
            if prefix is not None:
                master = parameter.detach().float().clone()
                self._low.append(parameter)
                self._high.append(master)
                groups.setdefault((rates[prefix], parameter.dim() > 1), []).append(master)
        fused = self._high[0].is_cuda
        parts = [{"params": p, "lr": rate, "peak": rate, "weight_decay": 0.02 if wide else 0.0} for (rate, wide), p in groups.items()]
        self._adam = torch.optim.AdamW(parts, betas=(0.9, 0.98), fused=fused)

    def step(self, loss: Tensor, scale: float) -> None:
        """Backward pass and update; gradients are cut at a norm of 1."""
        loss.backward()
        for low, high in zip(self._low, self._high):
            high.grad = torch.zeros_like(high) if low.grad is None else low.grad.float()
            low.grad = None
        nn.utils.clip_grad_norm_(self._high, 1.0)
        for group in self._adam.param_groups:
            group["lr"] = group["peak"] * scale
        self._adam.step()
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self._low], self._high)

    def state(self) -> dict[str, Any]:
        return {"high": self._high, "adam": self._adam.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        for mine, stored in zip(self._high, state["high"]):
            mine.copy_(stored)
        self._adam.load_state_dict(state["adam"])


def with_language_model(model: Any, folder: str, dtype: torch.dtype) -> Any:
    """A multimodal model, its language model's weights read from a folder, in a dtype."""
    from transformers import AutoModelForCausalLM

    text = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.language_model.load_state_dict(text.model.state_dict())
    with torch.no_grad():
        model.lm_head.weight.copy_(text.lm_head.weight)
    return model.to(dtype)


def answer_loss(model: Any, embeds: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answers, and the share of their tokens that is right; logits are made where an answer is, alone.

    Args:
        embeds: [B, L, D].
        labels: [B, L], on the processor: the token at each place, -100 where none is asked for.
        mask: [B, L]; None: all are read.
    """
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    at = (labels[:, 1:] != -100).nonzero()
    wanted = labels[at[:, 0], at[:, 1] + 1].to(embeds.device, non_blocking=True)
    at = at.to(embeds.device, non_blocking=True)
    logits = model.lm_head(hidden[at[:, 0], at[:, 1]]).float()
    return nn.functional.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean()


def compile_layers(model: Any) -> None:
    """Compile the language model's layers, all of which share one program."""
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)
