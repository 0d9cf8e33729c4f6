"""Loading what was made: a transformers model with the artifact's runtime policies installed."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .adapters import transformers_identity
from .adapters.base import Description
from .device import pick_device
from .errors import ModelError
from .io.strict_json import read_json
from .model import auto_class, decoder_layers, sanitized
from .packed_model import Linears, choose_packed, fill, with_holes
from .parallel import is_joined
from .passes import RuntimePass
from .plugins import OFFICIAL, PluginHost
from .records import RECORDS, plugins_hint
from .schemes import CACHE_SCALES
from .source import Source, compute_dtype, describe_source, open_any, quantization_config
from .transforms import install

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .packed import PackedLinear

Packed = bool | Literal["auto"]

OWN_READER = "transformers, weights dequantized by AngelSlim"
_CACHE_READER = ", KV cache rounded to FP8 by AngelSlim"
_TRANSFORMS = ", transform_config applied by AngelSlim"


@dataclass
class Loaded:
    """A model ready to run.

    Args:
        backend: who read the weights, and how many linears run packed and on what.
        tokenizer: None where the folder has none.
        policies: ids of the runtime passes installed.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    backend: str
    policies: list[str] = field(default_factory=list)


def load(
    path: str | Path, device: str = "auto", plugins: tuple[str, ...] = (), packed: Packed = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Model and tokenizer of a folder, runtime policies installed, so that `generate` just works.

    Args:
        plugins: third parties' plugins whose runtime policies may be installed; official ones are loaded as needed.
        packed: as for `load_model`.
    """
    host = PluginHost()
    host.load(plugins)
    loaded = load_model(Path(path), device, host=host, packed=packed)
    return loaded.model, loaded.tokenizer


def load_model(
    path: str | Path, device: str = "auto", *, host: PluginHost | None = None, emulate: bool = True, own_reader: bool = False, packed: Packed = "auto"
) -> Loaded:
    """Load any folder this toolkit can read, in its stored dtype.

    Linears run on their codes as stored where a plugin can do that. Of the others transformers reads what it can read
    exactly if there is nothing else; otherwise they are dequantized by our own reader. `backend` says what was done.

    Args:
        emulate: linears that our own reader dequantized round their inputs, and attention what a quantized KV cache
            holds, as engines do, which stops gradients.
        own_reader: let our own reader dequantize what transformers could read, to compare the two.
        packed: run linears as stored: "auto" where that was measured to be faster, True wherever it is possible, False
            nowhere. Such linears have no gradients; `emulate=False` and `own_reader` exclude them.

    Raises:
        ModelError: invalid, unknown, or a tensor is missing, unexpected or of a wrong shape.
    """
    folder = Path(path)
    host = host or PluginHost()
    source = open_any(folder, host.registry.exporters.values())
    description = describe_source(source, host.registry.layouts)
    where = pick_device(device)
    classes = choose_packed(source, description, host, where, packed) if emulate and not own_reader else {}
    native = not classes and (source.exporter is None or (reads_natively(source, description) and not own_reader))
    model, backend = _from_transformers(source, description, native=native, emulate=emulate, classes=classes, device=where)
    if emulate and source.cache:
        _round_cache(model, source, description)
        backend += _CACHE_READER
    if source.transforms:
        backend += _TRANSFORMS
    model.to(where).eval()
    policies = _install(folder, model, host)
    tokenizer = load_tokenizer(folder) if source.checkpoint.has_tokenizer else None
    return Loaded(model, tokenizer, backend, policies)


def reads_natively(source: Source, description: Description) -> bool:
    """Whether transformers itself reads a folder and computes what was stored.

    It replaces `nn.Linear` modules only, so quantized experts, which it holds as 3-D parameters, are ours to read, as are
    separate ones beside anything quantized, which it does not find (5.24 with compressed-tensors 0.20), and block FP8 and packed zero points, whose shape it mistakes (5.23 with compressed-tensors 0.20). FP4 and MX
    weights it restores in BF16 only.
    """
    if source.exporter is None:
        return True
    if source.transforms:  # 5.23 with compressed-tensors 0.20 leaves them out without a word
        return False
    if is_joined():  # compressed-tensors 0.20 shares the work with the other processes, which load nothing
        return False
    if source.quantized and any(s.expert is not None and (s.name in source.quantized or s.part is None) for s in description.sites):
        return False
    wide = compute_dtype(source, description) != "BF16" and any(s.weights.scale_dtype in ("U8", "F8_E4M3") for s in source.quantized.values())
    return source.exporter.name == "compressed-tensors" and not wide and all(s.weights.symmetric for s in source.quantized.values())


def _from_transformers(
    source: Source, description: Description, native: bool, emulate: bool, classes: Mapping[str, type[PackedLinear]], device: str
) -> tuple[PreTrainedModel, str]:
    """The model on the CPU, but for packed linears, which are on the device; and who read it."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    from .io.checkpoint import torch_dtype

    config = sanitized(source.config)
    config.update(transformers_identity(description.layout, source.config))
    if native and source.quantized:
        # 5.23 with compressed-tensors 0.20 leaves the cache in 16 bits, whatever the scheme says: ours to do
        config["quantization_config"] = {**(quantization_config(source.config) or {}), "kv_cache_scheme": None}
    dtype = torch_dtype(compute_dtype(source, description))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # compressed-tensors draws bars that no setting turns off
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
            # transformers sees a sanitized config and, as links, only the weight files that were checked
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(config))
            made = AutoConfig.from_pretrained(folder, local_files_only=True)
            if native:
                for file in {info.file for info in source.checkpoint.tensors.values()}:
                    (folder / file.name).symlink_to(file.resolve())
                index = source.checkpoint.folder / "model.safetensors.index.json"
                if index.is_file():
                    (folder / index.name).symlink_to(index.resolve())
                model, info = auto_class(made).from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
                if source.quantized:  # it decompresses on the first forward, with more bars
                    from compressed_tensors.offload import remove_dispatch

                    with torch.no_grad():
                        model(torch.zeros(1, 1, dtype=torch.int64))
                    remove_dispatch(model)  # else its weights stay on the CPU, wherever the model goes
            else:
                with torch.device("meta"):
                    model_class = type(auto_class(made).from_config(made, dtype=dtype))
                loader = with_holes(model_class, description, classes) if classes else model_class
                state, input_scales = _dequantized(source, dtype, classes)
                model, info = loader.from_pretrained(None, config=made, state_dict=state, dtype=dtype, output_loading_info=True)
                model.__class__ = model_class
                del state
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            95, str(source.checkpoint.folder), f"transformers cannot load it: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    _check_loading(info, description, source)
    linears = Linears(model, description)
    backend = "transformers" if native else OWN_READER
    if classes:
        backend = f"transformers, {fill(linears, source.read_quantized, classes, dtype, device)}"
        dequantized = len([m for m in source.quantized if m not in classes and f"{m}.weight" not in description.mtp_tensors])
        backend += f", {dequantized} dequantized" if dequantized else ""
    transform_linears(linears, source)
    if emulate and not native:
        _round_inputs(linears, source, input_scales)
    return model, backend


