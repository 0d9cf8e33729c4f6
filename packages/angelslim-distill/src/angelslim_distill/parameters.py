"""Which parameters of a student are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from angelslim_core.errors import RecipeError
from angelslim_core.fake_quant import placed
from angelslim_core.model import decoder_layers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Train = Literal["auto", "all", "quantizers", "weights"]
QUANTIZER = ".quantizer."  # in the name of what a quantizer learns


def choose_parameters(model: nn.Module, train: Train, also: Sequence[str] = ()) -> int:
    """Let just these require gradients; how many numbers they are.

    Args:
        train: "auto": quantizers, and the weights that they say are trained along, or without any quantizer all there is. Weights that
            a quantizer says are frozen stay so whatever is asked for.
        also: parameters whose names contain one of these texts are trained, too.

    Raises:
        RecipeError: quantizers are to be trained where none is placed, or learn nothing; or no parameter that may be trained has a text in its name.
    """
    linears = placed(model)
    if train == "auto" and not linears:
        train = "all"
    along = {f"{name}.weight" for name, linear in linears.items() if linear.quantizer.trains_weight}
    frozen = {f"{name}.weight" for name in linears} - along
    names = [name for name, _ in model.named_parameters() if name not in frozen]
    for text in also:
        if not any(text in name for name in names):
            raise RecipeError(1040, "also", f"no parameter that may be trained has {text!r} in its name", f"names are like {names[-1]}")
    for name, parameter in model.named_parameters():
        is_quantizers = QUANTIZER in f".{name}"
        wanted = {"auto": is_quantizers or name in along, "all": True, "quantizers": is_quantizers, "weights": not is_quantizers}[train]
        wanted = wanted or any(text in name for text in also)
        parameter.requires_grad_(wanted and name not in frozen)
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not found:
        raise RecipeError(916, "train", f"{train}: nothing of the model is left to be trained", "set train: all, or use a pass whose quantizers learn")
    return found


def matrices_of(model: PreTrainedModel) -> list[str]:
    """Names of matrices that are trained and that inputs are multiplied by in decoder layers: what Muon is for.

    Scales of groups are none of them, nor are routed experts, which are one tensor of three dimensions.

    Raises:
        RecipeError: there is none.
    """
    path, layers = decoder_layers(model, model.config.get_text_config().num_hidden_layers)
    trained = [name for name, p in layers.named_parameters() if p.ndim == 2 and p.requires_grad and name.endswith(".weight")]
    found = [f"{path}.{name}" for name in trained if QUANTIZER not in f".{name}"]
    if not found:
        raise RecipeError(1120, "optimizer", "muon steps the layers' matrices, and none of them is trained", "give optimizer: adamw, or train: all")
    return found
