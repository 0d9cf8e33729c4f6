"""Packed linears that read one input and run as one, and gated MLPs of them, with a class that only holds its weight."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

from angelslim_core.errors import EngineError
from angelslim_core.gated import Names, activation_of, gate
from angelslim_core.packed import PackedLinear, SharedInput, join
from angelslim_core.schemes import Grid, Quantized, Scheme

WIDTH = 8


class Plain(PackedLinear):
    """Notes how many outputs each of its products has."""

    name, unit = "plain", 2
    products: ClassVar[list] = []

    def pack(self, quantized):
        self.keep("weight", quantized.codes.float(), rows=0)
        self.keep("offset", quantized.input_scale)

    def multiply(self, prepared):
        self.products.append(self.out_features)
        return nn.functional.linear(prepared, self.weight, self.bias)


class Layer(nn.Module):
    """Its linears by turns, `between` called on the input after each."""

    def __init__(self, linears):
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x, between=lambda x: x):
        found = []
        for linear in self.linears:
            found.append(linear(x))
            x = between(x)
        return found


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    Plain.products.clear()


def plain(outputs, bias=True, offset=None):
    codes = torch.randint(-8, 8, (outputs, WIDTH), dtype=torch.int8)
    scheme = Scheme("", Grid(8, "int", "channel"))
    offset = None if offset is None else torch.tensor([offset])
    return Plain(Quantized(scheme, codes, torch.ones(outputs, 1), input_scale=offset), nn.Parameter(torch.randn(outputs)) if bias else None, torch.float32)


def layer_of(*outputs, **options):
    """A layer of joined linears, and what a joined one alone computes."""
    linears = [plain(n, **options) for n in outputs]
    weights = [(m.weight.clone(), None if m.bias is None else m.bias.detach().clone()) for m in linears]
    joined = join(linears)
    layer = Layer(linears).requires_grad_(False)
    shared = SharedInput(layer)
    for linear in (*linears, *([] if joined is None else [joined])):
        linear.shared = shared
    return layer, joined, lambda x: [nn.functional.linear(x, *w) for w in weights]


def equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_serves_all(bias):
    layer, joined, wanted = layer_of(6, 4, 3, bias=bias)
    for shape in ((5, WIDTH), (2, 3, WIDTH), (WIDTH,)):
        x = torch.randn(shape)
        found = layer(x)
        assert [y.shape for y in found] == [y.shape for y in wanted(x)]
        for a, b in zip(found, wanted(x), strict=True):
            torch.testing.assert_close(a, b)
    assert Plain.products == [13] * 3 and not joined.shared._outputs
    assert [y.shape for y in layer(torch.empty(0, WIDTH))] == [(0, 6), (0, 4), (0, 3)]


def test_memory_is_held_once_and_named_as_before():
    layer, joined, _ = layer_of(6, 4, 3)
    own = {n: tuple(b.shape) for n, b in layer.named_buffers() if "weight" in n}
    assert own == {"linears.0.weight": (6, WIDTH), "linears.1.weight": (4, WIDTH), "linears.2.weight": (3, WIDTH)}
    assert sum(m.packed_bytes() for m in layer.linears) == joined.packed_bytes() == 13 * (WIDTH + 1) * 4
    assert len([m for m in layer.modules() if isinstance(m, PackedLinear)]) == 3
    base = joined.weight.untyped_storage().data_ptr()
    assert all(m.weight.untyped_storage().data_ptr() == base for m in layer.linears)
    with pytest.raises(EngineError, match="cannot be saved"):
        layer.state_dict()
    with pytest.raises(EngineError, match="keep their dtype"):
        layer.linears[1].half()
    with pytest.raises(EngineError, match="no gradients"):
        layer.linears[2](torch.randn(2, WIDTH, requires_grad=True))


def test_what_moves_or_is_copied_stays_joined():
    layer, joined, wanted = layer_of(6, 4, 3)
    x = torch.randn(5, WIDTH)
    other = copy.deepcopy(layer)
    its = other.linears[0].joined
    assert its is not joined and its.members == tuple(other.linears) and its.shared is other.linears[0].shared is not joined.shared
    assert equal(other(x), layer(x)) and Plain.products == [13, 13]
    layer._apply(lambda t: t.clone())  # moves every tensor, whatever moved already
    for each, whole in ((layer, joined), (other, its)):
        assert all(m.weight.untyped_storage().data_ptr() == whole.weight.untyped_storage().data_ptr() for m in each.linears)
    assert equal(layer(x), other(x)) and joined.weight.untyped_storage().data_ptr() != its.weight.untyped_storage().data_ptr()
    for a, b in zip(layer(x), wanted(x), strict=True):
        torch.testing.assert_close(a, b)
    layer.linears[1].to("meta")
    assert all(b.is_meta for b in layer.buffers()) and joined.weight.is_meta


def test_alone_each_multiplies_its_own_rows():
    layer, _, wanted = layer_of(6, 4, 3)
    x = torch.randn(5, WIDTH)
    assert equal([m(x) for m in layer.linears], wanted(x)) and Plain.products == [6, 4, 3]  # no layer runs
    with torch.inference_mode():
        x = torch.randn(5, WIDTH)
        assert equal(layer(x), wanted(x)) and Plain.products == [6, 4, 3] * 2


def test_another_input_is_never_answered_from_the_last():
    layer, _, wanted = layer_of(6, 4, 3)
    x = torch.randn(5, WIDTH)
    steps = [x + n for n in range(3)]
    found = layer(x.clone(), between=lambda x: x.add_(1))
    for n, y in enumerate(found):
        torch.testing.assert_close(y, wanted(steps[n])[n])
    assert Plain.products == [13, 4, 3]
    layer(x, between=torch.clone)  # who read different inputs once run alone from then on
    assert Plain.products == [13, 4, 3, 6, 4, 3]


def test_an_output_changed_in_place_is_not_answered_again():
    layer, _, wanted = layer_of(6, 4)
    layer.linears.append(layer.linears[0])
    x = torch.randn(5, WIDTH)
    found = []
    layer.linears[0].register_forward_hook(lambda module, given, y: found.append(y.clone()) or y.zero_())
    layer(x)
    torch.testing.assert_close(found[1], wanted(x)[0])


@pytest.mark.parametrize("between", [lambda x: x, torch.clone])
def test_another_thread_may_end_the_layer_meanwhile(between):
    class Ended(dict):
        def get(self, key):
            found = super().get(key)
            self.clear()
            return found

    layer, joined, wanted = layer_of(6, 4)
    joined.shared._outputs = Ended()
    x = torch.randn(5, WIDTH)
    for a, b in zip(layer(x, between), wanted(x), strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_left_as_it_is():
    assert join([plain(6)]) is None
    for others in ([plain(5), plain(4)], [plain(6), plain(4, bias=False)], [plain(6, offset=1.0), plain(4, offset=2.0)], [plain(6, offset=1.0), plain(4)]):
        assert join(others) is None and not any(m.joined for m in others)
    fits = [plain(6, offset=1.0), plain(5, offset=1.0)]
    assert join(fits) is not None and fits[0].offset is fits[1].offset


def test_nothing_is_kept_after_a_failure():
    layer, joined, _ = layer_of(6, 4)
    layer.linears.insert(1, nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        layer(torch.randn(5, WIDTH))
    assert joined.shared is not None and not joined.shared._outputs


# gated MLPs -----------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, act=nn.functional.silu, width=6):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act = plain(width, bias=False), plain(width, bias=False), nn.Identity(), act

    def forward(self, states):
        return self.down_proj(self.act(self.gate_proj(states)) * self.up_proj(states))


class Gelu(MLP):
    def __init__(self):
        super().__init__(nn.GELU(approximate="tanh"))


class Clamped(MLP):
    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x).clamp(-7, 7))


class Widened(MLP):
    def forward(self, x):
        return self.down_proj((self.act(self.gate_proj(x).float()) * self.up_proj(x).float()).to(x.dtype))


class Swapped(MLP):
    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)) * self.gate_proj(x))


class Doubled(MLP):
    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(2 * x)) * self.up_proj(2 * x))


class After(MLP):
    def forward(self, x):
        return 2 * self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Scaled(MLP):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Chosen(MLP):
    def forward(self, x, which=None):
        return super().forward(x)


class Flat(MLP):
    def forward(self, x):
        return super().forward(x.view(-1, WIDTH)).view(x.shape)


NAMES = Names("gate_proj", "up_proj", "down_proj")
NOT_GATED = [MLP(nn.GELU()), MLP(nn.functional.relu), Clamped(), Widened(), Swapped(), Doubled(), After(), Scaled(), Chosen(), Flat()]


def test_gated_mlps_are_known_by_what_they_compute():
    function, module, gelu = MLP(), MLP(nn.SiLU()), Gelu()
    state = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert activation_of(function, NAMES, 6, dtype) == activation_of(module, NAMES, 48, dtype) == "silu"
        assert activation_of(gelu, NAMES, 100, dtype) == "gelu_tanh"
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("mlp", NOT_GATED, ids=lambda m: f"{type(m).__name__} {getattr(m.act, '__name__', m.act)}")
def test_what_computes_anything_else_is_left_alone(mlp):
    assert activation_of(mlp, NAMES, 100, torch.bfloat16) is None


def gated():
    """A gated MLP of packed linears, and its twin that is not."""
    mlp = MLP()
    mlp.down_proj = Plain(Quantized(Scheme("", Grid(8, "int", "channel")), torch.ones(5, 6, dtype=torch.int8), torch.ones(5, 1)), None, torch.float32)
    twin = copy.deepcopy(mlp)
    assert join([mlp.gate_proj, mlp.up_proj]) is not None
    gate(mlp, NAMES, torch.float32)
    return mlp, twin


def test_a_gated_mlp_makes_two_products():
    mlp, twin = gated()
    x = torch.randn(2, 3, WIDTH)
    wanted = twin(x)
    Plain.products.clear()
    for each in (mlp, copy.deepcopy(mlp)):
        torch.testing.assert_close(each(x), wanted)
        torch.testing.assert_close(each(states=x), wanted)
        assert each(x[:0]).shape == (0, 3, 5) and each.forward.mlp is each
    assert Plain.products == [12, 5] * 4
    with torch.inference_mode():
        torch.testing.assert_close(mlp(torch.ones(2, WIDTH)), twin(torch.ones(2, WIDTH)))
    with pytest.raises(EngineError, match="no gradients"):
        mlp(torch.randn(2, WIDTH, requires_grad=True))


def test_whoever_watches_or_replaces_its_linears_gets_the_plain_one():
    mlp, twin = gated()
    x, seen = torch.randn(2, WIDTH), []
    hook = mlp.down_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]) or (2 * given[0],))
    torch.testing.assert_close(mlp(x), 2 * twin(x))
    assert len(seen) == 1
    hook.remove()
    Plain.products.clear()
    mlp(x)
    assert Plain.products == [12, 5]
    mlp.register_forward_hook(lambda module, given, y: y + 1)
    torch.testing.assert_close(mlp(x), twin(x) + 1)
    own, its = mlp.down_proj, twin.down_proj
    mlp.down_proj, twin.down_proj = nn.Sequential(own), nn.Sequential(its)
    torch.testing.assert_close(mlp(x), twin(x) + 1)
    mlp.down_proj, mlp.up_proj = own, plain(6, bias=False)
    twin.down_proj, twin.up_proj = its, mlp.up_proj
    torch.testing.assert_close(mlp(x), twin(x) + 1)


def test_an_mlp_that_is_not_joined_is_not_gated():
    mlp = MLP()
    mlp.down_proj = plain(6)
    gate(mlp, NAMES, torch.float32)
    join([mlp.gate_proj, mlp.up_proj])
    mlp.down_proj = nn.Linear(6, 6)
    gate(mlp, NAMES, torch.float32)
    assert "forward" not in vars(mlp)
