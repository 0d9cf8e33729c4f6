"""A model whose own `generate` decodes speculatively, where that changes nothing but the time it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .drafters.base import Drafter
from .generation import generate
from .target import Target

log = logging.getLogger(__name__)

# options of transformers' `generate` that are understood here, and what a generation config may hold beside them
_OPTIONS = frozenset({"attention_mask", "do_sample", "eos_token_id", "input_ids", "inputs", "max_new_tokens", "streamer", "temperature", "top_k", "top_p"})
_HARMLESS = frozenset({"bos_token_id", "max_length", "output_attentions", "output_hidden_states", "pad_token_id", "transformers_version", "use_cache"})
_DEFAULT_TOP_K = 50


class Speculative:
    """Stands for a model's `generate`: the same calls, the same output. Calls that ask for anything else go to the model's own.

    Args:
        model: its `generate` is replaced.
        drafter: makes a drafter for a call, given the model.
        k: tokens to propose a round.
    """

    def __init__(self, model: Any, drafter: Callable[[Target], Drafter], k: int) -> None:
        self._model, self._own, self._drafter, self._k = model, model.generate, drafter, k
        self._target: Target | None = None
        model.generate = self

    def __call__(self, *args: Any, **options: Any) -> Any:
        ids: Any = args[0] if len(args) == 1 else options.get("input_ids", options.get("inputs"))
        if why := self._refusal(args, ids, options):
            log.info("decoding without a draft: %s", why)
            return self._own(*args, **options)
        self._target = self._target or Target(self._model)
        streamer, stops = options.get("streamer"), options.get("eos_token_id")
        if streamer is not None:
            streamer.put(ids.cpu())
        sampling = self._value(options, "do_sample", False)
        made = generate(
            self._target, ids, self._drafter(self._target), options["max_new_tokens"], float(self._value(options, "temperature", 1.0)) if sampling else 0.0,
            top_k=int(self._value(options, "top_k", _DEFAULT_TOP_K)), top_p=float(self._value(options, "top_p", 1.0)), k=self._k,
            seed=int(torch.randint(1 << 31, ())), stop_ids=None if stops is None else [stops] if isinstance(stops, int) else list(stops),
            attention_mask=options.get("attention_mask"), tell=None if streamer is None else lambda rows: streamer.put(torch.tensor(rows[0])),
        )  # fmt: skip
        if streamer is not None:
            streamer.end()
        return made.sequences

    def _value(self, options: dict[str, Any], name: str, default: Any) -> Any:
        found = options.get(name)
        if found is None:
            found = getattr(self._model.generation_config, name, None)
        return default if found is None else found

    def _refusal(self, args: tuple[Any, ...], ids: Any, options: dict[str, Any]) -> str:
        """Why a call is not for us; empty: it is."""
        given = {name for name, value in options.items() if value is not None}
        settings = {name for name, value in self._model.generation_config.to_diff_dict().items() if value is not None and not name.startswith("_")}
        if len(args) > 1 or not isinstance(ids, Tensor) or ids.dim() != 2:
            return "no prompt of token ids"
        if unknown := given - _OPTIONS:
            return f"{sorted(unknown)[0]} is not known here"
        if unknown := settings - _OPTIONS - _HARMLESS:
            return f"the generation config sets {sorted(unknown)[0]}"
        mask = options.get("attention_mask")
        if (
            bool((ids == self._model.generation_config.pad_token_id).any())
            if mask is None
            else mask.shape != ids.shape or bool((mask.long().diff(dim=1) < 0).any())
        ):
            return "padding is not masked, or not on the left"
        if "max_new_tokens" not in given:
            return "max_new_tokens is not given"
        return "several rows cannot be streamed" if "streamer" in given and len(ids) > 1 else ""
