"""Norms that packed linears read, with a class that notes what it prepares."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from angelslim_core.normed import Normed, join_norm, norm_of
from angelslim_core.packed import PackedLinear, SharedInput, join
from angelslim_core.schemes import Grid, Quantized, Scheme

WIDTH, CPU = 24, torch.device("cpu")


class Doubled(PackedLinear):
    """Its codes are twice its inputs."""

    name, unit, prepares = "doubled", 1, "twice"
    prepared: ClassVar[list] = []

    def pack(self, quantized):
        self.keep("weight", quantized.codes.to(self.dtype), rows=0)

    def prepare(self, x):
        self.prepared.append(x)
        return 2 * super().prepare(x)

    def multiply(self, prepared):
        return nn.functional.linear(prepared / 2, self.weight)


class Layer(nn.Module):
    def __init__(self, norm, linears):
        super().__init__()
        self.norm, self.linears = norm, nn.ModuleList(linears)

    def forward(self, x, between=lambda x: x):
        x = between(self.norm(x))
        return [linear(x) for linear in self.linears]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    Doubled.prepared.clear()


def norm_with(norm_class, dtype):
    norm = norm_class(WIDTH, 1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(WIDTH))
    return norm


def layer_of(norm_class=LlamaRMSNorm, dtype=torch.float32, joined=True):
    """A layer whose norm stands for its readers too, and the same without."""
    codes = [torch.randint(-8, 8, (n, WIDTH), dtype=torch.int8) for n in (6, 3)]
    linears = [Doubled(Quantized(Scheme("", Grid(8, "int", "channel")), c, torch.ones(len(c), 1)), None, dtype) for c in codes]
    layer = Layer(norm_with(norm_class, dtype), linears)
    whole = join(linears) if joined else None
    shared = SharedInput(layer)
    for linear in (*linears, *([] if whole is None else [whole])):
        linear.shared = shared
    plain = copy.deepcopy(layer)
    join_norm(layer.norm, linears, dtype)
    return layer, plain


def equal(found, wanted):
    return all(a.dtype == b.dtype and a.equal(b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, Gemma3RMSNorm])
def test_readers_find_their_input_prepared(norm_class, joined, dtype):
    layer, plain = layer_of(norm_class, dtype, joined)
    assert isinstance(layer.norm.forward, Normed) and "forward" not in vars(plain.norm)
    for shape in ((5, WIDTH), (2, 3, WIDTH), (WIDTH,)):
        x = torch.randn(shape).to(dtype)
        wanted = plain(x)
        Doubled.prepared.clear()
        for each in (layer, copy.deepcopy(layer)):
            assert each.norm.forward.norm is each.norm and each.norm.forward.readers == tuple(each.linears)
            assert equal(each(x), wanted) and each.linears[0].shared._last is None
        assert len(Doubled.prepared) == 2
        assert layer.norm(x).equal(plain.norm(x)) and len(Doubled.prepared) == 2  # nobody keeps it where no layer runs
    empty, strided = torch.empty(0, WIDTH, dtype=dtype), torch.randn(2, WIDTH, 3).to(dtype).transpose(1, 2)
    assert equal(layer(empty), plain(empty)) and equal(layer(strided), plain(strided))
    apart = torch.randn(2, 3, 2 * WIDTH).to(dtype)[..., 5 : 5 + WIDTH]
    Doubled.prepared.clear()
    assert equal(layer(apart), plain(apart)) and len(Doubled.prepared) == 2
    with torch.inference_mode():
        x = torch.randn(5, WIDTH).to(dtype)
        assert equal(layer(x), plain(x))


@pytest.mark.parametrize("between", [torch.clone, lambda x: x.mul_(2)], ids=["copied", "changed"])
def test_what_readers_get_instead_is_prepared_anew(between):
    layer, plain = layer_of()
    x = torch.randn(5, WIDTH)
    assert equal(layer(x, between), plain(x, between))
    hook = layer.norm.register_forward_hook(lambda module, given, y: between(y))
    plain.norm.register_forward_hook(lambda module, given, y: between(y))
    assert equal(layer(x), plain(x))
    hook.remove()


def test_the_norm_runs_itself_where_it_should():
    layer, plain = layer_of()
    x, calls = torch.randn(5, WIDTH), []
    own = type(layer.norm).forward

    class Counted(type(layer.norm)):
        def forward(self, hidden_states):
            calls.append(hidden_states)
            return own(self, hidden_states)

    layer.norm.__class__ = Counted
    layer(x)
    assert not calls
    hook = layer.linears[1].register_forward_pre_hook(lambda module, given: (2 * given[0],))
    plain.linears[1].register_forward_pre_hook(lambda module, given: (2 * given[0],))
    assert equal(layer(x), plain(x)) and len(calls) == 1
    hook.remove()
    learning = x.clone().requires_grad_()
    layer.norm(learning).sum().backward()
    assert learning.grad is not None and len(calls) == 2
    layer.norm.weight.requires_grad_()
    layer.norm(x).sum().backward()
    assert layer.norm.weight.grad is not None and len(calls) == 3
    layer.norm.requires_grad_(False)
    assert layer.norm(x.bfloat16()).dtype == torch.float32 and len(calls) == 4  # as it promotes
    layer.norm.variance_epsilon = 10.0
    plain.norm.variance_epsilon = 10.0
    plain.linears[1]._forward_pre_hooks.clear()
    assert equal(layer(x), plain(x)) and len(calls) == 4


class Layered(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Residual(LlamaRMSNorm):
    def forward(self, x, more=None):
        return super().forward(x)


class Biased(LlamaRMSNorm):
    def __init__(self, *given):
        super().__init__(*given)
        self.bias = nn.Parameter(torch.zeros(WIDTH))


class InPlace(LlamaRMSNorm):
    def forward(self, x):
        y = super().forward(x)
        x += 1
        return y


class Inside(LlamaRMSNorm):
    """Takes eps as part of the root."""

    def forward(self, x):
        return self.weight * (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)).to(x.dtype)


class Narrow(LlamaRMSNorm):
    """Does not widen."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class Hidden(LlamaRMSNorm):
    """Keeps its eps elsewhere."""

    def __init__(self, width, eps):
        super().__init__(width, eps)
        del self.variance_epsilon
        self.options = {"eps": eps}

    def forward(self, x):
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.options["eps"])).to(x.dtype)


