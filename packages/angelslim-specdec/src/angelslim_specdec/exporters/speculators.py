"""The layout of the speculators library, which vLLM serves. Its layers count hidden states, the embedding being the first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from angelslim_core.errors import ModelError

from .base import NORM_FLAGS, Facts, Fields, Given, Layout, default_layers, layer_facts, layer_fields

VERSION = "0.3.0"
CLASSES = {"eagle3": "Eagle3Speculator", "dflash": "DFlashSpeculator", "dspark": "DSparkSpeculator"}


class Speculators(Layout):
    """EAGLE-3, DFlash and DSpark."""

    name = "speculators"
    renamed: ClassVar[Mapping[str, Mapping[str, str]]] = {"eagle3": {"midlayer.": "layers.0."}, "dflash": {}, "dspark": {}}

    def config(self, given: Given) -> dict[str, Any]:
        flags, counted = given.facts().flags, [i + 1 for i in given.config.aux_hidden_state_layer_ids]
        served = given.served
        method = {"proposal_type": "greedy", "speculative_tokens": given.k, "verifier_accept_k": 1, "accept_tolerance": 0.0}
        document = {
            "architectures": [CLASSES[given.name]], "speculators_model_type": given.name, "speculators_version": VERSION,
            "speculators_config": {
                "algorithm": given.name, "proposal_methods": [method], "default_proposal_method": "greedy",
                "verifier": {"name_or_path": served.name if served else None, "architectures": served.architectures if served else []},
            },
            "transformer_layer_config": layer_fields(given, "llama" if given.name == "eagle3" else "qwen3"),
            "draft_vocab_size": given.config.draft_vocab_size, "target_hidden_size": given.config.target_hidden_size,
            "tie_word_embeddings": False, "dtype": layer_fields(given, "llama")["dtype"],
        }  # fmt: skip
        if given.name == "eagle3":
            return {**document, **flags, "eagle_aux_hidden_state_layer_ids": counted, "embed_requires_grad": False}
        document |= {"aux_hidden_state_layer_ids": counted, "mask_token_id": flags["mask_token_id"], "block_size": flags["block_size"]}
        document["sample_from_anchor"] = flags["sample_from_anchor"]
        if given.name == "dspark":
            document |= {"markov_rank": flags["markov_rank"], "markov_head_type": flags["markov_head_type"]}
            document |= {"enable_confidence_head": flags["confidence_head"], "confidence_head_with_markov": flags["confidence_head"]}
        return document

    def facts(self, config: Fields, given: Given) -> Facts:
        layer, inner = config.inner("transformer_layer_config"), config.inner("speculators_config")
        methods = inner.get("proposal_methods")
        if not layer.values or not isinstance(methods, list) or not methods or not isinstance(methods[0], dict) or "verifier" not in inner.values:
            raise ModelError(756, "config.json", "lacks transformer_layer_config, proposal_methods or verifier, without which vLLM does not start")
        Fields(methods[0], "config.json: proposal_methods").whole("speculative_tokens")
        draft_vocab = config.whole("draft_vocab_size", layer.whole("vocab_size", 0))
        flags: dict[str, Any]
        if given.name == "eagle3":
            counted = config.ids("eagle_aux_hidden_state_layer_ids")
            flags = {flag: config.flag(flag, flag == "norm_before_residual") for flag in NORM_FLAGS}
            return layer_facts(layer, given, tuple(i - 1 for i in counted) or default_layers(given), draft_vocab, flags)
        flags = {"block_size": config.whole("block_size", 16), "mask_token_id": config.whole("mask_token_id", -1)}
        flags["sample_from_anchor"] = config.flag("sample_from_anchor", False)
        if given.name == "dspark":
            flags |= {
                "markov_rank": config.whole("markov_rank", 0), "markov_head_type": config.text("markov_head_type", "vanilla"),
                "confidence_head": config.flag("enable_confidence_head", False) and config.flag("confidence_head_with_markov", False),
            }  # fmt: skip
        return layer_facts(layer, given, tuple(i - 1 for i in config.ids("aux_hidden_state_layer_ids")), draft_vocab, flags)

    def serve(self, given: Given, folder: str) -> str:
        return f"--speculative-config '{json.dumps({'method': given.name, 'model': folder, 'num_speculative_tokens': given.k})}'"
