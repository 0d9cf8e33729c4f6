"""Quantizers trained block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from angelslim_core.errors import PlanError
from angelslim_core.passes import ModelPass, PassConfig, TrainedPass

if TYPE_CHECKING:
    from torch.nn import Module

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context
    from angelslim_core.plan import Plan


class Blockwise(ModelPass):
    """Quantizers, and weights where these are meant to be trained, block by block on each block's output.

    Source: block-wise training of all parameters, as in EfficientQAT (Chen et al., 2407.11062).
    """

    id = "distill.blockwise"

    class Config(PassConfig):
        epochs: int = Field(default=20, ge=1, description="Times that each block sees all samples.")
        batch: int = Field(default=1, ge=1, description="Samples a step, over all processes.")
        lr: float = Field(default=1e-3, gt=0, le=1, description="Highest learning rate of weights; it falls along a cosine.")
        quantizer_lr: float = Field(default=1e-4, gt=0, le=1, description="The same of what quantizers learn, scales for instance.")
        final_lr: float = Field(default=0.05, ge=0, le=1, description="Share of the rates at the end of a block.")
        train: Literal["auto", "quantizers"] = Field(default="auto", description="`auto`: quantizers, and the weights that they are trained with.")
        relative: bool = Field(
            default=True, description="Divide each token's squared error by its mean square: a few tokens carry a stream hundreds of times larger."
        )
        held_out: float = Field(
            default=0.1, ge=0, le=0.5, description="Share of the samples that the best epoch is chosen by and that are not trained on; 0: by those trained on."
        )

    @property
    def needs_calibration(self) -> bool:
        return True

    def trained_weights(self, rounded: Sequence[tuple[TrainedPass, Sequence[Site]]], weights: Mapping[str, int]) -> int:
        layers: Counter[int | None] = Counter()
        for pass_, sites in rounded if self.config.train == "auto" else ():
            for site in sites if pass_.trains_weight else ():
                layers[site.layer] += site.shape[0] * site.shape[1]
        return max(layers.values(), default=0)

    def check(self, plan: Plan) -> None:
        """
        Raises:
            PlanError: no step before it says how linears round.
        """
        at = next(s.index for s in plan.steps if s.pass_ is self)
        if not any(isinstance(s.pass_, TrainedPass) for s in plan.steps[:at]):
            what = f"{self.id} trains linears that round, and no step before it says how"
            raise PlanError(935, plan.recipe.where(f"steps[{at}]"), what, "put a step such as quant.seq2 before it")

    def run(self, model: Module, context: Context) -> Mapping[str, Any]:
        from ..blockwise import BlockOptions, train_blocks

        found = train_blocks(model, context, BlockOptions(**self.config.model_dump()))  # type: ignore[arg-type]
        starts, ends = ([block[name] for block in found] for name in ("start_error", "error"))
        return {
            "start_errors": starts, "errors": ends, "epochs": [block["epoch"] for block in found],
            "last_start_error": starts[-1], "last_error": ends[-1],
        }  # fmt: skip
