"""What a model's head reads, so that logits are made where they are needed, some rows at a time.

Shapes: B rows, T positions, H hidden size, V vocabulary, N chosen positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from angelslim_core.errors import ModelError
from angelslim_core.fake_quant import FakeQuantizedLinear

from .attention import VARLEN, can_mask, mask_of, starts_of
from .targets import Batch, Hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# kinds of layers whose tokens see just those that a mask lets them see, so that documents can share a row
_MASKED = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class Reader:
    """Runs a causal language model up to its head.

    Attributes:
        is_varlen: attention is `attention.VARLEN`, where `attention.varlen_obstacle` has nothing against it.

    Raises:
        ModelError: the head is no plain linear.
    """

    is_varlen = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        head: Any = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or isinstance(head, FakeQuantizedLinear):
            what = "is rounded" if isinstance(head, FakeQuantizedLinear) else "is no linear"
            raise ModelError(910, type(model).__name__, f"its head {what}, and logits are made of hidden states here", "leave the head out of the targets")
        self._head, self._config, self._is_checked = head, model.config.get_text_config(), False

    @property
    def can_pack(self) -> bool:
        """Whether documents can share a row without seeing each other."""
        kinds = set(getattr(self._config, "layer_types", None) or ())
        return kinds <= _MASKED and self._config is self.model.config

    def __call__(self, batch: Batch) -> Hidden:
        """Hidden states of all positions, with gradients where the caller has them.

        Raises:
            ModelError: the model makes its logits in another way than is known here.
        """
        found: list[Tensor] = []

        def before_head(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            found.append(args[0])
            return (args[0][:, :1], *args[1:])

        hook = self._head.register_forward_pre_hook(before_head)
        try:
            with self._attention():
                logits = self.model(input_ids=batch.input_ids, use_cache=False, **self._given(batch)).logits
        finally:
            hook.remove()
        config = self._config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        hidden = Hidden(found[0], self._head.weight, self._head.bias, getattr(config, "final_logit_softcapping", None), scale)
        if not self._is_checked:
            with torch.no_grad():
                own = logits_of(hidden, found[0][:, :1])
                if not torch.allclose(own, logits.float(), rtol=0.05, atol=0.02 * float(logits.abs().max())):
                    raise ModelError(911, type(self.model).__name__, "makes its logits of hidden states in a way that is not known here")
            self._is_checked = True
        return hidden

    @contextmanager
    def _attention(self) -> Iterator[None]:
        config: Any = self.model.config
        was = config._attn_implementation
        try:
            if self.is_varlen:
                config._attn_implementation = VARLEN
            yield
        finally:
            if self.is_varlen:
                config._attn_implementation = was

    def _given(self, batch: Batch) -> dict[str, Any]:
        """What the model needs to know of documents; attention is causal and padding stands on the right, so that rows need no mask for themselves."""
        given: dict[str, Any] = {} if batch.positions is None else {"position_ids": batch.positions}
        rows, length = batch.input_ids.shape
        if self.is_varlen:
            starts = batch.starts
            if starts is None and batch.positions is not None:
                starts = starts_of(batch.positions.cpu(), ~batch.attention_mask.cpu(), length).to(batch.input_ids.device)
            elif starts is None:
                starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=batch.input_ids.device)
            given |= {"cu_seq_lens_q": starts, "max_length_q": batch.longest or length}
        elif batch.positions is not None and can_mask(self.model):
            given["attention_mask"] = mask_of(batch.positions)  # transformers, which would make it, waits for the device to know whether it must
        return given


def logits_of(hidden: Hidden, states: Tensor) -> Tensor:
    """fp32 logits [..., V] of some of the hidden states [..., H]."""
    logits = nn.functional.linear(states, hidden.weight, hidden.bias).float() * hidden.scale
    return logits if hidden.softcap is None else hidden.softcap * torch.tanh(logits / hidden.softcap)
