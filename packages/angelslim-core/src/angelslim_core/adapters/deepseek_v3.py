"""DeepSeek-V3 and Kimi-K2: multi-head latent attention, dense first layers, routed and shared experts, MTP layers."""

from .base import ATTENTION_FEED, EXPERTS, INNER_FEEDS, MLP, MLP_FEED, STACKED_EXPERTS, Feed, Layout, shared_experts

_LATENT = {
    "self_attn.q_proj": "q",
    "self_attn.q_a_proj": "q_a",
    "self_attn.q_b_proj": "q_b",
    "self_attn.kv_a_proj_with_mqa": "kv_a",
    "self_attn.kv_b_proj": "kv_b",
    "self_attn.o_proj": "o",
}

LAYOUTS = (
    Layout(
        model_types=("deepseek_v3", "kimi_k2"),
        roles=_LATENT | MLP | EXPERTS | shared_experts("shared_experts"),
        # q_a and kv_a read one input and run as one matmul where the query is compressed
        fused=(("q_a", "kv_a"), ("gate", "up"), ("shared_gate", "shared_up"), ("expert_gate", "expert_up")),
        optional_fused=(("q_a", "kv_a"),),
        other=("mlp.gate",),
        stacked=STACKED_EXPERTS,
        experts="mlp.experts",
        feeds=(
            ATTENTION_FEED,
            Feed("self_attn.q_a_layernorm", ("self_attn.q_b_proj",), "self_attn"),
            Feed("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), "self_attn"),
            MLP_FEED,
            *INNER_FEEDS,
        ),
        loads_as={"kimi_k2": "deepseek_v3"},
    ),
)
