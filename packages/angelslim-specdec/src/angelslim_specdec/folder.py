"""A draft on disk: `config.json` and `model.safetensors`, nothing of which is believed before it is checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from angelslim_core.errors import ModelError
from angelslim_core.io.checkpoint import FLOATS, Checkpoint, TensorSpec, dtype_name, torch_dtype
from angelslim_core.io.writer import ShardWriter, disk_errors, shard_name, spec_bytes, split_shards, write_index, write_json
from angelslim_core.workdir import Workdir

from .drafts.base import Draft, DraftConfig, TargetShape
from .registry import draft_of
from .vocabulary import Vocabulary

SHARD_BYTES = 5 << 30
# what no config means: larger numbers are refused before anything is built from them
MOST, MOST_LAYERS = 1 << 24, 1 << 10


@dataclass(frozen=True)
class Stored:
    """A draft folder whose config and headers have been checked against each other; no tensor has been read.

    Args:
        kind: the draft's class.
        config: of the class's own `Config`.
        specs: name -> dtype and shape of every tensor.
    """

    kind: type[Draft]
    config: DraftConfig
    checkpoint: Checkpoint
    specs: dict[str, TensorSpec]

    @property
    def where(self) -> str:
        return str(self.checkpoint.folder)

    def read(self, name: str) -> Tensor:
        """A tensor in the dtype it is stored in.

        Raises:
            ModelError: it holds something else than finite numbers.
        """
        tensor = self.checkpoint.read(name)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(748, name, "holds numbers that are not finite")
        return tensor

    def vocabulary(self) -> Vocabulary | None:
        """The tokens it proposes; None: all of the target's.

        Raises:
            ModelError: `d2t` and `t2d` give no such selection.
        """
        if "d2t" not in self.specs:
            return None
        return Vocabulary.from_stored(self.read("d2t"), self.config.vocab_size, self.where, self.read("t2d"))


def write_draft(draft: Draft, folder: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a draft's files into an existing folder, which whoever made it publishes.

    Args:
        dtype: of all floating-point tensors; None: as they are.
        shard_bytes: of a weight file, at most, unless one tensor is larger.
    """
    tensors = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in draft.state_dict().items()}
    write_json(folder / "config.json", {"architectures": [draft.architecture], **draft.config.model_dump(mode="json")})
    write_tensors(folder, tensors, shard_bytes)


