"""DFlash: blocks in one forward, after one projection of the target's features.

Source: arXiv:2602.06036.
"""

from __future__ import annotations

from torch import Tensor, nn

from .block import BlockConfig, BlockDraft


class DFlash(BlockDraft):
    """Context: hidden_norm(fc(features side by side)), the same for all layers."""

    name = "dflash"
    architecture = "QwenDFlashDraftModel"

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(len(config.aux_hidden_state_layer_ids) * config.target_hidden_size, config.hidden_size, bias=False)

    def contexts(self, aux: Tensor) -> Tensor:
        return self.hidden_norm(self.fc(aux))[None]
