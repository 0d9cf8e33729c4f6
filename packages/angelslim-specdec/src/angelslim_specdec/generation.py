"""Text of a target, faster by a draft and otherwise the same: `generate`.

Shapes: B rows, P prompt, T prompt and new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

from .adaptive import Pace, Pacing
from .drafters.autoregressive import Autoregressive, Tree
from .drafters.base import Drafter, Warp
from .engine import Decoded, Engine, Rule
from .registry import drafters
from .spec_exit import SpecExit, exits_of
from .stop_strings import StopStrings
from .target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Generated:
    """What `generate` made.

    Args:
        sequences: [B, T], int64, as transformers' `generate` returns them: prompts as given, new tokens, padding.
        decoded: new tokens, and counts of rounds and of accepted tokens.
    """

    sequences: Tensor
    decoded: Decoded

    @property
    def acceptance_length(self) -> float:
        """Tokens a round, the one that the target adds counted; 1.0 is plain decoding."""
        return self.decoded.acceptance_length

    @property
    def stats(self) -> dict[str, Any]:
        """Numbers for JSON."""
        found, rounds = self.decoded, sum(self.decoded.rounds)
        tokens = sum(map(len, found.tokens))
        exits = {} if found.exited is None else {"exited": found.exited}
        return {
            "lossless": found.lossless, **exits, "tokens": tokens, "rounds": rounds, "drafts": found.drafts, "drafted": found.drafted, "accepted": found.accepted,
            "acceptance_length": found.acceptance_length, "accepted_by_position": found.by_position,
            "prompt_seconds": found.prompt_seconds, "seconds": found.seconds,
        }  # fmt: skip


def generate(
    target: Target | PreTrainedModel, input_ids: Tensor, drafter: Drafter | str | Path | None = None, max_new_tokens: int = 256, temperature: float = 0.0, *,
    top_k: int = 0, top_p: float = 1.0, k: int = 5, tree: Tree | None = None, rule: Rule = "auto", seed: int | Sequence[int] = 0, stop_ids: Sequence[int] | None = None,
    attention_mask: Tensor | None = None, adaptive: bool = False, pace: Pacing | None = None, static: bool | None = None,
    tell: Callable[[list[list[int]]], None] | None = None, stop_strings: Sequence[str] | StopStrings | None = None, spec_exit: SpecExit | None = None,
) -> Generated:  # fmt: skip
    """Continue prompts, exactly as the target would: greedily the same tokens, sampled the same distribution; but for `spec_exit`.

    Args:
        target: a transformers causal language model, or a `Target` around one. Of its generation config stop and padding tokens
            are taken; what else stands there, such as penalties, is not.
        input_ids: [B, P], int64.
        drafter: "ngram", "suffix" or another registered name, a draft's folder, or a drafter; None: plain decoding by the same engine.
        max_new_tokens: of each row, if no stop token comes first.
        temperature: 0 is greedy.
        top_k: tokens that may be sampled; 0: all.
        top_p: their share of probability.
        k: tokens to propose a round, levels of a tree.
        tree: shape of the trees that a draft of one token at a time proposes; None: chains.
        rule: how sampled tokens are accepted, as for `Engine`.
        seed: the first row's, each further one's being greater by one, or one for each row. What a row samples depends on nothing
            else of its batch, without `adaptive` and `pace`.
        stop_ids: None: those of the generation config.
        attention_mask: [B, P], 0 where a row is padded on the left; None: no padding.
        adaptive: each round proposes and verifies as many tokens as pay for their time, up to k; of chains those that the draft is
            surest of, in whatever row. Sampled tokens keep their distribution, but since times are measured the same seed need not give them twice.
        pace: what changes rounds instead; as is `static`, for `Engine`.
        tell: called with the new tokens of each row, after each round.
        stop_strings: end a row with the token that completes one of them, as in transformers; a `StopStrings` tells afterwards which.
            They need a target with its tokenizer.
        spec_exit: end thoughts where the draft's signals pass these thresholds, which is NOT lossless; needs a draft with `exit_signals`
            and a target with its tokenizer. None: never.

    Raises:
        UsageError: the mask is of another shape, or pads in between or on the right; the drafter grows no trees, or has no signals to exit by;
            `adaptive` has no drafter, or a pace beside it; there is no tokenizer where one is needed; or as `Engine.decode` raises.
        ModelError: the target cannot be decoded speculatively, or the draft is of another target.
    """
    target = target if isinstance(target, Target) else Target(target)
    prompts, lengths = left_aligned(input_ids, attention_mask)
    capacity = int(lengths.max()) + max_new_tokens
    proposer = drafter_of(drafter, target, tree)
    stops = target.stop_ids if stop_ids is None else stop_ids
    if adaptive:
        if proposer is None or pace is not None:
            raise UsageError(786, "adaptive", "nothing is proposed" if proposer is None else "and pace both set what a round does", "leave it out")
        pace = Pace(k, len(prompts), cuts=not (isinstance(proposer, Autoregressive) and proposer.tree is not None))
    exits = None if spec_exit is None else exits_of(spec_exit, proposer, target, len(prompts))
    words = stop_strings if stop_strings is None or isinstance(stop_strings, StopStrings) else StopStrings(target.tokenizer, stop_strings)
    engine = Engine(
        target, proposer, len(prompts), capacity, k=k, warp=Warp(temperature, top_k, top_p), rule=rule, stops=stops, pace=pace, static=static, exits=exits,
        words=words,
    )  # fmt: skip
    seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else list(seed)
    decoded = engine.decode(prompts, lengths, max_new_tokens, seeds, tell)
    new = torch.full((len(prompts), max(map(len, decoded.tokens))), target.pad_id, dtype=torch.int64)
    for row, tokens in zip(new, decoded.tokens, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return Generated(torch.cat([input_ids, new.to(input_ids.device)], 1), decoded)


def drafter_of(drafter: Drafter | str | Path | None, target: Target, tree: Tree | None = None) -> Drafter | None:
    """The drafter of a name, of a folder, or as it is.

    Raises:
        ModelError: the folder holds no draft, or one of another target.
        UsageError: a tree is asked of a drafter that grows none.
    """
    if isinstance(drafter, str | Path):
        if str(drafter) in (known := drafters()):
            drafter = known[str(drafter)]()
        else:
            from .folder import load_draft

            drafter = load_draft(Path(drafter), target.shape).to(target.device, target.dtype).eval().drafter(target.heads())
    if tree is not None:
        if not isinstance(drafter, Autoregressive):
            raise UsageError(714, "tree", "only drafts of one token at a time grow trees", "leave it out")
        drafter.tree = tree
    return drafter


def left_aligned(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts [B, P] that begin at 0, whatever follows them, and their lengths [B].

    Raises:
        UsageError: as `generate`.
    """
    if attention_mask is None:
        return input_ids, torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    real = attention_mask.bool()
    lengths = real.sum(1)
    number = torch.arange(input_ids.shape[1], device=input_ids.device)
    if real.shape != input_ids.shape or not torch.equal(real, number >= input_ids.shape[1] - lengths[:, None]):
        raise UsageError(713, "attention_mask", f"of shape {list(real.shape)} for {list(input_ids.shape)} tokens, is no padding on the left")
    at = (number + input_ids.shape[1] - lengths[:, None]).clamp(max=input_ids.shape[1] - 1)
    return input_ids.gather(1, at), lengths
