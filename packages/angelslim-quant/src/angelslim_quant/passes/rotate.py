"""Rotation: stream, value heads and inputs of `down` in a Hadamard basis, where outliers are spread over all channels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from angelslim_core.errors import PlanError
from angelslim_core.passes import PassConfig, SourcePass

if TYPE_CHECKING:
    from angelslim_core.adapters.base import Description, Site
    from angelslim_core.source import Source
    from angelslim_core.transforms import Transform

    from ..rotated import Change

# roles whose outputs are added to the residual stream, and roles that neither read nor write it
WRITERS = frozenset({"o", "linear_out", "down", "shared_down", "expert_down"})
INNER = frozenset({"q_b", "kv_b"})
# role of what reads the channels between two linears of a feed-forward part -> roles of what writes them
FEEDERS = {f"{part}down": (f"{part}gate", f"{part}up") for part in ("", "shared_", "expert_")}
# keys of config.json that give the number of multi-token-prediction layers
MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


class Rotate(SourcePass):
    """Hadamard rotation of residual stream, value heads and, while the model runs, inputs of `down`; it computes the same."""

    id = "quant.rotate"

    class Config(PassConfig):
        r1: bool = Field(True, description="Rotate the residual stream; norm weights are folded into what reads them, a tied head gets its own weight.")
        r2: bool = Field(True, description="Rotate the values of each attention head; layers with latent or gated attention are left as they are.")
        r4: bool = Field(False, description="Rotate the inputs of `down` too; whoever runs the model must do that online, see below.")
        r4_block_size: int | None = Field(None, ge=2, description="Inputs of `down` that are mixed with each other, all if not given.")
        r4_zigzag: bool = Field(False, description="Before R4, deal the inputs of `down` to its blocks by size, so that each has as many large ones.")
        randomize: bool = Field(False, description="Random signs, from the run's seed, before each Hadamard matrix.")

        @model_validator(mode="after")
        def _something(self) -> Rotate.Config:
            if not (self.r1 or self.r2 or self.r4):
                raise ValueError("r1, r2 and r4 are all off, so nothing would be rotated")
            if (self.r4_block_size or self.r4_zigzag) and not self.r4:
                raise ValueError("r4_block_size and r4_zigzag need r4: true")
            if self.r4_zigzag and not self.r4_block_size:
                raise ValueError("r4_zigzag needs r4_block_size: in one block every order is as good")
            return self

    def rewrite(self, source: Source, description: Description, device: str, seed: int) -> Source:
        from ..rotated import RotatedSource

        plan = _Planner(source, description, seed if self.config.randomize else None)
        if self.config.r1:
            plan.stream()
        if self.config.r2:
            plan.values(required=not (self.config.r1 or self.config.r4))
        if self.config.r4:
            plan.inner(self.config.r4_block_size, self.config.r4_zigzag)
        layout = description.layout
        return RotatedSource(
            source, self.id, plan.changes(), norm_offset=layout.norm_offset, transposed=layout.stacked_transposed, device=device,
            added=plan.added, dropped=plan.dropped, config=plan.config, report=plan.report, warnings=plan.warnings,
            transforms=tuple(plan.transforms),
        )  # fmt: skip


class _Planner:
    """Finds what becomes of every tensor, from names and shapes alone."""

    def __init__(self, source: Source, description: Description, seed: int | None) -> None:
        self.source, self.description, self.seed = source, description, seed
        self.layout = description.layout
        self.text: Mapping[str, Any] = source.config.get("text_config") or source.config
        self.config = source.config
        self.added: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.report: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.transforms: list[Transform] = []
        self._changes: dict[str, dict[str, Any]] = {}

    def changes(self) -> dict[str, Change]:
        from ..rotated import Change

        return {name: Change(**fields) for name, fields in self._changes.items()}

    def stream(self) -> None:
        """R1: everything that writes the residual stream, and everything that reads it, with its norm."""
        from ..numerics.hadamard import Rotation

        prefix = self.description.block.rpartition(".")[0]
        embedding, norm = f"{prefix}.embed_tokens.weight", f"{prefix}.norm.weight"
        for name in (embedding, norm):
            if name not in self.source.shapes:
                raise PlanError(243, name, "is missing, so the residual stream cannot be rotated", "set r1: false")
        hidden = self.source.shapes[embedding][1]
        rotation = Rotation(hidden, self.seed)
        if rotation.block == 1:
            raise PlanError(244, embedding, f"{hidden} channels have no Hadamard matrix", "set r1: false")
        if rotation.block < hidden:
            self.warnings.append(f"quant.rotate: no Hadamard matrix of order {hidden} is known here, so the stream is rotated in blocks of {rotation.block}")
        self.report.update(r1=hidden, r1_block=rotation.block)
        self._drop_mtp()
        self._untie(embedding)
        self._change(embedding, inputs=rotation)
        self._change(norm, fill=1 - self.layout.norm_offset)
        self._change(self.head, fold=norm, inputs=rotation)
        self._beside({embedding, norm, self.head, f"{self.head.removesuffix('.weight')}.bias"}, rotation)
        norms: dict[str, set[str]] = {}
        for feed in self.layout.feeds:
            if "." not in feed.source:  # norms inside a block do not stand on the stream
                norms.setdefault(f"{feed.source}.weight", set()).update(feed.readers)
        self._norms(norms)
        self._linears(norms, rotation)

    def _drop_mtp(self) -> None:
        if not self.description.mtp_tensors:
            return
        # they share embedding and head with the model, whose norm is folded into the head, so they cannot follow it
        self.dropped = dict.fromkeys(self.description.mtp_tensors, "multi-token prediction reads the stream as it was before rotation")
        self.warnings.append("quant.rotate: the multi-token-prediction layers read the unrotated stream and are left out")
        self._set(**dict.fromkeys(MTP_COUNTS, 0))

    def _untie(self, embedding: str) -> None:
        head = next((s.tensor for s in self.description.sites if s.role == "head"), None)
        if head is None:
            head = "language_model.lm_head.weight" if self.description.block.startswith("language_model.") else "lm_head.weight"
            self.added[head] = embedding
        self.head = head
        self._set(tie_word_embeddings=False)

    def _set(self, **values: Any) -> None:
        """Set the keys that config.json has, also where it nests the language model's."""

        def merged(config: Mapping[str, Any]) -> dict[str, Any]:
            nested = {"text_config": merged(config["text_config"])} if isinstance(config.get("text_config"), Mapping) else {}
            # a config without the key takes its class's default, which may be tied
            known = {k: v for k, v in values.items() if k in config or k == "tie_word_embeddings"}
            return {**config, **known, **nested}

        self.config = merged(self.config)

    def _beside(self, known: set[str], rotation: Any) -> None:
        """What stands outside the layers: a projector's outputs take the place of embeddings."""
        projectors = re.compile("|".join(rf"(?:.*\.)?{re.escape(p).replace(re.escape('{e}'), r'[0-9]+')}\.(?:weight|bias)" for p in self.layout.projectors))
        towers, found = [], False
        for name in self.source.shapes:
            if name.startswith(f"{self.description.block}.") or name in known or name in self.dropped:
                continue
            if projectors.fullmatch(name):
                self._change(name, outputs=rotation)
                found = True
            elif set(self.layout.towers) & set(name.split(".")[:2]):
                towers.append(name)
            else:
                raise PlanError(245, name, "may read or write the residual stream in a way not known here", "set r1: false")
        if towers and not found:
            raise PlanError(246, towers[0], "belongs to a tower whose projector is not known here; its outputs would stay unrotated", "set r1: false")

    def _norms(self, norms: Mapping[str, set[str]]) -> None:
        inside = re.compile(re.escape(self.description.block) + r"\.\d+\.([^.]+\.weight)")
        for name, shape in self.source.shapes.items():
            match = inside.fullmatch(name)
            if match is None or len(shape) != 1 or name in self.dropped:
                continue
            if match[1] not in norms:
                raise PlanError(
                    247, name, "scales what is added to the residual stream, channel by channel, so rotating the stream is not exact", "set r1: false"
                )
            self._change(name, fill=1 - self.layout.norm_offset)

    def _linears(self, norms: Mapping[str, set[str]], rotation: Any) -> None:
        for site in self.description.sites:
            if site.layer is None:
                continue
            prefix = f"{self.description.block}.{site.layer}."
            inner = re.sub(r"(?<=experts\.)\d+(?=\.)", "{e}", site.name.removeprefix(prefix))
            norm = next((norm for norm, readers in norms.items() if inner in readers), None)
            if norm is not None:
                self._change(site.tensor, fold=prefix + norm, inputs=rotation)
            elif site.role in WRITERS:
                self._change(site.tensor, outputs=rotation)
                self._change(f"{site.name}.bias", outputs=rotation)
            elif site.role not in INNER:
                raise PlanError(248, site.name, "may read or write the residual stream in a way not known here", "set r1: false")

    def values(self, required: bool) -> None:
        """R2: the values of each head, and what reads them.

        Args:
            required: it is an error if no layer has values that can be rotated.
        """
        from ..numerics.hadamard import Rotation

        by_layer: dict[int, dict[str, Site]] = {}
        for site in self.description.sites:
            if site.layer is not None and site.role in ("q", "v", "o"):
                by_layer.setdefault(site.layer, {})[site.role] = site
        heads = self.text.get("num_attention_heads")
        rotated = 0
        for index, sites in by_layer.items():
            # a gate on the output, which doubles q, multiplies channel by channel
            if set(sites) != {"q", "v", "o"} or sites["q"].shape[0] != sites["o"].shape[1]:
                continue
            v, o = sites["v"], sites["o"]
            if not isinstance(heads, int) or heads < 1 or o.shape[1] % heads or v.shape[0] % (o.shape[1] // heads):
                raise PlanError(249, o.name, f"{o.shape[1]} inputs and {v.shape[0]} values are no {heads!r} heads", "set r2: false")
            rotation = Rotation(o.shape[1] // heads, None if self.seed is None else self.seed + 1 + index)
            if rotation.block == 1:
                continue
            self._change(v.tensor, outputs=rotation)
            self._change(f"{v.name}.bias", outputs=rotation)
            self._change(o.tensor, inputs=rotation)
            self.report.update(r2=rotation.size, r2_block=rotation.block)
            rotated += 1
        self.report["r2_layers"] = rotated
        if required and not rotated:
            raise PlanError(250, self.description.block, "no layer has values that can be rotated head by head", "set r1: true")

    def inner(self, block_size: int | None, zigzag: bool) -> None:
        """R4: the inputs of each `down`; the matrix meets them while the model runs.

        Args:
            block_size: order of the matrix, None for the width of each linear, or of its blocks where there is none.
            zigzag: also put these channels in another order.
        """
        if self.source.transforms:
            raise PlanError(381, self.source.transforms[0].name, "rotates the inputs of down already", "let one step say r4: true")
        by_size: dict[int, list[Site]] = {}
        for site in self.description.sites:
            if site.role in FEEDERS and site.layer is not None:
                by_size.setdefault(self._inner_size(site, block_size), []).append(site)
        for size, sites in by_size.items():
            self._online(f"R4_{size}" if len(by_size) > 1 else "R4", size, sites)
        self.report.update(r4=sum(map(len, by_size.values())), r4_block=max(by_size))
        if zigzag:
            for site in (s for sites in by_size.values() for s in sites):
                self._deal(site, block_size or 1)

    def _inner_size(self, site: Site, block_size: int | None) -> int:
        """Order of the matrix for a `down`."""
        from ..numerics.hadamard import Rotation

        width = site.shape[1]
        size = block_size or Rotation(width).block
        if width % size or Rotation(size).block != size:
            fit = ", ".join(str(n) for n in range(2, width + 1) if width % n == 0 and Rotation(n).block == n)
            raise PlanError(382, site.name, f"its {width} inputs have no Hadamard blocks of {size}", f"r4_block_size: {fit}" if fit else "set r4: false")
        if size == 1:
            raise PlanError(383, site.name, f"{width} channels have no Hadamard matrix", "set r4: false")
        if size < width and not block_size:
            self.warnings.append(f"quant.rotate: no Hadamard matrix of order {width} is known here, so inputs of {site.name} are rotated in blocks of {size}")
        return size

    def _online(self, name: str, size: int, sites: list[Site]) -> None:
        from angelslim_core.transforms import Transform

        from ..numerics.hadamard import Rotation

        rotation = Rotation(size, self.seed)
        layers: dict[str, list[int]] = {}
        for site in sites:
            self._change(site.tensor, inputs=rotation)
            assert site.layer is not None
            inside = site.name.removeprefix(f"{self.description.block}.{site.layer}.")
            layers.setdefault(re.sub(r"(?<=experts\\\.)\d+", r"\\d+", re.escape(inside)), []).append(site.layer)
        kind = self.description.block.rpartition(".")[2]
        # engines know the layers under other prefixes
        targets = [rf"re:(?:.*\.)?{kind}\.(?:{'|'.join(map(str, dict.fromkeys(found)))})\.{inside}$" for inside, found in layers.items()]
        beside = {part for tensor in self.source.shapes for part in tensor.split(".")[:2]}
        self.transforms.append(
            Transform(
                name, tuple(targets), size, lambda x, _: rotation(x), tuple(f"re:.*{tower}.*" for tower in self.layout.towers if tower in beside),
                # Sylvester's matrix is known to engines, others are stored
                tensor=None if size & (size - 1) == 0 and self.seed is None else f"{sites[0].name}.{name}_input.weight",
            )
        )  # fmt: skip

    def _deal(self, site: Site, block_size: int) -> None:
        """Put the inputs of a `down`, and the outputs of what feeds it, in the order of the sizes of its columns."""
        feeders = {s.tensor: s for s in self.description.sites if s.layer == site.layer and s.expert == site.expert and s.role in FEEDERS[site.role]}
        self._change(site.tensor, order=site.tensor, block=block_size)
        for tensor, feeder in feeders.items():
            self._change(tensor, order=site.tensor, block=block_size)
            self._change(f"{feeder.name}.bias", order=site.tensor, block=block_size)

    def _change(self, name: str, **fields: Any) -> None:
        if name in self.source.shapes or name in self.added:
            self._changes.setdefault(name, {}).update(fields)
