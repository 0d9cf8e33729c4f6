"""Models attend through `attach`: one attention function, and one mask function, in transformers' interfaces.

RoPE, norms, gates and the KV cache stay in the model; the function gets queries, keys and values as attention sees them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from angelslim_core.errors import ModelError, UsageError
from angelslim_core.kv_cache import attention_by, attention_of

from .attention import Lengths, _select, sparse_attention
from .block_index import own_blocks
from .call import Call, Packing, packing
from .config import SparseAttentionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .policies.base import Policy

_NAME = "sparseattn_"
_NUMBERS = count(1)
# what only a model's own eager attention computes
_EAGER = ("s_aux", "sinks", "softcap")
_ATTACHED: WeakKeyDictionary[nn.Module, Attached] = WeakKeyDictionary()


class _Layer:
    """What one layer did: sparse calls, dense ones by reason, blocks kept and of causal attention over all sparse calls."""

    def __init__(self) -> None:
        self.sparse, self.causal = 0, 0
        self.dense: Counter[str] = Counter()
        self.kept: Tensor | float = 0.0  # on the device, so that counting waits for nothing


class _Binding(NamedTuple):
    """A config, the name that computed attention before, and the one that does now."""

    config: Any
    before: str
    name: str


class Attached:
    """A model that attends as its configuration says, until `detach` or the end of a `with` block.

    Attributes:
        prompt_len: tokens of the whole prompt, for policies whose budgets follow from it; set it, and back to None, around
            a prefill in chunks without padding, else each chunk counts as the prompt's end.
    """

    def __init__(self, config: SparseAttentionConfig, num_layers: int) -> None:
        self.config = config
        self.prompt_len: int | None = None
        self._policies = [config.policy_of(layer) for layer in range(num_layers)]
        self._layers: dict[int, _Layer] = {}
        self._bound: list[_Binding] = []
        self._packed: tuple[Tensor, Packing | None] | None = None

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """The model attends as before."""
        _unbind(self._bound)
        self._bound = []
        for model in [m for m, attached in _ATTACHED.items() if attached is self]:
            del _ATTACHED[model]

    def stats(self) -> list[dict[str, Any]]:
        """Of each layer that ran: `layer`, `calls`, `sparse`, `dense` {reason: calls}, `density`, the mean over sparse calls or None."""
        return [
            {
                "layer": number, "calls": layer.sparse + layer.dense.total(), "sparse": layer.sparse, "dense": dict(layer.dense),
                "density": float(layer.kept) / layer.causal if layer.sparse else None,
            } for number, layer in sorted(self._layers.items())
        ]  # fmt: skip

    def reset(self) -> None:
        """Count from zero."""
        self._layers.clear()

    def mask(
        self, batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> Tensor | None:  # fmt: skip
        """transformers' mask function.

        Returns:
            for causal attention that may become sparse a mask [B, N] of real keys, or None if all are; otherwise what SDPA
            takes, bool [B, 1, L, N] or None.
        """
        from transformers.masking_utils import causal_mask_function, sdpa_mask

        causal = mask_function is None or mask_function is causal_mask_function
        kwargs |= {"mask_function": mask_function or causal_mask_function, "attention_mask": attention_mask}
        if q_length < self.config.block or kv_length < self.config.min_len:
            return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **kwargs)  # type: ignore[no-any-return]
        real = int(q_offset) + q_length  # a static cache is longer
        if not causal or kv_offset or real > kv_length or (attention_mask is not None and attention_mask.shape[-1] != real):
            kwargs["allow_is_causal_skip"] = False  # where no mask comes it is causal attention of the last queries
            return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **kwargs)  # type: ignore[no-any-return]
        if attention_mask is not None and not bool(attention_mask.all()):
            return attention_mask.to(torch.bool, copy=True)  # another forward pass may bring the same one, of other queries
        return None if real == kv_length else torch.ones(batch_size, real, dtype=torch.bool, device=kwargs.get("device", "cpu"))

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any) -> tuple[Tensor, None]:
        """transformers' attention function: q [B, Hq, L, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv] to [B, L, Hq, Dv].

        Raises:
            UsageError: attention weights are asked for.
        """
        if options.get("output_attentions"):
            raise UsageError(551, "output_attentions", "sparse attention yields no attention weights", "detach it first")
        policy, reason = self._policy(module, query, key, value, attention_mask, options)
        short = query.shape[2] < self.config.block or key.shape[2] < self.config.min_len
        packs = not short and reason != "not causal" and (attention_mask is None or attention_mask.dim() == 2)
        call = Call(module, query, key, value, attention_mask, packs, options)
        if reason in ("sinks or softcap", "position bias"):
            out = call.eager() if reason == "sinks or softcap" else call.biased()
        elif not packs:
            out = call.sdpa()
        else:
            found = self._packing(call)
            lengths = Lengths((query.shape[2],) * len(query), (call.k.shape[2],) * len(query)) if found is None else found.lengths
            if not reason and (not lengths.kv or max(lengths.kv) < self.config.min_len):  # none: a chunk of padding
                reason = "short"
            if policy is not None and not reason:
                return self._sparse(call, found, lengths, policy), None
            out = call.dense(found)
        if not torch.compiler.is_compiling():  # numbers would be compiled in
            self._of(module).dense[reason] += 1
        return out, None

    def _of(self, module: nn.Module) -> _Layer:
        return self._layers.setdefault(_number(module), _Layer())

    def _policy(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> tuple[Policy | None, str]:
        """What the layer follows, and why it attends to everything all the same, or nothing."""
        number = _number(module)
        policy = self._policies[number] if 0 <= number < len(self._policies) else None
        causal = options.get("is_causal")
        reasons = {
            "sinks or softcap": any(options.get(name) is not None for name in _EAGER),
            "position bias": options.get("position_bias") is not None,
            "not causal": not (getattr(module, "is_causal", True) if causal is None else causal),
            "few queries": q.shape[2] < self.config.block,
            "short": k.shape[2] < self.config.min_len,
            "sliding window": options.get("sliding_window") is not None,
            "mask": mask is not None and mask.dim() != 2,
            "training": module.training or bool(options.get("dropout")) or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))),
            "dense layer": policy is None,
        }
        return policy, next((reason for reason, holds in reasons.items() if holds), "")

    def _packing(self, call: Call) -> Packing | None:
        """Of the call's mask; computed by the first layer of a forward pass."""
        if call.mask is None:
            return None
        if self._packed is None or self._packed[0] is not call.mask:
            self._packed = call.mask, packing(call.mask, call.q.shape[2])
        return self._packed[1]

    def _sparse(self, call: Call, found: Packing | None, lengths: Lengths, policy: Policy) -> Tensor:
        q, k, v = (_autocast(x) for x in call.packed(found))
        prompt = None if found is not None or self.prompt_len is None else max(self.prompt_len, *lengths.kv)
        with call.on_device():
            index = _select(q, k, v, policy, lengths, call.scale, self.config.block, prompt, policy.min_len)
            out = sparse_attention(q, k, v, index, self.config.executor, scale=call.scale)
        layer = self._of(call.module)
        layer.sparse += 1
        layer.kept = layer.kept + index.row_ptr[-1] + (0 if index.tokens is None else index.tokens.ptr[-1] / index.block_n)
        layer.causal += index.shape[1] * sum(_causal_blocks(*pair, self.config.block) for pair in zip(*lengths, strict=True))
        return call.unpacked(out, found)


