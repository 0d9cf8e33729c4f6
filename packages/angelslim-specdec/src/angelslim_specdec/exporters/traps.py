"""What makes an exported draft load without a word and then accept nothing, each by its name.

tied_head: the head is taken for the embedding (SGLang crashes where the draft has fewer tokens). rope_theta: positions turn
at another speed than in training. max_positions: beyond them acceptance collapses. layer_ids: features of other layers.
fp8_dtype: SGLang wants FP16 drafts beside an FP8 target. d2t_offsets: proposed ids are others. norm_flags: another network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from angelslim_core.errors import ModelError
from angelslim_core.io.checkpoint import Checkpoint, torch_dtype

from ..vocabulary import Vocabulary
from .base import Fields, Given, Layout, normal_rope

TRAPS = ("tied_head", "rope_theta", "max_positions", "layer_ids", "fp8_dtype", "d2t_offsets", "norm_flags", "block", "sizes", "vocabulary", "dtype", "weights")


@dataclass(frozen=True)
class Problem:
    """One way in which an export is not the draft.

    Args:
        trap: one of `TRAPS`.
        what: a line on it.
    """

    trap: str
    what: str


def problems(folder: Path, layout: Layout, given: Given) -> list[Problem]:
    """Read an exported folder as its engine does and compare it with the draft it was made from.

    Raises:
        ModelError: the folder is no checkpoint, or its config has values of impossible types.
    """
    checkpoint = Checkpoint.open(folder)
    return [*_config_problems(Fields(checkpoint.config), layout, given), *_tensor_problems(checkpoint, layout, given)]


def _config_problems(config: Fields, layout: Layout, given: Given) -> list[Problem]:
    wanted, found = given.facts(), layout.facts(config, given)
    rope, served = normal_rope(given.config.rope_parameters), given.served
    seen: list[Problem] = []

    def expect(trap: str, good: bool, what: str) -> None:
        if not good:
            seen.append(Problem(trap, what))

    expect("tied_head", not found.tied, "tie_word_embeddings is true, and the draft has a head of its own")
    for read in found.ropes:
        expect("rope_theta", read == rope, f"{layout.name} will turn positions by {read}, and the draft was trained with {rope}")
    least = max(wanted.max_positions, served.max_positions if served else 0)
    expect("max_positions", found.max_positions >= least, f"max_position_embeddings is {found.max_positions}, and {least} are to be served")
    expect(
        "layer_ids", found.layer_ids == wanted.layer_ids, f"{layout.name} will read layers {found.layer_ids}, and the draft was trained on {wanted.layer_ids}"
    )
    fp8 = layout.name == "sglang" and served is not None and served.fp8
    expect("fp8_dtype", not fp8 or found.dtype == "float16", f"dtype is {found.dtype}, and SGLang wants float16 beside an FP8 target")
    for flag, value in wanted.flags.items():
        trap = "norm_flags" if given.name == "eagle3" else "block"
        expect(trap, found.flags[flag] == value, f"{layout.name} will take {flag} for {found.flags[flag]}, and the draft has {value}")
    for size, value in wanted.sizes.items():
        expect("sizes", found.sizes[size] == value, f"{size} is {found.sizes[size]}, and the draft's is {value}")
    expect("vocabulary", found.draft_vocab == wanted.draft_vocab, f"draft_vocab_size is {found.draft_vocab}, and the draft's is {wanted.draft_vocab}")
    expect("dtype", found.dtype == wanted.dtype, f"dtype is {found.dtype or 'not given'}, and the draft's is {wanted.dtype}")
    return list(dict.fromkeys(seen))


def _tensor_problems(checkpoint: Checkpoint, layout: Layout, given: Given) -> list[Problem]:
    draft = given.draft
    names = {layout.stored_name(given, name): name for name in draft.specs}
    extra = {"lm_head.weight"} if given.needs_head else set()
    missing, more = (names.keys() | extra) - checkpoint.tensors.keys(), checkpoint.tensors.keys() - names.keys() - extra
    seen = [Problem("d2t_offsets" if name == "d2t" else "weights", f"has no tensor {name}") for name in sorted(missing)]
    seen += [Problem("weights", f"has a tensor {name[:200]} that the draft has not") for name in sorted(more)]
    for name in sorted(names.keys() & checkpoint.tensors.keys()):
        wanted, found = given.tensor(names[name]), checkpoint.read(name)
        if name == "d2t":
            try:
                ids = Vocabulary.from_stored(found, given.config.vocab_size, checkpoint.folder.name).ids
            except ModelError as error:
                seen.append(Problem("d2t_offsets", error.what))
                continue
            if not torch.equal(ids, Vocabulary.from_stored(wanted, given.config.vocab_size, draft.where).ids):
                seen.append(Problem("d2t_offsets", "gives other tokens of the target than the draft's"))
            continue
        if wanted.is_floating_point():
            wanted = wanted.to(torch_dtype(given.dtype))
        if found.dtype != wanted.dtype or not torch.equal(found, wanted):
            seen.append(Problem("weights", f"{name} is not the draft's"))
    if extra and given.served is not None and "lm_head.weight" in checkpoint.tensors:
        vocabulary = draft.vocabulary()
        assert vocabulary
        if not torch.equal(checkpoint.read("lm_head.weight"), given.served.head(vocabulary.ids).to(torch_dtype(given.dtype))):
            seen.append(Problem("weights", "lm_head.weight holds other rows than the target's head has for the draft's tokens"))
    return seen
