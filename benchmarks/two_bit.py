"""Two bits and below by training, beside rounding after training: what is left of a model, on text it was not trained on.

    python benchmarks/two_bit.py --model OFFGRID --answers answers.jsonl --text TEXT --work FOLDER --out benchmarks/results/two_bit.json

Each way is a recipe, run as `angelslim run` would, and its saved folder is scored by `angelslim eval`'s own function: windows from the start of TEXT.
Methods after training calibrate on the second half of TEXT. Trained ones see what `angelslim specdec regen` made the model itself say (--answers);
the second half of TEXT, in pieces (--mix 0: not); with --continued also what the model makes of that half's pieces:

    python -c "t = open('TEXT', encoding='utf-8').read(); open('half.txt', 'w', encoding='utf-8').write(t[len(t) // 2 :])"
    angelslim specdec invent --model OFFGRID --text half.txt --prefix 16 128 --max-new-tokens 448 --count 45000 --out continued.jsonl

The share of each is reported. The results are of --training '{"held_out": 0.004}', those of `norms trained along` of '{"held_out": 0.004, "also": ["norm"]}'
and --lr 2.1e-3. Peers' rounded models are folders (--peer NAME=FOLDER), scored alike.
The file is written after every way; what it has is not measured again unless it is named by --only.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

from measure import table, write

PROMPTS = ("Explain in two sentences why the sky is blue.", "Natalia sold 48 clips in April and half as many in May. How many did she sell in both months?")
GROUP = {"group_size": 64}
# way -> its steps; those with "data" are trained
WAYS: dict[str, list[dict[str, Any]]] = {
    "2 bits, rounded": [{"use": "quant.int4_rtn", "with": {"bits": 2, **GROUP}}],
    "2 bits, gptq": [{"use": "quant.gptq", "with": {"bits": 2, **GROUP}}],
    "2 bits, gptaq, zero points": [{"use": "quant.gptaq", "with": {"bits": 2, **GROUP, "symmetric": False}}],
    "2 bits, learned rounding, zero points": [{"use": "quant.learned_rounding", "with": {"bits": 2, **GROUP, "symmetric": False}}],
    "4 bits, rounded": [{"use": "quant.int4_rtn", "with": {"bits": 4, **GROUP}}],
    "seq2": [{"use": "quant.seq2", "with": GROUP}],
    "seq2, rotated": [{"use": "quant.rotate"}, {"use": "quant.seq2", "with": GROUP}],
    "tequila": [{"use": "quant.tequila", "with": GROUP}],
    "sherry": [{"use": "quant.sherry", "with": GROUP}],
}
TRAINED = ("quant.seq2", "quant.tequila", "quant.sherry")


def training_rows(given: argparse.Namespace) -> dict[str, list[str]]:
    """Lines of JSONL by where they come from: answers, the second half of the text in pieces (--mix), what the model made of it (--continued)."""
    found = {name: lines_of(path) for name, path in (("answers", given.answers), ("continued", given.continued)) if path}
    if given.mix:
        text = Path(given.text).read_text(encoding="utf-8")
        half = text[len(text) // 2 :]
        pieces = [half[i : i + given.piece] for i in range(0, len(half), given.piece)]
        found["text"] = [json.dumps({"text": piece}) for piece in pieces] * given.mix
    return found


def lines_of(path: str) -> list[str]:
    return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def shares(rows: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Of each kind of rows, how many there are and their share of all characters that are said."""
    from angelslim_core.calibration.rows import interpret, plain

    said = {name: sum(len(plain(interpret(json.loads(line)) or "")) for line in lines) for name, lines in rows.items()}
    return {name: {"rows": len(lines), "share": said[name] / max(1, sum(said.values()))} for name, lines in rows.items()}


def training_file(given: argparse.Namespace) -> Path:
    """The answers, and what is to be among them."""
    found = training_rows(given)
    if list(found) == ["answers"]:
        return Path(given.answers)
    rows = [line for lines in found.values() for line in lines]
    random.Random(0).shuffle(rows)
    out = Path(given.work) / "mixed.jsonl"
    out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return out


