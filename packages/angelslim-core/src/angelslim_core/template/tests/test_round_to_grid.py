import angelslim_acme
import torch
from angelslim_core.testing.conformance import check_pass, check_plugin, tiny_site


def test_plugin_is_valid():
    check_plugin("acme", angelslim_acme)


def test_pass_keeps_its_promises(tmp_path):
    check_pass("acme", angelslim_acme, "acme.round_to_grid", tmp_path)


def test_weights_lie_on_the_grid():
    weight = torch.tensor([[0.1, 0.3], [-0.26, 0.0]])
    pass_ = angelslim_acme.RoundToGrid(angelslim_acme.RoundToGrid.Config(step=0.25))
    (rounded,) = pass_.apply({tiny_site((2, 2), "F32"): weight}, None).values()
    assert rounded.tolist() == [[0.0, 0.25], [-0.25, 0.0]]
