"""Which parameters of a student are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from angelslim_core.errors import RecipeError
from angelslim_core.fake_quant import placed

if TYPE_CHECKING:
    from torch import nn

Train = Literal["auto", "all", "quantizers", "weights"]
QUANTIZER = ".quantizer."  # in the name of what a quantizer learns


def choose_parameters(model: nn.Module, train: Train) -> int:
    """Let just these require gradients; how many numbers they are.

    Args:
        train: "auto": quantizers, and the weights that they say are trained along, or without any quantizer all there is. Weights that
            a quantizer says are frozen stay so whatever is asked for.

    Raises:
        RecipeError: quantizers are to be trained where none is placed, or learn nothing.
    """
    linears = placed(model)
    if train == "auto" and not linears:
        train = "all"
    along = {f"{name}.weight" for name, linear in linears.items() if linear.quantizer.trains_weight}
    frozen = {f"{name}.weight" for name in linears} - along
    for name, parameter in model.named_parameters():
        is_quantizers = QUANTIZER in f".{name}"
        wanted = {"auto": is_quantizers or name in along, "all": True, "quantizers": is_quantizers, "weights": not is_quantizers}[train]
        parameter.requires_grad_(wanted and name not in frozen)
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not found:
        raise RecipeError(916, "train", f"{train}: nothing of the model is left to be trained", "set train: all, or use a pass whose quantizers learn")
    return found
