import pytest
import torch

from angelslim_core.errors import UsageError
from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.drafts.base import Batch, Heads, TargetShape
from angelslim_specdec.drafts.mtp import MTP

H, V = 32, 40
TARGET = TargetShape(H, 48, 8, 4, 2, 8, V, 1e-6, {"rope_type": "default", "rope_theta": 1e4}, 128)


@pytest.fixture
def case():
    torch.manual_seed(0)
    draft = MTP.from_target(TARGET, ttt_steps=4)
    heads = Heads(torch.randn(V, H), torch.randn(V, H))
    draft.begin(heads, torch.rand(H) + 0.5)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.mul_(4) if "proj" in name else parameter.mul_(1.5)
    ids, places = torch.randint(V, (1, 16)), torch.arange(16)[None]
    return draft, heads, Batch(ids, places > 0, torch.zeros_like(ids), places, torch.randn(1, 16, H), torch.randn(1, 16, H))


def test_training_on_its_own_choices_is_what_it_proposes(case):
    """Every row's unrolled first choices, counted against the target's, are those of a greedy chain."""
    draft, heads, batch = case
    loss = draft.train_loss(batch, heads)
    best, hits = heads.logits(batch.final).argmax(-1)[0], torch.zeros(4)
    drafter = draft.drafter(heads)
    for t in range(14):
        drafter.start(batch.ids[:, : t + 1], torch.tensor([t + 1]), 64, Warp())
        drafter.observe(batch.ids[:, 1 : t + 2], batch.aux[:, : t + 1], torch.tensor([t + 1]))
        told = best[t + 1 : t + 5][: 14 - t]
        hits[: len(told)] += drafter.propose(4).tokens[0, : len(told)] == told
    assert torch.equal(loss.hits, hits) and loss.asked.tolist() == [14, 13, 12, 11] and loss.weights.tolist() == [1, 1, 1, 1]


def test_what_is_stored_and_what_is_trained(case):
    draft, heads, batch = case
    loss = draft.train_loss(batch, heads)
    loss.sums.sum().backward()
    assert all(parameter.grad is not None for parameter in draft.parameters())
    assert draft.config.aux_hidden_state_layer_ids == (7,)
    layer = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    names = ["fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden", *(f"layers.0.{x}" for x in layer)]
    assert set(draft.state_dict()) == {"target_norm", *(f"{n}.weight" for n in names)}


def test_two_layers_are_refused():
    with pytest.raises(UsageError):
        MTP.from_target(TARGET, num_hidden_layers=2)
