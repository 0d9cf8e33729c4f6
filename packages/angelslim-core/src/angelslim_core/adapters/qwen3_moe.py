"""Qwen3 mixture of experts."""

from .base import ATTENTION, EXPERTS, MLP, STACKED_EXPERTS, Layout

LAYOUTS = (Layout(model_types=("qwen3_moe",), roles=ATTENTION | MLP | EXPERTS, other=("mlp.gate",), stacked=STACKED_EXPERTS, experts="mlp.experts"),)
