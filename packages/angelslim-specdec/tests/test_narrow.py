"""A few rows are multiplied the other way round, to the same values, and layers are as before afterwards."""

import pytest
import torch
from torch import nn

from angelslim_specdec.narrow import Narrow


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 4), (3, 5)], ids=str)
def test_products_are_those_of_the_layers(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96, bias=False), nn.Linear(96, 33))
    x = torch.randn(*shape, 48)
    expected = model(x)
    with Narrow(model)(shape[0] * shape[1]):
        assert all(("forward" in vars(layer)) == (1 < shape[0] * shape[1] <= 8) for layer in model)
        found = model(x)
    assert found.is_contiguous() and not any("forward" in vars(layer) for layer in model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_other_layers_are_left_alone():
    class Own(nn.Linear):
        pass

    replaced = nn.Linear(8, 8)
    replaced.forward = own = lambda x: x
    model = nn.Sequential(Own(8, 8), replaced, nn.Linear(8, 8, dtype=torch.bfloat16))
    with Narrow(model)(5):
        assert [vars(layer).get("forward") for layer in model] == [None, own, None]
    assert replaced.forward is own
