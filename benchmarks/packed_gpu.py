"""Packed linears on a GPU, alone and in a model shaped as Llama-3.1-8B, beside BF16.

    python benchmarks/packed_gpu.py --out benchmarks/results/packed_gpu.json
    python benchmarks/packed_gpu.py --parts tune --tune few   # prints the best tiles and warps, for kernels/triton, and the ways beside them

Weights are random. Every linear is compared with its reference before it is timed. Linears are timed in a CUDA graph
over copies that together exceed the L2 cache; a prefill is one forward of transformers' model, a decoding step one
token after a context, all layers in one CUDA graph (`step`, the same code for BF16 and packed; norms and rotations are fused).
Packed models are put together by the function that `load` uses: in their prefill norms are fused with what reads them, BF16's are not.
Times are medians.
"""
# ruff: noqa: B023  (closures are called before their variables change)

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import table, write
from torch import Tensor, nn
from torch.nn import functional

from angelslim_core.adapters import llama
from angelslim_core.adapters.base import describe
from angelslim_core.emulation import round_input
from angelslim_core.packed import PackedLinear
from angelslim_core.packed_model import Linears, fill
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_quant.kernels import int4_matmul, scaled_matmul
from angelslim_quant.kernels.available import block_scaled_mm
from angelslim_quant.kernels.triton import int4_matmul as triton4
from angelslim_quant.kernels.triton import scaled_matmul as triton8
from angelslim_quant.kernels.triton.scaled_matmul import Tile
from angelslim_quant.numerics import fp8, integer
from angelslim_quant.packed import FP8Linear, INT4Linear, INT8Linear

SHAPES = [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)]
TOKEN_FP8, TOKEN_INT8 = Grid(8, "float", "token", dynamic=True), Grid(8, "int", "token", dynamic=True)
SCHEMES: dict[str, tuple[type[PackedLinear], Scheme]] = {
    "fp8 rows": (FP8Linear, Scheme("", Grid(8, "float", "channel"), TOKEN_FP8)),
    "fp8 tensors": (FP8Linear, Scheme("", Grid(8, "float", "tensor"), Grid(8, "float", "tensor"))),
    "fp8 blocks": (FP8Linear, Scheme("", Grid(8, "float", "block", block_structure=(128, 128)), Grid(8, "float", "group", 128, dynamic=True))),
    "int8": (INT8Linear, Scheme("", Grid(8, "int", "channel"), TOKEN_INT8)),
    "w4a16 g128": (INT4Linear, Scheme("", Grid(4, "int", "group", 128, scale_dtype="BF16"))),
    "w4a16 g128 asym": (INT4Linear, Scheme("", Grid(4, "int", "group", 128, symmetric=False, scale_dtype="BF16"))),
    "w4a8 g128": (INT4Linear, Scheme("", Grid(4, "int", "group", 128, scale_dtype="BF16"), TOKEN_FP8)),
}
CONFIG = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MANY_TILES = [
    Tile(128, 256, 128, 8, 3), Tile(128, 256, 64, 8, 4), Tile(128, 128, 128, 8, 3), Tile(128, 128, 128, 4, 3), Tile(256, 128, 128, 8, 3), Tile(64, 256, 128, 4, 3),
]  # fmt: skip
# up to 16 rows, and up to 64
FEW_TILES = [
    Tile(16, 16, 512, 4, 4), Tile(16, 32, 256, 4, 4), Tile(16, 64, 256, 4, 4), Tile(16, 64, 128, 4, 5), Tile(16, 32, 512, 4, 3), Tile(16, 64, 128, 4, 6, True),
    Tile(16, 64, 256, 4, 4, True), Tile(16, 64, 512, 4, 3, True), Tile(16, 128, 128, 4, 6, True), Tile(16, 128, 256, 8, 4, True),
]  # fmt: skip
MORE_TILES = [
    Tile(64, 64, 128, 4, 4), Tile(64, 128, 128, 4, 4), Tile(32, 64, 256, 4, 3, True), Tile(64, 64, 256, 4, 3, True), Tile(64, 64, 128, 4, 5, True),
    Tile(64, 128, 128, 4, 4, True),
]  # fmt: skip


