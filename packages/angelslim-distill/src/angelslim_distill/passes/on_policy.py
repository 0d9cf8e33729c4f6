"""Distillation on what the student says itself.

Source: Agarwal et al., "On-policy distillation of language models" (2306.13649), GKD.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from angelslim_core.errors import PlanError, RecipeError
from angelslim_core.passes import TrainedPass

from .base import Distilling, Options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from angelslim_core.calibration.rows import Chat
    from angelslim_core.context import Context
    from angelslim_core.plan import Plan

    from ..data.rows import Rows, Source


class OnPolicy(Distilling):
    """Trains the model towards a teacher's distributions, on answers it samples itself and on data by turns (GKD)."""

    id = "distill.on_policy"

    class Config(Options):
        kind: Literal["kl", "rkl", "jsd", "cakld", "mse", "tvd", "kd"] = Field("jsd", description="distillation loss: see `angelslim_distill.kd_loss`")
        lmbda: float = Field(0.5, ge=0, le=1, description="share of the steps that are trained on the model's own answers; 0: none, as `distill.logits`")
        max_new_tokens: int = Field(128, ge=1, description="tokens of an answer, at most; with its prompt at most `length`")
        sampling_temperature: float = Field(0.9, gt=0, le=100, description="divides logits where answers are sampled; the loss has `temperature`")
        top_p: float = Field(1.0, gt=0, le=1, description="answers are drawn of the most likely tokens that together have this probability")
        prompts: Path | None = Field(
            None, description="JSONL of `prompt`, `turns` or `messages`, of which the first turn is answered; none: what stands before the answers of `data`"
        )

    def check(self, plan: Plan) -> None:
        at = next(s.index for s in plan.steps if s.pass_ is self)
        where, config = plan.recipe.where(f"steps[{at}].with"), self.config
        if config.teacher is None and not any(isinstance(s.pass_, TrainedPass) for s in plan.steps[:at]):
            raise PlanError(930, where, "there is no teacher, and the model's own unrounded self is none where nothing rounds", "give teacher: FOLDER")
        if config.prompts is None and config.count == "all":
            raise PlanError(931, where, "of data that all count nothing is a prompt", "give prompts: FILE, or count: answers")
        if config.max_new_tokens >= config.length:
            raise PlanError(932, where, f"answers of {config.max_new_tokens} tokens leave none of {config.length} to prompts", "give a greater length")
        if config.prompts is not None and not config.prompts.is_file():
            raise PlanError(933, where, f"prompts {config.prompts} is no file", "give a JSONL file")
        if config.cache is not None and config.lmbda:
            raise PlanError(934, where, "no cache holds what the model has yet to say", "leave out cache, or give lmbda: 0")
        if config.shard and config.lmbda:
            raise PlanError(936, where, "a model whose weights lie in parts samples no answers", "leave out shard, or give lmbda: 0")
        if config.compile is True and config.lmbda:
            raise PlanError(1011, where, "answers are of all lengths, for which layers are not compiled", "leave out compile, or give lmbda: 0")
        super().check(plan)

    def is_compiled(self, lengths: Sequence[int], multiple: int, device: str) -> bool | Literal["auto"]:
        return False if self.config.lmbda else super().is_compiled(lengths, multiple, device)

    def source(self, model: PreTrainedModel, rows: Rows, context: Context, multiple: int) -> Source:
        from angelslim_core.loading import load_tokenizer

        from ..fingerprints import vocabulary_size
        from ..on_policy import OnPolicy as Mixed
        from ..rollouts import Sampled

        config, stops = self.config, _stop_ids(model)
        known = vocabulary_size(load_tokenizer(context.source.checkpoint.folder))
        sampled = Sampled(model, config.max_new_tokens, stops, config.sampling_temperature, config.top_p, known)
        return Mixed(
            super().source(model, rows, context, multiple), self._prompts(rows, context), sampled, stops, batch=config.batch, lmbda=config.lmbda,
            accumulate=config.accumulate, seed=context.seed, group=context.group, multiple=multiple,
            tell=context.fallbacks.append,
        )  # fmt: skip

    def _prompts(self, rows: Rows, context: Context) -> list[list[int]]:
        """
        Raises:
            RecipeError: none is short enough.
        """
        from angelslim_core.calibration.chats import read_prompts
        from angelslim_core.calibration.spans import Renderer
        from angelslim_core.loading import load_tokenizer

        from ..on_policy import prompts_of

        config, folder = self.config, context.source.checkpoint.folder
        if config.prompts is None:
            found = prompts_of(rows.train)
        else:
            found = Renderer(load_tokenizer(folder), str(folder)).prompts([_opening(prompt.messages) for prompt in read_prompts(config.prompts)])
        fit = [prompt for prompt in found if len(prompt) + config.max_new_tokens <= config.length]
        if not fit:
            what = f"none of {len(found)} prompts leaves room for {config.max_new_tokens} tokens within {config.length}"
            raise RecipeError(932, str(config.prompts or config.data), what, "give a greater length")
        if len(fit) < len(found):
            context.warnings.append(f"{self.id}: {len(found) - len(fit)} of {len(found)} prompts are left out, since their answers would not fit in `length`")
        return fit


def _opening(messages: Chat) -> Chat:
    """A conversation up to what the user says first: later turns would follow answers that there are not."""
    return messages[: next(i for i, message in enumerate(messages) if message["role"] == "user") + 1]


def _stop_ids(model: PreTrainedModel) -> list[int]:
    """Tokens that end an answer, of the generation config."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [] if found is None else [*found] if isinstance(found, list | tuple) else [int(found)]
