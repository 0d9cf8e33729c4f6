"""Sparse attention on a GPU beside FlexAttention and dense attention, in one process.

    python benchmarks/sparseattn.py --out benchmarks/results/sparseattn.json
    python benchmarks/sparseattn.py --parts kernel --lengths 32768 --out kernel.json

Batch 1, 32 query heads over 8 KV heads of 128, BF16, random. Three parts, each within its seconds (`SECONDS`, times `--patience`):
what would come later is recorded as left out, what fails with its error.

kernel   one index for all: random blocks of 128 x 128 a head, the first block and two local ones; effective TFLOP/s are
         2 * Hq * N^2 * D * density / time. FlexAttention is compiled for each length; its FLASH backend and our `flash` run where
         `flash_attn.cute` is. Tables are made beforehand but in "lists made", which makes ours from an index at each call. What a
         length and density has is compiled first and then timed by turns.
select   selection and attention against dense cuDNN, memory beyond the inputs and the output, and whether the host waits anywhere.
         Random input is near uniform: what XAttention keeps of it says nothing about text.
ttft     time to the first token of a model shaped as Llama-3.1-8B, random weights, dense cuDNN against policies; layers 0 and 1 stay dense.
Times are medians, of two calls the shorter.
"""
# ruff: noqa: B023  (closures are called before their variables change)

from __future__ import annotations

import argparse
import inspect
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import table, write
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from angelslim_sparseattn import BlockIndex, make_policy, select, sparse_attention
from angelslim_sparseattn.bench import machine
from angelslim_sparseattn.kernels.block_sparse import BLOCK_SPARSE
from angelslim_sparseattn.policies.base import Policy
from angelslim_sparseattn.recall import densities
from angelslim_sparseattn.timing import Spread, dense_peers, fastest_sdpa, has_fa4, timed, timed_by_turns

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 128
# keeps about a quarter of random inputs, whose mass lies everywhere
SHARE: dict[str, Any] = {"score": "mass", "tau": 0.25, "alpha": 0.95, "n_init": 128, "n_local": 256}
SECONDS = {"kernel": 75, "select": 40, "ttft": 150}
CONFIG = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
Call = Callable[[], Any]