def quantized(weight_OI: Tensor, scheme: Scheme) -> Quantized:
    grid = scheme.weights
    if grid.type == "float":
        codes, scale = fp8.quantize(weight_OI, grid)
        static = (scheme.input_activations or grid).strategy == "tensor"
        return Quantized(scheme, codes, scale, input_scale=torch.full((1,), 0.012, device=weight_OI.device) if static else None)
    codes, scale, zero = integer.quantize(weight_OI, grid)
    return Quantized(scheme, codes, scale, zero)


def made(name: str, weight_OI: Tensor) -> PackedLinear:
    linear_class, scheme = SCHEMES[name]
    return linear_class(quantized(weight_OI, scheme), None, torch.bfloat16)


def in_graph(calls: Sequence[Callable[[], Any]], repeats: int = 7) -> float:
    """Microseconds a call, all calls one after another in one graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return events(graph.replay, repeats) * 1e3 / len(calls)


def events(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of a call."""
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def copies(shape: tuple[int, int], bits: float) -> int:
    """How many weights exceed the L2 cache three times."""
    return max(2, int(150e6 / (shape[0] * shape[1] * bits / 8)))


def check(linear: PackedLinear, weight: Tensor, name: str, rows: int) -> float:
    """Largest error against inputs and weights rounded and multiplied in fp32, in parts of the largest output."""
    scheme = SCHEMES[name][1]
    x = torch.randn(rows, weight.shape[1], device="cuda").bfloat16()
    given = quantized(weight, scheme)
    rounded = x.float() if scheme.input_activations is None else round_input(x.float(), scheme.input_activations, given.input_scale)
    wanted = rounded @ given.dequantize().T
    error = float((linear(x).float() - wanted).abs().max() / wanted.abs().max())
    assert error < 0.02, (name, tuple(weight.shape), rows, error)
    return error


