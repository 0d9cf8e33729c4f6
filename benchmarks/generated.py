"""Checkpoints of any size for benchmarks: Llama-shaped, in shards, written tensor by tensor, the same for the same seed.

    python benchmarks/generated.py FOLDER --gb 6 [--fp8] [--twin FOLDER2] [--seed 0]

Values repeat after 4 Mi: what is measured is reading, computing and writing, and drawing each would take longer.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from angelslim_core.exporters.hf_fp8 import HFFP8, block_scheme
from angelslim_core.io.checkpoint import TensorSpec
from angelslim_core.io.writer import ShardWriter, shard_name, spec_bytes, write_index
from angelslim_core.source import open_source
from angelslim_quant.numerics.fp8 import quantize

SCHEME = block_scheme((128, 128))
DRAWN = 1 << 22  # values
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Shape:
    """Widths of a Llama."""

    hidden: int = 2048
    intermediate: int = 8192
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 32000

    def layer(self, index: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one decoder layer."""
        prefix = f"model.layers.{index}."
        return {
            prefix + "self_attn.q_proj.weight": (self.heads * self.head_dim, self.hidden),
            prefix + "self_attn.k_proj.weight": (self.kv_heads * self.head_dim, self.hidden),
            prefix + "self_attn.v_proj.weight": (self.kv_heads * self.head_dim, self.hidden),
            prefix + "self_attn.o_proj.weight": (self.hidden, self.heads * self.head_dim),
            prefix + "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            prefix + "mlp.up_proj.weight": (self.intermediate, self.hidden),
            prefix + "mlp.down_proj.weight": (self.hidden, self.intermediate),
            prefix + "input_layernorm.weight": (self.hidden,),
            prefix + "post_attention_layernorm.weight": (self.hidden,),
        }

    def config(self, layers: int) -> dict[str, object]:
        """config.json without quantization."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "num_hidden_layers": layers, "vocab_size": self.vocabulary, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
            "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


def generate(folder: Path, total: int, *, layers_per_shard: int = 10, fp8: bool = False, seed: int = 0, shape: Shape | None = None) -> int:
    """Write a checkpoint of about `total` bytes; memory is a few times its largest tensor.

    Args:
        fp8: store the linears in FP8 blocks of 128 x 128, every third scale in another shard than its weight.

    Returns:
        bytes of its tensors.
    """
    shape = shape or Shape()
    layer = sum(spec_bytes(spec) for name, s in shape.layer(0).items() for spec in _specs(name, s, fp8).values())
    layers = max(1, round((total - 2 * spec_bytes(TensorSpec("BF16", (shape.vocabulary, shape.hidden)))) / layer))
    shards: list[dict[str, tuple[int, ...]]] = [{EMBEDDING: (shape.vocabulary, shape.hidden)}]
    for first in range(0, layers, layers_per_shard):
        shards.append({n: s for i in range(first, min(first + layers_per_shard, layers)) for n, s in shape.layer(i).items()})
    shards.append({NORM: (shape.hidden,), HEAD: (shape.vocabulary, shape.hidden)})
    return _write(folder, shape.config(layers), shards, fp8, lambda name, shape: _drawn(name, shape, seed, 0.02))


def twin(base: Path, folder: Path, *, delta: float = 2e-4, fp8: bool = False, seed: int = 1) -> int:
    """Write what training would make of a checkpoint: each linear weight plus normal noise of standard deviation `delta`.

    Args:
        base: of `generate`, BF16 or FP8.
        fp8: as for `generate`.

    Returns:
        bytes of its tensors.
    """
    source = open_source(base)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in source.dtypes:
        shards.setdefault(source.checkpoint.tensors[name].file.name, {})[name] = source.shapes[name]

    def trained(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        weight = source.read(name)
        return weight if "_proj" not in name else weight + _drawn(name, shape, seed, delta)

    return _write(folder, config, list(shards.values()), fp8, trained)


def _drawn(name: str, shape: tuple[int, ...], seed: int, spread: float) -> torch.Tensor:
    """BF16 [shape]: 1 for norms, else normal."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    size = shape[0] * shape[1]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # torch takes 32 bits of a seed
    drawn = (torch.randn(min(DRAWN, size), generator=generator) * spread).bfloat16()
    return drawn.repeat(-(-size // DRAWN))[:size].view(shape)


def _specs(name: str, shape: tuple[int, ...], fp8: bool) -> dict[str, TensorSpec]:
    """What stores a weight."""
    if not fp8 or "_proj" not in name:
        return {name: TensorSpec("BF16", shape)}
    module = name.removesuffix("weight")
    return {module + suffix: spec for suffix, spec in HFFP8().layout((shape[0], shape[1]), SCHEME).items()}


def _write(folder: Path, config: Mapping[str, object], shards: list[dict[str, tuple[int, ...]]], fp8: bool, made) -> int:  # type: ignore[no-untyped-def]
    """Write the shards; `made(name, shape)` is asked once for each tensor, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    if fp8:
        config = {**config, "quantization_config": HFFP8().config({"": SCHEME}, ["lm_head"])}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    contents: list[dict[str, TensorSpec]] = [{} for _ in shards]
    for number, (index, (name, shape)) in enumerate(_all(shards)):
        for stored, spec in _specs(name, shape, fp8).items():
            away = stored.endswith("scale_inv") and number % 3 == 0  # the next shard; there is one, that of the head
            contents[index + away][stored] = spec
    writers = [ShardWriter(folder / shard_name(i, len(shards)), specs) for i, specs in enumerate(contents)]
    place = {name: writer for writer, specs in zip(writers, contents, strict=True) for name in specs}
    for _, (name, shape) in _all(shards):
        tensors = {name: made(name, shape)}
        if len(_specs(name, shape, fp8)) > 1:
            tensors = dict(zip((name, f"{name}_scale_inv"), quantize(tensors[name], SCHEME.weights), strict=True))
        for stored, tensor in tensors.items():
            place[stored].write(stored, tensor)
    for writer in writers:
        writer.finish()
    write_index(folder, contents)
    return sum(spec_bytes(spec) for specs in contents for spec in specs.values())


def _all(shards: list[dict[str, tuple[int, ...]]]) -> Iterator[tuple[int, tuple[str, tuple[int, ...]]]]:
    return ((index, item) for index, shapes in enumerate(shards) for item in shapes.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=6.0, help="size of the checkpoint, GB of 10**9 bytes")
    parser.add_argument("--layers-per-shard", type=int, default=10)
    parser.add_argument("--fp8", action="store_true", help="linears in FP8 blocks")
    parser.add_argument("--twin", type=Path, help="also write a checkpoint trained from it")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(generate(given.folder, int(given.gb * 1e9), layers_per_shard=given.layers_per_shard, fp8=given.fp8, seed=given.seed))
    if given.twin:
        print(twin(given.folder, given.twin, fp8=given.fp8, seed=given.seed + 1))


if __name__ == "__main__":
    main()
