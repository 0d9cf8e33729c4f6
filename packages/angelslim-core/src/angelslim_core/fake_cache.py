"""Attentions whose keys and values round while a model is trained, as linears of `fake_quant` do: what a `TrainedPass` with a `cache` puts in.

What `FakeCache.rounded` computes in evaluation is what a loaded model reads of its cache under `FakeCache.scales`.

Shapes: B batch, H key-value heads, T tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError, PluginError
from .io.checkpoint import Checkpoint, read_header
from .io.writer import keep_tensors
from .kv_cache import Attend, by_taps, trained_scales
from .schemes import CACHE_SCALES, CacheScheme


class FakeCache(nn.Module):
    """How the keys and values of one attention round. What is learnt of it, scales for instance, are its parameters (fp32).

    It is a tap that goes along where its attention is copied. What it learns of the first batch is as of a `fake_quant.FakeQuantizer`.

    Attributes:
        rounds: False: keys and values stay as they are.
        progress: share of the training that is done, 0 to 1, set before each step; for what is annealed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounds = True
        self.progress = 0.0

    def rounded(self, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded keys and values in their dtype, with gradients for them and for the scales; in evaluation those of `kv_cache.round_heads`."""
        raise NotImplementedError

    def scales(self) -> tuple[Tensor, Tensor]:
        """Of keys and of values as they are stored: fp32, of `CacheScheme.shape`."""
        raise NotImplementedError

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> tuple[Tensor, Any]:
        return attend(query, *(self.rounded(key, value) if self.rounds else (key, value)))


def place_cache(attention: nn.Module, quantizer: FakeCache) -> None:
    """Let an attention round its keys and values from now on.

    Raises:
        ModelError: the module computes attention in a way of its own.
    """
    by_taps(attention)
    attention.quantizer = quantizer.to(next(attention.parameters()).device)


def placed_caches(model: nn.Module) -> dict[str, FakeCache]:
    """How the keys and values of attentions round, by the attention's module name."""
    return {name: own for name, m in model.named_modules() if isinstance(own := m._modules.get("quantizer"), FakeCache)}


def remove_cache(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """Let an attention read its keys and values as they are again; returns the scales to store."""
    quantizer = attention.quantizer
    assert isinstance(quantizer, FakeCache)
    with torch.no_grad():
        found = quantizer.eval().scales()
    del attention.quantizer
    return found


def write_trained_cache(workdir: Path, trained: Mapping[str, tuple[Tensor, Tensor]], cache: CacheScheme, heads: int) -> None:
    """Keep the scales of keys and values that training left of attentions, by their names in the checkpoint: all of them, or nothing.

    Raises:
        PluginError: they are not as the scheme says.
    """
    tensors = {f"{name}.{suffix}": t.detach().float().cpu() for name, scales in trained.items() for suffix, t in zip(CACHE_SCALES, scales, strict=True)}
    for name, t in tensors.items():
        if tuple(t.shape) != cache.shape(heads):
            raise PluginError(1000, name, f"is of shape {list(t.shape)}, where {cache.name} has {list(cache.shape(heads))}", "give scales of CacheScheme.shape")
    keep_tensors(trained_scales(workdir), tensors)


def read_trained_cache(workdir: Path, attention: str) -> tuple[Tensor, Tensor]:
    """Scales of the keys and of the values of an attention as `write_trained_cache` kept them, on the CPU.

    Raises:
        ModelError: there are none.
    """
    file = trained_scales(workdir)
    if not file.is_file():
        raise ModelError(1000, str(file), "is missing: no step has trained the cache", "delete the work folder beside the output and run again")
    kept = Checkpoint(file.parent, {}, read_header(file))
    k_scale, v_scale = (kept.read(f"{attention}.{suffix}") for suffix in CACHE_SCALES)
    return k_scale, v_scale
