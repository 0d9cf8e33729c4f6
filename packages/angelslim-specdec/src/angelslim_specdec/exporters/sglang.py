"""SGLang's layout. Its layers are numbers of layers from 0; to serve an FP8 target it wants drafts in FP16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import Facts, Fields, Given, Layout, default_layers, layer_facts, layer_fields
from .vllm import block_facts, block_fields


class SGLang(Layout):
    """EAGLE-3 in its original form, and DFlash with the target's own head."""

    name = "sglang"
    renamed: ClassVar[Mapping[str, Mapping[str, str]]] = {"eagle3": {}, "dflash": {}}

    def lacks(self, given: Given) -> str:
        if given.name == "dflash":
            return "" if given.full_vocabulary else "a DFlash draft there has the target's whole vocabulary"
        flags = [name for name, value in given.facts().flags.items() if value]
        if flags:
            return f"its EAGLE-3 knows no {', '.join(flags)}"
        if len(given.config.aux_hidden_state_layer_ids) != 3:
            return "its EAGLE-3 reads three layers"
        return "" if given.config.num_hidden_layers == 1 else "its EAGLE-3 has one layer"

    def config(self, given: Given) -> dict[str, Any]:
        if given.name == "dflash":
            return block_fields(given)
        return {
            "architectures": ["LlamaForCausalLMEagle3"], **layer_fields(given, "llama"),
            "draft_vocab_size": given.config.draft_vocab_size, "target_hidden_size": given.config.target_hidden_size,
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(given.config.aux_hidden_state_layer_ids)},
        }  # fmt: skip

    def facts(self, config: Fields, given: Given) -> Facts:
        if given.name == "dflash":
            return block_facts(config, given, config.whole("vocab_size", 0))
        ids = config.inner("eagle_config").ids("eagle_aux_hidden_state_layer_ids") or default_layers(given)
        # it has no flags, whatever the config says
        return layer_facts(config, given, ids, config.whole("draft_vocab_size", config.whole("vocab_size", 0)), dict.fromkeys(given.facts().flags, False))

    def serve(self, given: Given, folder: str) -> str:
        if given.name == "dflash":
            return f"--speculative-algorithm DFLASH --speculative-draft-model-path {folder}"
        return (
            f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {folder} --speculative-num-steps {given.k}"
            f" --speculative-eagle-topk 1 --speculative-num-draft-tokens {given.k + 1}"
        )
