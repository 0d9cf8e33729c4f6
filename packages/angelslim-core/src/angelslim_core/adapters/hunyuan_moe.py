"""Hunyuan mixture of experts: a shared MLP beside routed experts."""

from .base import ATTENTION, EXPERTS, MLP, STACKED_EXPERTS, Layout

_SHARED = {f"mlp.shared_mlp.{role}_proj": f"shared_{role}" for role in ("gate", "up", "down")}

LAYOUTS = (
    Layout(
        model_types=("hunyuan_v1_moe",),
        roles=ATTENTION | MLP | EXPERTS | _SHARED,
        other=("mlp.gate.wg",),
        stacked=STACKED_EXPERTS,
        experts="mlp.experts",
    ),
)