def linears(given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for shape, name in itertools.product(SHAPES, ["bf16", *SCHEMES]):
        number = copies(shape, 16 if name == "bf16" else 4 if "w4" in name else 8)
        weights = [torch.randn(shape, device="cuda").bfloat16() * 0.02 for _ in range(min(number, 3))]
        modules: list[Any] = []
        try:
            for index in range(number):
                weight = weights[index % len(weights)]
                if name == "bf16":
                    copy = weight.clone()
                    modules.append(lambda x, w=copy: functional.linear(x, w))
                else:
                    modules.append(made(name, weight))
            error = {} if name == "bf16" else {n: round(check(modules[0], weights[0], name, n), 5) for n in (1, 3, 16, 64, 129, 4096)}
            row: dict[str, Any] = {"shape": shape, "scheme": name, "runs": getattr(modules[0], "name", "cuBLAS"), "error": error}
            for count in (1, 8, 16, 64, 4096):
                x = torch.randn(count, shape[1], device="cuda").bfloat16()
                few = modules[:2] if count > 64 else modules
                row[f"us_{count}"] = round(in_graph([lambda m=m, x=x: m(x) for m in few]), 2)
        except Exception as error:  # one that fails must not hide the others
            row = {"shape": shape, "scheme": name, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
        rows.append(row)
        print(row, flush=True)
        del modules
    return rows


def tune(given: argparse.Namespace) -> dict[str, Any]:
    best: dict[str, Any] = {}

    def search(label: str, tiles: Iterable[Any], run: Callable[[Any], float]) -> None:
        found = []
        for tile in tiles:
            try:
                found.append((round(run(tile), 2), tuple(tile) if isinstance(tile, Tile) else tile))
            except Exception as error:  # too much shared memory, for instance
                print(label, tile, f"{type(error).__name__}: {str(error)[:80]}")
        best[label] = sorted(found)[:4]
        print(label, best[label], flush=True)

    for part in given.tune.split(","):
        {"int4": tune_int4, "few": tune_few, "many": tune_many}[part](search)
    return best


def tune_int4(search: Callable[..., None]) -> None:
    """INT4 on tensor cores by warps, beside a weight that is widened for cuBLAS: which rows `WIDE_ROWS` should give to which."""
    half = torch.bfloat16
    for shape in SHAPES:
        base = int4_matmul.pack4(quantized(torch.randn(shape, device="cuda").bfloat16(), SCHEMES["w4a16 g128"][1]))
        weights = [int4_matmul.Packed4(base.words.clone(), base.scale.clone(), None) for _ in range(copies(shape, 4))]
        for rows in (1, 4, 8, 16, 32, 40, 48, 56, 64):
            x = torch.randn(rows, shape[1], device="cuda").bfloat16()
            search(
                f"int4 {shape} rows {rows}, warps and registers",
                [(n, r) for n in triton4.WARPS for r in (48, 64, 96, 128) if n * r <= 2048],
                lambda tile: in_graph([lambda w=w: triton4.matmul(x, w, None, None, half, tile[0], registers=tile[1]) for w in weights], 3),
            )
            if rows >= 16:
                wide = [lambda w=w: functional.linear(x, triton4.widen(w, half)) for w in weights]
                search(f"int4 {shape} rows {rows}, widened", ["cuBLAS"], lambda _: in_graph(wide, 3))


def tune_few(search: Callable[..., None]) -> None:
    """Row-wise FP8 and INT8 by tiles, beside torch's product: which rows `ROW_WISE_FROM` should give to which."""
    one = torch.ones(1, device="cuda")
    for shape, name in itertools.product(SHAPES, ("fp8 rows", "int8")):
        base = made(name, torch.randn(shape, device="cuda").bfloat16())
        weights = [(base.codes.clone(), base.weight_scale) for _ in range(copies(shape, 8))]
        for rows in (1, 16, 32, 64):
            codes, scale = base.prepare(torch.randn(rows, shape[1], device="cuda").bfloat16())
            label, half = f"{name} {shape} rows {rows}", torch.bfloat16
            tiles = FEW_TILES if rows <= 16 else MORE_TILES
            wanted = scaled_matmul.pieces(codes, scale, base.codes, base.weight_scale).float()

            def run(tile: Tile) -> float:
                calls = [lambda w=w, s=s: triton8.scaled_matmul(codes, scale, w, s, None, half, tile) for w, s in weights]
                error = float((calls[0]().float() - wanted).abs().max() / wanted.abs().max())
                assert error < 0.02, error
                return in_graph(calls, 3)

            search(f"{label} triton", tiles, run)
            if name == "fp8 rows":
                torchs = {
                    "scaled_mm": [lambda w=w, s=s: scaled_matmul.whole_mm(codes, scale, w, s, None, half) for w, s in weights],
                    "scaled_mm of one scale, to fp32, yet to be scaled": [lambda w=w: scaled_matmul.whole_mm(codes, one, w, one, None, torch.float32) for w, _ in weights],
                }  # fmt: skip
                for other, calls in torchs.items():
                    search(f"{label} {other}", ["torch"], lambda _: in_graph(calls, 3))


def tune_many(search: Callable[..., None]) -> None:
    """4096 rows by tiles, beside every other implementation."""
    for name in ("int8", "fp8 rows", "fp8 blocks"):
        linear = made(name, torch.randn(14336, 4096, device="cuda").bfloat16())
        codes, scale = linear.prepare(torch.randn(4096, 4096, device="cuda").bfloat16())
        arguments = (codes, scale, linear.codes, linear.weight_scale)
        tiles = [t for t in MANY_TILES if t.inputs <= 128] if name == "fp8 blocks" else MANY_TILES
        search(f"{name} triton", tiles, lambda tile: in_graph([lambda: triton8.scaled_matmul(*arguments, None, torch.bfloat16, tile)] * 4, 3))
        kernel = scaled_matmul.INT8_MATMUL if name == "int8" else scaled_matmul.FP8_MATMUL
        for other in ("scaled_mm", "scaled_mm blocks", "int_mm"):
            chosen = next((i for i in kernel.implementations if i.name == other), None)
            if chosen and chosen.available()[0] and chosen.supports(*arguments, dtype=torch.bfloat16)[0]:
                search(f"{name} {other}", ["torch"], lambda _: in_graph([lambda: chosen.function(*arguments)] * 4, 3))
        if name == "fp8 rows":
            for fast in (True, False):
                scaled_matmul.FAST_ACCUM = fast
                search(f"fp8 rows scaled_mm fast_accum={fast}", ["torch"], lambda _: in_graph([lambda: linear.multiply((codes, scale))] * 4, 3))
            scaled_matmul.FAST_ACCUM = True


def decoded(layer: Any, hidden: Tensor, more: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """A layer's forward for one token after `place` others, whose keys and values are in the caches [1, H, T, D]; sums are yet to be added."""
    attention, before, after = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
    hidden, x = added(hidden, more, before.weight, before.variance_epsilon)
    q, k, v = (p(x).view(1, 1, -1, attention.head_dim).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    q = rotated(q, k, v, cos, sin, keys, values, place)
    seen = functional.scaled_dot_product_attention(q, keys[:, :, : place + 1], values[:, :, : place + 1], enable_gqa=True)
    hidden, x = added(hidden, attention.o_proj(seen.transpose(1, 2).reshape(1, 1, -1)), after.weight, after.variance_epsilon)
    return hidden, layer.mlp(x)


# what is between the linears of a decoding step is a kernel each, as in engines: of BF16 as of packed models


@torch.compile(dynamic=False)
def rotated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
    """Queries and keys rotated, keys and values put into the caches."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    turned, k = apply_rotary_pos_emb(q, k, cos, sin)
    keys[:, :, place : place + 1] = k
    values[:, :, place : place + 1] = v
    return turned


@torch.compile(dynamic=False)
def added(hidden: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Their sum, and its norm."""
    hidden = hidden + more
    return hidden, functional.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def step(model: Any, ids: Tensor, position: Tensor, place: int, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits of one token after `place` others."""
    body = model.model
    hidden = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(hidden, position)
    more = torch.zeros_like(hidden)
    for layer, (keys, values) in zip(body.layers, caches, strict=True):
        layer.forward = partial(decoded, layer)  # with the layer's hooks around it, as what q, k and v share lasts while it runs
        hidden, more = layer(hidden, more, cos, sin, keys, values, place)
        del layer.forward
    return model.lm_head(added(hidden, more, body.norm.weight, body.norm.variance_epsilon)[1])


def packed_copy(model: Any, scheme: str) -> Any:
    """A model with packed linears in its layers and everything else shared; for "bf16" all is."""
    found = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    if scheme != "bf16":
        linear_class, stored = SCHEMES[scheme]
        weights = model.state_dict()
        description = describe(llama.LAYOUTS[0], model.config.to_dict(), {n: tuple(t.shape) for n, t in weights.items()}, dict.fromkeys(weights, "BF16"))
        classes = {s.name: linear_class for s in description.sites if s.layer is not None}
        print(fill(Linears(found, description), lambda name: quantized(weights[f"{name}.weight"], stored), classes, torch.bfloat16, "cuda"), flush=True)
    return found


def whole(given: argparse.Namespace) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    layers = 4 if given.quick else given.layers
    with torch.device("cuda"), no_init_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG, num_hidden_layers=layers), dtype=torch.bfloat16).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.fill_(1) if "norm" in name else p.normal_(0, 0.02)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    cache = (1, CONFIG["num_key_value_heads"], given.context + 1, CONFIG["head_dim"])
    caches = [(torch.randn(cache, device="cuda").bfloat16(), torch.randn(cache, device="cuda").bfloat16()) for _ in range(layers)]
    ids = torch.randint(0, CONFIG["vocab_size"], (1, 16384), device="cuda")
    position = torch.full((1, 1), given.context, device="cuda")
    short = ids[:, :64]
    wanted = model(short, use_cache=False).logits.float()

    def measure(scheme: str, row: dict[str, Any]) -> None:
        start = time.perf_counter()
        packed = packed_copy(model, scheme)
        torch.cuda.synchronize()
        row["seconds_to_pack"] = round(time.perf_counter() - start, 2)
        logits = packed(short, use_cache=False).logits.float()
        row["logit_error"] = round(float((logits - wanted).norm() / wanted.norm()), 4)
        row["linears_gb"] = round(sum(packed_bytes(packed.get_submodule(n)) for n in names) / 1e9, 3)
        for tokens in (4096, 8192, 16384):
            run = lambda tokens=tokens: packed(ids[:, :tokens], use_cache=False, logits_to_keep=1)  # noqa: E731
            run()
            row[f"prefill_ms_{tokens}"] = round(events(run, 3 if given.quick else 5), 2)
        decode = lambda: step(packed, short[:, :1], position, given.context, caches)  # noqa: E731
        decode()
        row["decode_ms"] = round(in_graph([decode], 11) / 1e3, 4)

    rows: list[dict[str, Any]] = []
    for scheme in given.schemes.split(","):
        row: dict[str, Any] = {"scheme": scheme, "layers": layers}
        try:
            measure(scheme, row)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
        print(row, flush=True)
        torch.cuda.empty_cache()
    for row in rows[1:]:
        row["speedup"] = {k: round(rows[0][k] / row[k], 3) for k in row if k.startswith(("prefill_ms", "decode_ms")) and rows[0].get(k)}
    return rows


def packed_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def loading(given: argparse.Namespace) -> dict[str, Any]:
    """Tiny folders of every scheme through `load_model`, packed and dequantized: largest difference of logits in parts of the largest."""
    from angelslim_core import compress
    from angelslim_core.loading import load_model
    from angelslim_core.plugins import PluginHost
    from angelslim_core.testing.models import tiny_checkpoint
    from angelslim_quant import plugin

    found: dict[str, Any] = {}
    g32 = "steps[0].with.group_size=32"
    cases = {
        "fp8_dynamic": [], "fp8_block": [], "int8_dynamic": [], "int4_rtn": [g32], "int4_rtn asym": [g32, "steps[0].with.symmetric=false"],
        "int4_rtn gptq": [g32, "export.format=gptq"], "w4a8_fp8": [g32, "steps[0].with.method=rtn"],
    }  # fmt: skip
    ids = torch.arange(2, 34, device="cuda")[None]
    with tempfile.TemporaryDirectory() as work:
        for architecture in ("llama", "qwen3_moe"):
            model = tiny_checkpoint(architecture, Path(work) / architecture)
            for case, options in cases.items():
                label = f"{architecture} {case}"
                try:
                    host = PluginHost()
                    host.register_module("quant", plugin)
                    compress(model, [f"quant.{case.split()[0]}"], Path(work) / "out", overrides=options, plugins=["quant"], host=host, replace=True)
                    packed, own = (load_model(Path(work) / "out", "cuda", host=host, packed=p, own_reader=not p) for p in (True, False))
                    logits, wanted = packed.model(ids).logits.float(), own.model(ids).logits.float()
                    written = packed.model.generate(ids, max_new_tokens=8, do_sample=False)
                    found[label] = {"backend": packed.backend, "error": float((logits - wanted).abs().max() / wanted.abs().max()), "tokens": written.shape[1]}
                except Exception as error:
                    found[label] = f"{type(error).__name__}: {str(error)[:300]}"
                print(label, found[label], flush=True)
    return found


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {"load": loading, "linears": linears, "model": whole, "tune": tune}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="")
    parser.add_argument("--parts", default="load,linears,model", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--schemes", default="bf16,fp8 rows,fp8 blocks,int8,w4a16 g128", help="of the whole model; BF16 first")
    parser.add_argument("--tune", default="int4,few,many", help="what the part of that name tries")
    parser.add_argument("--quick", action="store_true", help="4 layers, fewer repeats")
    given = parser.parse_args()
    torch.manual_seed(0)
    document: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "block_scaled_mm": block_scaled_mm(), "quick": given.quick}
    with torch.no_grad():
        for part in given.parts.split(","):
            start = time.perf_counter()
            document[part] = PARTS[part](given)
            print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
            if given.out:
                write(Path(given.out), document)
    for row in document.get("model", []):
        print(row["scheme"], row.get("speedup", ""), row.get("failed", ""))
    if "linears" in document:
        keys = [k for k in document["linears"][0] if k.startswith("us_")]
        table(
            [[str(r["shape"]), r["scheme"], str(r.get("runs", r.get("failed")))[:40], *(str(r.get(k, "")) for k in keys)] for r in document["linears"]],
            ["shape", "scheme", "runs", *keys],
        )


if __name__ == "__main__":
    main()
