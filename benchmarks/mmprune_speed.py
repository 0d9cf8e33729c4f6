"""Time to the first token and memory at 4096 image tokens, of a LLaVA of 8 billion weights by lot, with all tokens and with a share of them.

    python benchmarks/mmprune_speed.py --out benchmarks/results/mmprune_speed.json

The vision tower has CLIP-L's shape at 896 px (64 x 64 patches), the language model Llama-3-8B's; batch 1, BF16, a prompt of 32 words more.
What is timed is `generate` of one token: encoder, selection and all. `encoder_ms` is the tower and the projector alone, which no pruning behind
them can save.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from mmprune_evaluation import BASE, available, cells_of, evaluate
from torch import Tensor

IMAGE, TEXT = 3, 32
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "8b": {
        "text": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 896, "patch_size": 14},
    },
    "tiny": {
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 28, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256},
        "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12, "num_attention_heads": 2, "image_size": 112, "patch_size": 14},
    },
}  # fmt: skip
STRATEGIES: dict[str, dict[str, Any]] = {
    "idpruner": {}, "vision_selector": {}, "random": {}, "divprune": {}, "visionzip": {}, "vispruner": {}, "hiprune": {}, "fastv": {}, "dart": {},
    "pyramiddrop": {}, "scope": {}, "prunesid": {}, "id_selection": {},
}  # fmt: skip
SCORED = ("idpruner", "vision_selector")


def random_scorer(folder: Path, width: int) -> None:
    """A scorer by lot, as published ones are stored."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    hidden = width // 2
    torch.manual_seed(1)
    weights = {f"{name}.weight": torch.randn(hidden, width) * width**-0.5 for name in ("q_proj", "k_proj")}
    save_file(weights | {f"{name}.bias": torch.zeros(hidden) for name in ("q_proj", "k_proj")}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"in_features": width, "hidden_dim": hidden, "init_scale": 1e-4, "architecture": "ImportanceScorer"}))


def build(shape: str, device: str) -> Any:
    """The model, made on its device."""
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(**SHAPES[shape]["text"], rope_theta=500000.0, max_position_embeddings=8192, eos_token_id=2, bos_token_id=1, pad_token_id=2)
    vision = CLIPVisionConfig(**SHAPES[shape]["vision"])
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=(vision.image_size // vision.patch_size) ** 2)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    return model.eval().requires_grad_(False)


def encoder_ms(model: Any, pixels: Tensor) -> float:
    """Median of seven."""
    times = []
    for _ in range(9):
        start = time.perf_counter()
        with torch.inference_mode():
            model.model.multi_modal_projector(model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
        if pixels.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mmprune_speed.json"))
    parser.add_argument("--work", type=Path, default=Path("work"), help="for a scorer by lot")
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.1])
    parser.add_argument("--seconds", type=float, default=300.0, help="after which no cell is begun")
    given = parser.parse_args()
    start = time.perf_counter()
    model = build(given.shape, given.device)
    side, patch = (SHAPES[given.shape]["vision"][key] for key in ("image_size", "patch_size"))
    tokens = (side // patch) ** 2
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, SHAPES[given.shape]["text"]["vocab_size"], (1, TEXT), generator=generator)
    ids = torch.cat([torch.full((1, tokens), IMAGE), words], 1).to(model.device)
    pixels = torch.randn(1, 3, side, side, generator=generator).to(model.device, model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
    random_scorer(given.work / "random_scorer", SHAPES[given.shape]["text"]["hidden_size"])
    scorer = {"scorer": str(given.work / "random_scorer")}
    options = {label: scorer if label in SCORED else of for label, of in STRATEGIES.items()}
    cells = cells_of(options, given.strategies or available(STRATEGIES, "vision"), given.ratios)
    head = {"score": "ttft_ms", "image_tokens": tokens, "text_tokens": TEXT, "shape": SHAPES[given.shape], "encoder_ms": encoder_ms(model, pixels)}
    evaluate(model, cells, dict, lambda: inputs, given.out, seconds=given.seconds, head=head)
    rows = [row for row in json.loads(given.out.read_text())["rows"] if "error" not in row]
    base = next(row["ttft_ms"] for row in rows if row["label"] == BASE)
    for row in rows:
        print(f"{row['label']} at {row['keep_ratio']:g}: {row['ttft_ms']:.1f} ms, {base / row['ttft_ms']:.2f} x", flush=True)


if __name__ == "__main__":
    main()
