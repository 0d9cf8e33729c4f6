"""How good each sparse attention policy is at equal density, on a real model's queries, keys and values, and on its logits.

    python benchmarks/sparse_pareto.py --model MODEL --text FILE --length 8192 --out benchmarks/results/sparse_pareto.json --plot PARETO.png

Three parts, on consecutive windows of the text:

- pareto: each policy at several densities on what dense attention reads: recall, the kept share of each row's weight, mean
  over rows, heads, layers and windows, and |out - dense| / |dense|.
- kl: the whole model with each policy at one density in all layers but the first two: KL(dense, policy) in nats a token.
  Options step through densities, so the two settings next to the density are run, and ln KL is interpolated to it. "noise"
  is the model with every block kept: what the executor's rounding alone costs.
- sweep: the same for Stem's options one at a time, and for all pairs of alpha and lam, by each of its scores.

A method that fails is recorded with its error, and the rest goes on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import table, write
from sparse_methods import MASS, Inputs, Knob, at_density, between, configured, knobs, stem, stem_by_share

from angelslim_core.evaluation import text_windows
from angelslim_core.loading import load_model
from angelslim_sparseattn import make_policy, select, sparse_attention
from angelslim_sparseattn.coupling import captured
from angelslim_sparseattn.harness import Method, divergence, following, logits
from angelslim_sparseattn.recall import Dense

PARTS = ("pareto", "kl", "sweep")
DENSITIES = (0.1, 0.15, 0.25, 0.4, 0.6)
# the model's density: close enough to be taken as it is, close enough to each other to interpolate between, and rounds of search
CLOSE, STEP, ROUNDS = 0.002, 0.04, 4
# options of Stem that the sweep varies, one at a time, around those of `stem`; tokens as shares of the length
ONE_BY_ONE: dict[str, list[Any]] = {
    "value_term": ["log"],
    "stride": [8, 32],
    "schedule": ["paper"],
    "n_init": [1 / 128, 1 / 32, 1 / 16],
    "n_local": [1 / 128, 1 / 64, 1 / 16],
}
ALPHAS, LAMS = (1.0, 0.9, 0.8, 0.7, 0.5), (0.0, 0.1, 0.2, 0.5, 1.0)


def tried(name: str, what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it yields, or its error; a line of progress either way."""
    start = time.perf_counter()
    try:
        found = what()
    except Exception as error:  # a kernel's compiler has errors of its own; none may end the other methods' measurement
        if not isinstance(error, ValueError):
            traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    shown = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float))
    print(f"{name}: {found.get('error', shown)}   {time.perf_counter() - start:.1f} s", flush=True)
    return {"method": name, **found}


