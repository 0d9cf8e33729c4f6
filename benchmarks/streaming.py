"""A checkpoint four times larger than the address space goes through a tensor pass.

    python benchmarks/streaming.py --checkpoint-gb 6 --work FOLDER --out benchmarks/results/streaming.json

Writes a Llama-shaped checkpoint of random bf16 weights in shards, then runs `angelslim run --use quant.int8_dynamic`
under RLIMIT_AS of a quarter of it, everything included: interpreter, libraries and threads. What `import torch`
alone takes is measured and reported too. Checks free disk first and deletes all it made.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import angelslim, environment, folder_mb, measure, table, versions, write

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2048, 8192, 16, 4, 128, 32000
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}  # each malloc arena reserves 64 MB of address space


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one decoder layer."""
    prefix = f"model.layers.{layer}."
    return {
        prefix + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        prefix + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        prefix + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        prefix + "input_layernorm.weight": (HIDDEN,),
        prefix + "post_attention_layernorm.weight": (HIDDEN,),
    }


def random_bf16(values: int, seed: int) -> bytes:
    """Bytes of `values` finite bf16 numbers of magnitude .002 to .03, of either sign."""
    draw = random.Random(seed)
    pattern = bytearray()
    for _ in range(1 << 16):
        pattern += struct.pack("<H", draw.getrandbits(1) << 15 | draw.randrange(0x3B00, 0x3D00))
    repeats = -(-2 * values // len(pattern))
    return bytes((pattern * repeats)[: 2 * values])


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], blobs: dict[int, bytes]) -> int:
    """Write one safetensors file, one tensor at a time; a blob is reused for all tensors of its size.

    Returns:
        Bytes of its tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = _bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            size = _bytes(shape)
            if size not in blobs:
                blobs[size] = random_bf16(size // 2, size)
            stream.write(blobs[size])
    return end


def _bytes(shape: tuple[int, ...]) -> int:
    size = 2
    for n in shape:
        size *= n
    return size


def generate(folder: Path, total: int, layers_per_shard: int) -> int:
    """Write config, shards and index of a checkpoint of at least `total` bytes.

    Returns:
        Bytes of its tensors.
    """
    layer_bytes = sum(map(_bytes, layer_shapes(0).values()))
    layers = -(-(total - 2 * _bytes((VOCABULARY, HIDDEN))) // layer_bytes)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    first_shard: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    last_shard: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    ranges = [range(first, min(first + layers_per_shard, layers)) for first in range(0, layers, layers_per_shard)]
    groups: list[dict[str, tuple[int, ...]]] = [
        first_shard,
        *({n: s for layer in chosen for n, s in layer_shapes(layer).items()} for chosen in ranges),
        last_shard,
    ]
    weight_map: dict[str, str] = {}
    blobs: dict[int, bytes] = {}
    written = 0
    for i, shapes in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        written += write_shard(folder / file, shapes, blobs)
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": written}, "weight_map": weight_map}))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-gb", type=float, default=6.0, help="size of the checkpoint, GB of 10**9 bytes; the limit is a quarter")
    parser.add_argument("--layers-per-shard", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", help="folder on a disk with room for the checkpoint and its output; default: the system's temporary folder")
    parser.add_argument("--out", required=True, help="JSON file to write")
    given = parser.parse_args()
    total = int(given.checkpoint_gb * 1e9)
    env = environment(given.threads, ONE_ARENA)
    with tempfile.TemporaryDirectory(prefix="streaming-", dir=given.work) as work:
        free = shutil.disk_usage(work).free
        if free < 1.8 * total:
            raise SystemExit(f"needs {1.8 * total / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free: give another --work or a smaller --checkpoint-gb")
        bare = measure([sys.executable, "-c", "import torch, time; time.sleep(0.2)"], env, watch_address_space=True)
        model, out = Path(work) / "model", Path(work) / "out"
        model.mkdir()
        size = generate(model, total, given.layers_per_shard)
        limit = size // 4
        command = angelslim("run", "--model", str(model), "--out", str(out), "--plugins", "quant", "--use", "quant.int8_dynamic", "--json")
        run = measure(command, env, preexec=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)), watch_address_space=True)
        report = json.loads(run.stdout)
        result = {
            "checkpoint_bytes": size,
            "shards": len(list(model.glob("*.safetensors"))),
            "largest_tensor_bytes": max(_bytes(shape) for shape in [*layer_shapes(0).values(), (VOCABULARY, HIDDEN)]),
            "limit_bytes": limit,
            "checkpoint_over_limit": round(size / limit, 3),
            "peak_address_mb": round(run.peak_address_mb or 0, 1),
            "peak_rss_mb": round(run.peak_rss_mb, 1),
            "import_torch_address_mb": round(bare.peak_address_mb or 0, 1),
            "import_torch_rss_mb": round(bare.peak_rss_mb, 1),
            "wall_s": round(run.wall_s, 2),
            "cpu_s": round(run.cpu_s, 2),
            "gb_per_s": round(size / 1e9 / run.wall_s, 3),
            "output_mb": round(folder_mb(out), 1),
            "reported_peak_ram_bytes": report["peak_ram_bytes"],
        }
    packages = ["torch", "safetensors", "angelslim-core", "angelslim-quant"]
    write(Path(given.out), {"sample": {"runs": 1, "threads": given.threads}, "versions": versions(sys.executable, packages), "result": result})
    table([[key, str(value)] for key, value in result.items()], ["what", "measured"])


if __name__ == "__main__":
    main()
