"""Tiny randomly initialised checkpoints of every known architecture, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_BASE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 256, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
_DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
# architecture -> what its config needs beyond the base
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "tie_word_embeddings": True},
    "qwen3_moe": {**_MOE, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_next": {**_MOE, **_LINEAR},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": {**_MOE, **_LINEAR},
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "use_qk_norm": True, "attention_bias": True,
    },
    "seed_oss": {"attention_bias": True, "attention_out_bias": False},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 32, "num_shared_expert": 1, "use_mixed_mlp_moe": True},
}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 14}
_QWEN_VISION = {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_CLIP_VISION = {**_VISION, "num_attention_heads": 2, "image_size": 28}
_WINDOWED_VISION = {**_VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 56}
_AUDIO = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 16, "max_source_positions": 20}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_QWEN_TOKENS = {"image_token_id": 255, "video_token_id": 254, "vision_start_token_id": 253, "vision_end_token_id": 252}
# multimodal architecture -> (its language model in `TINY`, what stands in its config beside it, and more of the language model's)
NESTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"vision_config": {**_CLIP_VISION, "num_hidden_layers": 1}, "mm_tokens_per_image": 4}),
    "llava": ("llama", {"vision_config": {**_CLIP_VISION, "num_hidden_layers": 2}, "image_token_index": 255, "text_config": {"model_type": "llama"}}),
    "qwen2_5_vl": ("qwen2", {"vision_config": _WINDOWED_VISION, **_QWEN_TOKENS, "text_config": _MROPE}),
    "qwen2_audio": ("qwen2", {"audio_config": _AUDIO, "audio_token_index": 255, "text_config": {"model_type": "qwen2"}}),
    "qwen3_vl": ("qwen3", {"vision_config": _QWEN_VISION, **_QWEN_TOKENS}),
    "qwen3_5": ("qwen3_5_text", {"vision_config": _QWEN_VISION}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"vision_config": _QWEN_VISION}),
}
_KNOWN_AS = {"kimi_k2": "deepseek_v3"}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def tiny_checkpoint(architecture: str, folder: Path | str, *, seed: int = 0, dtype: str = "bfloat16", tokenizer: bool = True, **overrides: Any) -> Path:
    """Make a model folder.

    Args:
        architecture: key of `TINY` or `NESTED`.
        dtype: "bfloat16", "float16" or "float32".
        overrides: config values of the language model, for instance `tie_word_embeddings=True`.
    """
    import torch
    from transformers import CONFIG_MAPPING

    from ..model import auto_class

    folder = Path(folder)
    language, beside = NESTED.get(architecture, (architecture, {}))
    values = {**_BASE, **TINY[language], **overrides}
    if beside:
        values = {"tie_word_embeddings": values["tie_word_embeddings"], **beside, "text_config": {**values, **beside.get("text_config", {})}}
    config = CONFIG_MAPPING[_KNOWN_AS.get(architecture, architecture)](**values)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=getattr(torch, dtype))
        with torch.no_grad():  # norms and biases start at one and zero, which would hide mistakes
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    if architecture in _KNOWN_AS:
        _edit(folder / "config.json", model_type=architecture)
    if tokenizer:
        tiny_tokenizer(folder)
    return folder


def tiny_tokenizer(folder: Path) -> None:
    """Add a byte-level tokenizer of 256 tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: 256 - len(specials)]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*specials, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)


def stack_experts(folder: Path) -> None:
    """Rewrite per-expert tensors as 3-D `experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I]."""
    import re

    import torch

    tensors = _load(folder)
    experts: dict[str, dict[tuple[int, str], Any]] = {}
    for name in list(tensors):
        match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensors.pop(name)
    for prefix, parts in experts.items():
        count = 1 + max(index for index, _ in parts)
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([parts[e, "gate"], parts[e, "up"]]) for e in range(count)])
        tensors[f"{prefix}.down_proj"] = torch.stack([parts[e, "down"] for e in range(count)])
    _save(folder, tensors)


def add_mtp(folder: Path) -> None:
    """Add a multi-token-prediction layer after the last decoder layer, a copy of it with the usual extra tensors."""
    import torch

    tensors = _load(folder)
    last = _read(folder / "config.json")["num_hidden_layers"]
    source = f"model.layers.{last - 1}."
    tensors.update({n.replace(source, f"model.layers.{last}."): t.clone() for n, t in tensors.items() if n.startswith(source)})
    tensors[f"model.layers.{last}.eh_proj.weight"] = torch.randn(64, 128).to(torch.bfloat16)
    _save(folder, tensors)


def split_shards(folder: Path, count: int) -> None:
    """Spread model.safetensors over `count` files with an index."""
    from safetensors.torch import save_file

    tensors = _load(folder)
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = names[i::count]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def store_as_fp8(folder: Path, *, block: tuple[int, int] = (128, 128), scale: str = "F32", scattered: bool = False) -> Path:
    """Store the linears but the head and the routers as block FP8, in the form DeepSeek publishes; returns where the plain values are.

    Args:
        scale: dtype of the scales, "F32", "BF16" or "F8_E8M0" (powers of two), or "ue8m0" for powers of two in fp32.
        scattered: over three files, scales in another one than their weights.
    """
    import math
    import shutil

    import torch
    from safetensors.torch import save_file

    tensors = _load(folder)
    plain = Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-plain")))
    tall, wide = block
    kept = []
    for name in [n for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2]:
        if "_proj" not in name or "eh_proj" in name:
            kept.append(name.removesuffix(".weight"))
            continue
        weight = tensors[name].float()
        rows, columns = weight.shape
        amax = torch.zeros(math.ceil(rows / tall), math.ceil(columns / wide))
        for i in range(amax.shape[0]):
            for j in range(amax.shape[1]):
                amax[i, j] = weight[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide].abs().max()
        stored = (amax / 448).clamp(min=1e-12)
        if scale in ("F8_E8M0", "ue8m0"):
            stored = torch.exp2(stored.log2().ceil())
        stored = stored.to({"BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu}.get(scale, torch.float32))
        spread = stored.float().repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        kind = tensors[name].dtype
        tensors |= {name: codes, f"{name}_scale_inv": stored}
        save_file(_load(plain) | {name: (codes.float() * spread).to(kind)}, plain / "model.safetensors", metadata={"format": "pt"})
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block), "modules_to_not_convert": kept}
    _edit(folder / "config.json", quantization_config=config | ({"scale_fmt": "ue8m0"} if scale in ("F8_E8M0", "ue8m0") else {}))
    _save(folder, tensors)
    if scattered:
        split_shards(folder, 3)
    return plain


def _load(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _save(folder: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**_read(path), **changes}))
