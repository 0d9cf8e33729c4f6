"""Numbers about weights and inputs for the report, gathered while they pass by: small, exact sums, the same for any order.

Histograms count |x| in half octaves: bin 2k begins at 2^k and bin 2k + 1 at 1.5 * 2^k. They are counts of a fixed sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import NumericError
from .io.checkpoint import DTYPES
from .schemes import pieces, scale_values

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .adapters.base import Site
    from .layer import Layer, LayerBatch
    from .plan import Plan
    from .recipe import Recipe
    from .schemes import Quantized

# values counted of a weight, and of a batch of an input
SAMPLE = 1 << 14
# bins below the one of the largest value; what is smaller is counted in the lowest
DEPTH = 40
# channels listed of an input
CHANNELS = 8
# an FP8 scale above this leaves small inputs few bits (the bound of `quant.md`'s original)
LARGE_SCALE = 1.5


def weight_numbers(weight_OI: Tensor, result: Quantized, packed: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the report says of one quantized linear.

    Args:
        weight_OI: what was quantized.
        packed: its tensors as they are stored.

    Returns:
        `sqnr_db` (10 log10(sum w^2 / sum (w - q)^2), None where there is no error or no signal), stored `bits` a weight,
        `amax` and `rms` of the weight, its `histogram`, [least, median, largest] `scale`, the static `input_scale`.

    Raises:
        NumericError: the dequantized weight is not finite.
    """
    import torch

    signal, noise = _signal_and_noise(weight_OI, result)
    if not math.isfinite(noise):
        raise NumericError(2, result.scheme.name, "a dequantized weight is not finite")
    sqnr = _decibels(signal, noise)
    low, high = torch.aminmax(weight_OI)
    scale = scale_values(result.scale).reshape(-1)
    if result.global_scale is not None:
        scale = scale * result.global_scale
    least, largest = torch.aminmax(scale)
    numbers = {
        "sqnr_db": sqnr,
        "bits": _short(8 * sum(t.nbytes for t in packed.values()) / weight_OI.numel()),
        "amax": _short(max(-float(low), float(high))),
        "rms": _short(math.sqrt(signal / weight_OI.numel())) if math.isfinite(signal) else None,
        "scale": [_short(float(v)) for v in (least, _sampled(scale, 1).median(), largest)],
        "histogram": _trimmed(half_octaves(_sampled(weight_OI, weight_OI.shape[1]))),
    }
    return numbers if result.input_scale is None else numbers | {"input_scale": _short(float(result.input_scale))}


def sqnr_db(weight_OI: Tensor, result: Quantized) -> float | None:
    """Signal of a weight to its quantization noise, as in `weight_numbers`."""
    return _decibels(*_signal_and_noise(weight_OI, result))


def _decibels(signal: float, noise: float) -> float | None:
    # squares of huge weights overflow fp32
    return round(10 * math.log10(signal / noise), 3) if noise > 0 and signal > 0 and math.isfinite(signal) and math.isfinite(noise) else None


def _signal_and_noise(weight_OI: Tensor, result: Quantized) -> tuple[float, float]:
    """sum w^2 and sum (w - q)^2, some rows at a time."""
    import torch

    sums = []
    for some in pieces(weight_OI, result.scheme.weights):
        reference = weight_OI[some].float()
        noise = result.rows(some).dequantize().sub_(reference).square_().sum()
        sums.append(torch.stack([reference.square().sum(), noise]))
    signal, noise = torch.stack(sums).double().sum(0).tolist()
    return signal, noise


def half_octaves(x: Tensor) -> Tensor:
    """[512] counts of |x|: the exponent and the first bit after it."""
    import torch

    return torch.bincount((x.float().contiguous().view(torch.int32) >> 22) & 511, minlength=512)