def on_inputs(inputs: Inputs, denses: list[Dense], knob: Knob, block: int, target: float) -> dict[str, Any]:
    """Recall and error of a knob's setting closest to a density."""
    found = at_density(inputs, knob, block, target)
    options = min((found.below, found.above), key=lambda b: abs(b[1] - target))[0]
    policy, recalls, lows, errors, densities = make_policy(knob.policy, **options), [], [], [], []
    for (q, k, v, scale), dense in zip(inputs, denses):
        index = select(q, k, v, policy, scale=scale, block=block)
        out, lse = sparse_attention(q, k, v, index, return_lse=True, scale=scale)
        recall = dense.recall(lse)
        recalls.append(float(recall.mean()))
        lows.append(float(recall.flatten().kthvalue(max(1, recall.numel() // 20)).values))
        errors.append(dense.error(out))
        densities.append(index.density())
    means = {"density": statistics.fmean(densities), "recall": statistics.fmean(recalls), "recall_p5": statistics.fmean(lows)}
    return {"target": target, "options": options, **means, "error_l2": statistics.fmean(errors)}


class Reading:
    """The model on the text's windows: KL of settings next to a density.

    Args:
        ids: [W, T].
        inputs: queries, keys and values that densities are first looked for on.
    """

    def __init__(self, model: Any, ids: torch.Tensor, inputs: Inputs, block: int, target: float) -> None:
        self.model, self.ids, self.inputs, self.block, self.target = model, ids, inputs, block, target
        self._dense = [logits(model, window) for window in ids]

    def kl(self, config: Any) -> tuple[float, list[float]]:
        """Density over the sparse layers of all windows, and the KL of each window."""
        densities, kls = [], []
        for window, dense in zip(self.ids, self._dense):
            with following(self.model, Method("", config)) as found:
                sums = divergence(dense, logits(self.model, window), window)
            if found["density"] is None:
                raise ValueError("no layer was sparse")
            densities.append(found["density"])
            kls.append(sums[1] / len(dense))
        if not all(math.isfinite(x) for x in kls):
            raise ValueError("logits are not finite")
        return statistics.fmean(densities), kls

    def at(self, knob: Knob) -> dict[str, Any]:
        """KL at the density, each window's interpolated between the settings next to it.

        Densities over the whole model, whose inputs are those of a model that attends sparsely, differ from those that are
        looked for first, so the search goes on with what the model showed.
        """
        sides: dict[str, dict[str, Any]] = {}
        goal = self.target
        for _ in range(ROUNDS):
            found = at_density(self.inputs, knob, self.block, goal)
            for options, _ in (found.below, found.above):
                if str(options) not in sides:
                    density, kls = self.kl(configured(knob.policy, options, self.block))
                    sides[str(options)] = {"options": options, "density": density, "kls": kls}
            near = min(sides.values(), key=lambda s: abs(s["density"] - self.target))
            below = max((s for s in sides.values() if s["density"] <= self.target), key=lambda s: s["density"], default=near)
            above = min((s for s in sides.values() if s["density"] >= self.target), key=lambda s: s["density"], default=near)
            if abs(near["density"] - self.target) < CLOSE:
                below = above = near
                break
            if below is not above and above["density"] - below["density"] < STEP:
                break
            goal = min(0.99, goal * self.target / near["density"])
        if below is above and abs(near["density"] - self.target) >= CLOSE:
            raise ValueError(f"density is {near['density']:.4f} at the nearest, not {self.target}")
        pairs = zip(below["kls"], above["kls"])
        kls = [math.exp(between(self.target, (below["density"], math.log(a)), (above["density"], math.log(b)))) for a, b in pairs]
        return {
            "kl": statistics.fmean(kls),
            "kls": kls,
            "density": near["density"],
            "kl_at_density": statistics.fmean(near["kls"]),
            "runs": list(sides.values()),
        }

    def noise(self) -> dict[str, Any]:
        """KL with every block kept."""
        density, kls = self.kl(configured("a_shape", {"n_init": 0, "n_local": 2 * self.ids.shape[1]}, self.block))
        return {"kl": statistics.fmean(kls), "kls": kls, "density": density}


def swept(length: int) -> dict[str, Knob]:
    """Stem's settings that the sweep compares."""
    found = {
        f"{of}alpha {alpha:g} lam {lam:g}": make(length, alpha=alpha, lam=lam)
        for of, make in (("", stem), ("mass, ", partial(stem, **MASS)), ("share, ", stem_by_share))
        for alpha in ALPHAS
        for lam in LAMS
    }
    for name, values in ONE_BY_ONE.items():
        for value in values:
            of = round(value * length) if isinstance(value, float) else value
            found[f"{name} {of}"] = stem(length, **{name: of})
    return found


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the figures must show."""
    kl = {row["method"]: row["kl"] for row in rows if "kl" in row}
    found: dict[str, Any] = {}
    for of, uniform in (("", "uniform top-k"), (" mass", "uniform mass"), (" share", "uniform share")):
        parts = {name: f"{name}{of}" for name in ("stem", "decay alone", "metric alone")}
        found |= {f"{mine} over {uniform}": kl[mine] / kl[uniform] for mine in parts.values() if {mine, uniform} <= kl.keys()}
    others = {name: value for name, value in kl.items() if name != "noise" and not name.startswith(("stem", "uniform", "decay", "metric"))}
    if others:
        best = min(others, key=others.__getitem__)
        found |= {f"{mine} over {best}": kl[mine] / others[best] for mine in ("stem", "stem mass", "stem share") if mine in kl}
    if "uniform top-k" in kl:
        found |= {f"{mine} over uniform top-k": kl[mine] / kl["uniform top-k"] for mine in ("stem mass", "stem share") if mine in kl}
    return found


def plot(rows: list[Mapping[str, Any]], target: Path, title: str) -> None:
    """Recall and error over density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    names = list(dict.fromkeys(row["method"] for row in rows if "error" not in row))
    for number, name in enumerate(names):
        points = sorted((row for row in rows if row["method"] == name and "error" not in row), key=lambda row: row["density"])
        style = {
            "marker": "o^"[number % 2],
            "color": pyplot.get_cmap("tab20")(number * 2 % 20 + number * 2 // 20),
            "linewidth": 2.2 if name == "stem" else 1,
            "markersize": 4,
        }
        for side, key in zip(axes, ("recall", "error_l2")):
            side.plot([100 * p["density"] for p in points], [p[key] for p in points], label=name, **style)
    for side, label in zip(axes, ("recall of dense attention's weight", "|out - dense| / |dense|")):
        side.set_xlabel("density, % of causal attention")
        side.set_ylabel(label)
        side.grid(alpha=0.3)
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 9, 16, 23, 29], help="layers that pareto measures")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.25, help="of kl and sweep")
    parser.add_argument("--methods", nargs="+", help="policies of pareto and kl; all if not given")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()

    start = time.perf_counter()
    loaded = load_model(given.model, given.device)
    model = loaded.model if torch.cuda.is_available() and given.device != "cpu" else loaded.model.float()  # processors are slow in bf16
    ids = text_windows(loaded.tokenizer, given.model, given.text, given.windows, given.length).to(model.device)
    if len(ids) < given.windows:
        raise SystemExit(f"{given.text} has {len(ids)} windows of {given.length} tokens, not {given.windows}")
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    layers = [i for i in given.layers if i < model.config.num_hidden_layers]
    inputs = [tuple(found) for window in ids for _, found in sorted(captured(model, window[None], layers).items())]
    print(f"{where}, {len(ids)} windows of {given.length} tokens, layers {layers}, {inputs[0][0].dtype}   {time.perf_counter() - start:.1f} s", flush=True)
    chosen = knobs(given.length, given.block)
    if unknown := set(given.methods or ()) - chosen.keys():
        raise SystemExit(f"no methods {sorted(unknown)}; there are {', '.join(chosen)}")
    chosen = {name: knob for name, knob in chosen.items() if given.methods is None or name in given.methods}
    head = {"tokens": given.length, "windows": len(ids), "layers": layers, "block": given.block, "density": given.density}
    document: dict[str, Any] = {"device": where, "torch": torch.__version__, **head}

    if "pareto" in given.parts:
        denses = [Dense.of(q, k, v, scale, block=given.block) for q, k, v, scale in inputs]
        document["pareto"] = [
            tried(name, lambda knob=knob, target=target: on_inputs(inputs, denses, knob, given.block, target))  # type: ignore[misc]
            for name, knob in chosen.items()
            for target in DENSITIES
        ]
        write(given.out, document)
        if given.plot:
            plot(document["pareto"], given.plot, f"{given.length} tokens, {len(ids)} windows, layers {', '.join(map(str, layers))}, blocks of {given.block}")
    if {"kl", "sweep"} & set(given.parts):
        spread = range(2, model.config.num_hidden_layers, max(1, model.config.num_hidden_layers // 10))
        first = [tuple(found) for found in captured(model, ids[:1], spread).values()]
        reading = Reading(model, ids, first, given.block, given.density)  # type: ignore[arg-type]
        if "kl" in given.parts:
            alone = {
                f"{part} alone{of}": make(**fixed)
                for of, make in (
                    ("", partial(stem, given.length)),
                    (" mass", partial(stem, given.length, **MASS)),
                    (" share", partial(stem_by_share, given.length)),
                )
                for part, fixed in (("decay", {"lam": 0.0}), ("metric", {"alpha": 1.0}))
                if f"stem{of}" in chosen
            }
            rows = [tried("noise", reading.noise)]
            rows += [tried(name, lambda knob=knob: reading.at(knob)) for name, knob in {**chosen, **alone}.items()]  # type: ignore[misc]
            document |= {"kl": rows, "verdict": verdict(rows)}
            write(given.out, document)
        if "sweep" in given.parts:
            document["sweep"] = [tried(name, lambda knob=knob: reading.at(knob)) for name, knob in swept(given.length).items()]  # type: ignore[misc]
    document["seconds"] = round(time.perf_counter() - start, 1)
    write(given.out, document)
    for part in ("kl", "sweep"):
        rows = sorted((row for row in document.get(part, []) if "kl" in row), key=lambda row: row["kl"])
        if rows:
            table(
                [[r["method"], f"{r['kl']:.5f}", f"{r['density']:.4f}", " ".join(f"{x:.5f}" for x in r["kls"])] for r in rows],
                [part, "KL", "density", "windows"],
            )
    print(document.get("verdict", ""), f"{document['seconds']} s")


if __name__ == "__main__":
    main()
