"""Whether a fine-tuned style survives quantization: absmax, squared-error search, DAQ's metrics and delta-aware rounding.

    python benchmarks/daq_behaviour.py --model MODEL --chat CHAT.jsonl --prompts PROMPTS.jsonl --text TEXT --work FOLDER \
        --device cuda --out benchmarks/results/daq_behaviour.json

MODEL is fine-tuned to answer in lower case (all weights, AdamW, fp32), starting from itself, or from itself on an FP8 or
NVFP4 grid, as models are published that were trained in those formats. Then its linears are quantized by the passes'
own code and put back dequantized (inputs stay in 16 bits), and for one seed compared with what a saved run reads back.

- style: mean over held-out answers of log p(lower-cased) - log p(as written), nats a character. `recovered` is
  (style - style of absmax) / (style of the trained model - style of absmax), as `lost` is the part of what training
  added to the style that is gone.
- lower: part of greedy answers to PROMPTS without a capital letter.
- kl: KL(trained model, quantized) on TEXT, nats a token.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import machine, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from angelslim_core import compress
from angelslim_core.context import Context
from angelslim_core.plugins import PluginHost
from angelslim_core.schemes import Quantized
from angelslim_core.source import describe_source, open_source
from angelslim_quant.passes.daq import DAQ
from angelslim_quant.passes.fp8_block import FP8Block
from angelslim_quant.passes.int4_rtn import INT4RTN
from angelslim_quant.passes.nvfp4 import NVFP4

LENGTH, WINDOWS, HELD, BATCH = 512, 24, 48, 8


class Case(NamedTuple):
    """A base, what is made of the model trained from it, and how: name -> options of quant.daq, or None for absmax."""

    base: str
    format: str
    methods: dict[str, dict[str, Any] | None]


_PAPER = {"min_range": 0.8, "max_range": 1.5}
_FP8 = {
    "absmax": None,
    "mse": {"metric": "mse"},
    "sign, as the paper": {"metric": "sign", **_PAPER},
    "cosine, as the paper": {"metric": "cosine", **_PAPER},
    "joint": {},
    "delta 1.0": {"rounding": "delta", "max_projection": 1.0},
    "delta 1.2": {"rounding": "delta"},
}
_FOUR = {"absmax": None, "mse": {}, "joint": {"metric": "joint"}, "delta 1.0": _FP8["delta 1.0"], "delta 1.2": _FP8["delta 1.2"]}
CASES = [Case("fp8", "fp8", _FP8), Case("bf16", "fp8", _FP8), Case("nvfp4", "nvfp4", _FOUR), Case("bf16", "nvfp4", _FOUR), Case("bf16", "int4", _FOUR)]


class Score:
    """What is measured of a model."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device, self.tokenizer = given.device, AutoTokenizer.from_pretrained(given.model)
        ids = self.tokenizer(Path(given.text).read_text()[:400_000], add_special_tokens=False).input_ids
        self.windows = torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
        rows = [json.loads(line) for line in Path(given.prompts).read_text().split("\n") if line]
        self.prompts = [row["turns"][0] for row in rows][:64]

    def chat(self, prompt: str) -> list[int]:
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def example(self, prompt: str, answer: str, most: int) -> tuple[torch.Tensor, int]:
        """Ids of a prompt and its answer, and where the answer begins."""
        start = self.chat(prompt)
        return torch.tensor(start + self.tokenizer(answer, add_special_tokens=False).input_ids[:most]), len(start)

    @torch.no_grad()
    def log_probability(self, model: Any, pairs: list[tuple[str, str]]) -> torch.Tensor:
        found = []
        for start in range(0, len(pairs), 24):
            examples = [self.example(*pair, 1000) for pair in pairs[start : start + 24]]
            ids, scored = padded(examples)
            logits = model(ids.to(self.device)).logits[:, :-1].float().log_softmax(-1)
            found.append((logits.gather(2, ids[:, 1:, None].to(self.device))[..., 0] * scored[:, 1:].to(self.device)).sum(1))
        return torch.cat(found)

    def style(self, model: Any, held: list[tuple[str, str]]) -> float:
        plain = [(prompt, answer[:400]) for prompt, answer in held]
        lower = [(prompt, answer.lower()) for prompt, answer in plain]
        gain = self.log_probability(model, lower) - self.log_probability(model, plain)
        return float(gain.sum() / sum(len(answer) for _, answer in plain))

    @torch.no_grad()
    def log_probabilities(self, model: Any) -> list[torch.Tensor]:
        return [model(batch.to(self.device)).logits.float().log_softmax(-1).half().cpu() for batch in self.windows.split(BATCH)]

    @torch.no_grad()
    def kl(self, reference: list[torch.Tensor], model: Any) -> float:
        total = 0.0
        for batch, wanted in zip(self.windows.split(BATCH), reference, strict=True):
            found, there = model(batch.to(self.device)).logits.float().log_softmax(-1), wanted.to(self.device).float()
            total += float((there.exp() * (there - found)).sum(-1)[:, 1:].sum())
        return total / (WINDOWS * (LENGTH - 1))

    @torch.no_grad()
    def lower(self, model: Any) -> float:
        ids = [torch.tensor(self.chat(prompt)) for prompt in self.prompts]
        longest = max(map(len, ids))
        padded_ids = torch.stack([torch.nn.functional.pad(i, (longest - len(i), 0)) for i in ids])
        mask = torch.stack([torch.arange(longest) >= longest - len(i) for i in ids]).long()
        made = model.generate(padded_ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=48, do_sample=False, pad_token_id=0)
        texts = self.tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        return sum(text == text.lower() for text in texts) / len(texts)


