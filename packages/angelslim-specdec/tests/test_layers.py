import pytest
import torch
from torch import nn

from angelslim_core.errors import ModelError
from angelslim_specdec.drafts.layers import MLP, Attention, RMSNorm, Rope, add_vocabulary, draft_rope, vocabulary_ids

SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e6}, SCALED, LLAMA3], ids=lambda r: r["rope_type"])
def test_a_layer_of_these_parts_is_llamas_own(rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=48, intermediate_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=8, rope_parameters=rope,
                         max_position_embeddings=256, attn_implementation="eager")  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaDecoderLayer(config, 0).double()
    parts = nn.ModuleDict({"input_layernorm": RMSNorm(48, config.rms_norm_eps), "self_attn": Attention(48, 48, 6, 2, 8),
                           "post_attention_layernorm": RMSNorm(48, config.rms_norm_eps), "mlp": MLP(48, 64)}).double()  # fmt: skip
    parts.load_state_dict(theirs.state_dict())
    x, positions = torch.randn(2, 7, 48, dtype=torch.float64), torch.arange(7).expand(2, 7) + 90
    seen = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 7, 7)
    turn = Rope(8, rope, 256)(positions)
    n = parts["input_layernorm"](x)
    attention = parts["self_attn"]
    attended = nn.functional.scaled_dot_product_attention(
        attention.queries(n, turn), attention.keys(n, turn), attention.values(n), seen[:, None], enable_gqa=True
    )
    h = x + attention.out(attended)
    h = h + parts["mlp"](parts["post_attention_layernorm"](h))
    mask = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~seen[:, None], -torch.inf)
    want = theirs(x, attention_mask=mask, position_embeddings=LlamaRotaryEmbedding(config)(x, positions))
    torch.testing.assert_close(h, want[0] if isinstance(want, tuple) else want, rtol=1e-5, atol=1e-5)


def test_rope_keeps_its_precision_in_a_draft_of_half_precision():
    rope, positions = {"rope_type": "default", "rope_theta": 1e6}, torch.tensor([[4000]])
    full = Rope(64, rope, 8192)
    want = full(positions)
    assert torch.equal(full.bfloat16()(positions)[0], want[0])


def test_rope_that_changes_with_length_is_refused():
    with pytest.raises(ModelError, match="rope_type dynamic"):
        Rope(8, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 64)


def test_rope_of_a_target_with_several():
    of = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert draft_rope(of) == {"rope_type": "default", "rope_theta": 1e6}
    assert draft_rope({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}) == {"rope_type": "default", "rope_theta": 1e4}


def test_vocabulary_is_stored_as_offsets():
    draft = nn.Module()
    add_vocabulary(draft, 16, 4)
    assert draft.t2d.nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    draft.d2t.copy_(torch.tensor([1, 4, 4, 12]))
    assert vocabulary_ids(draft).tolist() == [1, 5, 6, 15]
    whole = nn.Module()
    add_vocabulary(whole, 16, 16)
    assert vocabulary_ids(whole) is None and not list(whole.buffers())
