"""The layer sweep: layer by layer is the whole model, whatever the architecture, padding or interruption."""

import pytest
import torch

from angelslim_core.adapters import builtin_layouts
from angelslim_core.calibration.data import Samples
from angelslim_core.context import Context
from angelslim_core.layer import Layer, LayerBatch, joined
from angelslim_core.loading import load_model
from angelslim_core.model import Skeleton
from angelslim_core.source import describe_source, open_source
from angelslim_core.sweep import capture
from angelslim_core.testing.models import TINY, stack_experts
from angelslim_core.unfuse import LinearExperts, unfuse

LENGTHS = (12, 12, 7)


def sweep(folder, batch_size=3):
    """Hidden states [tokens, H] of each sample after the last layer, and the model's context."""
    source = open_source(folder)
    description = describe_source(source, builtin_layouts())
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in LENGTHS]
    context = Context(source, description, "cpu", 0, folder, Samples(ids), batch_size=batch_size)
    skeleton = Skeleton(source, description)
    skeleton.fill_backbone("cpu")
    captured = capture(skeleton, context)
    with torch.no_grad():
        for index in range(description.num_layers):
            layer = Layer(index, skeleton.fill_layer(index, "cpu"), f"{description.block}.{index}.", captured[index], context)
            outputs = [layer.forward(batch) for batch in layer.batches]
            for following, out in zip(captured[index + 1] if index + 1 < len(captured) else [], outputs, strict=False):
                following.hidden = out
            skeleton.drop_layer(index)
    rows = [row for batch in outputs for row in batch]
    return ids, [row[: len(sample)] for row, sample in zip(rows, ids, strict=True)], skeleton


def agreement(folder, batch_size=3):
    ids, hidden, skeleton = sweep(folder, batch_size)
    model = load_model(folder).model
    errors = []
    with torch.no_grad():
        for sample, rows in zip(ids, hidden, strict=True):
            logits = model.get_output_embeddings()(skeleton.backbone.norm(rows))
            expected = model(input_ids=torch.tensor([sample]), use_cache=False).logits[0]
            errors.append(float((logits - expected).abs().max() / expected.abs().max()))
    return max(errors)


@pytest.mark.parametrize("architecture", TINY)
def test_layer_by_layer_is_the_whole_model(tiny, architecture):
    assert agreement(tiny(architecture, dtype="float32")) < 2e-5


def test_unpadded_batches_are_the_whole_model_bitwise(tiny):
    assert agreement(tiny("llama", dtype="float32"), batch_size=1) == 0


def test_stacked_experts_are_read_the_same(tiny_copy):
    folder = tiny_copy("qwen3_moe", dtype="float32")
    stack_experts(folder)
    assert agreement(folder) < 2e-5


def layer_of(folder, tokens=9, pad=0):
    source = open_source(folder)
    description = describe_source(source, builtin_layouts())
    ids = [torch.randint(3, 256, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()]
    if pad:
        ids.append(ids[0] + [5] * pad)  # a longer neighbour pads the first
    context = Context(source, description, "cpu", 0, folder, Samples(ids), batch_size=2)
    skeleton = Skeleton(source, description)
    skeleton.fill_backbone("cpu")
    captured = capture(skeleton, context)
    index = description.num_layers - 1
    for batch, first in zip(captured[index], captured[0], strict=True):
        batch.hidden = first.hidden
    layer = Layer(index, skeleton.fill_layer(index, "cpu"), f"{description.block}.{index}.", captured[index], context)
    layer.sites = tuple(s for s in description.sites if s.layer == index and s.role != "other")
    return layer


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_observers_never_see_padding(tiny, architecture):
    layer = layer_of(tiny(architecture, dtype="float32"), tokens=9, pad=4)
    rows = {}
    layer.observe(lambda site, x: rows.setdefault(site.name, []).append(x.shape[0]))
    assert set(rows) == {s.name for s in layer.sites}
    assert {sum(n) for n in rows.values()} == {9 + 13}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "deepseek_v3", "glm4_moe", "hunyuan_v1_moe"])
def test_every_expert_sees_every_token_and_the_output_stays(tiny, architecture):
    layer = layer_of(tiny(architecture, dtype="float32"))
    experts = [m for m in layer.module.modules() if isinstance(m, LinearExperts)]
    assert len(experts) == 1
    with torch.no_grad():
        plain = layer.forward(layer.batches[0])
        experts[0].calibrate_all = True
        assert torch.equal(layer.forward(layer.batches[0]), plain)
        experts[0].calibrate_all = False
    seen = {}
    layer.observe(lambda site, x: seen.setdefault(site.name, 0) or seen.update({site.name: x.shape[0]}))
    assert set(seen.values()) == {9}


def test_routed_tokens_are_counted(tiny):
    layer = layer_of(tiny("qwen3_moe", dtype="float32"))
    (experts,) = unfuse(layer.module)
    with torch.no_grad():
        layer.forward(layer.batches[0])
    assert int(experts.tokens_per_expert.sum()) == 9 * 2


def test_experts_are_shown_their_tokens_without_padding_and_the_output_stays(tiny):
    layer = layer_of(tiny("qwen3_moe", dtype="float32"), tokens=9, pad=4)
    (experts,) = unfuse(layer.module)
    (batch,) = layer.batches
    with torch.no_grad():
        plain = layer.forward(batch)
        experts.token_mask = batch.mask.reshape(-1)
        experts.tokens_per_expert.zero_()
        assert torch.equal(layer.forward(batch), plain)
    counted = experts.tokens_per_expert.tolist()
    rows = {}
    layer.observe(lambda site, x: rows.update({site.name: x.shape[0]}), all_experts=False)
    assert sum(counted) == (9 + 13) * 2
    for site in layer.sites:
        expected = 9 + 13 if site.expert is None else counted[site.expert]
        assert rows.get(site.name, 0) == expected, site.name


def test_only_one_layer_is_resident(tiny):
    _, _, skeleton = sweep(tiny("llama", dtype="float32"))
    assert all(p.device.type == "meta" for layer in skeleton.layers for p in layer.parameters())


def test_samples_of_any_batches_are_joined():
    shared, own = torch.ones(1, 4, 2), torch.ones(2, 1, 4, 4)
    batches = []
    for number, kwargs in enumerate(({"angles": (shared,), "flag": True}, {"angles": (shared,), "flag": True}, {"angles": (shared,), "mask": own})):
        batch = LayerBatch(torch.randn(2, 4, 3), torch.ones(2, 4, dtype=torch.bool), kwargs, number)
        batch.target = -batch.hidden
        batches.append(batch)
    rows = [row for batch in batches for row in batch.rows()]
    assert [row for _, row in rows] == [0, 1, 0, 1, None]  # a mask for each sample: the batch stays whole
    first, second = joined([rows[3], rows[0], rows[4]], "cpu")
    assert torch.equal(first.hidden, torch.stack([batches[1].hidden[1], batches[0].hidden[0]])) and torch.equal(first.target, -first.hidden)
    assert first.reference is None and first.kwargs["angles"][0] is shared and first.mask.shape == (2, 4)
    assert torch.equal(second.hidden, batches[2].hidden) and second.kwargs["mask"] is own