def write_tensors(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as one safetensors file, or as several and their index."""
    units = [{name: TensorSpec(dtype_name(t.dtype), tuple(t.shape))} for name, t in sorted(tensors.items())]
    shards = [{n: s for i in part for n, s in units[i].items()} for part in split_shards(units, shard_bytes)]
    for index, shard in enumerate(shards):
        path = folder / shard_name(index, len(shards))
        with disk_errors(path, sum(map(spec_bytes, shard.values()))):
            writer = ShardWriter(path, shard)
            for name in shard:
                writer.write(name, tensors[name])
            writer.finish()
    write_index(folder, shards)


def save_draft(draft: Draft, path: str | Path, *, replace: bool = False, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a draft folder, which appears whole by one rename.

    Args:
        replace: an existing folder may be replaced once the new one is complete.
        dtype, shard_bytes: as for `write_draft`.

    Raises:
        OutputError: the folder exists, or is being made by somebody else.
    """
    with Workdir(Path(path), None, replace) as work:
        write_draft(draft, work.stage, dtype=dtype, shard_bytes=shard_bytes)
        work.publish()


def open_draft(path: str | Path, target: TargetShape | None = None) -> Stored:
    """Check a draft folder without reading its tensors.

    Args:
        target: what it is to be used with.

    Raises:
        ModelError: no draft, not a known one, config and tensors that do not fit each other, or a draft of another target.
    """
    checkpoint = Checkpoint.open(path)
    fields = dict(checkpoint.config)
    architectures = fields.pop("architectures", None)
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ModelError(749, "config.json", "has no list of architectures, by which a draft is known")
    kind = draft_of(architectures, str(path))
    config = _config(kind, fields)
    if target is not None:
        check_target(config, str(path), target.hidden_size, target.vocab_size, target.num_layers, target.fingerprint)
    stored = Stored(kind, config, checkpoint, {n: TensorSpec(i.dtype, i.shape) for n, i in checkpoint.tensors.items()})
    _check_tensors(stored)
    return stored


def load_draft(path: str | Path, target: TargetShape | None = None, *, dtype: torch.dtype | None = None) -> Draft:
    """A draft from its folder, on the CPU, ready to decode.

    Args:
        target: what it is to be used with.
        dtype: of all floating-point tensors; None: as stored.

    Raises:
        ModelError: as for `open_draft`, or tensors that make no sense.
    """
    stored = open_draft(path, target)
    stored.vocabulary()
    tensors = {name: stored.read(name) for name in stored.specs}
    with torch.random.fork_rng([]):  # what is drawn here is overwritten
        draft = stored.kind(stored.config)
    draft.load_state_dict({name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in tensors.items()}, assign=True)
    return draft.eval()


def check_target(config: DraftConfig, where: str, hidden_size: int, vocab_size: int, num_layers: int, fingerprint: str = "") -> None:
    """Whether a draft was made for a target of these sizes and, where both have one, of this fingerprint.

    Raises:
        ModelError: says what differs.
    """
    sizes = (
        ("hidden size", config.target_hidden_size, hidden_size),
        ("vocabulary", config.vocab_size, vocab_size),
        ("number of layers", config.num_target_layers, num_layers),
    )
    for what, wanted, found in sizes:
        if wanted != found:
            raise ModelError(750, where, f"was made for a target whose {what} is {wanted}, and this one's is {found}", "give the draft of this target")
    if config.target_fingerprint and fingerprint and config.target_fingerprint != fingerprint:
        hint = "for the same model stored in another way, make target_fingerprint empty in the draft's config.json"
        raise ModelError(751, where, "was made for another target of this shape", hint)


def _config(kind: type[Draft], fields: dict[str, Any]) -> DraftConfig:
    try:
        config = kind.Config.model_validate_json(json.dumps(fields), strict=True)
        wrong = _nonsense(config)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if wrong:
        raise ModelError(752, "config.json", wrong, f"it is not the config of a {kind.name} draft")
    return config


def _nonsense(config: DraftConfig) -> str:
    """What cannot be in a config whose types are right."""
    for name, value in config.model_dump().items():
        most = MOST_LAYERS if name in ("num_hidden_layers", "num_target_layers") else MOST
        if type(value) is int and not -1 <= value <= most:
            return f"{name} is {str(value)[:40]}, more than {most}"
    ids = config.aux_hidden_state_layer_ids
    theta: Any = config.rope_parameters.get("rope_theta")
    if type(theta) not in (int, float) or not 0 < theta < 1e15:
        return f"rope_parameters has rope_theta {theta!r:.40}, which is no positive number"
    if any(not _plain(value) for value in config.rope_parameters.values()):
        return "rope_parameters has something else than numbers and names"
    if config.num_attention_heads % config.num_key_value_heads:
        return f"{config.num_attention_heads} query heads cannot share {config.num_key_value_heads} of keys"
    if config.draft_vocab_size > config.vocab_size:
        return f"draft_vocab_size {config.draft_vocab_size} is more than the target's {config.vocab_size}"
    if any(not 0 <= i < config.num_target_layers for i in ids):
        return f"aux_hidden_state_layer_ids {list(ids)!r:.100} are no numbers of {config.num_target_layers} layers"
    return ""


def _plain(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= MOST_LAYERS and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
    return value is None or isinstance(value, str | bool) or (isinstance(value, int | float) and abs(value) < 1e15)


def _check_tensors(stored: Stored) -> None:
    try:
        with FakeTensorMode(), torch.random.fork_rng([]):  # tensors without memory, as the sizes may be absurd
            wanted = stored.kind(stored.config).state_dict()
    except ModelError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(754, "config.json", f"describes no {stored.kind.name} draft that can be built: {error!s:.200}") from error
    for name in sorted(wanted.keys() ^ stored.specs.keys()):
        what = f"has no tensor {name}, which its config asks for" if name in wanted else f"has a tensor {name[:200]}, of which its config knows nothing"
        raise ModelError(755, stored.where, what)
    for name, tensor in wanted.items():
        spec = stored.specs[name]
        fits = spec.dtype in FLOATS if tensor.is_floating_point() else torch_dtype(spec.dtype) == tensor.dtype
        if spec.shape != tuple(tensor.shape) or not fits:
            raise ModelError(
                757, f"{stored.where}: {name}", f"is {spec.dtype} {list(spec.shape)}, and config.json asks for {tensor.dtype} {list(tensor.shape)}"
            )
