"""Causal attention over the blocks, and single keys, that an index lists.

Shapes: q [B, Hq, L, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv]; of a list: r queries, n listed keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..block_index import BlockIndex


def reference(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """Attention [B, Hq, L, Dv] in q's dtype and the natural logarithm of its denominators [B, Hq, L] in fp32, a list at a time.

    A query without keys has output 0 and LSE -inf.
    """
    batch, heads, queries, _ = q.shape
    _, lists, rows, _ = index.shape
    out, lse = q.new_zeros(batch, heads, queries, v.shape[-1]), q.new_full((batch, heads, queries), -torch.inf, dtype=torch.float32)
    skip = index.skip_below()
    for r in range(batch * lists * rows):
        b, h, i = r // (lists * rows), r // rows % lists, r % rows
        if i * index.block_m >= index.q_len[b]:
            continue
        of_list = slice(h * (heads // lists), (h + 1) * (heads // lists))
        kv = h * k.shape[1] // lists
        own = slice(i * index.block_m, min((i + 1) * index.block_m, index.q_len[b]))
        position = index.off[b] + torch.arange(own.start, own.stop, device=q.device)
        key, live = _keys(index, r, b)
        scores = q[b, of_list, own].float() @ k[b, kv, key].float().T * scale
        scores = scores.masked_fill(~live | (key > position[:, None]), -torch.inf)
        if skip is not None:
            scores = _without_skipped(scores, index, r, position, skip[b])
        highest = scores.amax(-1, keepdim=True) if len(key) else scores.new_zeros(*scores.shape[:2], 1)
        weights = (scores - highest.nan_to_num(neginf=0.0)).exp()
        total = weights.sum(-1)
        out[b, of_list, own] = (weights @ v[b, kv, key].float() / total.clamp(min=1e-38)[..., None]).to(q.dtype)
        lse[b, of_list, own] = torch.where(total > 0, highest[..., 0] + total.log(), -torch.inf)
    return out, lse


def _keys(index: BlockIndex, r: int, b: int) -> tuple[Tensor, Tensor]:
    """Keys [n] of row r, block by block as listed and single ones last, and which of them exist; those that do not are key 0."""
    block = index.col[int(index.row_ptr[r]) : int(index.row_ptr[r + 1])].long()
    key = (block[:, None] * index.block_n + torch.arange(index.block_n, device=block.device)).flatten()
    if index.tokens is not None:
        key = torch.cat([key, index.tokens.col[int(index.tokens.ptr[r]) : int(index.tokens.ptr[r + 1])].long()])
    live = key < index.kv_len[b]
    return key * live, live


def _without_skipped(scores: Tensor, index: BlockIndex, r: int, position: Tensor, below: float) -> Tensor:
    """Scores [heads, r, n] with -inf in blocks that, at their turn, are further than `below` under the maximum so far of all rows of a head.

    Own blocks come first, whatever their place in the list; single keys come last and are never skipped.
    """
    block = index.col[int(index.row_ptr[r]) : int(index.row_ptr[r + 1])].long()
    others = block < position[0] // index.block_n
    turn = torch.cat([(~others).nonzero()[:, 0], others.nonzero()[:, 0]])
    highest = scores[..., : len(block) * index.block_n].unflatten(-1, (-1, index.block_n)).amax(-1)[..., turn]
    before = highest.cummax(-1).values.roll(1, -1)
    skipped = (highest - before).amax(-2) < below
    skipped[:, : int((~others).sum())] = False
    gone = torch.zeros(len(scores), len(block), dtype=torch.bool, device=scores.device)
    gone[:, turn] = skipped
    gone = torch.nn.functional.pad(gone.repeat_interleave(index.block_n, -1), (0, scores.shape[-1] - len(block) * index.block_n))
    return scores.masked_fill(gone[:, None], -torch.inf)


def _triton(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    from .triton.block_sparse import block_sparse

    return block_sparse(q, k, v, index, scale)


def triton_interprets() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _on_cpu(q: Tensor, *_: object) -> tuple[bool, str]:
    return q.device.type == "cpu", "tensors on the CPU"


def _fits(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[bool, str]:
    if not q.is_cuda and not triton_interprets():
        return False, "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"
    sizes = {index.block_m, index.block_n} <= {16, 32, 64, 128} and max(q.shape[-1], v.shape[-1]) <= 256
    return sizes, "blocks of 16, 32, 64 or 128 and heads up to 256 wide"


def _flex(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    from .flex import attend

    return attend(q, k, v, index, scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    from .flash import attend

    return attend(q, k, v, index, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    from .sdpa import attend

    return attend(q, k, v, index, scale)


def _flex_runs() -> tuple[bool, str]:
    from .flex import has_backends

    ok, why = triton_runs()
    return has_backends() if ok else (ok, why)


def _flash_runs() -> tuple[bool, str]:
    from .flash import runs

    return runs()


def _flex_fits(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[bool, str]:
    from .flex import fits

    return fits(q, k, v, index) if q.is_cuda else (False, "tensors on a GPU")


def _flash_fits(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[bool, str]:
    from .flash import fits

    return fits(q, k, v, index)


def _sdpa_fits(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[bool, str]:
    return index.skip_below() is None, "nothing is skipped while it runs"


# "auto" takes the first that fits; with tables made for each index "flash" takes longer than "triton"
BLOCK_SPARSE = Kernel(
    "sparseattn.block_sparse",
    reference,
    (
        Implementation("torch", reference, _on_cpu),
        Implementation("triton", _triton, _fits, triton_runs),
        Implementation("flex", _flex, _flex_fits, _flex_runs),
        Implementation("flash", _flash, _flash_fits, _flash_runs),
        Implementation("sdpa", _sdpa, _sdpa_fits, by_name=True),
    ),
)
