"""Building a transformers model around tensors we read ourselves; config.json never reaches transformers unsanitized."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .adapters import transformers_type
from .adapters.base import Description
from .errors import ModelError
from .io.checkpoint import torch_dtype
from .source import Source, compute_dtype
from .transforms import install

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

# keys through which a config reaches code or the network: custom classes, kernels from a hub, other weights
_REACHING = re.compile(r"auto_map|.*attn_implementation.*|.*experts_implementation.*|transformers_weights|custom_pipelines|_name_or_path|quantization_config")


def sanitized(config: Any) -> Any:
    """config.json without keys that reach for code, kernels or other folders, at any depth."""
    if isinstance(config, Mapping):
        return {key: sanitized(value) for key, value in config.items() if not _REACHING.fullmatch(key)}
    return [sanitized(value) for value in config] if isinstance(config, list) else config


def transformers_config(description: Description, config: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config of a checkpoint.

    Raises:
        ModelError: transformers does not know the architecture or refuses a value.
    """
    from transformers import CONFIG_MAPPING

    name = transformers_type(description.layout, config)
    if name not in CONFIG_MAPPING:
        raise ModelError(82, "config.json", f"transformers does not know the architecture {name!r}", "a newer transformers may")
    try:
        return CONFIG_MAPPING[name].from_dict(sanitized(config))
    except Exception as error:  # whatever a hostile value provokes in transformers is the model's fault
        raise ModelError(83, "config.json", f"transformers refuses it: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside get parameters without storage, but real buffers (rotary tables are computed, not loaded)."""
    import torch
    from torch import nn
    from torch.overrides import TorchFunctionMode

    class EmptyOnMeta(TorchFunctionMode):
        """Weights begin as empty tensors, which would leave holes of their size in the heap."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))

    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        plain(self, name, param if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def auto_class(config: PretrainedConfig) -> Any:
    """The transformers auto class that builds a whole model, the towers beside its language model included."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    # those that hear are listed among models that turn one sequence into another
    return AutoModelForSeq2SeqLM if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING else AutoModelForCausalLM


def _build(config: PretrainedConfig, dtype: torch.dtype, stored: int) -> PreTrainedModel:
    """The model of a config, parameters on meta.

    Args:
        stored: number of weights in the checkpoint.

    Raises:
        ModelError: transformers refuses a value, or the config asks for far more weights than are stored.
    """
    import torch
    from transformers.initialization import no_init_weights

    try:  # first wholly on meta, where a hostile size costs nothing
        with torch.device("meta"), no_init_weights():
            asked = sum(p.numel() for p in auto_class(config).from_config(config, dtype=dtype).parameters())
    except Exception as error:
        raise ModelError(105, "config.json", f"transformers refuses it: {type(error).__name__}: {str(error).split(chr(10), 1)[0]}") from error
    if asked > 2 * stored:
        raise ModelError(32, "config.json", f"describes a model of {asked} weights, but {stored} are stored", "the config is of another model")
    with parameters_on_meta(), no_init_weights():
        return auto_class(config).from_config(config, dtype=dtype)


def decoder_layers(model: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    """Name and module of the list of decoder layers.

    Raises:
        ModelError: there is none of that length.
    """
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("layers") and len(module) == num_layers and "vis" not in name and "audio" not in name:
            return name, module
    raise ModelError(84, "config.json", f"the model transformers builds has no list of {num_layers} layers")


class Skeleton:
    """A model with meta parameters, filled part by part from a source.

    Args:
        source: where the tensors are.
        description: where the layers are.
    """

    def __init__(self, source: Source, description: Description) -> None:
        import torch

        self.source, self.description = source, description
        config = transformers_config(description, source.config)
        self.dtype = torch_dtype(compute_dtype(source, description))
        self.model = _build(config, self.dtype, sum(map(math.prod, source.shapes.values())))
        self.model.eval()
        path, self.layers = decoder_layers(self.model, description.num_layers)
        self.backbone = self.model.get_submodule(path.rpartition(".")[0])
        self._prefix = description.block.rpartition(".")[0]
        self.torch = torch

    def fill_backbone(self, device: str, tokens: Iterable[int] | None = None) -> None:
        """Load what is around the layers: embeddings and final norm.

        Args:
            tokens: keep of the token embeddings these only, for captures.
        """
        wanted = [n for n, _ in self.backbone.named_parameters() if not n.startswith("layers.")]
        wanted += [n for n in self.backbone.state_dict() if not n.startswith("layers.") and n not in wanted]
        state = {}
        for name in wanted:
            stored = f"{self._prefix}.{name}" if self._prefix else name
            if stored not in self.source.dtypes:
                raise ModelError(85, stored, "is missing from the checkpoint")
            state[name] = self.source.read(stored).to(device)
        self._assign(self.backbone, state, ignore="layers.")
        for module in self.backbone.children():
            if module is not self.layers:
                module.to(device)
        if tokens is not None:
            self._keep_tokens(self.torch.tensor(sorted(set(tokens)), device=device))

    def _keep_tokens(self, tokens: torch.Tensor) -> None:
        embedding = self.model.get_input_embeddings()
        embedding.weight = self.torch.nn.Parameter(embedding.weight[tokens], requires_grad=False)
        embedding.padding_idx = None  # it would count in the whole table
        embedding.register_forward_pre_hook(lambda module, args: (self.torch.searchsorted(tokens, args[0]),))

    def drop_backbone(self) -> None:
        """Free what is around the layers."""
        for module in self.backbone.children():
            if module is not self.layers:
                module.to("meta")

    def fill_head(self, device: str) -> None:
        """Load what makes logits: the head, or the embedding that is tied to it."""
        stored = next((s.tensor for s in self.description.sites if s.role == "head"), None)
        weight = self.source.read(stored) if stored else self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings()
        head.weight = self.torch.nn.Parameter(weight.to(device, self.dtype), requires_grad=False)

    def fill_layer(self, index: int, device: str) -> nn.Module:
        """One decoder layer on `device`, routed experts as separate linears, its tensors fresh from the source."""
        from .unfuse import unfuse

        layer = self.layers[index]
        unfuse(layer)
        self._assign(layer, {n: t.to(device) for n, t in self.layer_tensors(index)})
        prefix = f"{self.description.block}.{index}."
        for site in (s for s in self.description.sites if s.layer == index and self.source.transforms):
            install(layer.get_submodule(site.name.removeprefix(prefix)), site.name, self.source.transforms)
        return layer.to(device)

    def layer_tensors(self, index: int, names: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name inside the layer, tensor) as stored, stacked experts taken apart; all, or those of `names`."""
        prefix = f"{self.description.block}.{index}."
        sites = [s for s in self.description.sites if s.layer == index]
        for site in sites:
            name = f"{site.name.removeprefix(prefix)}.weight"
            if names is None or name in names:
                yield name, self.source.read(site.tensor, site.part)
        covered = {s.tensor for s in sites} | self.source.matrices
        for stored in self.source.dtypes:
            name = stored.removeprefix(prefix)
            if name != stored and stored not in covered and (names is None or name in names):
                yield name, self.source.read(stored)

    def drop_layer(self, index: int) -> None:
        """Free a layer's parameters."""
        self.layers[index].to("meta")

    def _assign(self, module: nn.Module, state: Mapping[str, torch.Tensor], ignore: str = "\0") -> None:
        wanted = {n for n in module.state_dict() if not n.startswith(ignore)}
        for name in sorted(wanted - state.keys()):
            raise ModelError(86, name, f"is needed by {type(module).__name__} and missing from the checkpoint")
        for name in sorted(state.keys() - wanted):
            raise ModelError(87, name, f"is in the checkpoint, but {type(module).__name__} has no such tensor")
        for name, tensor in module.state_dict().items():
            if name in state and state[name].shape != tensor.shape:
                raise ModelError(33, name, f"has shape {list(state[name].shape)} in the checkpoint, {list(tensor.shape)} by config.json")
        parameters = dict(module.named_parameters())
        cast = {n: t.to(parameters[n].dtype) if n in parameters and t.is_floating_point() else t for n, t in state.items()}
        module.load_state_dict(cast, strict=False, assign=True)
        module.requires_grad_(False)
