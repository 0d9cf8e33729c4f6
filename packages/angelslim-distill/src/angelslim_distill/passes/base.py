"""What the passes that train towards a teacher's logits share: their options, and the way from these to a training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field

from angelslim_core.errors import AngelslimError, ModelError, PlanError, RecipeError
from angelslim_core.passes import ModelPass, PassConfig, TrainedPass

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context
    from angelslim_core.plan import Plan
    from angelslim_core.source import Source as Stored

    from ..cache.reading import Cache
    from ..data.rows import Rows, Source
    from ..objective import Objective
    from ..targets import Teacher


# rows may so become longer by padding to be compiled unasked
PADDING = 1.25
# options that change what is computed by no more than rounding
_HOW = {"every", "checkpointing", "shard", "compile", "attention"}


class Options(PassConfig):
    """Options of every training towards logits."""

    data: Path = Field(description="JSONL of `messages`, `conversations` or `prompt` and `answer`, or text")
    teacher: Path | None = Field(None, description="folder of the model to learn from; none: the model itself, before it is trained or rounded")
    cache: Path | None = Field(None, description="folder of the teacher's distributions, as `angelslim distill cache` writes it; none: the teacher is run")
    kind: Literal["kl", "rkl", "jsd", "cakld", "mse", "tvd", "kd"] = Field("kl", description="distillation loss: see `angelslim_distill.kd_loss`")
    temperature: float = Field(1.0, gt=0, le=100, description="divides the logits of both; the loss is multiplied by its square")
    top_k: int | None = Field(None, ge=1, description="tokens of the teacher that are told apart; none: all")
    top_k_mode: Literal["bucket", "renorm", "zero"] = Field("bucket", description="what is done with the rest of them")
    beta: float = Field(0.5, ge=0, le=1, description="of jsd: 0 is kl, 1 is rkl")
    kd_weight: float = Field(1.0, ge=0, description="of the distillation loss")
    lm_weight: float = Field(0.0, ge=0, description="of the cross-entropy of the data's own tokens")
    train: Literal["auto", "all", "quantizers", "weights"] = Field(
        "auto", description="`quantizers`, `weights` (all but those), `all`, or `auto`: quantizers and the weights that they are trained with; without any, all"
    )
    also: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="parameters whose names contain one of these texts are trained, too, `norm` for instance"
    )
    steps: int = Field(1000, ge=1, description="steps of the optimizer")
    batch: int = Field(8, ge=1, description="rows a batch, over all processes; more than there are become as many")
    accumulate: int = Field(1, ge=1, description="batches a step")
    length: int = Field(1024, ge=8, le=10**7, description="tokens of a row, at most; longer documents are cut")
    pack: bool = Field(True, description="documents share rows, without seeing each other")
    count: Literal["answers", "all"] = Field("answers", description="which tokens count: what the assistant says, or all")
    turns: Literal["joined", "each"] = Field(
        "joined", description="all answers of a conversation at once, or each with the history as the template shows it then"
    )
    held_out: float = Field(0.02, ge=0, le=0.5, description="share of the documents that is evaluated on and not trained on")
    every: int = Field(100, ge=1, description="steps between looks at held-out rows, and between states that a killed training goes on with")
    keep: Literal["best", "last"] = Field("best", description="what is left: the state of least KL to the teacher on held-out rows, or the last one")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="`muon`: of the layers' matrices; AdamW steps what else is trained")
    lr: float = Field(1e-5, gt=0, le=1, description="highest learning rate of weights")
    quantizer_lr: float = Field(1e-4, gt=0, le=1, description="highest learning rate of what quantizers learn")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps in which the rates rise")
    final_lr: float = Field(0.0, ge=0, le=1, description="share of the rates at the end of the cosine")
    weight_decay: float = Field(0.0, ge=0, description="decoupled from gradients, of matrices; norms, biases and what quantizers learn have none")
    clip: float = Field(1.0, gt=0, description="most that the gradients' norm may be")
    shard: bool = Field(
        False, description="weights, their fp32 copies and moments, and a teacher's weights, lie in parts over the processes of torchrun (FSDP2)"
    )
    checkpointing: bool = Field(False, description="compute the layers' activations anew on the way back: less memory, a third more time")
    compile: bool | Literal["auto"] = Field(
        "auto", description="compile decoder layers, for which rows are padded to one length; `auto`: on a GPU, where it works and pads little"
    )
    attention: Literal["auto", "masked", "varlen"] = Field(
        "auto", description="documents that share a row under a `masked` attention, or each by itself (`varlen`: FlashAttention); `auto`: that where it works"
    )


class Distilling(ModelPass):
    """Base of the passes.

    Attributes:
        index: of its step, settled with the plan: a recipe may train twice.
        drifted: weights were trained while they rounded by an earlier step, so that without rounding the model is no longer what it was.
    """

    index = 0
    drifted = False

    def check(self, plan: Plan) -> None:
        """What can be known before any work.

        Raises:
            PlanError: data, teacher and options do not fit together or the model.
        """
        from angelslim_core.loading import load_tokenizer

        from ..data.documents import check_form
        from ..teacher import check_tokenizer

        self.index = next(s.index for s in plan.steps if s.pass_ is self)
        where = plan.recipe.where(f"steps[{self.index}].with")
        checkpoint, config = plan.source.checkpoint, self.config
        rounds = next((s.index for s in plan.steps if isinstance(s.pass_, TrainedPass)), self.index)
        trains = [s.index for s in plan.steps[: self.index] if isinstance(s.pass_, ModelPass)]
        for other in ("shard", "checkpointing"):
            if config.compile is True and getattr(config, other):
                raise PlanError(1010, where, f"layers are not compiled together with {other}", f"leave out compile, or {other}")
        if config.optimizer == "muon" and config.shard:
            raise PlanError(1040, where, "muon steps whole matrices, and with shard they lie in parts", "leave out shard, or give optimizer: adamw")
        self.drifted = any(i > rounds for i in trains)
        if self.drifted and config.teacher is None and config.cache is None and trains[0] < rounds:
            what = "the model as it was trained before it rounded is no longer there to be the teacher"
            raise PlanError(937, where, what, "train in two runs, or give teacher: FOLDER")
        for step in plan.steps[: self.index]:
            if isinstance(step.pass_, TrainedPass) and any(site.role == "head" for site in step.sites):
                what = f"{step.pass_.id} rounds the head, and {self.id} makes logits of hidden states"
                raise PlanError(938, plan.recipe.where(f"steps[{step.index}]"), what, "leave the head out of the targets")
        # a loaded model may name them otherwise, so that only the run can refuse
        unknown = [text for text in config.also if not any(text in name for name in checkpoint.tensors)]
        plan.warnings += [f"{where}.also: no tensor of the checkpoint has {text!r} in its name" for text in unknown]
        try:
            if not checkpoint.has_tokenizer:
                raise ModelError(915, str(checkpoint.folder), "has no tokenizer, which training data need")
            self.objective()
            if config.cache is not None:
                self._check_cache(plan.source)
            if not config.data.is_file():
                raise RecipeError(919, str(config.data), "is no file" if config.data.exists() else "does not exist", "set data")
            check_form(config.data, config.count)
            if config.teacher is not None:
                check_tokenizer(config.teacher, load_tokenizer(checkpoint.folder))
        except AngelslimError as error:
            raise PlanError(910, where, f"{error.where}: {error.what}", error.hint) from error

    def trained_weights(self, rounded: Sequence[tuple[TrainedPass, Sequence[Site]]], weights: Mapping[str, int]) -> int:
        along, frozen = (
            {f"{site.name}.weight": math.prod(site.shape) for pass_, sites in rounded if pass_.trains_weight == is_along for site in sites}
            for is_along in (True, False)
        )
        train = "all" if self.config.train == "auto" and not rounded else self.config.train
        if train in ("all", "weights"):
            return sum(weights.values()) - sum(frozen.values())
        named = {name: n for name, n in weights.items() if name not in frozen and any(text in name for text in self.config.also)}
        return sum((named | (along if train == "auto" else {})).values())

    def _check_cache(self, source: Stored) -> None:
        from angelslim_core.loading import load_tokenizer

        self.objective().loss.check_kept(tempered=False)
        if not self.config.cache.is_dir():
            raise ModelError(916, str(self.config.cache), "is no folder", "write one: angelslim distill cache")
        text = source.config.get("text_config") or source.config
        self._opened(load_tokenizer(source.checkpoint.folder), text["vocab_size"], source.checkpoint.folder)

    def _opened(self, tokenizer: PreTrainedTokenizerBase, width: int, folder: Path) -> Cache:
        """The cache, of the teacher in a folder unless another is named, for logits of a width."""
        from ..cache.reading import open_cache

        return open_cache(self.config.cache, tokenizer, width, teacher=self.config.teacher or folder, top_k=self.config.top_k)

    def objective(self) -> Objective:
        """The loss that the options ask for."""
        from ..kinds import Loss
        from ..objective import Objective

        config = self.config
        return Objective(Loss(config.kind, config.temperature, config.beta, config.top_k_mode), config.top_k, config.lm_weight, config.kd_weight)

    def teacher(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Context) -> Teacher:
        """Who the student learns from; `model` says which of its parameters will be trained."""
        from ..teacher import teacher_from, teacher_of

        config = self.config
        folder = context.source.checkpoint.folder
        if config.cache is not None:
            return self._opened(tokenizer, model.get_output_embeddings().weight.shape[0], folder)
        if config.teacher is None and not self.drifted:
            return teacher_of(model)
        # one that is to lie in parts need not be whole on any device
        return teacher_from(config.teacher or folder, tokenizer, "cpu" if config.shard and context.group.size > 1 else context.device)

    def source(self, model: PreTrainedModel, rows: Rows, context: Context, multiple: int) -> Source:
        """Where the batches come from, of rows that are padded to a multiple of some length."""
        from ..data.rows import Supervised

        config = self.config
        return Supervised(rows.train, config.batch, accumulate=config.accumulate, seed=context.seed, group=context.group, multiple=multiple)

    def is_compiled(self, lengths: Sequence[int], multiple: int, device: str) -> bool | Literal["auto"]:
        """Whether layers are compiled.

        Args:
            lengths: of the rows; they would be padded to the longest, rounded up to `multiple`.
        """
        found: bool | Literal["auto"] = self.config.compile
        if found == "auto":
            padded = len(lengths) * _rounded_up(max(lengths), multiple)
            return "auto" if device == "cuda" and padded <= PADDING * sum(lengths) else False
        return found

    def run(self, model: Module, context: Context) -> Mapping[str, Any]:
        from angelslim_core.device import peak_gpu_bytes
        from angelslim_core.loading import load_tokenizer
        from angelslim_core.training import TrainingOptions

        from ..computing import Ways
        from ..data.rows import prepare
        from ..fingerprints import model_fingerprint
        from ..heads import Reader
        from ..parameters import QUANTIZER, choose_parameters, matrices_of
        from ..trainer import DistillTraining, Looks

        config, group, began = self.config, context.group, time.perf_counter()
        student = cast("PreTrainedModel", model)
        folder = context.source.checkpoint.folder
        tokenizer = load_tokenizer(folder)
        packed = config.pack
        if packed and not Reader(student).can_pack:
            packed = False
            context.warnings.append(f"{self.id}: documents do not share rows, since layers of this model would let them see each other")
        rows = prepare(
            config.data, tokenizer, str(folder), length=config.length, count=config.count, turns=config.turns, packed=packed, held_out=config.held_out,
            seed=context.seed,
        )  # fmt: skip
        trained = choose_parameters(student, config.train, config.also)
        matrices = matrices_of(student) if config.optimizer == "muon" else ()
        teacher = self.teacher(student, tokenizer, context)
        options = TrainingOptions(
            steps=config.steps, lr=config.lr, rates={QUANTIZER: config.quantizer_lr}, warmup=config.warmup, final_lr=config.final_lr,
            weight_decay=config.weight_decay, undecayed=(QUANTIZER,), clip=config.clip, accumulate=config.accumulate, seed=context.seed,
        )  # fmt: skip
        multiple = _multiple(context)
        compiled = self.is_compiled([len(row) for row in rows.train], multiple, context.device)
        if compiled == "auto" and (config.checkpointing or (config.shard and group.size > 1)):
            compiled = False  # it will not be done, and rows need no padding for it
        ways = Ways(compiled, config.attention)
        width = _rounded_up(max(map(len, rows.train)), multiple) if ways.compile else multiple
        fingerprint = model_fingerprint(config.teacher) if config.teacher else ""
        inputs = {"data": rows.data, "teacher": fingerprint, "options": config.model_dump(mode="json", exclude=_HOW)}
        training = DistillTraining(
            student, self.source(student, rows, context, width), teacher, self.objective(), options,
            Looks(rows.held_out, config.every, max(1, config.batch // group.size), config.keep, _multiple(context)),
            matrices=matrices, group=group, checkpointing=config.checkpointing, in_parts=config.shard, ways=ways,
            tell=lambda line: context.fallbacks.append(f"{self.id}: {line}"), inputs=inputs,
        )  # fmt: skip
        history = training.run(context.workdir / "measured" / f"{self.index}-{self.id}", context.progress, context.stop_requested)
        student.requires_grad_(False)
        if training.kept.get("step") == 0:
            context.warnings.append(f"{self.id}: training did not lower KL to the teacher on held-out rows, and its start is what is kept")
        first = history.looks[0] if history.looks else {}
        return {
            **({"kl_before": first["kl"], "perplexity_before": first["perplexity"]} if first else {}), **training.kept, "trained": trained,
            "documents": rows.documents, "dropped": rows.dropped, "rows": len(rows.train), "trained_tokens": history.tokens,
            "way": str(training.computing.way), "graphs": training.computing.graphs, "settling_seconds": training.computing.seconds,
            "tokens_per_second": history.tokens / max(history.seconds, 1e-9), "seconds": time.perf_counter() - began,
            "peak_gpu_bytes": peak_gpu_bytes(), "curves": history.curves(),
        }  # fmt: skip


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _multiple(context: Context) -> int:
    """To which rows are padded: kernels of a GPU like it."""
    return 64 if context.device == "cuda" else 1
