"""Qwen3-Next and Qwen3.5: linear attention in most layers, full attention in the others; dense or mixture of experts.

The small projections that set decay and write strength (a, b) and the convolution stay as they are.
"""

from .base import ATTENTION, EXPERTS, INNER_FEEDS, MLP, MLP_FEED, READS_INPUT, STACKED_EXPERTS, Feed, Layout, shared_experts

_EXPERTS = EXPERTS | shared_experts("shared_expert")
_ROUTERS = ("mlp.gate", "mlp.shared_expert_gate", "linear_attn.conv1d")
_IN = ("qkvz", "ba", "qkv", "z", "a", "b")
# the output gate of full attention multiplies channel by channel, so v still reaches o one channel at a time
_FEEDS = (
    Feed("input_layernorm", READS_INPUT, "self_attn"),
    Feed("input_layernorm", tuple(f"linear_attn.in_proj_{n}" for n in _IN), "linear_attn"),
    Feed("self_attn.v_proj", ("self_attn.o_proj",), "self_attn"),
    MLP_FEED,
    *INNER_FEEDS,
)

LAYOUTS = (
    Layout(
        model_types=("qwen3_next",),
        roles=ATTENTION | MLP | _EXPERTS | {"linear_attn.in_proj_qkvz": "linear_in", "linear_attn.out_proj": "linear_out"},
        other=(*_ROUTERS, "linear_attn.in_proj_ba"),
        stacked=STACKED_EXPERTS,
        experts="mlp.experts",
        feeds=_FEEDS,
        norm_offset=1.0,
    ),
    Layout(
        model_types=("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        roles=ATTENTION
        | MLP
        | _EXPERTS
        | {"linear_attn.in_proj_qkv": "linear_in", "linear_attn.in_proj_z": "linear_in_z", "linear_attn.out_proj": "linear_out"},
        fused=(("q", "k", "v"), ("gate", "up"), ("shared_gate", "shared_up"), ("expert_gate", "expert_up"), ("linear_in", "linear_in_z")),
        other=(*_ROUTERS, "linear_attn.in_proj_a", "linear_attn.in_proj_b"),
        stacked=STACKED_EXPERTS,
        experts="mlp.experts",
        feeds=_FEEDS,
        norm_offset=1.0,
        loads_as={"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"},
    ),
)
