"""Statistics of attention, taken where it happens: only the layers that a strategy needs are looked at, and only in a prompt's pass.

Shapes: H heads, n tokens of an encoder's call, d channels of a head, T tokens that the encoder makes for the language model, B rows, L columns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from angelslim_core.errors import UsageError
from angelslim_core.kv_cache import Attend, tapped

from .models import Size, Towers
from .plan import Grid, Need

_EAGER = "mmprune_eager"


def window_order(grids: Iterable[Grid], side: int) -> Tensor:
    """Numbers of the tokens of images in the order of their windows, [T], on the host, as Qwen2.5-VL's encoder computes them (arXiv 2502.13923, 2.1.1).

    Args:
        side: of a window, in tokens.
    """
    found: list[Tensor] = []
    first = 0
    for frames, rows, columns in grids:
        t, r, c = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
        window = (t * (rows // side + 1) + r // side) * (columns // side + 1) + c // side
        found.append(window.flatten().argsort(stable=True) + first)
        first += frames * rows * columns
    return torch.cat(found)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _tap(stack: ExitStack, attention: nn.Module, function: Any) -> None:
    """Look at an attention module until the stack is closed; then its config is as it was."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = attention.config
    before = config._attn_implementation
    stack.callback(lambda: setattr(config, "_attn_implementation", before))
    if before == "eager":  # each of transformers' files has its own, and none is registered
        ALL_ATTENTION_FUNCTIONS.register(_EAGER, _eager)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        config._attn_implementation = _EAGER
    stack.enter_context(tapped(attention, function))


@dataclass
class EncoderCall:
    """What an encoder was given, and what was seen of its attention.

    Args:
        made: its output, while that lives.
        values: [T] or [T, d] by need.
    """

    sizes: Sequence[Size]
    values: dict[Need, Tensor]
    made: ref[Tensor] | None = None

    def made_it(self, output: Any) -> bool:
        """Whether an output of an encoder is of this call."""
        return output is not None and self.made is not None and self.made() is getattr(output, "last_hidden_state", None)


class EncoderCapture:
    """Statistics of one call of an encoder, while a stack is open."""

    def __init__(self, stack: ExitStack, towers: Towers, needs: Iterable[Need], sizes: Sequence[Size]) -> None:
        self._towers = towers
        self.call = EncoderCall(sizes, {})
        self._needs = list(dict.fromkeys(needs))
        by_layer: dict[int, list[Need]] = {}
        for need in self._needs:
            by_layer.setdefault(towers.layer_of(need, need.statistic), []).append(need)
        for layer, of_layer in by_layer.items():
            _LayerCapture(self, stack, towers.encoder_attention[layer], of_layer)

    def add(self, needs: Sequence[Need], pieces: list[tuple[Tensor, Tensor]], hidden: Tensor) -> None:
        """What one call of a layer's attention said.

        Args:
            pieces: q, k [1 or media, H, n, d], each attending to itself alone.
            hidden: [1 or media, n, D], what the attention got.
        """
        from .statistics import of_pieces

        towers, media, sizes = self._towers, self._towers.media, self.call.sizes
        tokens = [grid.frames * grid.rows * grid.columns for grid, _ in sizes]
        lengths = [padded for _, padded in sizes] if sizes[0].padded else None  # one call for all, of one length
        for need in needs:
            if need.statistic == "hidden":
                if lengths is None:
                    states = hidden[:, int(media.has_class_token) :].flatten(0, 1)
                else:
                    states = torch.cat([of[: n * towers.unit] for of, n in zip(hidden, tokens, strict=True)])
                values = states.float().unflatten(0, (-1, towers.unit)).mean(1)
            else:
                scale = 1.0 if media.scales_queries else pieces[0][0].shape[-1] ** -0.5
                with torch.autocast(hidden.device.type, enabled=False):
                    values = of_pieces(need.statistic, pieces, towers.unit, media.has_class_token, scale, lengths)
                values = values.flatten(0, 1) if lengths is None else torch.cat([of[:n] for of, n in zip(values, tokens, strict=True)])
            if towers.window_side:
                values = values[window_order((grid for grid, _ in sizes), towers.window_side).argsort().to(values.device)]
            self.call.values[need] = values

    def finish(self) -> EncoderCall:
        """
        Raises:
            UsageError: a layer was not run, or its tokens are not those of the media.
        """
        tokens = sum(grid.frames * grid.rows * grid.columns for grid, _ in self.call.sizes)
        for need in self._needs:
            seen = len(self.call.values[need]) if need in self.call.values else 0
            if seen != tokens:
                raise UsageError(814, f"layer {need.layer}", f"the encoder showed attention of {seen} of {tokens} tokens", "choose a layer that it runs")
        return self.call


