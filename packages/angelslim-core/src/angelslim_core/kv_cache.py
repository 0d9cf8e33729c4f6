"""A quantized KV cache: planned, and emulated where keys and values enter attention; there passes look at them, too.

Whatever the architecture, transformers hands keys (after RoPE) and values, those of its cache included, to a function
that the config names. A tap is called instead of it. What was rounded once is left alone by rounding again, so that
rounding what is read equals rounding what is written.

Shapes: B batch, H key-value heads, T tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .errors import ModelError, PlanError
from .io.checkpoint import TensorSpec
from .passes import Pass, TrainedPass, WeightPass
from .rounding import cast_e4m3
from .schemes import CACHE_SCALES, CacheScheme

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .adapters.base import Description
    from .recipe import Recipe

# attention as a tap sees it: (query, key, value) -> [B, T, all heads, D] and whatever else it returns
Attend = Callable[["Tensor", "Tensor", "Tensor"], tuple["Tensor", Any]]
Tap = Callable[["Tensor", "Tensor", "Tensor", Attend], tuple["Tensor", Any]]

_PREFIX = "angelslim_"
# by module and not on it: a copy of a module is another module
_TAPS: WeakKeyDictionary[nn.Module, Tap] = WeakKeyDictionary()


def num_heads(config: Mapping[str, Any]) -> int:
    """Key-value heads of a model, by its config.json."""
    text = config.get("text_config") or config
    return int(text.get("num_key_value_heads") or text["num_attention_heads"])


def settled_cache(recipe: Recipe, passes: Sequence[Pass], description: Description) -> CacheScheme | None:
    """What the passes of a recipe make of the KV cache.

    Raises:
        PlanError: two of them settle it, or one cannot.
    """
    found: CacheScheme | None = None
    for i, pass_ in enumerate(passes):
        if not isinstance(pass_, WeightPass) or pass_.cache is None:
            continue
        where = recipe.where(f"steps[{i}]")
        if found is not None:
            raise PlanError(351, where, f"{pass_.id} and an earlier step both settle the KV cache", "drop one of them")
        # those of a step that trains are of its linears
        if not isinstance(pass_, TrainedPass) and (recipe.steps[i].targets is not None or recipe.steps[i].ignore):
            raise PlanError(352, where, f"{pass_.id} treats the KV cache as a whole, as engines do", "drop `targets` and `ignore`")
        if description.has_latent_cache:
            raise PlanError(353, where, f"{pass_.id} needs keys and values, and this model caches what both are made from (MLA)", "leave the cache as it is")
        if not description.attentions:
            raise PlanError(1000, where, f"{pass_.id} needs keys and values, and no layer of this model keeps any", "leave the cache as it is")
        found = pass_.cache
    return found


def cache_outputs(config: Mapping[str, Any], description: Description, cache: CacheScheme | None) -> list[dict[str, TensorSpec]]:
    """Per attention the tensors that hold the scales of a quantized cache.

    Args:
        config: config.json of the model.
    """
    if cache is None:
        return []
    spec = TensorSpec("F32", cache.shape(num_heads(config)))
    return [{f"{name}.{suffix}": spec for suffix in CACHE_SCALES} for name in description.attentions]


def trained_scales(workdir: Path) -> Path:
    """The file of the scales that training left, under the names that they are stored by."""
    return workdir / "trained_cache.safetensors"


def tap(attention: nn.Module, function: Tap) -> None:
    """From now on an attention module goes through `function`.

    Raises:
        ModelError: the module computes attention in a way of its own.
    """
    by_taps(attention)
    _TAPS[attention] = function


def by_taps(attention: nn.Module) -> None:
    """From now on an attention module goes through the tap that it has: a function's, or else a `fake_cache.FakeCache` of its own.

    Raises:
        ModelError: the module computes attention in a way of its own.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = attention.config
    original = str(config._attn_implementation)
    if not original.startswith(_PREFIX):
        if original not in ALL_ATTENTION_FUNCTIONS:
            raise ModelError(350, type(attention).__name__, f"computes attention in a way that cannot be observed ({original!r:.50})")
        config._attn_implementation = _by_taps(original)


def _by_taps(original: str) -> str:
    """Name of the attention function that goes through taps to the one of that name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from .fake_cache import FakeCache

    compute = ALL_ATTENTION_FUNCTIONS[original]

    def attention_by_tap(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Any]:
            return compute(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]

        own = getattr(module, "quantizer", None)
        found = _TAPS.get(module, own if isinstance(own, FakeCache) else None)
        return attend(query, key, value) if found is None else found(query, key, value, attend)

    ALL_ATTENTION_FUNCTIONS.register(_PREFIX + original, attention_by_tap)
    if original in ALL_MASK_ATTENTION_FUNCTIONS:  # for others transformers makes no masks
        ALL_MASK_ATTENTION_FUNCTIONS.register(_PREFIX + original, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return _PREFIX + original


def attention_of(config: Any) -> str:
    """Name of the function that computes attention for a transformers config, below taps."""
    return str(config._attn_implementation).removeprefix(_PREFIX)


def attention_by(config: Any, name: str) -> None:
    """From now on the registered function `name` computes attention for a transformers config, below the taps there are."""
    is_tapped = str(config._attn_implementation).startswith(_PREFIX)
    config._attn_implementation = {"": _by_taps(name) if is_tapped else name}


@contextmanager
def tapped(attention: nn.Module, function: Tap) -> Iterator[None]:
    """Inside, an attention module goes through `function`."""
    before = _TAPS.get(attention)
    tap(attention, function)
    try:
        yield
    finally:
        _TAPS.pop(attention)
        if before is not None:
            _TAPS[attention] = before


def round_heads(x_BHTD: Tensor, scale: Tensor) -> Tensor:
    """Keys or values as an FP8 (E4M3) cache gives them back, in their dtype.

    Args:
        scale: fp32, [1] or [H].
    """
    step = scale.to(x_BHTD.device).view(-1, 1, 1)
    return (cast_e4m3(x_BHTD.float() / step).float() * step).to(x_BHTD.dtype)


def round_cache(attention: nn.Module, k_scale: Tensor, v_scale: Tensor) -> None:
    """From now on an attention module reads its keys and values as from an FP8 cache; see `round_heads`."""
    tap(attention, lambda query, key, value, attend: attend(query, round_heads(key, k_scale), round_heads(value, v_scale)))