OTHERS = [Layered, Residual, Biased, InPlace, Inside, Narrow, Hidden, GptOssRMSNorm]


@pytest.mark.parametrize("norm_class", OTHERS, ids=lambda c: c.__name__)
def test_another_norm_is_left_alone(norm_class):
    dtype = torch.bfloat16
    norm = norm_with(norm_class, dtype)
    assert norm_of(norm, WIDTH, dtype, CPU) is None
    assert norm_of(nn.LayerNorm(WIDTH), WIDTH, dtype, CPU) is norm_of(nn.Linear(WIDTH, 3, bias=False), WIDTH, dtype, CPU) is None
    layer, plain = layer_of(norm_class, dtype)
    assert "forward" not in vars(layer.norm)
    x = torch.randn(5, WIDTH).to(dtype)
    assert equal(layer(x.clone()), plain(x.clone()))


def test_norms_are_known_by_what_they_compute():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert norm_of(LlamaRMSNorm(WIDTH, 1e-5), WIDTH, dtype, CPU) == ("weight", "variance_epsilon")
        assert norm_of(Qwen3NextRMSNorm(WIDTH, 1e-6), WIDTH, dtype, CPU) == ("one_plus_weight", "eps")
    assert norm_of(LlamaRMSNorm(WIDTH, 1e-5), 2 * WIDTH, torch.bfloat16, CPU) is None
    norm = norm_with(LlamaRMSNorm, torch.bfloat16)
    weight, state = norm.weight.clone(), torch.get_rng_state()
    norm_of(norm, WIDTH, torch.bfloat16, CPU)
    assert norm.weight.equal(weight) and torch.get_rng_state().equal(state)


def test_readers_that_differ_leave_it_alone():
    layer, _ = layer_of()
    norm, (one, other) = norm_with(LlamaRMSNorm, torch.float32), layer.linears
    for readers in ([], [one, nn.Linear(WIDTH, 3)]):
        join_norm(norm, readers, torch.float32)
        assert "forward" not in vars(norm)
    other.prepares = "thrice"
    join_norm(norm, [one, other], torch.float32)
    assert "forward" not in vars(norm)
    own = norm.forward = lambda x: x
    join_norm(norm, [one], torch.float32)
    assert norm.forward is own


def test_inputs_that_nobody_quantizes_are_normed_only():
    layer, plain = layer_of(joined=False)
    for each in (layer, plain):
        for linear in each.linears:
            linear.prepares = linear.shared = None
    x = torch.randn(5, WIDTH)
    assert equal(layer(x), plain(x)) and layer.norm(x).equal(plain.norm(x))
