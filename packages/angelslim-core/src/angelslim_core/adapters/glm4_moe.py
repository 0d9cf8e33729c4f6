"""GLM-4 mixture of experts (4.5 and later): biased q/k/v, dense first layers, shared experts, MTP layers."""

from .base import ATTENTION, EXPERTS, MLP, STACKED_EXPERTS, Layout, shared_experts

LAYOUTS = (
    Layout(
        model_types=("glm4_moe",),
        roles=ATTENTION | MLP | EXPERTS | shared_experts("shared_experts"),
        other=("mlp.gate",),
        stacked=STACKED_EXPERTS,
        experts="mlp.experts",
    ),
)
