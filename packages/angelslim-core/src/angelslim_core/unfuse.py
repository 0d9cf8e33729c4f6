"""Routed experts as separate linears, so that hooks see each one and names equal the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .transforms import transforms_of


class Expert(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int, act_fn: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype, device=device)
        self.up_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype, device=device)
        self.down_proj = nn.Linear(inner, hidden, bias=False, dtype=dtype, device=device)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LinearExperts(nn.Module):
    """Drop-in for a fused experts module with 3-D `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    Its children are named "0", "1", ... with `gate_proj`, `up_proj` and `down_proj`. The weights are empty, on the
    fused module's device; they are loaded from per-expert tensors.

    Attributes:
        calibrate_all: send every token through every expert, so that hooks see them all; the output is unchanged.
        token_mask: [tokens] bool, False on padding, which then is neither shown to hooks nor counted.
        tokens_per_expert: [E] int64, real tokens routed to each expert since construction.
    """

    num_experts: int
    calibrate_all: bool
    token_mask: Tensor | None
    tokens_per_expert: Tensor

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        weight, act_fn = fused.down_proj, fused.act_fn
        assert isinstance(weight, Tensor) and callable(act_fn)
        self.num_experts, hidden, inner = weight.shape
        for index in range(self.num_experts):
            self.add_module(str(index), Expert(hidden, inner, act_fn, weight.dtype, weight.device))
        self.calibrate_all = False
        self.token_mask = None
        self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device="cpu")  # also where a model is built on meta

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, H]; top_k_index and top_k_weights [tokens, K]."""
        output = torch.zeros_like(hidden_states)
        real = self.token_mask
        for index in range(self.num_experts):
            expert = self.get_submodule(str(index))
            tokens, slot = torch.where(top_k_index == index)
            counted = tokens if real is None else tokens[real[tokens]]
            self.tokens_per_expert[index] += counted.numel()
            if self.calibrate_all:
                expert(hidden_states if real is None else hidden_states[real])
            elif real is not None and counted.numel():
                expert(hidden_states[counted])
            if tokens.numel():
                result = self._routed(expert, hidden_states[tokens]) * top_k_weights[tokens, slot, None]
                output.index_add_(0, tokens, result.to(output.dtype))
        return output

    def _routed(self, expert: nn.Module, x: Tensor) -> Tensor:
        """The expert's result, without its hooks where they have already seen what they should."""
        assert isinstance(expert, Expert)
        if not self.calibrate_all and self.token_mask is None:
            return expert(x)
        linear = nn.functional.linear
        inner = expert.act_fn(linear(x, expert.gate_proj.weight)) * linear(x, expert.up_proj.weight)
        for transform in transforms_of(expert.down_proj):
            inner = transform(inner)
        return linear(inner, expert.down_proj.weight)

    def take(self, fused: nn.Module) -> None:
        """Use the weights of a fused module, without a copy."""
        gate_up, down = fused.gate_up_proj, fused.down_proj
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        for index in range(self.num_experts):
            expert = self.get_submodule(str(index))
            assert isinstance(expert, Expert)
            for linear, weight in zip((expert.gate_proj, expert.up_proj, expert.down_proj), (*gate_up[index].chunk(2), down[index]), strict=True):
                linear.weight = nn.Parameter(weight.detach(), requires_grad=False)


def unfuse(layer: nn.Module, keep: bool = False) -> list[LinearExperts]:
    """Replace every fused experts module inside a decoder layer; returns all `LinearExperts` in it.

    Args:
        keep: they use the fused weights; else theirs are empty.
    """
    for name, module in list(layer.named_modules()):
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) and module.gate_up_proj.dim() == 3:
            parent, _, child = name.rpartition(".")
            experts = LinearExperts(module)
            if keep:
                experts.take(module)
            setattr(layer.get_submodule(parent), child, experts)
    return [module for module in layer.modules() if isinstance(module, LinearExperts)]