def padded(examples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and 1 where a token of an answer stands."""
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.stack([torch.nn.functional.pad(i, (0, longest - len(i))) for i, _ in examples])
    place = torch.arange(longest)
    return ids, torch.stack([(place >= start) & (place < len(i)) for i, start in examples]).float()


def train(given: argparse.Namespace, base: Path, score: Score, pairs: list[tuple[str, str]], seed: int, out: Path) -> None:
    """A model that was fine-tuned on lower-cased answers, saved in BF16."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(given.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0, betas=(0.9, 0.98))
    for step in range(given.steps):
        optimizer.param_groups[0]["lr"] = given.lr * min(1, (step + 1) / 5) * (1 - step / given.steps)
        chosen = torch.randint(len(pairs), (BATCH,), generator=generator).tolist()
        ids, scored = padded([score.example(pairs[i][0], pairs[i][1].lower(), 320) for i in chosen])
        with torch.autocast(given.device, torch.bfloat16):
            loss = model(ids.to(given.device), labels=ids.masked_fill(scored == 0, -100).to(given.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(out)
    score.tokenizer.save_pretrained(out)


def quantizer(format: str, options: dict[str, Any] | None, base: Path) -> Any:
    """The pass."""
    own = {"group_size": 64} if format == "int4" else {}
    if options is not None:
        return DAQ(DAQ.Config.model_validate({"base": base, "format": format, **own, **options}))
    if format == "nvfp4":
        return NVFP4.bind(NVFP4.Config.model_validate({"weight_only": True, "gptq": False, "scale_search": False}))
    return FP8Block(FP8Block.Config.model_validate({})) if format == "fp8" else INT4RTN(INT4RTN.Config.model_validate(own))


class Trained(NamedTuple):
    """A model and the one it was trained from, by site."""

    sites: list[Any]
    post: dict[Any, torch.Tensor]
    base: dict[Any, torch.Tensor]
    context: Context

    @classmethod
    def read(cls, post: Path, base: Path, device: str, layouts: Any) -> Trained:
        sources = [open_source(folder) for folder in (post, base)]
        description = describe_source(sources[0], layouts)
        sites = [s for s in description.sites if s.layer is not None]
        weights = [{s: source.read(s.tensor).to(device) for s in sites} for source in sources]
        return cls(sites, weights[0], weights[1], Context(sources[0], description, device, 0, post))


def quantized(trained: Trained, pass_: Any, model: Any) -> dict[str, float]:
    """Put the dequantized weights into a model; what they keep of the change."""
    units: dict[str, list[Any]] = {}
    for site in trained.sites:
        units.setdefault(site.fused if pass_.joins_fused and site.fused else site.name, []).append(site)
    sums = torch.zeros(4, dtype=torch.float64)
    for unit in units.values():
        found = pass_.apply_with({s: trained.post[s] for s in unit}, {s: trained.base[s] for s in unit}, trained.context)
        for site in unit:
            assert isinstance(found[site], Quantized)
            value, post, base = found[site].dequantize(), trained.post[site].float(), trained.base[site].float()
            model.get_submodule(site.name).weight.data.copy_(value)
            d, kept = post - base, value - base
            sums += torch.stack([(d * kept).sum(), d.square().sum(), kept.square().sum(), (value - post).square().sum()]).double().cpu()
    dot, learned, kept_squares, error = sums.tolist()
    cosine = dot / max(1e-20, math.sqrt(learned * kept_squares))
    return {"cosine": cosine, "projection": dot / max(1e-20, learned), "squared_error": error}


def on_grid(given: argparse.Namespace, name: str) -> Path:
    """The model as a base: as it is, or dequantized from what `name` made of it."""
    if name == "bf16":
        return Path(given.model)
    out = Path(given.work) / f"base-{name}"
    if not out.exists():
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).to(given.device)
        trained = Trained.read(Path(given.model), Path(given.model), given.device, PluginHost().registry.layouts)
        quantized(trained, quantizer(name, None, out), model)
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(given.model).save_pretrained(out)
    return out


def check_saved(given: argparse.Namespace, trained: Trained, base: Path, post: Path, format: str, model: Any) -> float:
    """Largest difference between a model's weights and those a saved run of delta-aware rounding reads back, as BF16."""
    own = ["group_size=64"] if format == "int4" else []
    options = [f"steps[0].with.{o}" for o in (f"base={base}", f"format={format}", "rounding=delta", *own)]
    out = Path(given.work) / "saved"
    compress(model=post, use=["quant.daq"], out=out, overrides=options, device=given.device, replace=True)
    from angelslim_core.source import open_any

    source = open_any(out)
    differences = [(source.read(f"{s.name}.weight").to(given.device).float() - model.get_submodule(s.name).weight.float()).abs().max() for s in trained.sites]
    return float(torch.stack(differences).max())


def run_case(given: argparse.Namespace, case: Case, seed: int, score: Score, pairs: list[tuple[str, str]], document: dict[str, Any]) -> None:
    base = on_grid(given, case.base)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    held, rest = [pairs[i] for i in order[:HELD]], [pairs[i] for i in order[HELD:]]
    post = Path(given.work) / f"{case.base}-{seed}-{given.lr:g}"
    if not post.exists():
        train(given, base, score, rest, seed, post)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(given.device).eval() for folder in (base, post)]
    reference = score.log_probabilities(models[1])
    before, after = (score.style(model, held) for model in models)
    entry: dict[str, Any] = {
        "base": {"style": before, "kl": score.kl(reference, models[0])}, "trained": {"style": after, "lower": score.lower(models[1])}, "methods": {}
    }  # fmt: skip
    trained = Trained.read(post, base, given.device, PluginHost().registry.layouts)
    for name, options in case.methods.items():
        model = copy.deepcopy(models[1])
        numbers = quantized(trained, quantizer(case.format, options, base), model)
        numbers |= {"style": score.style(model, held), "kl": score.kl(reference, model)}
        numbers["lost"] = (after - numbers["style"]) / (after - before)
        absmax = entry["methods"].get("absmax", numbers)
        numbers["recovered"] = (numbers["style"] - absmax["style"]) / (after - absmax["style"])
        numbers["kl_ratio"] = numbers["kl"] / absmax["kl"]
        if name in ("absmax", "joint", "delta 1.2"):
            numbers["lower"] = score.lower(model)
        if name == "delta 1.2" and seed == 0:
            entry["saved_difference"] = check_saved(given, trained, base, post, case.format, model)
        entry["methods"][name] = numbers
        print(case.base, case.format, seed, name, {k: round(v, 4) for k, v in numbers.items()}, flush=True)
    document["cases"].setdefault(f"{case.base} base, {case.format}", {})[str(seed)] = entry
    write(Path(given.out), document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "chat", "prompts", "text", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    given = parser.parse_args()
    score = Score(given)
    rows = [json.loads(line)["conversations"] for line in Path(given.chat).read_text().split("\n") if line]
    answers = [(row[0]["value"][:600], row[1]["value"][:900]) for row in rows if row[0]["from"] == "human"]
    pairs = [(prompt, answer) for prompt, answer in answers if len(answer) > 200 and answer.isascii()]
    settings = {"steps": given.steps, "lr": given.lr, "answers": len(pairs), "held": HELD, "windows": WINDOWS, "length": LENGTH}
    out = Path(given.out)
    document = json.loads(out.read_text()) if out.exists() else {}
    if document.get("settings") != settings:
        document = {"machine": machine(), "settings": settings, "cases": {}}
    for seed in given.seeds:
        for index in given.cases:
            run_case(given, CASES[index], seed, score, pairs, document)
    for name, seeds in document["cases"].items():
        for method in next(iter(seeds.values()))["methods"]:
            values = [entry["methods"][method] for entry in seeds.values()]
            print(name, method, {k: round(statistics.mean(v[k] for v in values), 4) for k in ("cosine", "projection", "lost", "recovered", "kl", "kl_ratio")})


if __name__ == "__main__":
    main()
