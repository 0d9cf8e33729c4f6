"""What a layout is: how an engine stores a draft, and what the engine makes of a config that it is given.

A layout writes a config, and reads one back as its engine does, defaults and conventions included, into the same `Facts`
that a draft's own config gives. Whatever the two disagree on is a draft that would load and accept nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from angelslim_core.adapters import named
from angelslim_core.errors import ModelError
from angelslim_core.io.checkpoint import FLOATS, Checkpoint

from ..drafts.base import DraftConfig
from ..folder import Stored

NORM_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps",
)  # fmt: skip
# what rope is in an engine whose config says nothing
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Facts:
    """What a draft is, whoever stores it.

    Args:
        layer_ids: layers of the target whose outputs are read, from 0.
        ropes: what readers of each kind take rope to be.
        max_positions: positions that it can serve.
        tied: its head is its embedding.
        draft_vocab: tokens that it proposes.
        dtype: as torch names it.
        sizes: of its layers.
        flags: norm flags of EAGLE-3, and what a block draft is told of its blocks.
    """

    layer_ids: tuple[int, ...]
    ropes: tuple[Mapping[str, Any], ...]
    max_positions: int
    tied: bool
    draft_vocab: int
    dtype: str
    sizes: Mapping[str, Any]
    flags: Mapping[str, Any]


class Served:
    """The target's folder, as far as an engine's draft depends on it; headers only.

    Raises:
        ModelError: no model folder, or sizes that are none.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._checkpoint = name, Checkpoint.open(folder)
        config = self._checkpoint.config
        fields = Fields({**config, **(config.get("text_config") or {})}, "config.json of the target")
        self.hidden_size, self.vocab_size = fields.whole("hidden_size"), fields.whole("vocab_size")
        self.num_layers, self.max_positions = fields.whole("num_hidden_layers"), fields.whole("max_position_embeddings")
        classes = config.get("architectures")
        self.architectures = [str(a) for a in classes] if isinstance(classes, list) else []
        self.fp8 = any(info.dtype == "F8_E4M3" for info in self._checkpoint.tensors.values())

    def head(self, rows: Tensor) -> Tensor:
        """Rows [Vd, H] of the head, or of the embedding that is tied to it, in its dtype.

        Raises:
            ModelError: none is stored in floating point.
        """
        for end in ("lm_head.weight", "embed_tokens.weight"):
            for name, info in self._checkpoint.tensors.items():
                if name.endswith(end) and info.dtype in FLOATS and info.shape == (self.vocab_size, self.hidden_size):
                    return self._checkpoint.read(name)[rows]
        raise ModelError(758, self.name, "stores neither a head nor an embedding in floating point")


@dataclass(frozen=True)
class Given:
    """What is exported.

    Args:
        draft: a draft's folder.
        dtype: safetensors' name of the dtype that floating-point tensors get.
        k: tokens that the engine is to propose at a time.
        served: the target, where its folder was given.
    """

    draft: Stored
    dtype: str
    k: int
    served: Served | None = None

    @property
    def name(self) -> str:
        return self.draft.kind.name

    @property
    def config(self) -> DraftConfig:
        return self.draft.config

    def option(self, name: str, default: Any = None) -> Any:
        """An option of the draft's family."""
        return getattr(self.config, name, default)

    @property
    def full_vocabulary(self) -> bool:
        return self.config.draft_vocab_size == self.config.vocab_size

    @property
    def left_out(self) -> str:
        """What of the draft no engine has a place for; "": nothing."""
        return ", ".join(self.option("exit_signals", ()))

    def tensor(self, name: str) -> Tensor:
        """A tensor of the draft without rows for what is left out."""
        found = self.draft.read(name)
        return found[: self.config.hidden_size] if self.left_out and name == "fc.weight" else found

    @property
    def needs_head(self) -> bool:
        """Whether the draft uses rows of the target's head, which an engine does not choose itself."""
        return not self.full_vocabulary and "lm_head.weight" not in self.draft.specs

    def facts(self) -> Facts:
        """What every engine has to make of it."""
        flags: dict[str, Any]
        if self.name == "eagle3":
            flags = {flag: bool(self.option(flag, False)) for flag in NORM_FLAGS}
        else:
            flags = {name: self.option(name) for name in ("block_size", "mask_token_id", "sample_from_anchor")}
            if self.name == "dspark":
                flags |= {"markov_rank": self.option("markov_rank"), "markov_head_type": "vanilla", "confidence_head": True}
        return Facts(
            tuple(self.config.aux_hidden_state_layer_ids), (normal_rope(self.config.rope_parameters),), self.config.max_position_embeddings, False,
            self.config.draft_vocab_size, TORCH_NAMES[self.dtype], {name: getattr(self.config, name) for name in SIZES}, flags,
        )  # fmt: skip