def _dequantized(source: Source, dtype: torch.dtype, packed: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Tensors in the model's dtype, and the input scale of each quantized linear; none of packed ones."""
    state, scales = {}, {}
    for name in source.dtypes:
        module = name.removesuffix(".weight")
        if module in packed:
            continue
        if module in source.quantized:
            quantized = source.read_quantized(module)
            state[name], scales[module] = quantized.dequantize().to(dtype), quantized.input_scale
        else:
            state[name] = source.read(name)
    return state, scales


def transform_linears(linears: Linears, source: Source) -> None:
    """Let linears multiply their inputs and outputs as the checkpoint asks.

    Raises:
        ModelError: it asks for linears that are not there.
    """
    for transform in source.transforms:
        names = [s.name for s in linears.description.sites if transform.applies(s.name)]
        if not names:
            raise ModelError(380, f"config.json: transform_config: {transform.name:.100}", f"applies to no linear of this model: {transform.targets!r:.200}")
        for name in names:
            install(linears(name), name, source.transforms)


def _round_inputs(linears: Linears, source: Source, scales: Mapping[str, Tensor | None]) -> None:
    """Let quantized linears round their inputs as an engine would.

    Raises:
        ModelError: how is not known, or transformers does not run the linear as a module of its own.
    """
    from .emulation import check_emulable, round_inputs

    for name, scheme in source.quantized.items():
        grid = scheme.input_activations
        if name not in scales or grid is None or f"{name}.weight" in linears.description.mtp_tensors:
            continue
        check_emulable(name, grid, scales[name])
        round_inputs(linears(name), grid, scales[name])


def _round_cache(model: PreTrainedModel, source: Source, description: Description) -> None:
    """Let every attention read keys and values as from the cache that the checkpoint asks for.

    Raises:
        ModelError: scales are missing or wrong, or the model caches something else.
    """
    from .kv_cache import num_heads, round_cache

    if description.has_latent_cache:
        raise ModelError(354, "config.json: quantization_config", "asks for a quantized cache of what keys and values are made from (MLA), unknown here")
    _, layers = decoder_layers(model, description.num_layers)
    for name, site in description.attentions.items():
        assert site.layer is not None
        attention = layers[site.layer].get_submodule(name.removeprefix(f"{description.block}.{site.layer}."))
        round_cache(attention, *source.cache_scales(name, num_heads(source.config)))


def _check_loading(info: dict[str, Any], description: Description, source: Source) -> None:
    """Nothing may be initialised at random or left out, but MTP layers, which transformers does not run."""
    # experts that transformers has merged go by the name of their module
    cached = CACHE_SCALES if source.cache else ()
    mtp = {*description.mtp_tensors, *(n.partition(".experts.")[0] + ".experts" for n in description.mtp_tensors if ".experts." in n)}
    unexpected = [k for k in info.get("unexpected_keys") or () if not mtp & {k, k.rpartition(".")[0]} and k.split(".")[-2:] != ["rotary_emb", "inv_freq"]]
    unexpected = [k for k in unexpected if k.rpartition(".")[2] not in cached]
    missing = [k for k in info.get("missing_keys") or () if not (source.is_tied and k.endswith("lm_head.weight"))]
    mismatched = info.get("mismatched_keys") or ()
    for what, names in (("missing from", missing), ("not used by the model, but in", unexpected), ("of another shape in", mismatched)):
        if names:
            raise ModelError(91, str(sorted(map(str, names))[0]), f"is {what} the checkpoint ({len(names)} such tensors)")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; no code from the folder runs.

    Raises:
        ModelError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a hostile file provokes in the tokenizer library is the model's fault
        raise ModelError(92, str(folder), f"has an unreadable tokenizer: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _install(folder: Path, model: PreTrainedModel, host: PluginHost) -> list[str]:
    """Install the runtime policies of an artifact; official plugins are loaded, others must be loaded already."""
    record = folder / RECORDS / "runtime.json"
    if not record.is_file():
        return []
    installed = []
    policies = read_json(record).get("policies", [])
    if not isinstance(policies, list) or not all(isinstance(entry, dict) for entry in policies):
        raise ModelError(409, record.name, "policies are no list of objects")
    for entry in policies:
        pass_id = str(entry.get("pass"))
        plugin = pass_id.partition(".")[0]
        if plugin not in host.loaded and plugin in OFFICIAL:
            host.load([plugin])
        if plugin not in host.loaded:
            raise ModelError(280, record.name, f"{pass_id:.100} is of a plugin that is not loaded", plugins_hint(folder))
        pass_class = host.registry.find_pass(pass_id, f"{record.name}: {pass_id}")
        if not issubclass(pass_class, RuntimePass):
            raise ModelError(93, record.name, f"{pass_id} is no runtime pass")
        pass_class.install_from(folder, model, entry.get("policy") or {})
        installed.append(pass_id)
    return installed
