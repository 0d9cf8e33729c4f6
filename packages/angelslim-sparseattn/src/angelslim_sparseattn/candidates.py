"""Policies as a command line names them: `stem:rate=.1,xattention`, and where queries, keys and values come from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from angelslim_core.errors import RecipeError, UsageError
from angelslim_core.strict_yaml import parse

from .policies import make_policy

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from angelslim_core.plugins import PluginHost

    from .policies.base import Policy

# bytes of queries, keys and values that one forward pass leaves behind, at most, if a layer has no more
_HELD = 1 << 30
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Candidate:
    """A policy and how it was written.

    Args:
        label: as given.
        name, options: of `make_policy`.
    """

    label: str
    name: str
    options: Mapping[str, Any]
    policy: Policy = field(compare=False)


def candidates(text: str) -> list[Candidate]:
    """Policies of a list such as `stem:rate=.1:lam=0,xattention`.

    Raises:
        UsageError: no such policy or option, a value that does not fit, or one twice.
    """
    found = [_candidate(label) for label in re.split(r",(?=[a-z_]+(?:[:,]|$))", text.strip())]
    twice = [c.label for i, c in enumerate(found) if c in found[:i]]
    if twice:
        raise UsageError(581, "--policies", f"names {twice[0]} twice")
    return found


def _candidate(label: str) -> Candidate:
    name, *pairs = label.split(":")
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(582, "--policies", f"{pair!r} is no option", "write stem:rate=.1:lam=0")
        try:
            options[key] = parse(value, label)[0]
        except RecipeError as error:
            raise UsageError(583, "--policies", f"{pair!r} has no value: {error.what}") from error
    return Candidate(label, name, options, make_policy(name, **options))


def numbers(text: str, where: str, least: int = 0) -> list[int]:
    """Numbers of a list such as `8192,32768`; of nothing none.

    Raises:
        UsageError: something else.
    """
    if text and not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise UsageError(584, where, f"{text!r:.100} is no list of numbers such as 0,8")
    found = [int(n) for n in text.split(",") if n]
    if min(found, default=least) < least:
        raise UsageError(586, where, f"{min(found)} is below {least}")
    return found


@dataclass(frozen=True)
class Attention:
    """What one layer's attention reads: q [1, Hq, L, D], k [1, Hkv, L, D], v [1, Hkv, L, Dv], and what scores are multiplied by."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    layer: int | None = None


def drawn(length: int, heads: int, kv_heads: int, head_dim: int, dtype: str, device: str, seed: int = 0) -> Attention:
    """Queries, keys and values from N(0, 1)."""
    import torch

    if heads % kv_heads:
        raise UsageError(585, "--heads", f"{heads} is no multiple of {kv_heads} KV heads")
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (
        torch.randn(1, h, length, head_dim, generator=generator, device=device, dtype=getattr(torch, DTYPES[dtype])) for h in (heads, kv_heads, kv_heads)
    )
    return Attention(q, k, v, head_dim**-0.5)


class Reader:
    """A loaded model, dense even where its folder has a policy, and a text that it reads.

    Args:
        model: folder, or a hub id when online.
        text: file.
        host: with the plugins that its layouts and layers need.

    Raises:
        ModelError: the folder is invalid, unknown or damaged.
    """

    def __init__(self, model: str, text: str, device: str, host: PluginHost) -> None:
        from angelslim_core.io.hub import resolve
        from angelslim_core.loading import load_model

        from .coupling import attachment

        folder = resolve(model)
        loaded = load_model(folder, device, host=host)
        if (attached := attachment(loaded.model)) is not None:  # an artifact with a policy
            attached.detach()
        self.model, self.name, self._folder, self._text, self._tokenizer = loaded.model, folder.name, folder, text, loaded.tokenizer

    def windows(self, count: int, length: int) -> Tensor:
        """ids [W, length] of the text, W at most `count`.

        Raises:
            UsageError: no tokenizer, no text, or one that is too short.
        """
        from angelslim_core.evaluation import text_windows

        return text_windows(self._tokenizer, self._folder, self._text, count, length).to(self.model.device)

    def ids(self, length: int) -> Tensor:
        """The text's first tokens [1, length]."""
        return self.windows(1, length)

    def layers(self, given: str | None) -> list[int]:
        """Layers of a list such as `0,8`; of None four, evenly spaced, among those that have attention.

        Raises:
            UsageError: something else.
        """
        every = self.attention_layers()
        if given is None:
            return [every[i * (len(every) - 1) // 3] for i in range(4)] if len(every) > 4 else every
        wrong = [n for n in numbers(given, "--layers") if n not in every]
        if wrong:
            raise UsageError(590, "--layers", f"{wrong[0]} is none of the layers with attention: {every[0]} to {every[-1]}")
        return numbers(given, "--layers")

    def attention_layers(self, but: Sequence[int] = ()) -> list[int]:
        """Numbers of the layers that become sparse if asked to, found by asking them.

        Raises:
            UsageError: there are none, or none but these.
        """
        import torch

        from .config import SparseAttentionConfig
        from .coupling import attach

        asked = SparseAttentionConfig.model_validate({"policy": "a_shape", "block": 16, "min_len": 0, "dense_layers": (), "executor": "reference"})
        with attach(self.model, asked) as attached, torch.no_grad():
            self.model(input_ids=torch.zeros(1, 32, dtype=torch.int64, device=self.model.device), use_cache=False)
            found = [row["layer"] for row in attached.stats() if row["sparse"] and row["layer"] not in but]
        if not found:
            raise UsageError(591, self.name, "has no layer whose attention could be sparse" + (f" but {', '.join(map(str, but))}" if but else ""))
        return found


def real(model: PreTrainedModel, ids: Tensor, layers: Sequence[int]) -> Iterator[Attention]:
    """What the attention of these layers reads while the dense model runs over ids [1, T].

    As many layers a forward pass as `_HELD` bytes hold, so that memory does not grow with the number of layers.
    """
    from angelslim_core.products import products

    from .coupling import captured

    left, count = list(layers), 1
    while left:
        now, left = left[:count], left[count:]
        with products(model.device.type):
            found = captured(model, ids, now)
        for layer in now:
            q, k, v, scale = found.pop(layer)
            count = max(1, _HELD // (q.nbytes + k.nbytes + v.nbytes))
            yield Attention(q, k, v, scale, layer)
