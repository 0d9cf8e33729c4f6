"""Attention of rows in which documents lie side by side, each of which sees itself alone.

"masked": torch's attention under a mask of a row's length squared, which reads all pairs of tokens and of them drops most. "varlen": FlashAttention
on documents of any length, of which each reads its own pairs; on GPUs.

Shapes: B rows, T positions, N documents, H heads, K heads of keys and values, D head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from angelslim_core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARLEN = "angelslim_varlen"  # among transformers' attention functions
# places for documents' starts at least: compiled layers are of a number of them
FEWEST = 64
# of what attention functions are asked, what this one does not do
_UNKNOWN = ("softcap", "s_aux", "sliding_window", "position_bias")


def starts_of(positions: Tensor, is_padding: Tensor, longest: int, places: int = FEWEST) -> Tensor:
    """[N + 1] int32: where documents start among all tokens of a batch, and at last where these end, repeated to fill all places.

    Args:
        positions: [B, T], from 0 in each document; what pads a row on its right is as few documents as may be.
        is_padding: [B, T] bool.
        longest: no document has more tokens.
        places: if they are too few, the next power of two.
    """
    goes_on = torch.zeros_like(is_padding)
    goes_on[:, 1:] = is_padding[:, 1:] & is_padding[:, :-1] & ((is_padding.cumsum(1)[:, 1:] - 1) % longest != 0)
    first = positions == 0
    first[:, 0] = True
    found = (first & ~goes_on).reshape(-1).nonzero()[:, 0]
    if len(found) >= places:
        places = 1 << len(found).bit_length()
    starts = torch.full((places,), positions.numel(), dtype=torch.int32)
    starts[: len(found)] = found
    return starts


def mask_of(positions: Tensor) -> Tensor:
    """[B, 1, T, T] bool: which positions (last) a position sees, those of its document up to itself."""
    documents = (positions == 0).cumsum(1)
    places = torch.arange(positions.shape[1], device=positions.device)
    return ((documents[:, :, None] == documents[:, None, :]) & (places[:, None] >= places)).unsqueeze(1)


def can_mask(model: PreTrainedModel) -> bool:
    """Whether all layers see all of a document up to themselves, by torch's attention: then one mask is all that they need."""
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    is_whole = kinds <= {"full_attention"} and getattr(config, "sliding_window", None) is None
    return is_whole and config is config.get_text_config() and config._attn_implementation == "sdpa" and model._supports_attention_backend


def varlen_obstacle(model: PreTrainedModel) -> str:
    """Why documents' attention cannot be of variable length; empty: it can."""
    config: Any = model.config
    size = getattr(config, "head_dim", None) or config.get_text_config().hidden_size // config.get_text_config().num_attention_heads
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return "it runs in 16 bits on a GPU"
    if not can_mask(model) or not model._supports_flash_attn or getattr(config, "attn_logit_softcapping", None):
        return "the model's attention is of another kind"
    if getattr(config, "attention_dropout", 0.0):
        return "the model has attention_dropout"
    return "" if size % 8 == 0 and size <= 256 else f"heads of {size} do not fit it"


def register() -> None:
    """Make the attention known to transformers, as `VARLEN`."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, _varlen)


def _varlen(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0, **given: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it: query [B, H, T, D], keys and values [B, K, T, D], starts [N + 1]; [B, T, H, D].

    Raises:
        ModelError: the model asks for what it does not do, or does not pass on where documents start.
    """
    asked = [name for name in _UNKNOWN if given.get(name) is not None]
    if cu_seq_lens_q is None or asked or query.shape[-1] != value.shape[-1]:
        what = (
            f"asks its attention for {', '.join(asked) or 'values of another size'}" if cu_seq_lens_q is not None else "does not tell it where documents start"
        )
        raise ModelError(1010, type(module).__name__, what, "give attention: masked")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = documents_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def documents_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
    """[tokens, H, D] of tokens side by side, on a GPU FlashAttention of variable length.

    Args:
        query: [tokens, H, D]; key, value: [tokens, K, D].
        starts: as of `starts_of`.
        longest: no document has more tokens.
    """
    if query.device.type != "cpu":
        found = torch.ops.aten._flash_attention_forward(query, key, value, starts, starts, longest, longest, 0.0, True, False, scale=scale)
        out: Tensor = found[0]
        return out
    return reference(query, key, value, starts, scale)


def reference(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    """The definition, a document at a time."""
    ends = starts.tolist()
    out = []
    for first, end in pairwise(ends):
        if end > first:
            q, k, v = (x[first:end].transpose(0, 1)[None] for x in (query, key, value))
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            out.append(found[0].transpose(0, 1))
    return torch.cat(out)