def _autocast(x: Tensor) -> Tensor:
    """As SDPA would take it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype == torch.float32 else x


def _number(module: nn.Module) -> int:
    """The layer's, -1 if the module has none."""
    found = getattr(module, "layer_idx", None)
    return found if isinstance(found, int) else -1


@lru_cache(maxsize=1024)
def _causal_blocks(q_len: int, kv_len: int, block: int) -> int:
    return int((own_blocks(q_len, kv_len, block, block)[1] + 1).sum())


def attach(model: PreTrainedModel, config: SparseAttentionConfig) -> Attached:
    """From now on a model's causal attention goes by `config`; vision towers and the like stay as they are.

    Raises:
        ModelError: the model does not take its attention from transformers' interface.
        UsageError: the model is attached already, an override names a layer or a head that it does not have, or the configuration was chosen
            for another model.
    """
    text = model.config.get_text_config()
    if attention_of(text).startswith(_NAME):
        raise UsageError(554, type(model).__name__, "follows a sparse attention policy already", "detach that first")
    config.check(text.to_dict())
    attached = Attached(config, text.num_hidden_layers)
    attached._bound = _bind(model, lambda before: (attached.attend, attached.mask))
    _ATTACHED[model] = attached
    return attached


def attachment(model: nn.Module) -> Attached | None:
    """What `attach`, or loading an artifact with a policy, attached to a model, until it is detached."""
    return _ATTACHED.get(model)


