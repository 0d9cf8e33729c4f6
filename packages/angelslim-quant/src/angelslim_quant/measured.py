"""The file of measured sensitivities: what each choice for each unit would cost in KL, and of which model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from angelslim_core.errors import ModelError, PlanError
from angelslim_core.io.checkpoint import read_bytes
from angelslim_core.io.strict_json import read_json

from .candidates import CandidateConfig, Unit

if TYPE_CHECKING:
    from angelslim_core.source import Source

MAX_BYTES = 64 << 20
# of each tensor this many bytes are looked at to tell models of one architecture apart
PROBE = 64
Loss = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]


class UnitEntry(BaseModel):
    """One unit: its linears, and nats a token by candidate."""

    model_config = ConfigDict(extra="forbid", strict=True)

    linears: list[str]
    kl: dict[str, Loss]


class Sensitivity(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    model: str
    group_size: int
    symmetric: bool
    samples: int
    tokens: int
    seed: int
    units: dict[str, UnitEntry]

    def check(self, where: str, source: Source, config: CandidateConfig) -> None:
        """Raise PlanError unless it was measured on this model, with these options."""
        again = "measure again, or drop `sensitivity` so that the run measures"
        if self.model != model_digest(source):
            raise PlanError(290, where, "was measured on another model, or on this one before another step changed it", again)
        for name in ("group_size", "symmetric"):
            if getattr(self, name) != getattr(config, name):
                raise PlanError(291, where, f"was measured with {name} {json.dumps(getattr(self, name))}", again)

    def losses(self, where: str, unit: Unit, candidates: Sequence[str]) -> list[float]:
        """What each candidate costs a unit.

        Raises:
            PlanError: the file lacks the unit, one of its linears or a candidate.
        """
        entry = self.units.get(unit.name)
        if entry is None or set(entry.linears) != {site.name for site in unit.sites}:
            raise PlanError(292, where, f"does not cover {unit.name} as this step targets it", f"measured: {', '.join(list(self.units)[:3])}, ...")
        for name in candidates:
            if name not in entry.kl:
                raise PlanError(293, where, f"candidate {name} was not measured for {unit.name}", f"measured: {', '.join(entry.kl)}")
        return [entry.kl[name] for name in candidates]


def read_sensitivity(path: Path) -> Sensitivity:
    """Read a file of `angelslim quant sensitivity`.

    Raises:
        ModelError: it is no JSON, or not of this form.
    """
    try:
        return Sensitivity.model_validate(read_json(path, MAX_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(290, path.name, f"is no sensitivity file: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def model_digest(source: Source) -> str:
    """SHA-256 of the names, shapes, dtypes and first bytes of a model's tensors, and of which of them a step has changed."""
    tensors = sorted((name, list(source.shapes[name]), dtype) for name, dtype in source.dtypes.items())
    digest = hashlib.sha256(json.dumps([tensors, sorted(source.changed)]).encode())
    for _, info in sorted(source.checkpoint.tensors.items()):
        digest.update(read_bytes(info.file, info.offset, min(PROBE, info.nbytes)).numpy().tobytes())
    return digest.hexdigest()
