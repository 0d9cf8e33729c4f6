"""What an adapter is: a table from tensor names to roles. No code per architecture, and `model_type` lives only here.

An architecture is a `Layout`. `describe` matches a checkpoint's headers against it and gives every linear its `Site`;
a tensor of a decoder layer that the table does not know is an error, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import regex

from ..errors import ModelError, PlanError

# role -> the groups a recipe can name it by
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("q", "k", "v", "o", "q_a", "q_b", "kv_a", "kv_b"), ("attention",)),
        **dict.fromkeys(("linear_in", "linear_in_z", "linear_out"), ("attention", "linear_attention")),
        **dict.fromkeys(("gate", "up", "down"), ("mlp",)),
        **dict.fromkeys(("shared_gate", "shared_up", "shared_down"), ("mlp", "shared_experts")),
        **dict.fromkeys(("expert_gate", "expert_up", "expert_down"), ("mlp", "experts")),
        "head": ("head",),
        "other": ("other",),
    }
)


class Part(NamedTuple):
    """Where a linear lies in a stacked 3-D tensor [experts, rows, columns]."""

    expert: int
    start: int
    stop: int
    transposed: bool


@dataclass(frozen=True)
class Site:
    """One linear layer of a checkpoint.

    Args:
        name: module path as in the checkpoint, without `.weight`.
        tensor: name of the tensor that holds the weight.
        role: key of `GROUPS`; "other" is a weight the table leaves alone unless it is named.
        layer: index of the decoder layer, None outside.
        shape: (out_features, in_features).
        dtype: dtype as safetensors names it.
        expert: index of the routed expert, or None.
        fused: id shared by the linears which engines run as one matmul; they need equal per-tensor scales.
        part: place in a stacked 3-D tensor, or None.
        scale_dtype: dtype that the layout asked for prescribes for scales of integer weights, or None.
    """

    name: str
    tensor: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    dtype: str
    expert: int | None = None
    fused: str | None = None
    part: Part | None = None
    scale_dtype: str | None = None


class Feed(NamedTuple):
    """Something inside a decoder layer whose output channels can be scaled, and every weight that reads it.

    Args:
        source: a norm, or a linear whose output channels reach the readers one by one (`v`, `up`).
        readers: weight names inside the layer, `{e}` an expert index; those a layer lacks are skipped.
        block: the part of the layer whose output shows the effect.
    """

    source: str
    readers: tuple[str, ...]
    block: str


# attention and feed-forward names shared by most decoder architectures
ATTENTION = {f"self_attn.{role}_proj": role for role in "qkvo"}
MLP = {f"mlp.{role}_proj": role for role in ("gate", "up", "down")}
EXPERTS = {f"mlp.experts.{{e}}.{role}_proj": f"expert_{role}" for role in ("gate", "up", "down")}
STACKED_EXPERTS = {"mlp.experts.gate_up_proj": ("expert_gate", "expert_up"), "mlp.experts.down_proj": ("expert_down",)}


# readers of the norm before attention, and of the norm before the feed-forward part, routers included
READS_INPUT = tuple(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"))
_MLPS = ("", "experts.{e}.", "shared_experts.", "shared_expert.", "shared_mlp.")
READS_MLP = (*(f"mlp.{part}{role}_proj" for part in _MLPS for role in ("gate", "up")), "mlp.gate", "mlp.gate.wg", "mlp.shared_expert_gate")
ATTENTION_FEED = Feed("input_layernorm", READS_INPUT, "self_attn")
VALUE_FEED = Feed("self_attn.v_proj", ("self_attn.o_proj",), "self_attn")
MLP_FEED = Feed("post_attention_layernorm", READS_MLP, "mlp")
INNER_FEEDS = tuple(Feed(f"mlp.{part}up_proj", (f"mlp.{part}down_proj",), "mlp") for part in _MLPS)
FEEDS = (ATTENTION_FEED, VALUE_FEED, MLP_FEED, *INNER_FEEDS)


@dataclass(frozen=True)
class Layout:
    """An architecture as data.

    Args:
        model_types: `model_type` values of config.json this table serves.
        roles: weight name inside a decoder layer (no `.weight`; `{e}` an expert index) -> role.
        fused: role sets that engines run as one matmul (routed experts are joined per expert).
        optional_fused: those of `fused` whose members need not all be there.
        other: 2-D weights inside a layer that stay as they are by default (routers, gates), same syntax.
        stacked: 3-D tensors inside a layer -> the roles of their rows, in equal parts.
        stacked_transposed: the stacked tensors are [experts, in, out].
        blocks: possible prefixes of the decoder layers; the first that occurs is used.
        layer_count: key of config.json (or of its text_config) that gives the number of decoder layers.
        mtp: prefixes of multi-token-prediction tensors outside the layers; layers beyond the count are MTP as well.
        experts: module path of the routed experts inside a layer, "" if the architecture has none.
        feeds: what scaling and rotation may fold into the weights.
        norm_offset: a norm multiplies by its weight plus this.
        loads_as: `model_type` -> the name under which transformers knows its language model, where that differs.
        gguf: `model_type` -> the name llama.cpp has for the architecture, for those that can be written as GGUF.
        towers: names of the modules beside the language model, left alone; engines may know them under other prefixes.
        projectors: linears beside the language model whose outputs stand in its stream, as the ends of their names.
        renamed: prefix of tensors in a checkpoint -> the prefix under which transformers loads them, where that differs.
        biases: `model_type` -> key of config.json -> the roles whose linears have a bias if it is true.
    """

    model_types: tuple[str, ...]
    roles: Mapping[str, str]
    fused: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("gate", "up"), ("shared_gate", "shared_up"), ("expert_gate", "expert_up"))
    optional_fused: tuple[tuple[str, ...], ...] = ()
    other: tuple[str, ...] = ()
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stacked_transposed: bool = False
    blocks: tuple[str, ...] = ("model.layers", "model.language_model.layers", "language_model.model.layers")
    layer_count: str = "num_hidden_layers"
    mtp: tuple[str, ...] = ("mtp.",)
    experts: str = ""
    feeds: tuple[Feed, ...] = FEEDS
    norm_offset: float = 0.0
    loads_as: Mapping[str, str] = field(default_factory=dict)
    gguf: Mapping[str, str] = field(default_factory=dict)
    towers: tuple[str, ...] = ("vision_tower", "multi_modal_projector", "visual")
    projectors: tuple[str, ...] = ("visual.merger.linear_fc2", "visual.deepstack_merger_list.{e}.linear_fc2")
    renamed: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """A checkpoint seen through its layout.

    Args:
        layout: the table that matched.
        block: prefix of the decoder layers.
        num_layers: number of decoder layers, MTP excluded.
        sites: every linear in checkpoint order, the ones left alone by default among them.
        mtp_tensors: tensors of multi-token-prediction layers, copied unchanged.
    """

    layout: Layout
    block: str
    num_layers: int
    sites: tuple[Site, ...]
    mtp_tensors: frozenset[str]

    @property
    def attentions(self) -> dict[str, Site]:
        """Modules that keep keys and values in a cache, by name -> the linear that makes the keys."""
        return {site.name.rpartition(".")[0]: site for site in self.sites if site.role == "k" and site.layer is not None}

    @property
    def has_latent_cache(self) -> bool:
        """Whether what is cached is neither keys nor values, but what both are made from (MLA)."""
        return any(site.role == "kv_a" for site in self.sites)


def shared_experts(name: str) -> dict[str, str]:
    """Roles of a shared expert at `mlp.NAME`."""
    return {f"mlp.{name}.{role}_proj": f"shared_{role}" for role in ("gate", "up", "down")}


def _compile(patterns: Iterable[str]) -> re.Pattern[str]:
    bodies = (re.escape(p).replace(re.escape("{e}"), r"(\d+)") for p in patterns)
    return re.compile("|".join(f"(?:{b})" for b in bodies) or r"(?!)")


def describe(layout: Layout, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> Description:
    """Match a checkpoint against a layout.

    Args:
        config: parsed config.json.
        shapes: tensor name -> shape, from the headers.
        dtypes: tensor name -> dtype as safetensors names it.

    Raises:
        ModelError: layers missing, unknown weights inside a layer, an incomplete fused set, a wrong rank.
    """
    num_layers = _layer_count(layout, config)
    config = {**config, **(config.get("text_config") or {})}
    block = next((b for b in layout.blocks if any(name.startswith(f"{b}.0.") for name in shapes)), None)
    if block is None:
        raise ModelError(20, "checkpoint", f"no tensor starts with {layout.blocks[0]}.0.", "the weights are not those of this config.json")
    inside = re.compile(re.escape(block) + r"\.(\d+)\.(.+)")
    other, seen = _compile(layout.other), set()
    sites: list[Site] = []
    mtp: set[str] = set()
    parts: set[str] = set()
    beyond: dict[int, set[str]] = {}
    for name, shape in shapes.items():
        match = inside.fullmatch(name)
        if match is None:
            if name.startswith(layout.mtp):
                mtp.add(name)
            elif len(shape) == 2 and name.endswith(".weight") and "embed" not in name.split(".")[-2]:
                role = "head" if name.endswith("lm_head.weight") else "other"
                sites.append(Site(name.removesuffix(".weight"), name, role, None, (shape[0], shape[1]), dtypes[name]))
            continue
        layer, inner = int(match[1]), match[2]
        if layer >= num_layers:
            mtp.add(name)
            beyond.setdefault(layer, set()).add(inner)
            continue
        seen.add(layer)
        parts.add(inner)
        if inner in layout.stacked:
            sites += _stacked_sites(layout, f"{block}.{layer}.", layer, inner, name, shape, dtypes[name])
            continue
        module = inner.removesuffix(".weight")
        if len(shape) < 2 or module == inner:
            if len(shape) >= 2 and not other.fullmatch(inner):
                raise ModelError(21, name, f"a {len(shape)}-D tensor this architecture's table does not know", _where_to_add(layout))
            continue
        key = re.sub(r"(?<=experts\.)\d+(?=\.)", "{e}", module)
        if key in layout.roles and len(shape) == 2:
            role, expert = layout.roles[key], re.search(r"experts\.(\d+)\.", module)
            index = int(expert[1]) if expert else None
            sites.append(Site(f"{block}.{layer}.{module}", name, role, layer, (shape[0], shape[1]), dtypes[name], index))
        elif not other.fullmatch(module):
            raise ModelError(22, name, "a weight this architecture's table does not know", _where_to_add(layout))
        elif len(shape) == 2:
            sites.append(Site(f"{block}.{layer}.{module}", name, "other", layer, (shape[0], shape[1]), dtypes[name]))
    missing = sorted(set(range(num_layers)) - seen)
    if missing:
        raise ModelError(
            23,
            "checkpoint",
            f"config.json says {num_layers} layers, but layer {missing[0]} has no tensor",
            "a shard is missing, or the config is of another model",
        )
    for layer, inners in beyond.items():
        if inners <= parts:  # a layer that predicts further tokens has weights that the others lack
            raise ModelError(403, f"{block}.{layer}", f"is a layer, and config.json says {num_layers} layers", "the config is of another model")
    _check_shapes(config, block, sites, shapes)
    return Description(layout, block, num_layers, tuple(_with_fused(layout, sites)), frozenset(mtp))


# roles whose inputs, and whose outputs, are the hidden states
_READ_HIDDEN = frozenset({"q", "k", "v", "q_a", "kv_a", "linear_in", "linear_in_z", "gate", "up", "shared_gate", "shared_up", "expert_gate", "expert_up"})
_WRITE_HIDDEN = frozenset({"o", "linear_out", "down", "shared_down", "expert_down"})


def _check_shapes(config: Mapping[str, Any], block: str, sites: Sequence[Site], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Widths of config.json against the headers, and of a feed-forward part's linears against each other."""
    embedding = f"{block.rpartition('.')[0]}.embed_tokens.weight"
    found = [(embedding, shapes[embedding], 0, "vocab_size")] if embedding in shapes else []
    streamed = [s for s in sites if s.layer is not None and s.role in _READ_HIDDEN | _WRITE_HIDDEN]
    found += [(s.name, s.shape, int(s.role in _READ_HIDDEN), "hidden_size") for s in streamed]
    for name, shape, side, key in found:
        if key in config and shape[side : side + 1] != (config[key],):
            raise ModelError(404, name, f"has shape {list(shape)}, and config.json says {key} {config[key]!r:.50}", "the config is of another model")
    inner: dict[tuple[Any, ...], tuple[str, int]] = {}
    for s in sites:
        kind, _, role = s.role.rpartition("_")
        if s.layer is not None and role in ("gate", "up", "down"):
            size = s.shape[role == "down"]
            other, expected = inner.setdefault((s.layer, s.expert, kind), (s.name, size))
            if size != expected:
                raise ModelError(405, s.name, f"has shape {list(s.shape)}, which does not fit the {expected} channels of {other}", "fetch the model again")