def recipe(way: str, given: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a way."""
    steps = [dict(step) for step in WAYS[way]]
    if steps[-1]["use"] in TRAINED:
        steps[-1]["with"] = {**steps[-1]["with"], **json.loads(given.scheme)}
        training = {
            "data": str(training_file(given)), "steps": given.steps, "batch": given.batch, "length": given.length, "lr": given.lr,
            "quantizer_lr": given.quantizer_lr, "every": given.every, "count": given.count, **json.loads(given.training),
        }  # fmt: skip
        return {"steps": [*steps, {"use": "distill.qad", "with": training}]}
    text = Path(given.text).read_text(encoding="utf-8")
    calibration = Path(given.work) / "calibration.txt"
    calibration.write_text(text[len(text) // 2 :], encoding="utf-8")
    calibrated = {"data": str(calibration), "samples": given.samples, "tokens": given.tokens}
    return {"steps": steps, **({} if way.endswith("rounded") else {"calibration": calibrated})}


def scored(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Quality of a saved folder, and what it answers."""
    from angelslim_core import evaluate, load

    found = evaluate(folder, given.model, text=given.text, windows=given.windows, length=1024, device=given.device)
    row = {key: found[key] for key in ("perplexity", "base_perplexity", "kl", "kl_stderr", "top1_agreement", "backend")}
    model, tokenizer = load(folder, given.device, packed=False)
    row["answers"] = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = model.generate(**ids.to(model.device), max_new_tokens=given.answer_tokens, do_sample=False)
        row["answers"].append(tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return row


def bits_of(step: dict[str, Any]) -> float | None:
    """Bits a weight of the linears: codes, and a scale of 16 bits for each group."""
    options = step["with"]
    codes = {"quant.seq2": 2.0, "quant.tequila": 1.6, "quant.sherry": 1.25}.get(step["use"], options.get("bits"))
    if codes is None or not options["group_size"]:
        return codes  # a scale a channel is next to nothing
    zero = 0 if options.get("symmetric", True) or "bits" not in options else options["bits"] / options["group_size"]
    return codes + 16 / options["group_size"] + zero


def run_way(way: str, given: argparse.Namespace) -> dict[str, Any]:
    """Compress by a way, and score what was saved."""
    from angelslim_core import compress

    began = time.perf_counter()
    out = Path(given.work) / way.replace(",", "").replace(" ", "_")

    def progress(done: int, total: int, label: str) -> None:
        if time.perf_counter() - progress.last > 10:  # type: ignore[attr-defined]
            print(f"{way}: {done}/{total} {label}", flush=True)
            progress.last = time.perf_counter()  # type: ignore[attr-defined]

    progress.last = 0.0  # type: ignore[attr-defined]
    made = recipe(way, given)
    scheme = next(step for step in reversed(made["steps"]) if step["use"] != "distill.qad")
    result = compress(given.model, out=out, recipe=made, device=given.device, replace=True, progress=progress)
    row = {"seconds": time.perf_counter() - began, "bits_a_weight": bits_of(scheme), **scored(out, given)}
    trained = result.passes[-1]["metrics"] if result.passes[-1]["id"] == "distill.qad" else None
    if trained is not None:
        row["training"] = trained | {"options": {k: getattr(given, k) for k in ("steps", "batch", "length", "lr", "quantizer_lr", "count", "mix")}}
        row["training"] |= {"scheme": json.loads(given.scheme), "further": json.loads(given.training), "data": shares(training_rows(given))}
    if not given.keep:
        shutil.rmtree(out, ignore_errors=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--answers", help="JSONL of conversations, for the trained ways")
    parser.add_argument("--continued", metavar="FILE", help="JSONL of text that the model made of pieces of the second half of the text, for the trained ways")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help="a peer's rounded model")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--quantizer-lr", type=float, default=1.5e-3)
    parser.add_argument("--every", type=int, default=1700)
    parser.add_argument("--count", default="all", choices=["answers", "all"])
    parser.add_argument("--mix", type=int, default=4, help="how often the second half of the text is among the data")
    parser.add_argument("--piece", type=int, default=4000, help="characters of a piece of it")
    parser.add_argument("--scheme", default="{}", help="further options of the trained scheme, JSON")
    parser.add_argument("--training", default="{}", help="further options of distill.qad, JSON")
    parser.add_argument("--label", default="", help="in the table, behind a trained way's name")
    parser.add_argument("--answer-tokens", type=int, default=120)
    parser.add_argument("--keep", action="store_true", help="leave the folders in --work")
    given = parser.parse_args()
    Path(given.work).mkdir(parents=True, exist_ok=True)
    out = Path(given.out)
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    rows = document.setdefault("rows", {})
    document |= {"model": Path(given.model).name, "text_windows": given.windows, "calibration": {"samples": given.samples, "tokens": given.tokens}}
    if given.device == "cuda":
        import torch

        document["device"] = torch.cuda.get_device_name()
    for peer in given.peer:
        name, _, folder = peer.partition("=")
        rows[name] = scored(Path(folder), given)
        write(out, document)
    for way in given.only or [w for w in WAYS if given.answers or given.continued or WAYS[w][-1]["use"] not in TRAINED]:
        label = f"{way}{given.label}" if WAYS[way][-1]["use"] in TRAINED else way
        if label in rows and not given.only:
            continue
        rows[label] = run_way(way, given)
        print(label, {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[label].items() if k not in ("training",)}, flush=True)
        write(out, document)
    names = ["kl", "perplexity", "top1_agreement", "bits_a_weight", "seconds"]
    table([[label, *(f"{row[n]:.4g}" if row.get(n) is not None else "" for n in names)] for label, row in rows.items()], ["way", *names])


if __name__ == "__main__":
    main()
