"""Which engine loads which stored scheme: a table, with what each line rests on.

`verdicts` is a prediction from headers, before any engine runs; a scheme the table does not know is not ok.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .adapters.base import Description
    from .exporters import Exporter
    from .plan import Plan
    from .schemes import CacheScheme, Scheme
    from .source import Source

ENGINES = ("vllm", "sglang", "transformers", "llama.cpp")


class Row(NamedTuple):
    """One line of the table.

    Args:
        ok: the engine loads the scheme.
        why: condition or reason, for people.
        aligned: dimensions must be multiples of the block.
    """

    ok: bool
    why: str = ""
    aligned: bool = False


class Folder(NamedTuple):
    """What the verdicts go by, of a folder as it lies."""

    exporter: Exporter | None
    schemes: Mapping[str, Scheme]
    description: Description
    cache: CacheScheme | None = None
    source: Source | None = None


_EMULATED = Row(True, "verified on 5.24, emulated; BF16 models")
_UNROUNDED = Row(False, "5.23 with compressed-tensors 0.20 leaves the cache in 16 bits; AngelSlim's load() rounds it")
_OURS = Row(False, "a layout of AngelSlim's own, which its load() runs; `angelslim convert --to compressed-tensors` makes one for engines")
_WEIGHT_ONLY = ("w4a16", "w8a16", "wNa16", "w4a16-asym", "w8a16-asym", "wNa16-asym")
_GPTQMODEL = Row(False, "read only where gptqmodel is installed; AngelSlim's load() reads it")

# (engine, exporter, kind of scheme); versions: vLLM 0.32, transformers 5.23 with compressed-tensors 0.20 run by us,
# SGLang from its documentation
TABLE: dict[tuple[str, str, str], Row] = {
    ("vllm", "compressed-tensors", "w8a8-int"): Row(True, "verified on vLLM 0.32 CPU"),
    ("vllm", "compressed-tensors", "w8a8-float-dynamic"): Row(True, "needs a GPU with FP8, or falls back to weight-only"),
    ("vllm", "compressed-tensors", "w8a8-float-static"): Row(True, "needs a GPU with FP8"),
    ("vllm", "compressed-tensors", "w4a16"): Row(True, "verified on vLLM 0.32 CPU"),
    ("vllm", "compressed-tensors", "w4a16-asym"): Row(True, "verified on vLLM 0.32 CPU"),
    ("vllm", "compressed-tensors", "w8a16"): Row(True, "unverified here"),
    ("vllm", "compressed-tensors", "w8a8-float-block"): Row(True, "needs a GPU with FP8", aligned=True),
    ("vllm", "compressed-tensors", "nvfp4"): Row(True, "needs a GPU; with FP4 from Blackwell on, else weight-only; unverified here"),
    ("vllm", "compressed-tensors", "nvfp4a16"): Row(True, "needs a GPU; unverified here"),
    ("vllm", "compressed-tensors", "mxfp4"): Row(True, "needs a GPU; with FP4 from Blackwell on, else weight-only; unverified here"),
    ("vllm", "compressed-tensors", "mxfp8"): Row(True, "needs a GPU; unverified here"),
    ("vllm", "compressed-tensors", "w4a8-fp8"): Row(True, "needs a Hopper GPU, BF16, group_size 128 and dimensions divisible by 128; unverified here"),
    ("vllm", "compressed-tensors", "w4a8-int"): Row(True, "verified on vLLM 0.32 CPU"),
    ("vllm", "compressed-tensors", "kv-tensor"): Row(True, "loads and is applied on vLLM 0.32 CPU; on a GPU unverified here"),
    ("vllm", "compressed-tensors", "kv-attn_head"): Row(True, "needs FlashAttention 3, so a Hopper GPU; unverified here"),
    ("vllm", "fp8", "w8a8-float-block"): Row(True, "needs a GPU with FP8", aligned=True),
    ("vllm", "gptq", "w4a16"): Row(True, "verified on vLLM 0.32 CPU"),
    ("vllm", "gptq", "w8a16"): Row(True, "needs a GPU; unverified here"),
    ("vllm", "gptq", "w4a16-asym"): Row(False, "0.32 reads symmetric GPTQ only; awq holds zero points"),
    ("vllm", "awq", "w4a16"): Row(True, "verified on vLLM 0.32 CPU"),
    ("vllm", "awq", "w4a16-asym"): Row(True, "verified on vLLM 0.32 CPU"),
    ("vllm", "modelopt", "nvfp4"): Row(True, "needs a GPU with FP4; unverified here"),
    ("vllm", "modelopt", "nvfp4a16"): Row(True, "needs a GPU; unverified here"),
    ("sglang", "compressed-tensors", "kv-tensor"): Row(True, "with --kv-cache-dtype fp8_e4m3; unverified here"),
    ("sglang", "compressed-tensors", "w8a8-int"): Row(True, "unverified here"),
    ("sglang", "gptq", "w4a16"): Row(True, "unverified here"),
    ("sglang", "gptq", "w8a16"): Row(True, "unverified here"),
    ("sglang", "awq", "w4a16"): Row(True, "unverified here"),
    ("sglang", "awq", "w4a16-asym"): Row(True, "unverified here"),
    ("sglang", "modelopt", "nvfp4"): Row(True, "needs a GPU with FP4; unverified here"),
    ("sglang", "compressed-tensors", "w8a8-float-dynamic"): Row(True, "unverified here"),
    ("sglang", "compressed-tensors", "w8a8-float-static"): Row(True, "unverified here"),
    ("sglang", "compressed-tensors", "w4a16"): Row(True, "unverified here"),
    ("sglang", "fp8", "w8a8-float-block"): Row(True, "unverified here", aligned=True),
    ("transformers", "compressed-tensors", "w8a8-int"): Row(True, "verified on 5.24"),
    ("transformers", "compressed-tensors", "w8a8-float-dynamic"): Row(True, "verified on 5.24"),
    ("transformers", "compressed-tensors", "w8a8-float-static"): Row(True, "verified on 5.24"),
    ("transformers", "compressed-tensors", "w4a16"): Row(True, "verified on 5.24"),
    ("transformers", "compressed-tensors", "w4a16-asym"): Row(
        False, "5.23 with compressed-tensors 0.20 expects unpacked zero points; AngelSlim's load() reads it"
    ),
    ("transformers", "compressed-tensors", "w8a16"): Row(True, "verified on 5.24"),
    **{("transformers", "compressed-tensors", kind): _EMULATED for kind in ("nvfp4", "mxfp4", "mxfp8", "w4a8-fp8", "w4a8-int")},
    **{("transformers", "compressed-tensors", kind): Row(True, "verified on 5.24; BF16 models") for kind in ("nvfp4a16", "mxfp4a16", "mxfp8a16")},
    ("transformers", "compressed-tensors", "wNa16"): Row(True, "verified on 5.24"),
    ("transformers", "fp8", "w8a8-float-block"): Row(True, "dequantized where there is no GPU", aligned=True),
    **{("transformers", "compressed-tensors", kind): _UNROUNDED for kind in ("kv-tensor", "kv-attn_head")},
    **{(engine, "packed", kind): _OURS for engine in ("vllm", "sglang", "transformers") for kind in _WEIGHT_ONLY},
    **{("transformers", layout, kind): _GPTQMODEL for layout in ("gptq", "awq") for kind in ("w4a16", "w4a16-asym", "w8a16", "w8a16-asym")},
}


def kind(scheme: Scheme) -> str:
    """Key of the table for a scheme."""
    grid, inputs = scheme.weights, scheme.input_activations
    if grid.strategy == "tensor_group" or grid.scale_dtype == "U8":
        return f"{'nv' if grid.strategy == 'tensor_group' else 'mx'}fp{grid.bits}{'' if inputs else 'a16'}"
    if inputs is None:
        return (f"w{grid.bits}a16" if grid.type == "int" and grid.bits in (4, 8) else "wNa16") + ("" if grid.symmetric else "-asym")
    if grid.type == "int":
        return f"w{grid.bits}a{inputs.bits}-{'int' if inputs.type == 'int' else 'fp8'}"
    if grid.strategy == "block":
        return "w8a8-float-block"
    return f"w{grid.bits}a{inputs.bits}-float-{'dynamic' if inputs.dynamic else 'static'}"


def verdicts(plan: Plan | Folder) -> dict[str, dict[str, Any]]:
    """Engine -> {ok, why} for what the plan will write, or a folder holds."""
    return {engine: _verdict(engine, plan) for engine in ENGINES}


def _verdict(engine: str, plan: Plan | Folder) -> dict[str, Any]:
    if engine == "llama.cpp":
        return {"ok": False, "why": "reads GGUF only, which `angelslim convert OUT FILE --to gguf` makes of Llama, Qwen2 and Qwen3 models"}
    if plan.exporter is None:
        return {"ok": True, "why": "weights stay in a plain floating-point layout"}
    notes = []
    sites = {s.name: s for s in plan.description.sites}
    if engine == "transformers" and any(sites[name].expert is not None for name in plan.schemes):
        return {"ok": False, "why": "holds experts as 3-D parameters, which it does not quantize; AngelSlim's load() reads it"}
    if engine == "transformers" and plan.schemes and any(s.expert is not None and s.part is None for s in sites.values()):
        return {"ok": False, "why": "5.24 does not find separate experts beside quantized linears; AngelSlim's load() reads it"}
    for scheme in dict.fromkeys(plan.schemes.values()):
        row = TABLE.get((engine, plan.exporter.name, kind(scheme)))
        if row is None or not row.ok:
            return {"ok": False, "why": f"{scheme.name} ({plan.exporter.name}): {row.why if row else 'not known to load'}"}
        block = scheme.weights.block_structure
        if row.aligned and block:
            for name in (n for n, s in plan.schemes.items() if s == scheme):
                rows, columns = sites[name].shape
                if rows % block[0] or columns % block[1]:
                    return {"ok": False, "why": f"{name} is {rows} x {columns}, no multiple of the {block[0]} x {block[1]} block"}
        notes.append(f"{scheme.name}: {row.why}" if row.why else scheme.name)
    if plan.cache:
        row = TABLE.get((engine, plan.exporter.name, f"kv-{plan.cache.strategy}"))
        if row is None or not row.ok:
            return {"ok": False, "why": f"{plan.cache.name}: {row.why if row else 'not known to load'}"}
        notes.append(f"{plan.cache.name}: {row.why}")
    if plan.source and plan.source.transforms:
        why = _no_transforms(engine, plan)
        if why:
            return {"ok": False, "why": f"transform_config: {why}"}
        notes.append("transform_config: needs an NVIDIA GPU, no tensor parallelism; those kernels unverified, all else verified on 0.32")
    return {"ok": True, "why": "; ".join(notes)}


def _no_transforms(engine: str, plan: Plan | Folder) -> str:
    """Why an engine does not multiply inputs as a `transform_config` asks, "" if it does; read from its source code."""
    assert plan.source
    if engine == "transformers":
        return "5.23 with compressed-tensors 0.20 leaves it out without a word, so outputs are garbage; AngelSlim's load() applies it"
    if engine != "vllm":
        return "not known to be applied"
    for transform in plan.source.transforms:
        for site in (s for s in plan.description.sites if transform.applies(s.name)):
            if site.expert is not None:
                return f"0.32 does not apply it to experts, such as {site.name}"
            if f"{site.name}.bias" in plan.source.dtypes:
                return f"0.32 does not apply it to linears with a bias, such as {site.name}"
    return ""