def _layer_count(layout: Layout, config: Mapping[str, Any]) -> int:
    text = config.get("text_config") or {}
    count = config.get(layout.layer_count, text.get(layout.layer_count))
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < 100_000:
        raise ModelError(24, "config.json", f"{layout.layer_count} is {count!r}, not a positive number of layers")
    return count


def _where_to_add(layout: Layout) -> str:
    return f"if the checkpoint is right, add it to the layout of {layout.model_types[0]} in angelslim_core/adapters"


def _stacked_sites(layout: Layout, prefix: str, layer: int, inner: str, name: str, shape: tuple[int, ...], dtype: str) -> list[Site]:
    roles = layout.stacked[inner]
    if len(shape) != 3:
        raise ModelError(25, name, f"stacked experts must be 3-D, this has shape {list(shape)}")
    experts, rows, columns = shape if not layout.stacked_transposed else (shape[0], shape[2], shape[1])
    if rows % len(roles):
        raise ModelError(26, name, f"{rows} rows do not divide into {len(roles)} parts")
    high, parent = rows // len(roles), inner.rsplit(".", 1)[0]
    return [
        Site(
            f"{prefix}{parent}.{e}.{role.removeprefix('expert_')}_proj", name, role, layer, (high, columns), dtype, e,
            part=Part(e, i * high, (i + 1) * high, layout.stacked_transposed),
        )
        for e in range(experts)
        for i, role in enumerate(roles)
    ]  # fmt: skip


