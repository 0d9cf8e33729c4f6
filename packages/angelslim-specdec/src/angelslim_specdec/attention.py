"""Targets attend through one function in transformers' interface, which learns of the current call from a context variable.

Shapes: B rows, T tokens of this call, S slots of the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from angelslim_core.errors import ModelError
from angelslim_core.kv_cache import attention_by, attention_of

from .dcut import Line
from .kernels.verify_attention import VERIFY_ATTENTION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Made = TypeVar("_Made")
_NAME = "specdec"
# what attends as a model was trained to; policies of other plugins do not, and would be left out
_EXACT = frozenset({"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"})
# what only a model's own eager attention computes
_EAGER = ("s_aux", "sinks", "softcap", "position_bias")


@dataclass
class Visible:
    """What the tokens of one call may attend to; masks are made once a call.

    Args:
        lengths: [B], int64: slots that are confirmed, the new tokens being in those after them; None: there is no cache,
            and the keys are the tokens themselves.
        depths: [T] or [B, T], int64: position of each new token, counted from `lengths`.
        ancestors: [B, T, A], bool: which of the A slots after `lengths` each one sees; None: all up to its own, there being T.
        documents: [B, T], int64: tokens see their own document only; without a cache.
        line: queries come in this line, and what was attended goes back into it; None: they are in their rows.
        rooms: memory in which kernels work, given on to later calls where it is to be kept.
    """

    lengths: Tensor | None
    depths: Tensor
    ancestors: Tensor | None = None
    documents: Tensor | None = None
    line: Line | None = None
    rooms: dict[Any, Any] = field(default_factory=dict, repr=False)
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def is_causal(self, window: int | None) -> bool:
        """Whether every token simply sees all keys up to itself."""
        return self.lengths is None and self.documents is None and (window is None or self.depths.shape[-1] <= window)

    def mask(self, keys: int, window: int | None = None) -> Tensor:
        """[B or 1, 1, T, S], bool: which of the first S slots each token sees.

        Args:
            window: positions a token sees, its own included.
        """
        return self.once((keys, window), lambda: self._own(window) if self.lengths is None else self._slots(self.lengths, keys, window))

    def bias(self, keys: int, window: int | None, dtype: torch.dtype, groups: int = 1) -> Tensor:
        """`mask` as what is added to scores, once for each of the groups of queries: [B or 1, 1, groups T, S]."""

        def make() -> Tensor:
            mask = self.mask(keys, window)
            return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf).repeat(1, 1, groups, 1)

        return self.once((keys, window, dtype, groups), make)

    def room(self, key: Any, make: Callable[[], _Made]) -> _Made:
        """As `once`, but for as long as `rooms` is kept: nothing in it depends on what is visible."""
        if key not in self.rooms:
            self.rooms[key] = make()
        return self.rooms[key]  # type: ignore[no-any-return]

    def once(self, key: Any, make: Callable[[], _Made]) -> _Made:
        """What `make` gives, made by the first layer that asks."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[no-any-return]

    def _own(self, window: int | None) -> Tensor:
        number = torch.arange(self.depths.shape[-1], device=self.depths.device)
        behind = number[:, None] - number
        seen = (behind >= 0) & (behind < window) if window is not None else behind >= 0
        if self.documents is None:
            return seen[None, None]
        return (seen & (self.documents[:, :, None] == self.documents[:, None]))[:, None]

    def _slots(self, lengths: Tensor, keys: int, window: int | None) -> Tensor:
        tokens = self.depths.shape[-1]
        slot = torch.arange(keys, device=lengths.device)
        new = slot - lengths[:, None]  # [B, S]: number among the new tokens
        if self.ancestors is None:
            seen = new[:, None] <= torch.arange(tokens, device=lengths.device)[:, None]
        else:
            slots = self.ancestors.shape[2]
            among = self.ancestors.gather(2, new.clamp(0, slots - 1)[:, None].expand(-1, tokens, -1))
            seen = (new < 0)[:, None] | (among & (new < slots)[:, None])
        if window is not None:
            depths = self.depths.expand(len(lengths), -1)
            depth = torch.where(new < 0, new, depths.gather(1, new.clamp(0, tokens - 1)))
            seen = seen & (depths[:, :, None] - depth[:, None] < window)
        return seen[:, None]


_CALL: ContextVar[Visible] = ContextVar("specdec_call")


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *,
    scaling: float | None = None, sliding_window: int | None = None, dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """transformers' attention function: q [B, Hq, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] to [B, T, Hq, Dv].

    Queries in a line are [1, Hq, N, D], to [1, N, Hq, Dv]: keys cost more than the queries that read them, so that rows are as long as ever here.

    Raises:
        ModelError: the model wants of attention what is not known here.
    """
    visible, scale = _CALL.get(), query.shape[-1] ** -0.5 if scaling is None else scaling
    if (line := visible.line) is not None:
        query = line.rows(query.transpose(1, 2)).transpose(1, 2)
    attended, weights = _attend(visible, module, query, key, value, scale, sliding_window, options)
    return attended if line is None else line.line(attended), weights


def _attend(
    visible: Visible, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None, options: dict[str, Any]
) -> tuple[Tensor, Any]:  # fmt: skip
    if any(options.get(name) is not None for name in _EAGER):
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise ModelError(704, type(module).__name__, f"attends in a way that is not known here: with one of {', '.join(_EAGER)}")
        return eager(module, query, key, value, visible.bias(key.shape[2], sliding_window, query.dtype), scaling=scale, dropout=0.0, **options)  # type: ignore[no-any-return]
    return VERIFY_ATTENTION(query, key, value, visible, scale, sliding_window).transpose(1, 2), None


class Coupling:
    """Lets a model attend through `attend` for the time of a call, and as before else.

    Raises:
        ModelError: the model has layers that keep no keys and values, or does not take its attention from transformers' interface.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int) -> None:
        from transformers import PreTrainedModel
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        inner = {m.layer_idx: m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and getattr(m, "is_causal", False)}
        missing = sorted(set(range(num_layers)) - inner.keys())
        if missing or not model._can_set_attn_implementation():
            what = f"layers {missing!r:.60} keep a state instead of keys and values, which cannot go back when a token is refused"
            own = "computes attention in a way of its own, not through transformers' interface"
            raise ModelError(705, type(model).__name__, what if missing else own)
        ids = {id(m.config) for m in inner.values()}
        # masks may be made by the config of any module around
        outer = [m.config for m in model.modules() if isinstance(m, PreTrainedModel) and any(id(getattr(n, "config", None)) in ids for n in m.modules())]
        self._configs = list({id(c): c for c in [*(m.config for m in inner.values()), *outer]}.values())
        # with no mask function of this name transformers makes no masks
        ALL_ATTENTION_FUNCTIONS.register(_NAME, attend)

    @contextmanager
    def __call__(self, visible: Visible) -> Iterator[None]:
        """Inside, the model attends to what is visible.

        Raises:
            ModelError: it attends by a policy that is not known here.
        """
        before = [attention_of(config) for config in self._configs]
        if other := set(before) - _EXACT:
            raise ModelError(712, "attention", f"goes by {sorted(other)[0]!r:.50}, which speculative decoding would leave out", "detach that policy first")
        token = _CALL.set(visible)
        try:
            for config in self._configs:
                attention_by(config, _NAME)
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                attention_by(config, name)
            _CALL.reset(token)