class Part:
    """Rows of one part, each of which may fail or come too late."""

    def __init__(self, name: str, patience: float, save: Callable[[], None]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._end, self._save = time.monotonic() + SECONDS[name] * patience, save

    def row(self, measure: Callable[[], dict[str, Any]], **what: Any) -> dict[str, Any]:
        """Add what `measure` finds, or why there is nothing."""
        self._fill(what, measure)
        return self._add(what)

    def rows_by_turns(self, calls: dict[str, Call], check: Callable[[Tensor], dict[str, Any]], length: int, density: float) -> None:
        """Add a row for each kernel. All are compiled and their outputs checked first, then they are timed by turns: one timed right
        after another's seconds of compiling would meet a cooler card.
        """
        rows: dict[str, dict[str, Any]] = {name: {"length": length, "kernel": name, "density": density} for name in calls}
        checked: dict[str, dict[str, Any]] = {name: {} for name in calls}

        def warm(name: str) -> dict[str, Any]:
            with torch.no_grad():
                checked[name] = check(calls[name]())
                calls[name]()
            torch.cuda.synchronize()
            return {}

        ready = {name: call for name, call in calls.items() if self._fill(rows[name], lambda: warm(name))}
        try:
            with torch.no_grad():
                spreads = timed_by_turns(ready, repeats(length), "cuda")
        except Exception as error:  # of whichever it was: none was timed whole
            spreads = {}
            for name in ready:
                rows[name]["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        for name, row in rows.items():
            if name in spreads:
                seconds = row.pop("seconds")
                row |= {**times(spreads[name]), **tflops(length, spreads[name].median, density), **checked[name], "seconds": seconds}
            self._add(row)

    def _fill(self, what: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> bool:
        torch.cuda.empty_cache()
        start = time.monotonic()
        if start > self._end:
            what["left_out"] = "no time left"
            return False
        try:
            what |= measure()
        except Exception as error:  # whatever ends one entry, the others go on
            what["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        what["seconds"] = round(time.monotonic() - start, 1)
        return "failed" not in what

    def _add(self, what: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(what)
        print({k: v for k, v in what.items() if k != "seconds"}, flush=True)
        self._save()
        return what


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, length, DIM, device="cuda", dtype=torch.bfloat16, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def repeats(length: int) -> int:
    return 30 if length <= 32768 else 12


def times(spread: Spread) -> dict[str, float]:
    return {"ms": round(spread.median, 4), "p90_ms": round(spread.p90, 4)}


def tflops(length: int, ms: float, density: float = 1.0) -> dict[str, float]:
    return {"tflops": round(2 * HEADS * length**2 * DIM * density / ms / 1e9, 1)}


# kernel -----------------------------------------------------------------------------------------------------------------


def random_cells(length: int, share: float) -> Tensor:
    """bool [1, Hq, P, P]: the index that every kernel gets."""
    blocks = length // BLOCK
    generator = torch.Generator("cuda").manual_seed(1)
    cells = torch.rand(1, HEADS, blocks, blocks, device="cuda", generator=generator) < share
    i, j = torch.arange(blocks, device="cuda")[:, None], torch.arange(blocks, device="cuda")
    return (cells | (j == 0) | (i - j < 2)) & (j <= i)


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def block_mask(cells: Tensor) -> BlockMask:
    """The same index for FlexAttention: the diagonal masked, all else full."""
    blocks = cells.shape[-1]
    diagonal = torch.eye(blocks, dtype=torch.bool, device=cells.device)
    full = cells & ~diagonal
    order = full.int().argsort(dim=-1, descending=True, stable=True).int()
    one = torch.ones(cells.shape[:3], dtype=torch.int32, device=cells.device)
    own = torch.zeros_like(order)
    own[..., 0] = torch.arange(blocks, device=cells.device)
    options = {"compute_q_blocks": False} if "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters else {}
    length = (blocks * BLOCK,) * 2
    return BlockMask.from_kv_blocks(one, own, full.sum(-1).int(), order, BLOCK_SIZE=BLOCK, mask_mod=causal, seq_lengths=length, **options)


def flex(backend: str) -> Callable[..., Tensor]:
    options = {"kernel_options": {"BACKEND": "FLASH"}} if backend == "FLASH" else {}
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)  # uncompiled it ignores the lists
    return lambda q, k, v, mask: compiled(q, k, v, block_mask=mask, enable_gqa=True, **options)


def kernel(given: argparse.Namespace, part: Part) -> None:
    backends = {"flex triton": flex("TRITON"), **({"flex flash": flex("FLASH")} if has_fa4() else {})}
    for length in given.lengths or (32768, 131072, 8192):
        q, k, v = inputs(length)
        dense: dict[str, Call] = {}
        for name, call in dense_peers("cuda").items():
            if call is None:
                part.rows.append({"length": length, "kernel": name, "left_out": "not installed"})
            else:
                dense[name] = lambda call=call: call(q, k, v, DIM**-0.5)
        part.rows_by_turns(dense, lambda out: {}, length, 1.0)
        for share in (0.1, 0.25):
            cells = random_cells(length, share)
            index = BlockIndex.from_bool(cells, (length,), (length,))
            ours = sparse_attention(q, k, v, index, "auto", check=False).float()
            name = BLOCK_SPARSE.choose(q, k, v, index, DIM**-0.5).name
            mask = block_mask(cells)
            runs: dict[str, Call] = {f"ours: {name}": lambda: sparse_attention(q, k, v, index, "auto", check=False)}
            for other in BLOCK_SPARSE.implementations:
                if other.name not in (name, "torch", "flex", "sdpa") and other.available()[0] and other.supports(q, k, v, index, DIM**-0.5)[0]:
                    runs[f"ours: {other.name}"] = lambda other=other: sparse_attention(q, k, v, index, other.name, check=False)
            if "ours: flash" in runs:  # an index that was not seen before, over the same lists
                runs["ours: flash, lists made"] = lambda: sparse_attention(q, k, v, replace(index), "flash", check=False)
            runs |= {label: lambda run=run: run(q, k, v, mask) for label, run in backends.items()}
            part.rows_by_turns(runs, lambda out: {"apart": round(float((out.float() - ours).norm() / ours.norm()), 5)}, length, round(index.density(), 4))
        if not has_fa4():
            part.rows += [{"length": length, "kernel": label, "left_out": "not installed"} for label in ("ours: flash", "flex flash")]
    for row in part.rows:
        peers = {
            r["kernel"]: r["ms"]
            for r in part.rows
            if (r["length"], r.get("density")) in ((row["length"], row.get("density")), (row["length"], 1.0)) and "ms" in r
        }
        if row["kernel"].startswith("ours") and "ms" in row:
            row["speedup"] = {name: round(ms / row["ms"], 3) for name, ms in peers.items() if not name.startswith("ours")}


# select -----------------------------------------------------------------------------------------------------------------


def rate_for(length: int, wanted: float) -> float:
    """Stem's rate, with its decay, at which it keeps this share of blocks: what it keeps depends on positions only."""
    q = torch.randn(1, 1, length, 16, device="cuda", dtype=torch.bfloat16)
    low, high = 0.0, 1.0
    for _ in range(12):
        rate = (low + high) / 2
        found = float(densities(select(q, q, q, make_policy("stem", rate=rate, alpha=0.7), check=False))[0])
        low, high = (rate, high) if found < wanted else (low, rate)
    return low or high  # what is kept anyway may be more already


def policies(length: int) -> dict[str, Policy]:
    return {
        "stem": make_policy("stem", min_len=0),
        "stem 10%": make_policy("stem", rate=rate_for(length, 0.1), alpha=0.7, min_len=0),
        "xattention": make_policy("xattention", min_len=0),
        "xattention tau .25": make_policy("xattention", tau=0.25, min_len=0),
        "stem share": make_policy("stem", **SHARE, min_len=0),
    }


def waits(call: Call) -> str:
    """What makes the host wait for the GPU, or nothing."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0][:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def selection(given: argparse.Namespace, part: Part) -> None:
    for length in given.lengths or (131072, 32768):
        q, k, v = inputs(length)
        cudnn = dense_peers("cuda")["cudnn"]
        assert cudnn is not None
        dense = part.row(lambda: times(timed(lambda: cudnn(q, k, v, DIM**-0.5), repeats(length), "cuda")), length=length, policy="dense cudnn")
        for name, policy in policies(length).items():

            def measure() -> dict[str, Any]:
                choose, both = lambda: select(q, k, v, policy, check=False), lambda: sparse_attention(q, k, v, policy, check=False)
                index = choose()
                spread = [timed(c, repeats(length), "cuda") for c in (choose, lambda: sparse_attention(q, k, v, index, check=False), both)]
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                out = both()
                extra = torch.cuda.max_memory_allocated() - before - out.nbytes
                row = {f"{key}_ms": round(s.median, 4) for key, s in zip(("select", "kernel", "total"), spread, strict=True)}
                row |= {"density": round(float(densities(index).mean()), 4), "extra_mib": round(extra / 2**20, 1), "waits": waits(both)}
                if "ms" in dense:
                    row |= {"speedup": round(dense["ms"] / row["total_ms"], 3), "selection_of_dense": round(row["select_ms"] / dense["ms"], 5)}
                return row

            part.row(measure, length=length, policy=name)


# ttft -------------------------------------------------------------------------------------------------------------------


def llama(layers: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    with torch.device("cuda"), no_init_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG, num_hidden_layers=layers), dtype=torch.bfloat16).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.02)
    return model


def first_token(given: argparse.Namespace, part: Part) -> None:
    from angelslim_sparseattn.config import SparseAttentionConfig
    from angelslim_sparseattn.coupling import attach

    model = llama(given.layers)
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = given.lengths or (32768, 65536, 131072)
    ids = torch.randint(0, CONFIG["vocab_size"], (1, max(lengths)), device="cuda", generator=generator)

    def prefill(length: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids[:, :length], use_cache=True, logits_to_keep=1).logits.argmax(-1).item()
        return time.perf_counter() - start

    for length in lengths:
        dense: dict[str, Any] = {}
        for name in ("dense cudnn", *given.policies.split(",")):

            def measure() -> dict[str, Any]:
                count = 3 if length <= 32768 else 2
                if name == "dense cudnn":
                    prefill(min(lengths))
                    found, extra = [prefill(length) for _ in range(count)], {}
                else:
                    options: dict[str, Any] = {
                        "stem": {},
                        "stem 10%": {"rate": rate_for(length, 0.1), "alpha": 0.7},
                        "xattention": {},
                        "xattention tau .25": {"tau": 0.25},
                        "stem share": SHARE,
                    }[name]
                    with attach(model, SparseAttentionConfig(policy=name.split()[0], options=options)) as attached:
                        prefill(min(lengths))
                        found = [prefill(length) for _ in range(count)]
                        stats = attached.stats()
                    extra = {"stats": stats[-1], "sparse_layers": sum(bool(s["sparse"]) for s in stats)}
                best = statistics.median_low(found)
                row = {"s": round(best, 4), "times_s": [round(t, 4) for t in found], **extra, "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}
                if "s" in dense:
                    row["speedup"] = round(dense["s"] / best, 3)
                return row

            with torch.no_grad(), fastest_sdpa("cuda"):
                row = part.row(measure, length=length, policy=name, layers=given.layers)
            dense = row if name == "dense cudnn" else dense


PARTS: dict[str, Callable[[argparse.Namespace, Part], None]] = {"kernel": kernel, "select": selection, "ttft": first_token}


def revision() -> str:
    """Of the checkout, where there is one."""
    found = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--parts", default="kernel,select,ttft", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], help="instead of each part's own")
    parser.add_argument("--layers", type=int, default=32, help="of the model whose first token is timed")
    parser.add_argument("--policies", default="stem,stem 10%,stem share,xattention,xattention tau .25", help="of the model whose first token is timed")
    parser.add_argument("--patience", type=float, default=1.0, help="times the seconds that each part may take")
    given = parser.parse_args()
    document: dict[str, Any] = {**machine("cuda"), "revision": revision(), "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": "bf16"}}
    for name in given.parts.split(","):
        start = time.monotonic()
        part = Part(name, given.patience, lambda: write(Path(given.out), document))
        document[name] = part.rows
        try:
            PARTS[name](given, part)
        except Exception as error:  # the other parts go on
            part.rows.append({"failed": f"{type(error).__name__}: {str(error)[:300]}"})
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        torch.cuda.empty_cache()
    write(Path(given.out), document)
    for name in given.parts.split(","):
        keys = list(dict.fromkeys(k for row in document[name] for k in row if k not in ("stats", "times_s")))
        table([[str(row.get(k, ""))[:60] for k in keys] for row in document[name]], keys)


if __name__ == "__main__":
    main()