def _with_fused(layout: Layout, sites: Sequence[Site]) -> list[Site]:
    """Give the members of each complete fused set one id; an incomplete set is an error."""
    set_of = {role: roles for roles in layout.fused for role in roles}
    found: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        if site.role in set_of:
            found.setdefault((site.layer, set_of[site.role], site.expert), []).append(site)
    ids: dict[str, str] = {}
    for (_, roles, _), members in found.items():
        have = [m.role for m in members]
        if sorted(have) != sorted(roles):
            if roles in layout.optional_fused:
                continue
            raise ModelError(27, members[0].name, f"has {', '.join(sorted(have))} where the layer needs {', '.join(roles)}")
        parent = members[0].name.rsplit(".", 1)[0]
        ids.update({m.name: f"{parent}.{'+'.join(roles)}" for m in members})
    return [Site(**{**site.__dict__, "fused": ids.get(site.name)}) for site in sites]


# selection -----------------------------------------------------------------------------------------------------------

_RANGE = re.compile(r"layers\[(\d{,9}):(\d{,9})\]")


def select(sites: Sequence[Site], selectors: Sequence[str], where: str, optional: bool = False) -> list[Site]:
    """Sites matched by any selector, in checkpoint order.

    A selector is a role ("q"), a group ("attention", "mlp", "experts"), an exact name, `re:` and a regular expression
    for the full name, or a range "layers[0:4]"; "layers[0:4].mlp" combines a range with a role or group.

    Raises:
        PlanError: a selector matches nothing and `optional` is false.
    """
    chosen: set[str] = set()
    for selector in selectors:
        hits = [s.name for s in sites if _matches(selector, s, where)]
        if not hits and not optional:
            known = ", ".join(sorted({s.role for s in sites} | {g for s in sites for g in GROUPS[s.role]}))
            raise PlanError(20, where, f"{selector!r} matches no linear of this model", f"roles and groups it has: {known}; or write `optional: true`")
        chosen.update(hits)
    return [s for s in sites if s.name in chosen]


def _matches(selector: str, site: Site, where: str) -> bool:
    ranged, _, rest = selector.partition("]")
    match = _RANGE.fullmatch(ranged + "]")
    if match:
        low, high = int(match[1] or 0), int(match[2] or 10**9)
        return site.layer is not None and low <= site.layer < high and (not rest or _matches(rest.removeprefix("."), site, where))
    if selector.startswith("re:"):
        try:
            return regex.fullmatch(selector[3:], site.name, timeout=1.0) is not None
        except (regex.error, TimeoutError, RecursionError) as error:
            raise PlanError(21, where, f"{selector[:200]!r} is no usable regular expression: {error}") from error
    return selector == site.name or selector == site.role or selector in GROUPS[site.role]