class _LayerCapture:
    """One attention module of an encoder: the pieces that a call computes, then what they say."""

    def __init__(self, owner: EncoderCapture, stack: ExitStack, attention: nn.Module, needs: Sequence[Need]) -> None:
        self._owner, self._needs = owner, needs
        self._calls: list[tuple[Tensor, Tensor]] = []
        _tap(stack, attention, self._look)
        for hook in (attention.register_forward_pre_hook(self._begin, with_kwargs=True), attention.register_forward_hook(self._end)):
            stack.callback(hook.remove)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._calls, self._hidden, self._bounds = [], hidden if hidden.ndim == 3 else hidden[None], kwargs.get("cu_seqlens")

    def _look(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> tuple[Tensor, Any]:
        self._calls.append((query, key))
        return attend(query, key, value)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        pieces = self._calls
        if self._bounds is not None and len(pieces) == 1:  # all in one call that is told where each ends
            sizes = self._bounds.diff().tolist()
            pieces = list(zip(pieces[0][0].split(sizes, 2), pieces[0][1].split(sizes, 2), strict=True))
        self._owner.add(self._needs, pieces, self._hidden)
        self._calls = []


class LanguageCapture:
    """Statistics of the language model's attention while a stack is open.

    Args:
        needs: by layer.
        rows: tells, when a layer runs, of each row the real tokens of this pass, which are its last, and which keys before them are real.
    """

    def __init__(self, stack: ExitStack, towers: Towers, needs: Iterable[Need], rows: Any) -> None:
        self._rows = rows
        self.found: dict[Need, Tensor] = {}
        by_layer: dict[int, list[Need]] = {}
        for need in needs:
            by_layer.setdefault(towers.layer_of(need, need.statistic), []).append(need)
        for layer, of_layer in by_layer.items():
            self._add(stack, towers.attention[layer], of_layer)

    def _add(self, stack: ExitStack, attention: nn.Module, needs: Sequence[Need]) -> None:
        def states(module: nn.Module, args: Any, kwargs: Any) -> None:
            for need in needs:
                if need.statistic == "hidden":
                    self.found[need] = args[0] if args else kwargs["hidden_states"]

        def look(query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> tuple[Tensor, Any]:
            for need in needs:
                if need.statistic != "hidden":
                    with torch.autocast(query.device.type, enabled=False):
                        self.found[need] = self._statistic(need, query, key)
            return attend(query, key, value)

        _tap(stack, attention, look)
        stack.callback(attention.register_forward_pre_hook(states, with_kwargs=True).remove)

    def _statistic(self, need: Need, query: Tensor, key: Tensor) -> Tensor:
        """[B, L(, d)]; 0 where a row has no token."""
        from .statistics import of_llm

        lengths, before = self._rows()
        width, scale = query.shape[2], query.shape[-1] ** -0.5
        if before is None:
            return of_llm(need.statistic, query, key, scale, None if min(lengths) == width else lengths)
        found = []
        for i, n in enumerate(lengths):
            k = torch.cat([key[i : i + 1, :, : before.shape[1]][:, :, before[i]], key[i : i + 1, :, key.shape[2] - n :]], 2)
            values = of_llm(need.statistic, query[i : i + 1, :, width - n :], k, scale)[0, -n:]
            found.append(pad(values, (0, 0) * (values.ndim - 1) + (width - n, 0)))
        return torch.stack(found)
