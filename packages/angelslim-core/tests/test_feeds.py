"""Scaling what an architecture's table calls a feed leaves every layer's function as it was, routers included."""

import pytest
import torch

from angelslim_core.adapters import builtin_layouts
from angelslim_core.calibration.data import Samples
from angelslim_core.context import Context
from angelslim_core.layer import Layer
from angelslim_core.model import Skeleton
from angelslim_core.source import describe_source, open_source
from angelslim_core.sweep import capture
from angelslim_core.testing.models import TINY


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_scaling_a_feed_changes_nothing(tiny, architecture):
    folder = tiny(architecture, dtype="float32")
    source = open_source(folder)
    description = describe_source(source, builtin_layouts())
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0)).tolist()
    context = Context(source, description, "cpu", 0, folder, Samples(ids), batch_size=2)
    skeleton = Skeleton(source, description)
    skeleton.fill_backbone("cpu")
    captured = capture(skeleton, context)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index in range(description.num_layers):
            layer = Layer(index, skeleton.fill_layer(index, "cpu"), f"{description.block}.{index}.", captured[index], context)
            folds = layer.feeds()
            read = {reader for fold in folds for reader in fold.readers}
            weights = {n.removesuffix(".weight") for n, p in layer.module.named_parameters() if p.dim() == 2}
            latent = {"self_attn.o_proj"} if "self_attn.kv_b_proj" in weights else set()
            assert weights - read <= latent | {"linear_attn.out_proj"}, weights - read  # nothing that reads a norm was forgotten
            before = layer.forward(layer.batches[0])
            for fold in folds:
                channels = layer.module.get_submodule(fold.source).weight.shape[0]
                layer.scale(fold, torch.rand(channels, generator=generator) * 1.5 + 0.5)
                after = layer.forward(layer.batches[0])
                assert torch.allclose(after, before, rtol=1e-4, atol=2e-5), (fold.source, float((after - before).abs().max()))
            captured[min(index + 1, len(captured) - 1)][0].hidden = before
