"""Passes that train a draft for what the recipe makes: one class a kind of draft, made from the table at the end.

A draft guesses from hidden states, and those of a compressed model differ from its source's. So it is trained last, on the output
as it will be served, wherever its step stands in the recipe.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from angelslim_core.errors import AngelslimError, ModelError, PlanError
from angelslim_core.passes import RuntimePass

from .base import Drafting, checked, others

if TYPE_CHECKING:
    from torch.nn import Module

    from angelslim_core.context import Context
    from angelslim_core.loading import Loaded
    from angelslim_core.plan import Plan

FOLDER = "draft"


class Training(Drafting):
    """Options of every training, as those of `angelslim specdec train`."""

    data: Path = Field(description="JSONL of conversations that the model answered, as `angelslim specdec regen` writes it")
    steps: int | None = Field(None, ge=1, description="steps; none: `epochs` say")
    epochs: float = Field(10.0, gt=0, le=10**6, description="how often each row is trained on")
    draft_vocab: int | None = Field(None, ge=1, description="tokens the draft may propose, the most frequent ones; none: its kind's default")
    settings: dict[str, Any] = Field(default_factory=dict, description="fields of the draft's config, such as its layers or its loss")
    length: int = Field(2048, ge=8, le=10**7, description="tokens of a packed row, at most; longer conversations are cut")
    batch: int | None = Field(None, ge=1, description="rows a step; none: 4 on a GPU, 1 on a CPU")
    lr: float = Field(5e-4, gt=0, le=1, description="highest learning rate")
    warmup: float = Field(0.015, ge=0, le=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, of matrices")
    clip: float = Field(0.5, gt=0, description="most that the gradients' norm may be")
    accumulate: int = Field(1, ge=1, description="batches a step")
    validation: float | None = Field(None, ge=0, le=0.5, description="share of conversations held out; none: 0.02 from 500 conversations on, else 0")
    every: int = Field(500, ge=1, description="steps between validation, `probe`, and states that a killed training goes on with")
    probe: int = Field(0, ge=0, description="prompts that are decoded to measure acceptance: held-out ones if any are")
    turns: Literal["joined", "each"] = Field("joined", description="train on all answers of a conversation at once, or on each with its own history")


class Installed(BaseModel):
    """The policy: what `load` is to decode with."""

    model_config = ConfigDict(extra="forbid")

    draft: str = Field(max_length=200, description="folder in the artifact")
    k: int = Field(ge=1, le=64, description="tokens to propose a round")


class Trained(RuntimePass):
    """Base of the passes, each of whose `Config` is a `Training`."""

    draft: ClassVar[str]

    def check(self, plan: Plan) -> None:
        """What can be known before any work: data, template, and whether there is such a draft for such a model.

        Raises:
            RecipeError: the data hold no conversations with answers.
            ModelError: the model has no tokenizer with a chat template.
            PlanError: options do not fit the model.
        """
        from angelslim_core.calibration.chats import read_conversations
        from angelslim_core.calibration.spans import Renderer
        from angelslim_core.loading import load_tokenizer

        read_conversations(self.config.data)
        checkpoint = plan.source.checkpoint
        Renderer(load_tokenizer(checkpoint.folder) if checkpoint.has_tokenizer else None, str(checkpoint.folder))
        where = plan.recipe.where(f"steps[{next(s.index for s in plan.steps if s.pass_ is self)}].with")
        try:
            most = self._most(plan)
        except AngelslimError as error:
            raise PlanError(719, where, f"{error.where}: {error.what}", error.hint) from error
        if self.config.k > most:
            raise PlanError(721, where, f"k is {self.config.k}, and the draft proposes {most} tokens at most")

    def _most(self, plan: Plan) -> int:
        """Tokens that the draft can propose a round; makes it without memory.

        Raises:
            AngelslimError: there is no such draft for this model.
        """
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from transformers import AutoConfig

        from angelslim_core.adapters import transformers_identity
        from angelslim_core.model import sanitized

        from ..drafts.base import TargetShape
        from ..registry import draft_named
        from ..target import sizes_of

        source = plan.source.config
        text = AutoConfig.for_model(**(sanitized(source) | transformers_identity(plan.description.layout, source))).get_text_config()
        size = self.config.draft_vocab
        if size is not None and size > text.vocab_size:
            raise PlanError(722, "draft_vocab", f"{size} tokens, and the model has {text.vocab_size}")
        with FakeTensorMode(), torch.random.fork_rng([]):
            found = draft_named(self.draft).from_target(TargetShape(**sizes_of(text, text.vocab_size)), draft_vocab_size=size, **self.config.settings)
        return int(getattr(found.config, "num_tokens", self.config.k))

    def policy(self, context: Context) -> Mapping[str, Any]:
        return {"draft": FOLDER, "k": self.config.k}

    def make(self, loaded: Loaded, folder: Path, context: Context) -> Mapping[str, Any]:
        from ..target import Target
        from ..training.whole import train_draft

        target = Target(loaded.model, loaded.tokenizer)
        made = context.workdir / "measured" / FOLDER
        made.parent.mkdir(exist_ok=True)
        given = {
            **{name: getattr(self.config, name) for name in Training.model_fields}, "model": str(folder), "draft": self.draft, "features": None, "vocab": None,
            "keep": "auto", "shard": "none", "seed": context.seed, "export_every": 0, "out": made, "replace": True,
        }  # fmt: skip
        found = train_draft(given, target, target.device, progress=context.progress, stop_requested=context.stop_requested)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)  # of a run that was killed since
        made.rename(folder / FOLDER)
        return found

    @classmethod
    def install(cls, model: Module, policy: Mapping[str, Any]) -> None:
        raise ModelError(717, f"runtime.json: {cls.id}", "names a draft, which lies in an artifact's folder", "load that folder")

    @classmethod
    def install_from(cls, folder: Path, model: Module, policy: Mapping[str, Any]) -> None:
        from ..folder import load_draft
        from ..runtime import Speculative
        from ..target import Target

        found = checked(Installed, policy, cls.id)
        where, path = f"runtime.json: {cls.id}.draft", folder / found.draft
        if "\0" in found.draft or not path.resolve().is_relative_to(folder.resolve()) or path.resolve() == folder.resolve():
            raise ModelError(723, where, f"{found.draft!r:.100} is no folder in the artifact")
        target = Target(model)  # type: ignore[arg-type]
        draft = load_draft(path, target.shape)
        if draft.name != cls.draft:
            raise ModelError(724, where, f"holds a draft of kind {draft.name:.50}")
        if found.k > (most := getattr(draft.config, "num_tokens", found.k)):
            raise ModelError(718, f"runtime.json: {cls.id}.k", f"is {found.k}, and the draft proposes {most} tokens at most")
        Speculative(model, lambda target: draft.to(target.device, target.dtype).drafter(target.heads()), found.k)


def _made(name: str, summary: str, k: int) -> type[Trained]:
    proposed = Field(k, ge=1, le=64, description="tokens to propose a round")
    config = type("Config", (Training,), {"__module__": __name__, "__qualname__": f"{name}.Config", "__annotations__": {"k": int}, "k": proposed})
    return type(
        name, (Trained,), {"__module__": __name__, "__doc__": summary, "id": f"specdec.{name}", "draft": name, "conflicts": others(name), "Config": config}
    )


# kind -> (what it is, tokens a round by default)
_KINDS = {
    "eagle3": ("Speculative decoding with an EAGLE-3 draft trained for the output: one layer that reads three of the model's, a token at a time.", 5),
    "dflash": ("Speculative decoding with a DFlash draft trained for the output: all tokens of a block at once, from features of several layers.", 7),
    "dflare": ("Speculative decoding with a DFlare draft trained for the output: as DFlash, each layer with its own mixture of features.", 7),
    "dfly": ("Speculative decoding with a DFly draft trained for the output: as DFlash, corrected by the token before.", 7),
    "dspark": ("Speculative decoding with a DSpark draft trained for the output: as DFlash, its logits biased by the token before.", 7),
    "mtp": ("Speculative decoding with an MTP head trained for the output: one layer on the model's last, a token at a time.", 3),
}
TRAINED = tuple(_made(name, *rest) for name, rest in _KINDS.items())
