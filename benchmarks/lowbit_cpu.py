"""Tokens per second of a model of 1.8 B weights in two bits and below on a CPU: packed by `load`, and in llama.cpp beside F16 and Q4_0.

    python benchmarks/lowbit_cpu.py --work WORK --llamacpp-python ENV/bin/python --out benchmarks/results/lowbit_cpu.json

A Llama of random weights: 32 layers of 2048, a vocabulary of 120,000, embedding and head one matrix. Layers share their bytes, which
no program knows. Q4_0 is what the four levels of quant.seq2 become in GGUF, TQ2_0 and TQ1_0 what ternary weights become; the embedding
is Q8_0 beside them. A folder of ours in groups of 128 is run packed, and as `load` runs it by itself. Each run is a process of its
own, in turn; of decoding the median step counts. llama.cpp comes as the wheel xllamacpp==2026.10.11549. 7 GB of files, 6 of memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from engines import HERE
from measure import environment, measure, reason, table, write
from safetensors.torch import save_file

from angelslim_core.plugins import PluginHost
from angelslim_core.schemes import Grid, Quantized, Scheme

HIDDEN, WIDE, LAYERS, HEADS, KV_HEADS, HEAD, VOCABULARY = 2048, 6144, 32, 16, 4, 128, 120000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
# name of ours, name in GGUF, outputs, inputs
LINEARS = [
    ("self_attn.q_proj", "attn_q", HEADS * HEAD, HIDDEN), ("self_attn.k_proj", "attn_k", KV_HEADS * HEAD, HIDDEN), ("self_attn.v_proj", "attn_v", KV_HEADS * HEAD, HIDDEN),
    ("self_attn.o_proj", "attn_output", HIDDEN, HEADS * HEAD), ("mlp.gate_proj", "ffn_gate", WIDE, HIDDEN), ("mlp.up_proj", "ffn_up", WIDE, HIDDEN),
    ("mlp.down_proj", "ffn_down", HIDDEN, WIDE),
]  # fmt: skip
TYPES = ("F16", "Q4_0", "TQ2_0", "TQ1_0")
LEVELS = (-3, -1, 1, 3)
GROUP = 128


def weights() -> int:
    return LAYERS * sum(outputs * inputs for _, _, outputs, inputs in LINEARS) + VOCABULARY * HIDDEN


def blocks(kind: str, outputs: int, inputs: int, draw: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random rows of a GGUF type: one scale for all."""
    if kind in ("F16", "Q8_0"):
        values = draw.standard_normal((outputs, inputs), dtype=np.float32) * np.float32(0.02)
        return values.astype(np.float16) if kind == "F16" else gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    scale = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
    if kind == "Q4_0":
        codes = draw.integers(0, 4, (2, outputs, inputs // 32, 16), dtype=np.uint8) * 2 + 5  # -3, -1, 1, 3, as 8 above
        parts = [np.broadcast_to(scale, (outputs, inputs // 32, 2)), codes[0] | codes[1] << 4]
    elif kind == "TQ2_0":
        digits = draw.integers(0, 3, (4, outputs, inputs // 256, 64), dtype=np.uint8)
        parts = [digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6, np.broadcast_to(scale, (outputs, inputs // 256, 2))]
    else:
        numbers = draw.integers(0, 243, (outputs, inputs // 256, 52), dtype=np.uint16)
        parts = [((numbers * 256 + 242) // 243).astype(np.uint8), np.broadcast_to(scale, (outputs, inputs // 256, 2))]
    return np.ascontiguousarray(np.concatenate(parts, -1).reshape(outputs, -1))


def write_gguf(path: Path, kind: str) -> None:
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind}"]))
    writer.add_quantization_version(2)
    fields = {
        "block_count": LAYERS, "context_length": 2048, "embedding_length": HIDDEN, "feed_forward_length": WIDE, "head_count": HEADS, "head_count_kv": KV_HEADS,
        "key_length": HEAD, "value_length": HEAD, "rope_dimension_count": HEAD, "rope_freq_base": 10000.0, "layer_norm_rms_eps": 1e-5, "vocab_size": VOCABULARY,
    }  # fmt: skip
    for key, value in fields.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_tokenizer_model("none")
    ones = np.ones(HIDDEN, np.float32)

    def add(name: str, data: np.ndarray[Any, Any], held: str) -> None:
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[held])

    coarse = "F16" if kind == "F16" else "Q8_0"
    add("token_embd", blocks(coarse, VOCABULARY, HIDDEN, draw), coarse)
    add("output_norm", ones, "F32")
    shared = {name: blocks(kind, outputs, inputs, draw) for _, name, outputs, inputs in LINEARS}
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}", ones, "F32")
        for name, data in shared.items():
            add(f"blk.{layer}.{name}", data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(folder: Path, layout: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    exporter = PluginHost().registry.exporters[layout]()
    scheme = Scheme("seq2 g128", Grid(4, "int", "group", GROUP, scale_dtype="BF16", levels=LEVELS))
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": (torch.randn(VOCABULARY, HIDDEN) * 0.02).bfloat16(), "model.norm.weight": ones}
    for name, _, outputs, inputs in LINEARS:
        codes = torch.tensor(LEVELS, dtype=torch.int8)[torch.randint(len(LEVELS), (outputs, inputs))]
        packed = exporter.pack(Quantized(scheme, codes, torch.full((outputs, inputs // GROUP), 0.01, dtype=torch.bfloat16)))
        for layer in range(LAYERS):
            tensors |= {f"model.layers.{layer}.{name}.{suffix}": tensor.clone() for suffix, tensor in packed.items()}
    for layer in range(LAYERS):
        tensors |= {f"model.layers.{layer}.{norm}.weight": ones.clone() for norm in ("input_layernorm", "post_attention_layernorm")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    modules = {f"model.layers.{layer}.{name}": scheme for layer in range(LAYERS) for name, *_ in LINEARS}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": exporter.config(modules, ["lm_head"])}))


def run(given: argparse.Namespace, script: str, model: Path, python: str, *more: str) -> dict[str, Any]:
    command = [python, str(HERE / script), str(model), "--prompt", str(given.prompt), "--new", str(given.new), *more]
    found = measure(command, environment(given.threads))
    said = json.loads(found.stdout.strip().splitlines()[-1])
    return {**said["tokens_per_s"]["1"], "backend": said.get("backend", "llama.cpp"), "peak_rss_mb": round(found.peak_rss_mb)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder for the files; those that are there are used")
    parser.add_argument("--llamacpp-python", default=sys.executable, help="Python of an environment with xllamacpp and numpy")
    parser.add_argument("--layout", default="packed", help="of the folder of ours")
    for name, default in (("prompt", 64), ("new", 24), ("threads", 2), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", required=True, help="JSON file to write")
    given = parser.parse_args()
    work = Path(given.work)
    work.mkdir(parents=True, exist_ok=True)
    files = {kind: work / f"{kind}.gguf" for kind in TYPES}
    for kind, path in files.items():
        if not path.exists():
            write_gguf(path, kind)
    folder = work / given.layout
    if not (folder / "config.json").exists():
        write_folder(folder, given.layout)
    runs: dict[str, tuple[str, Path, str, tuple[str, ...]]] = {
        **{f"llama.cpp {kind}": ("llamacpp_speed.py", path, given.llamacpp_python, ()) for kind, path in files.items()},
        "ours, packed": ("angelslim_speed.py", folder, sys.executable, ("--packed",)),
        "ours, by itself": ("angelslim_speed.py", folder, sys.executable, ()),
    }
    rows: dict[str, Any] = {}
    for _ in range(given.repeats):
        for name, (script, model, python, more) in runs.items():
            try:
                found = run(given, script, model, python, *more)
            except RuntimeError as error:  # one that fails must not hide the others
                rows[name] = {"failed": reason(error)}
                continue
            size = sum(f.stat().st_size for f in model.glob("*.safetensors")) if model.is_dir() else model.stat().st_size
            row = rows.setdefault(name, {"file_mb": round(size / 1e6), "runs": []})
            row["runs"].append(found)
            print(name, found, flush=True)
    for row in rows.values():
        if "runs" in row:
            for key in ("prefill", "decode", "peak_rss_mb"):
                row[key] = float(f"{statistics.median(r[key] for r in row['runs']):.4g}")
    sample = {key: getattr(given, key) for key in ("prompt", "new", "threads", "repeats", "layout")}
    write(Path(given.out), {"weights": weights(), "sample": sample, "rows": rows})
    table(
        [[name, *(str(row.get(k, row.get("failed", ""))) for k in ("file_mb", "prefill", "decode", "peak_rss_mb"))] for name, row in rows.items()],
        ["row", "file MB", "prompt tokens/s", "tokens/s", "peak MB"],
    )


if __name__ == "__main__":
    main()