def _sampled(x: Tensor, columns: int) -> Tensor:
    """About `SAMPLE` values spread evenly, over all columns too."""
    flat = x.reshape(-1)
    step = max(1, flat.numel() // SAMPLE)
    while math.gcd(step, columns) > 1:
        step += 1
    return flat[::step]


def _trimmed(counts: Tensor) -> dict[str, Any]:
    """Counts of `half_octaves` from the lowest occupied bin to the highest; `first` is relative to the bin that begins at 1."""
    filled = counts.nonzero().flatten().tolist() or [0]
    low = max(filled[0], filled[-1] - DEPTH)
    return {"first": low - 254, "counts": [int(counts[: low + 1].sum()), *counts[low + 1 : filled[-1] + 1].tolist()]}


def merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The histogram of both."""
    first = min(a["first"], b["first"])
    counts = [0] * (max(h["first"] + len(h["counts"]) for h in (a, b)) - first)
    for histogram in (a, b):
        for i, count in enumerate(histogram["counts"]):
            counts[histogram["first"] - first + i] += count
    return {"first": first, "counts": counts}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


class _Input:
    """Of what linears read: the largest |x| per channel [E, I] (E experts, or 1) and a histogram."""

    def __init__(self, rows: int, columns: int, device: str) -> None:
        import torch

        self.amax = torch.zeros(rows, columns, device=device)
        self.counts = torch.zeros(512, dtype=torch.int64, device=device)

    def see(self, x: Tensor, row: int) -> None:
        x = x.reshape(-1, x.shape[-1])
        if x.shape[0]:
            self.amax[row] = self.amax[row].maximum(x.abs().amax(0))
            self.counts += half_octaves(_sampled(x, x.shape[1]))

    def numbers(self) -> dict[str, Any]:
        """`amax`, `median` of the channels' maxima, the channels largest beside their median, the histogram."""
        amax = self.amax.cpu()
        median = amax.median(1, keepdim=True).values
        ratio = (amax / median.clamp_min(1e-30)).masked_fill_(median == 0, 0)
        top = ratio.flatten().topk(min(CHANNELS, ratio.numel()))
        channels = [[i // amax.shape[1], i % amax.shape[1], _short(r)] for r, i in zip(top.values.tolist(), top.indices.tolist(), strict=True) if r]
        return {
            "amax": _short(float(amax.max())),
            "median": _short(float(median.max())),
            "channels": channels if amax.shape[0] > 1 else [c[1:] for c in channels],
            "histogram": _trimmed(self.counts.cpu()),
        }


class LayerInputs:
    """What the linears of a finished layer read and how its router spreads tokens, seen while its outputs are computed."""

    def __init__(self, layer: Layer) -> None:
        from .unfuse import LinearExperts

        self._layer = layer
        self._mask: Tensor | None = None
        self._inputs: dict[str, _Input] = {}
        self._experts = next((m for m in layer.module.modules() if isinstance(m, LinearExperts)), None)

    def forward(self, batch: LayerBatch) -> Tensor:
        """The layer's outputs for a batch."""
        self._mask = None if bool(batch.mask.all()) else batch.mask.to(self._layer.context.device).reshape(-1)
        if self._experts:
            self._experts.token_mask = self._mask
        return self._layer.forward(batch)

    @contextmanager
    def watched(self) -> Iterator[LayerInputs]:
        """Look at what `forward` computes in this context."""
        handles = [module.register_forward_pre_hook(hook) for module, hook in self._hooks()]
        if self._experts:
            self._experts.tokens_per_expert.zero_()
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            if self._experts:
                self._experts.token_mask = None

    def numbers(self) -> dict[str, Any]:
        """`inputs`: numbers of each, by the roles of the linears that read it ("q+k+v"); `experts`: real tokens sent to each."""
        group = self._layer.context.group
        for seen in self._inputs.values():
            seen.amax, seen.counts = group.reduce(seen.amax, "max"), group.reduce(seen.counts)
        found: dict[str, Any] = {"inputs": {name: seen.numbers() for name, seen in self._inputs.items()}}
        if self._experts:
            found["experts"] = group.reduce(self._experts.tokens_per_expert).tolist()
        return found

    def _hooks(self) -> Iterator[tuple[nn.Module, Callable[[nn.Module, tuple[Tensor, ...]], None]]]:
        """A hook where each input is read; routed experts share one, but each has an intermediate of its own."""
        readers: dict[tuple[str, int], Site] = {}
        for site in self._layer.context.description.sites:
            if site.layer == self._layer.index and site.role != "other":
                own = site.expert if site.expert is not None and not site.fused else 0
                readers.setdefault((site.fused.rpartition(".")[2] if site.fused else site.role, own), site)
        for (name, row), site in readers.items():
            shared = self._experts if site.expert is not None and site.fused else None
            if name not in self._inputs:
                rows = self._experts.num_experts if self._experts and site.expert is not None and not shared else 1
                self._inputs[name] = _Input(rows, site.shape[1], self._layer.context.device)
            yield shared or self._layer.linear(site), self._look(name, row)

    def _look(self, name: str, row: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, mask = args[0], self._mask
            if mask is not None and x.shape[:-1].numel() == mask.numel():  # one expert's tokens come without padding
                x = x.reshape(-1, x.shape[-1])[mask]
            self._inputs[name].see(x, row)

        return look


def check_experts(recipe: Recipe, entry: Mapping[str, Any]) -> None:
    """Hold a swept layer against the gate on tokens per expert.

    Args:
        entry: its `layer` and `analysis`.

    Raises:
        NumericError: an expert got too few.
    """
    least = recipe.gates.min_expert_tokens if recipe.gates else None
    tokens = entry["analysis"].get("experts")
    if least is None or not tokens or min(tokens) >= least:
        return
    few = sum(count < least for count in tokens)
    raise NumericError(
        390, recipe.where("gates.min_expert_tokens"),
        f"the router of layer {entry['layer']} sends fewer than {least} tokens to {few} of {len(tokens)} experts, {min(tokens)} to expert {tokens.index(min(tokens))}",
        "nothing was written; use more or other calibration samples, or lower the gate",
    )  # fmt: skip


def summarized(plan: Plan, metrics: Mapping[str, Any], layers: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """`analysis.json`: what the report draws.

    Args:
        metrics: `weight_numbers` by linear.
        layers: `LayerInputs.numbers` by decoder layer, for what was calibrated.

    Returns:
        `linears` by name, those left alone with their `bits` only; `histograms` of weights by role and layer; `inputs`
        and `experts` by layer.
    """
    linears: dict[str, Any] = {}
    histograms: dict[str, dict[str, Any]] = {}
    for site in plan.description.sites:
        place = {"layer": site.layer, "role": site.role, "weights": site.shape[0] * site.shape[1]}
        if site.name in metrics:
            numbers = {k: v for k, v in metrics[site.name].items() if k != "histogram"}
            linears[site.name] = place | numbers
            histogram, of_role = metrics[site.name]["histogram"], histograms.setdefault(site.role, {})
            of_role[str(site.layer)] = merged(of_role[str(site.layer)], histogram) if str(site.layer) in of_role else histogram
        elif site.layer is not None and site.role != "other":
            linears[site.name] = place | {"bits": DTYPES[site.dtype][0]}
    return {
        "linears": linears,
        "histograms": histograms,
        "inputs": {str(i): numbers["inputs"] for i, numbers in layers.items()},
        "experts": {str(i): numbers["experts"] for i, numbers in layers.items() if "experts" in numbers},
    }


def warnings_of(analysis: Mapping[str, Any], plan: Plan) -> list[str]:
    """What should worry the user, a line each."""
    large = {}
    for name, entry in analysis["linears"].items():
        grid = plan.schemes[name].input_activations if "input_scale" in entry else None
        if grid and (grid.type, grid.bits, grid.strategy) == ("float", 8, "tensor") and entry["input_scale"] > LARGE_SCALE:
            large[name] = entry["input_scale"]
    if not large:
        return []
    worst = max(large, key=lambda name: large[name])
    return [
        f"{len(large)} linears have an FP8 input scale above {LARGE_SCALE}, the largest {large[worst]:.3g} ({worst}): "
        f"inputs below {large[worst] * 2**-6:.2g} lose precision there; smoothing before this step helps"
    ]


def summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and worst SQNR over quantized linears, dB."""
    values = {name: m["sqnr_db"] for name, m in metrics.items() if isinstance(m, Mapping) and m.get("sqnr_db") is not None}
    if not values:
        return {}
    worst = min(values, key=lambda name: values[name])
    return {"sqnr_db_mean": round(sum(values.values()) / len(values), 3), "sqnr_db_min": values[worst], "worst": worst, "linears": len(values)}


def merged_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of a layer pass over all layers: sums of counts, otherwise a list per layer."""
    keys = dict.fromkeys(k for r in reports for k in r)
    return {k: sum(r.get(k, 0) for r in reports) if all(type(r.get(k, 0)) is int for r in reports) else [r.get(k) for r in reports] for k in keys}