class Layout(ABC):
    """An engine's way to store drafts.

    Attributes:
        name: as in `--to`.
        renamed: draft -> {prefix of its tensors: prefix there}; drafts that are not named have no place in the layout.
    """

    name: ClassVar[str]
    renamed: ClassVar[Mapping[str, Mapping[str, str]]]

    def refusal(self, given: Given) -> str:
        """Why the layout cannot hold a draft; "": it can."""
        if given.name not in self.renamed:
            return f"has no place for a {given.name} draft, only for {', '.join(self.renamed)}"
        ids, served = given.config.aux_hidden_state_layer_ids, given.served
        if any(a >= b for a, b in pairwise(ids)):
            return f"engines read layers in ascending order, each once, and this draft wants {list(ids)}"
        if given.config.hidden_size != given.config.target_hidden_size:
            return "engines give a draft the target's embedding, which is not as wide as this one"
        if given.needs_head and served is None:
            return "the draft reads rows of the target's head, which are stored with it: give the target's folder"
        if given.name == "dflash" and given.option("sample_from_anchor"):
            return "no engine's DFlash drafts a token from the row of the last one"
        return self.lacks(given)

    def lacks(self, given: Given) -> str:
        """What of a draft it has a place for the engine cannot do; "": nothing."""
        return ""

    def stored_name(self, given: Given, name: str) -> str:
        """Name there of a draft's tensor."""
        for old, new in self.renamed[given.name].items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    @abstractmethod
    def config(self, given: Given) -> dict[str, Any]:
        """Its config.json."""

    @abstractmethod
    def facts(self, config: Fields, given: Given) -> Facts:
        """What the engine makes of a config.json."""

    @abstractmethod
    def serve(self, given: Given, folder: str) -> str:
        """How the engine is told of it."""


class Fields:
    """An object of somebody's JSON, read by type.

    Raises:
        ModelError: from every method, for a value of another type.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values, self.where = values, where

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def whole(self, name: str, default: int | None = None) -> int:
        return int(self._typed(name, default, lambda v: type(v) is int, "whole number"))

    def real(self, name: str, default: float | None = None) -> float:
        return float(self._typed(name, default, lambda v: type(v) in (int, float) and abs(v) < 1e30, "number"))

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._typed(name, default, lambda v: type(v) is bool, "true or false"))

    def text(self, name: str, default: str | None = None) -> str:
        return str(self._typed(name, default, lambda v: isinstance(v, str), "name"))

    def ids(self, name: str) -> tuple[int, ...]:
        """Numbers; none where there is no list."""
        found = self._typed(name, [], lambda v: isinstance(v, list) and all(type(i) is int for i in v), "list of whole numbers")
        return tuple(found)

    def inner(self, name: str) -> Fields:
        """An object; empty where there is none."""
        return Fields(self._typed(name, {}, lambda v: isinstance(v, dict), "object"), f"{self.where}: {name}")

    def _typed(self, name: str, default: Any, good: Any, what: str) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if not good(value):
            raise ModelError(759, self.where, f"{name} is {value!r:.80}, and a {what} is wanted")
        return value


def layer_fields(given: Given, architecture: str) -> dict[str, Any]:
    """Entries that transformers' config of a layer has, under every name that some version of it reads."""
    rope = normal_rope(given.config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        **named(architecture), **{name: getattr(given.config, name) for name in SIZES},
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "max_position_embeddings": given.config.max_position_embeddings,
        "rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": scaling if len(scaling) > 1 else None,
        "dtype": TORCH_NAMES[given.dtype], "torch_dtype": TORCH_NAMES[given.dtype],
    }  # fmt: skip


def layer_facts(config: Fields, given: Given, layer_ids: tuple[int, ...], draft_vocab: int, flags: Mapping[str, Any]) -> Facts:
    """What an engine makes of such entries."""
    old = {**DEFAULT_ROPE, **config.inner("rope_scaling").values, "rope_theta": config.real("rope_theta", 10000.0)}
    new = config.inner("rope_parameters").values
    ropes = (normal_rope({**DEFAULT_ROPE, **new}) if new else normal_rope(old), normal_rope(old))
    sizes: dict[str, Any] = {name: config.whole(name, 0) for name in SIZES if name != "rms_norm_eps"}
    sizes["rms_norm_eps"] = config.real("rms_norm_eps", 1e-6)
    sizes = {name: sizes[name] for name in SIZES}
    dtype = config.text("dtype", config.text("torch_dtype", ""))
    tied = config.flag("tie_word_embeddings", False)
    return Facts(layer_ids, ropes, config.whole("max_position_embeddings", 2048), tied, draft_vocab, dtype, sizes, flags)


def default_layers(given: Given) -> tuple[int, ...]:
    """Layers that engines read for EAGLE-3 where a config names none."""
    count = given.config.num_target_layers
    return (1, count // 2 - 1, count - 4)


def normal_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rope under its present names, so that two can be compared."""
    kept = {key: value for key, value in rope.items() if key not in ("type", "rope_type") and value is not None}
    theta: Any = rope.get("rope_theta")
    number = float(theta) if type(theta) in (int, float) else theta
    return {**kept, "rope_type": rope.get("rope_type") or rope.get("type") or "default", "rope_theta": number}
