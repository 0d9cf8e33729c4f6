"""Llama, Qwen2 and Qwen3 as llama.cpp knows them: names of tensors, order of rows, hyperparameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import ModelError, PlanError

OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class Shape:
    """Hyperparameters of a config (hostile input), under llama.cpp's names where `fields` gives them.

    Raises:
        PlanError: a window or rotary scaling this export does not know.
        ModelError: a value is missing or impossible.
    """

    def __init__(self, config: Mapping[str, Any], architecture: str) -> None:
        self.config, self.architecture = config, architecture
        if (config.get("use_sliding_window", True) and config.get("sliding_window") is not None) or (config.get("mlp_bias") and architecture != "llama"):
            raise PlanError(227, "gguf", "this export knows neither sliding windows nor, but of Llama, biases of the feed-forward part")
        self.heads = self._count("num_attention_heads")
        self.kv_heads = self._count("num_key_value_heads", self.heads)
        self.head_dim = self._count("head_dim", self._count("hidden_size") // self.heads)
        self.rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        self.rope_type = str(self.rope.get("rope_type", self.rope.get("type", "default")))
        if self.rope_type not in ("default", "linear", "llama3", "yarn"):
            raise PlanError(228, "gguf", f"this export does not know rotary scaling {self.rope_type[:50]!r}")

    def name(self, tensor: str) -> str:
        """llama.cpp's name of a tensor."""
        module, _, suffix = tensor.rpartition(".")
        match = _LAYER.fullmatch(module)
        found = INSIDE.get(match[2]) if match else OUTSIDE.get(module)
        if found is None or suffix not in ("weight", "bias"):
            raise PlanError(232, tensor, "has no name in GGUF that this export knows")
        return f"blk.{match[1]}.{found}.{suffix}" if match else f"{found}.{suffix}"

    def row_order(self, tensor: str) -> list[int] | None:
        """Rows of a tensor in llama.cpp's order, None where they stay: its Llama rotates neighbouring pairs, not halves."""
        role = tensor.split(".")[-2]
        if self.architecture != "llama" or role not in ("q_proj", "k_proj"):
            return None
        half = self.head_dim // 2
        heads = self.heads if role == "q_proj" else self.kv_heads
        return [head * self.head_dim + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]

    def fields(self) -> dict[str, int | float | str]:
        """Hyperparameters by key, without the architecture's prefix."""
        fields: dict[str, int | float | str] = {
            "block_count": self._count("num_hidden_layers"),
            "context_length": self._count("max_position_embeddings"),
            "embedding_length": self._count("hidden_size"),
            "feed_forward_length": self._count("intermediate_size"),
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": self._number(self.config, "rms_norm_eps"),
            "rope.dimension_count": self.head_dim,
            "rope.freq_base": self._base(),
            "vocab_size": self._count("vocab_size"),
        }
        if self.rope_type in ("linear", "yarn"):
            fields |= {"rope.scaling.type": self.rope_type, "rope.scaling.factor": self._number(self.rope, "factor")}
        if self.rope_type == "yarn":
            fields["rope.scaling.original_context_length"] = int(self._number(self.rope, "original_max_position_embeddings"))
        return fields

    def rope_divisors(self) -> list[float] | None:
        """By what Llama 3's scaling divides each rotary frequency, None for other kinds."""
        if self.rope_type != "llama3":
            return None
        factor, low, high = (self._number(self.rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context, base = self._number(self.rope, "original_max_position_embeddings"), self._base()
        divisors = []
        for i in range(0, self.head_dim, 2):
            turns = context / (2 * math.pi * base ** (i / self.head_dim))
            smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
            divisors.append(1 / ((1 - smooth) / factor + smooth))
        return divisors

    def _base(self) -> float:
        return self._number(self.rope if "rope_theta" in self.rope else self.config, "rope_theta", 10000.0)

    def _count(self, key: str, default: int | None = None) -> int:
        found = default if self.config.get(key) is None else self.config[key]
        if type(found) is not int or not 0 < found < 1 << 31:
            raise ModelError(238, "config.json", f"{key} is {found!r:.50}, not a count")
        return found

    def _number(self, holder: Mapping[str, Any], key: str, default: float | None = None) -> float:
        found = holder.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
            raise ModelError(239, "config.json", f"{key} is {found!r:.50}, not a positive number")
        return float(found)
