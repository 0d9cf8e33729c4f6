"""A conformance kit: what the pipeline will ask of a plugin and its passes, asked of them in a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor

from ..adapters.base import Site
from ..errors import PlanError
from ..hookspecs import hookimpl
from ..io.checkpoint import TensorSpec, dtype_name, torch_dtype
from ..kv_cache import round_heads
from ..loading import load_model
from ..passes import ModelPass, Pass, RuntimePass, TensorPass, TrainedPass
from ..pipeline import compress
from ..plugins import PluginHost
from ..schemes import CacheScheme, Quantized
from ..validation import validate
from .models import tiny_checkpoint

if TYPE_CHECKING:
    from ..context import Context

SHAPES = ((64, 128), (100, 128), (7, 64))
DTYPES = ("BF16", "F16", "F32")


def tiny_site(shape: tuple[int, int] = (64, 128), dtype: str = "BF16", role: str = "up", layer: int = 0) -> Site:
    """A site of a made-up model."""
    name = f"model.layers.{layer}.mlp.{role}_proj"
    return Site(name, f"{name}.weight", role, layer, shape, dtype)


def check_plugin(name: str, module: ModuleType | Any) -> PluginHost:
    """The plugin loads: hook version, hook names, ids. Returns the host that holds it."""
    host = PluginHost()
    host.register_module(name, module)
    for pass_ in host.registry.passes.values():
        assert pass_.summary() and not pass_.summary().startswith(("Pass", "class")), f"{pass_.id} has no docstring"
        schema = pass_.Config.model_json_schema()
        for option, entry in schema.get("properties", {}).items():
            assert entry.get("description"), f"{pass_.id}: option {option} has no description"
    return host


def check_pass(plugin: str, module: ModuleType | Any, pass_id: str, folder: Path, **options: Any) -> None:
    """One pass, with these options, keeps what it promises, alone and end to end on a tiny model.

    Args:
        folder: empty folder for the tiny model and the output.
        options: options of the pass.

    Raises:
        AssertionError: with what was promised and not kept.
    """
    host = check_plugin(plugin, module)
    pass_class = host.registry.find_pass(pass_id)
    _refuses_unknown(pass_class)
    pass_ = pass_class.bind(pass_class.Config(**options))
    if isinstance(pass_, TensorPass):
        _check_tensor_pass(pass_, host)
    if isinstance(pass_, TrainedPass) and pass_.cache:
        _check_cache(pass_, pass_.cache)
    model = tiny_checkpoint("llama", folder / "model")
    step = {"use": pass_id, "with": options}
    recipe: dict[str, Any] = {"steps": [step]}
    if pass_.needs_calibration:
        text = folder / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
        recipe["calibration"] = {"data": str(text), "samples": 4, "tokens": 32}
    if isinstance(pass_, TrainedPass):
        recipe["steps"].append({"use": _Looks.id})
    for out in ("out", "again"):
        compress(model, out=folder / out, recipe=recipe, plugins=[plugin, "conformance"], host=_fresh(plugin, module))
    if isinstance(pass_, TrainedPass):
        reloaded = load_model(folder / "out", "cpu", own_reader=True).model
        assert torch.equal(_logits(reloaded), _Looks.seen), f"{pass_id}: what is stored is not what would have been trained"
    first, second = (sorted((folder / out).glob("*.safetensors")) for out in ("out", "again"))
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second], f"{pass_id}: two runs gave different bytes"
    if not isinstance(pass_, RuntimePass):
        found = validate(folder / "out", model)
        assert found["ok"], f"{pass_id}: {found['problems']}"


class _Looks(ModelPass):
    """Trains nothing: shows the model, rounding, a batch, for quantizers that learn of one, and runs it."""

    id = "conformance.looks"
    seen: ClassVar[Tensor]

    def run(self, model: torch.nn.Module, context: Context) -> Mapping[str, Any]:
        _logits(model.train())
        _Looks.seen = _logits(model.eval())
        return {}


@hookimpl
def _register_passes() -> list[type[Pass]]:
    return [_Looks]


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(3, 67)[None]).logits
    return found


def _fresh(plugin: str, module: ModuleType | Any) -> PluginHost:
    host = PluginHost()
    host.register_module(plugin, module)
    host.register_module("conformance", SimpleNamespace(__name__="conformance", ANGELSLIM_HOOKS=1, angelslim_register_passes=_register_passes))
    return host


def _refuses_unknown(pass_class: type[Pass]) -> None:
    try:
        pass_class.Config.model_validate({"no_such_option_": 1})
    except ValidationError:
        return
    raise AssertionError(f"{pass_class.id} accepts options it does not know; derive its Config from PassConfig")


def _check_tensor_pass(pass_: TensorPass, host: PluginHost) -> None:
    tried = 0
    for shape in SHAPES:
        for dtype in DTYPES:
            site = tiny_site(shape, dtype)
            try:
                scheme = pass_.scheme(site)
            except PlanError:
                continue  # refusing a shape from the headers is right
            tried += 1
            for label, weight in _weights(shape, dtype).items():
                where = f"{pass_.id} on {label} {dtype} {list(shape)}"
                before = weight.clone()
                result = _apply(pass_, {site: weight}, site)
                assert torch.equal(weight, before), f"{where}: changed its input"
                if scheme is None:
                    assert isinstance(result, Tensor), f"{where}: announced a plain weight and returned {type(result).__name__}"
                    assert (result.shape, result.dtype) == (weight.shape, weight.dtype), f"{where}: changed shape or dtype"
                    assert bool(torch.isfinite(result).all()), f"{where}: is not finite"
                    continue
                assert isinstance(result, Quantized) and result.scheme == scheme, f"{where}: did not return the scheme it announced"
                exporter = host.registry.exporters[scheme.exporters[0]]()
                packed = {n: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for n, t in exporter.pack(result).items()}
                assert packed == exporter.layout(shape, scheme), f"{where}: packs otherwise than announced"
                assert bool(torch.isfinite(result.dequantize()).all()), f"{where}: is not finite"
                assert bool((result.scale.float() != 0).all()), f"{where}: has a zero scale"
                again = exporter.unpack(exporter.pack(result), scheme)
                assert torch.equal(again.dequantize(), result.dequantize()), f"{where}: does not survive packing"
    assert tried, f"{pass_.id} refuses every shape tried: {SHAPES}"


def _check_cache(pass_: TrainedPass, cache: CacheScheme) -> None:
    """Keys and values round as the stored scales say, those of a pass that learns of the first batch once it has seen one."""
    heads = 2
    for dtype in (torch.bfloat16, torch.float32):
        quantizer = pass_.cache_quantizer(heads).train()
        for seed in range(2):
            pair = torch.randn(2, 3, heads, 5, 16, generator=torch.Generator().manual_seed(seed)).to(dtype).unbind()
            quantizer.rounded(*pair)
        with torch.no_grad():
            found = quantizer.eval().rounded(*pair)
        for x, rounded, scale in zip(pair, found, quantizer.scales(), strict=True):
            assert (scale.dtype, tuple(scale.shape)) == (torch.float32, cache.shape(heads)), f"{pass_.id}: scales are not as {cache.name} stores them"
            assert bool((torch.isfinite(scale) & (scale > 0)).all()), f"{pass_.id}: has a scale that is not positive"
            assert torch.equal(rounded, round_heads(x, scale.detach())), f"{pass_.id}: what is stored of the cache is not what is trained"


def _apply(pass_: TensorPass, weights: Mapping[Site, Tensor], site: Site) -> Quantized | Tensor:
    if isinstance(pass_, TrainedPass):
        quantizer, weight = pass_.quantizers(weights)[site].train(), weights[site]
        assert quantizer.trains_weight == pass_.trains_weight, f"{pass_.id}: it and its quantizers differ in whether weights are trained"
        with torch.no_grad():
            quantizer.inputs(torch.ones_like(weight))  # for those that learn of a batch
            quantizer.eval()
            found = quantizer.quantized(weight)
            assert torch.equal(quantizer.weight(weight), found.dequantize(weight.dtype)), f"{pass_.id}: what is stored is not what is trained"
        return found
    return pass_.apply(weights, None)[site]  # type: ignore[arg-type]


def _weights(shape: tuple[int, int], dtype: str) -> dict[str, Tensor]:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kind = torch_dtype(dtype)
    spiked = normal * 0.02
    spiked[0, 0] = 100.0
    cases = {"normal": normal * 0.02, "spiked": spiked, "zero": torch.zeros(shape), "tiny": normal * 1e-7, "large": normal * 1000}
    return {label: weight.to(kind) for label, weight in cases.items()}
