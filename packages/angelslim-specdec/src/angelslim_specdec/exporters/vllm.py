"""vLLM's plain layout, for `--speculative-config`. Its layers count hidden states, the embedding being the first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from .base import NORM_FLAGS, Facts, Fields, Given, Layout, default_layers, layer_facts, layer_fields


class VLLM(Layout):
    """EAGLE-3, DFlash and DSpark as vLLM reads them."""

    name = "vllm"
    renamed: ClassVar[Mapping[str, Mapping[str, str]]] = {"eagle3": {}, "dflash": {}, "dspark": {}}

    def config(self, given: Given) -> dict[str, Any]:
        ids = list(given.config.aux_hidden_state_layer_ids)
        extra = {"draft_vocab_size": given.config.draft_vocab_size, "target_hidden_size": given.config.target_hidden_size}
        if given.name == "eagle3":
            flags = given.facts().flags
            return {
                "architectures": ["Eagle3LlamaForCausalLM"], **layer_fields(given, "llama"), **extra, **flags,
                "eagle_aux_hidden_state_layer_ids": [i + 1 for i in ids], "num_aux_hidden_states": len(ids), "eagle_config": {"use_aux_hidden_state": True},
            }  # fmt: skip
        return {**block_fields(given), **extra}

    def facts(self, config: Fields, given: Given) -> Facts:
        draft_vocab = config.whole("draft_vocab_size", config.whole("vocab_size", 0))
        if given.name != "eagle3":
            return block_facts(config, given, draft_vocab)
        inner = config.inner("eagle_config")
        counted = config.ids("eagle_aux_hidden_state_layer_ids") or inner.ids("eagle_aux_hidden_state_layer_ids")
        flags = {flag: config.flag(flag, False) for flag in NORM_FLAGS}
        flags["norm_before_fc"] = inner.flag("norm_before_fc", flags["norm_before_fc"])
        return layer_facts(config, given, tuple(i - 1 for i in counted) or default_layers(given), draft_vocab, flags)

    def serve(self, given: Given, folder: str) -> str:
        return f"--speculative-config '{json.dumps({'method': given.name, 'model': folder, 'num_speculative_tokens': given.k})}'"


def block_fields(given: Given) -> dict[str, Any]:
    """Config of a block draft, as its authors publish them; vLLM and SGLang add 1 to the layers themselves."""
    ids, flags = list(given.config.aux_hidden_state_layer_ids), given.facts().flags
    fields = {**layer_fields(given, "qwen3"), "block_size": flags["block_size"], "num_target_layers": given.config.num_target_layers}
    fields["layer_types"] = ["full_attention"] * given.config.num_hidden_layers
    if given.name == "dflash":
        return {"architectures": ["DFlashDraftModel"], **fields, "dflash_config": {"mask_token_id": flags["mask_token_id"], "target_layer_ids": ids}}
    return {
        "architectures": ["Qwen3DSparkModel"], **fields, "mask_token_id": flags["mask_token_id"], "target_layer_ids": ids,
        "markov_rank": flags["markov_rank"], "markov_head_type": flags["markov_head_type"],
        "enable_confidence_head": flags["confidence_head"], "confidence_head_with_markov": flags["confidence_head"],
        "sample_from_anchor": flags["sample_from_anchor"],
    }  # fmt: skip


def block_facts(config: Fields, given: Given, draft_vocab: int) -> Facts:
    """What an engine makes of such a config."""
    inner = config.inner("dflash_config")
    flags: dict[str, Any] = {"block_size": config.whole("block_size", 16), "mask_token_id": inner.whole("mask_token_id", config.whole("mask_token_id", -1))}
    counted = config.ids("eagle_aux_hidden_state_layer_ids")
    flags["sample_from_anchor"] = config.flag("sample_from_anchor", True) if given.name == "dspark" else inner.flag("sample_from_anchor", False)
    ids = tuple(i - 1 for i in counted) or inner.ids("target_layer_ids") or config.ids("target_layer_ids")
    if given.name == "dspark":
        flags |= {
            "markov_rank": config.whole("markov_rank", 0), "markov_head_type": config.text("markov_head_type", "vanilla"),
            "confidence_head": config.flag("enable_confidence_head", False) and config.flag("confidence_head_with_markov", False),
        }  # fmt: skip
    return layer_facts(config, given, ids, draft_vocab, flags)
