"""Packed linears that read one input and run as one, with a class that only holds its weight."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

from angelslim_core.errors import EngineError
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
