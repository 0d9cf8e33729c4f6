"""Whether sparse attention costs a model what it retrieves: multi-key retrieval that the dense model has learned.

    python benchmarks/sparse_retrieval.py --model MODEL --text FILE --work FOLDER --out benchmarks/results/sparse_retrieval.json --device cuda

MODEL is fine-tuned (all weights, AdamW, fp32 weights under bf16 autocast) on sequences of --length tokens: keys of two words
with numbers as values, scattered over the text, questions for keys said earlier at random places, loss on the answers
alone. Short sequences come first. Training ends when the dense model answers --enough of the questions, or with --seconds;
the weights stay in --work, and a second call uses them.

Then, with the same questions for all:

- spread: questions all over the prompt, as in training; an answer counts if every one of its tokens is the model's first
  choice, so everything, answers too, is read sparsely. Many questions a prompt.
- end: one question at the end of the prompt, whose answer is decoded, dense. An answer counts as before: greedy decoding
  writes it if and only if each of its tokens is the first choice after those before.

Uniform top-k is Stem without decay and without the values' term. Densities are looked for on the trained model's own
queries, keys and values: uniform top-k's setting is the closest to it, the others have at most its density.
"""

from __future__ import annotations

import argparse
import math
import random
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import table, write
from sparse_methods import MASS, Inputs, Knob, at_density, configured, knobs, stem, stem_by_share
from torch.nn import functional

from angelslim_core.evaluation import read_text
from angelslim_core.loading import load_model
from angelslim_sparseattn.coupling import captured
from angelslim_sparseattn.harness import Method, following
from angelslim_sparseattn.tasks.words import ADJECTIVES, NOUNS

# shares of the training time and lengths, as shares of --length, that come one after the other
CURRICULUM = ((0.35, 8), (0.25, 2), (0.4, 1))
# tokens of the shortest sequences; of a sequence's tokens one key, and one question, stand in so many
SHORTEST, TOKENS_A_KEY = 512, 128
UNIFORM = "uniform top-k"


@dataclass(frozen=True)
class Asked:
    """Tokens, and where answers stand: (start, stop) each, end excluded."""

    ids: list[int]
    answers: list[tuple[int, int]]


class Maker:
    """Sequences of statements, questions and text, of exact length."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._encode = lambda piece: tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        self._decode = tokenizer.decode
        self._text = self._encode(text[: 1 << 22])
        if len(self._text) < 1024:
            raise SystemExit("the text has fewer than 1024 tokens")

    def sequence(self, rng: random.Random, length: int, layout: str) -> Asked:
        """One of `length` tokens; "end" has one question, at its end."""
        count = max(2, length // TOKENS_A_KEY)
        words = rng.sample([(a, n) for a in ADJECTIVES for n in NOUNS], count)
        pairs = [(f" {a} {n}", f" {rng.randrange(10**4, 10**5)}") for a, n in words]
        statements = [self._encode(f"\nThe number of the{key} is{value}.") for key, value in pairs]
        questions = [self._question(key, value) for key, value in pairs]
        asked = rng.sample(range(count), count) if layout == "spread" else [rng.randrange(count)]
        room = length - sum(map(len, statements)) - sum(len(q) + len(a) + 1 for q, a in (questions[i] for i in asked))
        if room < 0:
            raise SystemExit(f"{length} tokens have no room for {count} keys")
        # questions come after their statements: a place for each in the text that is left
        place = {i: rng.randrange(room + 1) for i in range(count)}
        events = [(place[i], rng.random(), i, False) for i in range(count)]
        events += [(rng.randint(place[i], room) if layout == "spread" else room, 2.0, i, True) for i in asked]
        start = rng.randrange(len(self._text))
        filler = [self._text[(start + n) % len(self._text)] for n in range(room)]
        ids: list[int] = []
        answers, done = [], 0
        for at, _, i, is_question in sorted(events):
            ids += filler[done:at]
            done = at
            if not is_question:
                ids += statements[i]
                continue
            question, answer = questions[i]
            answers.append((len(ids) + len(question), len(ids) + len(question) + len(answer)))
            ids += [*question, *answer, self._text[0]]  # what follows an answer is not scored
        ids += filler[done:]
        return Asked(ids, answers)

    def _question(self, key: str, value: str) -> tuple[list[int], list[int]]:
        """Question and answer; the answer's first token holds a digit, so that the prompt's last token has to find it."""
        question, answer = self._encode(f"\nWhich number has the{key}? It is"), self._encode(value)
        blank = next(n for n, token in enumerate(answer) if self._decode([token]).strip())
        return question + answer[:blank], answer[blank:]


def answered(model: Any, sequence: Asked, layout: str) -> tuple[int, int, int, float]:
    """Questions answered, questions, first tokens right, and the sum of losses over answers' tokens."""
    ids = torch.tensor([sequence.ids], device=model.device)
    with torch.no_grad():
        if layout == "spread":
            places = torch.tensor([p - 1 for start, stop in sequence.answers for p in range(start, stop)], device=model.device)
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, places]
            logits = model.lm_head(hidden)
        else:  # prefill up to the question's last token, then the answer as decoding would feed it
            ((start, stop),) = sequence.answers
            first = model(input_ids=ids[:, :start], use_cache=True, logits_to_keep=1)
            logits = first.logits[0]
            if stop - start > 1:
                rest = model(input_ids=ids[:, start : stop - 1], past_key_values=first.past_key_values, use_cache=True)
                logits = torch.cat([logits, rest.logits[0]])
    targets = torch.cat([ids[0, start:stop] for start, stop in sequence.answers])
    loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
    right = (logits.argmax(-1) == targets).split([stop - start for start, stop in sequence.answers])
    return sum(bool(r.all()) for r in right), len(right), sum(bool(r[0]) for r in right), float(loss)