def _bind(model: PreTrainedModel, functions: Callable[[str], tuple[Callable[..., Any], Callable[..., Any]]]) -> list[_Binding]:
    """Let causal attention of the model go through other functions.

    Args:
        functions: from the name that computed attention so far to the functions of attention and of masks.
    """
    from transformers import PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    inner = {id(c): c for m in model.modules() if hasattr(m, "layer_idx") and getattr(m, "is_causal", True) and (c := getattr(m, "config", None)) is not None}
    if not inner or not model._can_set_attn_implementation():
        raise ModelError(552, type(model).__name__, "computes attention in a way of its own, not through transformers' interface")
    # masks may be made by the config of any module around
    outer = {
        id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel) and any(id(getattr(n, "config", None)) in inner for n in m.modules())
    }
    bound = []
    for config in {**inner, **outer}.values():
        name = f"{_NAME}{next(_NUMBERS)}"
        before = attention_of(config)
        attend, mask = functions(before)
        ALL_ATTENTION_FUNCTIONS.register(name, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
        attention_by(config, name)
        bound.append(_Binding(config, before, name))
    return bound


def _unbind(bound: Sequence[_Binding]) -> None:
    """As before; transformers keeps names, but not what they stood for."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for config, before, name in bound:
        attention_by(config, before)
        ALL_ATTENTION_FUNCTIONS.register(name, _gone)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _gone)


def _gone(*_: Any, **__: Any) -> Any:
    raise UsageError(556, "attention", "was detached, but a config that was copied before still names it", "copy the model after detaching")


class Captured(NamedTuple):
    """What one layer's attention was given: q [B, Hq, L, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv], and what scores are multiplied by."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def captured(model: PreTrainedModel, input_ids: Tensor, layers: Sequence[int]) -> dict[int, Captured]:
    """Queries, keys and values of a forward pass over [B, N] tokens, by layer."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: dict[int, Captured] = {}
    wanted = set(layers)

    def functions(before: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        compute = ALL_ATTENTION_FUNCTIONS[before]

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
            if getattr(module, "layer_idx", None) in wanted:
                scale = options.get("scaling")
                found[module.layer_idx] = Captured(query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale))  # type: ignore[index, arg-type]
            return compute(module, query, key, value, *args, **options)

        return attend, ALL_MASK_ATTENTION_FUNCTIONS[before]

    with _bound(model, functions), torch.no_grad():
        model(input_ids, use_cache=False)
    if missing := (wanted - found.keys()):
        raise UsageError(553, "layers", f"{sorted(missing)} have no attention that goes through transformers' interface")
    return found


@contextmanager
def _bound(model: PreTrainedModel, functions: Callable[[str], tuple[Callable[..., Any], Callable[..., Any]]]) -> Iterator[None]:
    bound = _bind(model, functions)
    try:
        yield
    finally:
        _unbind(bound)
