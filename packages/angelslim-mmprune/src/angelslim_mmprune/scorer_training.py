"""Training a scorer through its own model, which stays as it is: what scores low is faded out of the language model's input.

Shapes: B prompts, L places, N tokens of the media, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from angelslim_core.errors import ModelError, NumericError, UsageError
from angelslim_core.training import Terms, Training, TrainingOptions

from .scorer import Scorer, soft_topk

log = logging.getLogger(__name__)

_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id", "audio_token_index")


class ScorerOptions(TrainingOptions):
    """As VisionSelector was trained, but for the number of steps; there it was one pass over the data."""

    lr: float = Field(default=5e-5, gt=0)
    warmup: float = Field(default=0.03, ge=0, le=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    keep_ratio: float = Field(default=0.2, gt=0, lt=1, description="of the tokens, that the soft choice adds up to")
    first_weight: float = Field(default=0.1, ge=0, description="of the distance to a hard choice, at the start")
    last_weight: float = Field(default=2.0, ge=0, description="at the end; it changes linearly")


@dataclass(frozen=True)
class Trained:
    """
    Args:
        scorer: ready to be saved.
        task: cross entropy of each step's prompts with faded tokens.
        distance: binary cross entropy of the soft choice and the hard one.
    """

    scorer: Scorer
    task: tuple[float, ...]
    distance: tuple[float, ...]


def train_scorer(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], options: ScorerOptions,
    *, scorer: Scorer | None = None, hidden_dim: int | None = None, placeholders: Collection[int] | None = None,
) -> Trained:  # fmt: skip
    """Train a scorer for a multimodal model; nothing of the model is changed.

    The loss is the model's own with each token of the media multiplied by its soft choice, plus a weight times the binary cross entropy
    of soft and hard choice.

    Args:
        model: of transformers, with `get_decoder`.
        batches: its keyword arguments, `input_ids` and `labels` among them; read again from the start where there are fewer than steps, and none is held.
        scorer: to go on with; None: a new one, drawn by the options' seed.
        hidden_dim: of a new one; None: half of the width, as published.
        placeholders: ids that stand for tokens of the media; None: those that the model's config names.

    Raises:
        UsageError: no batch, an iterator of fewer than steps, or a batch without labels or media.
        ModelError: a config that names no placeholders.
        NumericError: a loss, with which the scorer stays as the step before left it, or a gradient is not finite.

    Source: arXiv:2510.16598 §3.3-3.4.
    """
    ids = torch.tensor(sorted(placeholders if placeholders is not None else _placeholders(model)))
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    if scorer is None:
        with torch.random.fork_rng([]):
            torch.manual_seed(options.seed)
            scorer = Scorer(embeddings.shape[1], hidden_dim or embeddings.shape[1] // 2)
    scorer = scorer.to(embeddings.device, torch.float32).requires_grad_(True)
    training = Training(dict(scorer.named_parameters()), options)
    source = _again(batches)
    task: list[float] = []
    distance: list[float] = []
    with _frozen(model, scorer):
        while not training.is_done:
            weight = options.first_weight + (options.last_weight - options.first_weight) * training.step / max(1, options.steps - 1)

            def terms(step: int, part: int, weight: float = weight) -> Terms:
                batch = next(source)
                fade = _Fade(scorer, options.keep_ratio, _media(batch, ids))
                with fade.on(decoder):
                    loss = model(**batch).loss
                if loss is None or fade.distance is None:
                    raise UsageError(837, "batches", "the model gave no loss, or its decoder was not called with embeddings", "give labels")
                sums = torch.stack([loss.float(), fade.distance])
                if not bool(sums.isfinite().all()):  # before it gets into the scorer
                    raise NumericError(830, f"step {step}", "the loss is not finite", "lower the learning rate, or look at the batch")
                return Terms(sums, torch.ones_like(sums), sums.new_tensor([1.0, weight]), sums.detach() / options.accumulate)

            training.advance(terms)
            seen = training.seen()
            assert seen is not None
            task.append(seen.extra[0])
            distance.append(seen.extra[1])
            log.debug("step %d: task %.4f, distance %.4f", training.step, *seen.extra)
    return Trained(scorer.requires_grad_(False), tuple(task), tuple(distance))


class _Fade:
    """Multiplies tokens of the media by their soft choice where they enter the decoder, and keeps how far that is from a hard one."""

    def __init__(self, scorer: Scorer, keep_ratio: float, media: Tensor) -> None:
        self.scorer, self.keep_ratio, self.media = scorer, keep_ratio, media
        self.distance: Tensor | None = None

    @contextmanager
    def on(self, decoder: nn.Module) -> Iterator[None]:
        hook = decoder.register_forward_pre_hook(self._enter, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None:
            return None
        media = self.media.to(embeddings.device)
        counts = media.sum(1)
        # media first, in order
        place = (~media).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
        valid = torch.arange(place.shape[1], device=place.device) < counts[:, None]
        x = embeddings.gather(1, place[..., None].expand(-1, -1, embeddings.shape[2]))
        scores = self.scorer(x, valid)
        soft = soft_topk(scores, self.keep_ratio * counts.float(), valid)
        wanted = _hard(scores.detach(), (self.keep_ratio * counts.double()).floor().clamp(min=1).long(), valid)
        # binary cross entropy; torch's own stops a GPU for good where it meets NaN
        apart = -torch.where(wanted > 0, soft, 1 - soft).clamp(min=1e-38).log()
        self.distance = ((apart * valid).sum(1) / counts).mean()
        factor = torch.ones(media.shape, device=media.device).scatter(1, place, torch.where(valid, soft, 1.0))
        return args, {**kwargs, "inputs_embeds": embeddings * factor[..., None].to(embeddings.dtype)}


def _hard(scores: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """1.0 for the k best of each row, the lowest number first among equals, else 0."""
    order = torch.where(valid, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen = (torch.arange(scores.shape[1], device=scores.device) < k[:, None]).float()
    return torch.zeros_like(scores).scatter(1, order, chosen)


def _media(batch: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """[B, L], bool: which places are of the media."""
    if "input_ids" not in batch or "labels" not in batch:
        raise UsageError(838, "batches", f"a batch has {sorted(batch)!r:.200}", "give input_ids and labels beside the media")
    media = torch.isin(batch["input_ids"].cpu(), ids)
    if not bool(media.any(1).all()):
        raise UsageError(839, "batches", "a prompt has no token of an image, video or clip", "leave it out")
    return media


def _placeholders(model: nn.Module) -> set[int]:
    config: Any = model.config
    found = {value for name in _PLACEHOLDERS if isinstance(value := getattr(config, name, None), int)}
    if not found:
        raise ModelError(837, type(config).__name__, "names no placeholder of an image, video or clip", "give placeholders")
    return found


def _again(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    while True:
        is_empty = True
        for batch in batches:
            is_empty = False
            yield batch
        if is_empty:
            raise UsageError(834, "batches", "there is none left", "give as many as steps, or what can be read again, such as a list")


@contextmanager
def _frozen(model: nn.Module, scorer: Scorer) -> Iterator[None]:
    """No gradients for the model, and no dropout, until the end."""
    own = {id(p) for p in scorer.parameters()}
    asked = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    training = {module: module.training for module in model.modules()}
    model.eval()
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
        for module, was in training.items():
            module.training = was