def accuracy(model: Any, sequences: Sequence[Asked], layout: str, config: Any = None) -> dict[str, Any]:
    """Of all questions of the sequences."""
    model.eval()
    with following(model, Method("", config)) as found:
        sums = [sum(column) for column in zip(*(answered(model, s, layout) for s in sequences))]
    tokens = sum(stop - start for s in sequences for start, stop in s.answers)
    correct, asked = int(sums[0]), int(sums[1])
    share = correct / asked
    return {
        "accuracy": share, "stderr": math.sqrt(share * (1 - share) / asked), "questions": asked, "correct": correct,
        "first_token": sums[2] / asked, "loss": sums[3] / tokens, "density": found["density"], "sparse_layers": found["sparse_layers"],
    }  # fmt: skip


def train(model: Any, maker: Maker, held: list[Asked], given: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune in place; returns what happened."""
    cuda = model.device.type == "cuda"
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=given.lr, betas=(0.9, 0.98), fused=cuda)
    rng, start, step, log = random.Random(given.seed), time.perf_counter(), 0, []
    running, best, next_look = None, 0.0, 0.2
    while (spent := (time.perf_counter() - start) / given.seconds) < 1 and step < given.steps:
        progress = max(spent, step / given.steps)
        part = next((part for until, part in _stages() if progress < until), 1)
        length = max(given.length // part, min(given.length, SHORTEST))
        batch = [maker.sequence(rng, length, "spread") for _ in range(max(1, given.batch_tokens // length))]
        for group in optimizer.param_groups:
            group["lr"] = given.lr * min(1, (step + 1) / 20) * (1 if progress < 0.6 else max(0.05, (1 - progress) / 0.4))
        model.train()
        ids = torch.tensor([s.ids for s in batch], device=model.device)
        rows, places = zip(*((n, p) for n, s in enumerate(batch) for begin, stop in s.answers for p in range(begin, stop)))
        at = torch.tensor(rows, device=model.device), torch.tensor(places, device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
            logits = model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state[at[0], at[1] - 1])
        loss = functional.cross_entropy(logits.float(), ids[at])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % given.log_every == 0:
            value = float(loss)
            running = value if running is None else 0.7 * running + 0.3 * value
            log.append({"step": step, "length": length, "loss": value, "norm": float(norm), "seconds": round(time.perf_counter() - start, 1)})
            print(f"step {step}, {length} tokens x {len(batch)}, loss {value:.4f}, norm {float(norm):.2f}, {log[-1]['seconds']} s", flush=True)
            if not math.isfinite(value):
                raise SystemExit("the loss is not finite: choose a smaller --lr")
        if progress >= next_look:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
                found = accuracy(model, held, "spread")
            best, next_look = found["accuracy"], progress + 0.1
            log.append({"step": step, "dense": found})
            print(f"step {step}: dense answers {100 * best:.1f} % at {given.length} tokens, first tokens {100 * found['first_token']:.1f} %", flush=True)
            if best >= given.stop_at:
                break
    return {"steps": step, "seconds": round(time.perf_counter() - start, 1), "log": log}


def _stages() -> list[tuple[float, int]]:
    """Until which share of the time, and what part of the length."""
    until, found = 0.0, []
    for share, part in CURRICULUM:
        until += share
        found.append((until, part))
    return found


def methods(length: int, given: argparse.Namespace) -> dict[str, Knob]:
    """Uniform top-k, Stem, and each of Stem's two parts alone, by the mean of antidiagonals; the first two by their mass, too, Stem by a share of it, and XAttention."""
    kept = {"n_init": round(given.sink * length), "n_local": round(given.local * length)}
    return {
        UNIFORM: stem(length, **kept, alpha=1.0, lam=0.0),
        "stem": stem(length, **kept, alpha=given.alpha, lam=given.lam),
        "decay alone": stem(length, **kept, alpha=given.alpha, lam=0.0),
        "metric alone": stem(length, **kept, alpha=1.0, lam=given.lam),
        "uniform mass": stem(length, **kept, **MASS, alpha=1.0, lam=0.0),
        "stem mass": stem(length, **kept, **MASS, alpha=given.alpha, lam=given.lam),
        "stem share": stem_by_share(length, **kept, lam=given.lam),
        "xattention": knobs(length, given.block)["xattention"],
    }


def compared(model: Any, inputs: Inputs, prompts: dict[str, list[Asked]], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a layout, density and method: uniform top-k closest to the density looked for, the others at its density or just below."""
    for target in given.densities:
        goal = target
        for name, knob in methods(given.length, given).items():
            try:
                found = at_density(inputs, knob, given.block, goal)
                if name == UNIFORM:  # the others get no more than it has
                    options, goal = min((found.below, found.above), key=lambda b: abs(b[1] - target))
                else:
                    options, _ = found.below
                config = configured(knob.policy, options, given.block)
                results = {layout: accuracy(model, sequences, layout, config) for layout, sequences in prompts.items()}
            except Exception as error:  # a kernel's compiler has errors of its own; the other settings are still measured
                if not isinstance(error, ValueError):
                    traceback.print_exc()
                failed = f"{type(error).__name__}: {str(error)[:300]}"
                print(f"{name} at {target}: {failed}", flush=True)
                yield {"method": name, "target": target, "error": failed}
                continue
            for layout, result in results.items():
                print(f"{name} at {target}, {layout}: {100 * result['accuracy']:.2f} %, density {result['density']:.4f}", flush=True)
                yield {"method": name, "target": target, "layout": layout, "options": options, **result}


def verdict(dense: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that uniform top-k and Stem lose to dense, by layout and density."""
    found = []
    for layout in dense:
        for target in dict.fromkeys(row["target"] for row in rows):
            of = {row["method"]: row for row in rows if row["target"] == target and row.get("layout") == layout}
            lost = {name: 100 * (dense[layout]["accuracy"] - row["accuracy"]) for name, row in of.items()}
            if {"stem", UNIFORM} <= lost.keys():
                holds = {name: lost[name] <= 0.5 and lost[UNIFORM] >= 2 for name in ("stem", "stem mass", "stem share") if name in lost}
                found.append({"layout": layout, "target": target, "points_lost": lost, "holds": holds, "densities": {n: r["density"] for n, r in of.items()}})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the trained weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=140, help="most seconds of training")
    parser.add_argument("--steps", type=int, default=100_000, help="most steps of training")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--enough", type=float, default=0.95, help="dense accuracy below which policies are not blamed")
    parser.add_argument("--stop-at", type=float, default=0.995, help="dense accuracy at which training ends")
    parser.add_argument("--spread", type=int, default=16, help="prompts with questions all over")
    parser.add_argument("--end", type=int, default=200, help="prompts with one question at their end")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.85, 0.75, 0.6, 0.4, 0.25])
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--sink", type=float, default=1 / 64, help="share of the length that every row keeps at its start")
    parser.add_argument("--local", type=float, default=1 / 32, help="share of the length that every row keeps before it")
    parser.add_argument("--alpha", type=float, default=0.7, help="Stem's decay, by count")
    parser.add_argument("--lam", type=float, default=0.2, help="weight of Stem's values' term")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    start = time.perf_counter()
    loaded = load_model(given.model, given.device)
    model, cuda = loaded.model.float(), loaded.model.device.type == "cuda"
    model.requires_grad_(True)
    maker = Maker(loaded.tokenizer, read_text(Path(given.text)))
    held = [maker.sequence(random.Random(f"held {given.seed} {n}"), given.length, "spread") for n in range(4)]
    prompts = {
        layout: [maker.sequence(random.Random(f"{layout} {given.seed} {n}"), given.length, layout) for n in range(count)]
        for layout, count in (("spread", given.spread), ("end", given.end))
        if count
    }
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
        "options": {k: v for k, v in vars(given).items() if k not in ("model", "text", "work", "out")},
    }  # fmt: skip
    weights = given.work / f"retrieval-{given.length}.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights, map_location=model.device, weights_only=True))
        print(f"weights of {weights.name}", flush=True)
    else:
        document["before"] = accuracy(model, held, "spread")
        print(f"before training dense answers {100 * document['before']['accuracy']:.1f} %", flush=True)
        document["training"] = train(model, maker, held, given)
        given.work.mkdir(parents=True, exist_ok=True)
        torch.save({k: v.bfloat16() for k, v in model.state_dict().items()}, weights)
    model = model.to(torch.bfloat16 if cuda else torch.float32).eval().requires_grad_(False)
    dense = {layout: accuracy(model, sequences, layout) for layout, sequences in prompts.items()}
    document["dense"] = dense
    write(given.out, document)
    for layout, result in dense.items():
        print(f"dense, {layout}: {100 * result['accuracy']:.2f} % of {result['questions']}, loss {result['loss']:.4f}", flush=True)
    able = {layout: prompts[layout] for layout, result in dense.items() if result["accuracy"] >= given.enough}
    for layout in dense.keys() - able.keys():
        print(f"dense answers less than {100 * given.enough:g} % of {layout}: no policy is tried there", flush=True)
    spread = range(2, model.config.num_hidden_layers, max(1, model.config.num_hidden_layers // 10))
    inputs = [tuple(found) for found in captured(model, torch.tensor([held[0].ids], device=model.device), spread).values()]
    rows: list[dict[str, Any]] = []
    document |= {"rows": rows, "verdict": [], "seconds": round(time.perf_counter() - start, 1)}
    write(given.out, document)
    for row in compared(model, inputs, able, given) if able else ():  # type: ignore[arg-type]
        rows.append(row)
        document |= {"verdict": verdict({k: dense[k] for k in able}, rows), "seconds": round(time.perf_counter() - start, 1)}
        write(given.out, document)
    cells = [
        [r["layout"], f"{r['target']:g}", r["method"], f"{100 * r['accuracy']:.2f}", f"{100 * (dense[r['layout']]['accuracy'] - r['accuracy']):.2f}", f"{r['density']:.4f}"]
        for r in rows
        if "error" not in r
    ]  # fmt: skip
    table(cells, ["layout", "target", "method", "accuracy %", "points lost", "density"])
    print(
        f"{document['seconds']} s; holds at: {[(v['layout'], v['target'], name) for v in document['verdict'] for name, holds in v['holds'].items() if holds]}"
    )


if __name__ == "__main__":
    main()
