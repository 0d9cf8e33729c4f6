"""Block-sparse attention for Hopper: one warp fetches listed blocks, two warpgroups of 64 queries each multiply and take softmax.

Programs stay: each takes the next block of queries from a counter, and its keys are fetched while the last one's output is written.
Source: the order of products within a warpgroup is that of arXiv:2407.08608 §3.2.
"""

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...block_index import BlockIndex
from .block_sparse import box_fits

# the second names are those of Triton 3.6
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# of a thread: 12 warps start with as many as the multiprocessor has, then those that multiply take from the one that fetches
REGISTERS = 168
MULTIPLYING: gl.constexpr = gl.constexpr(240)
FETCHING: gl.constexpr = gl.constexpr(24)
# a single number, the same in each thread of the warp that writes it and of a warpgroup that reads it
WRITTEN: gl.constexpr = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
READ: gl.constexpr = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _place(item, rows, heads, GROUP: gl.constexpr, TOGETHER: gl.constexpr, LISTS_SHARE: gl.constexpr):
    # the longest lists, which are those of the last queries, come first
    beside = item % (GROUP * TOGETHER)
    i = rows - 1 - item // (GROUP * TOGETHER) % rows
    bh = item // (GROUP * TOGETHER * rows) * (GROUP * TOGETHER) + beside
    row = (bh // LISTS_SHARE).to(gl.int64) * rows + i
    return bh // heads, bh % heads, i, row


@gluon.jit
def _fetch(
    q, k, v, row_ptr, col, taken, bufs, bars, items, rows, heads, own_first,
    GROUP: gl.constexpr, TOGETHER: gl.constexpr, LISTS_SHARE: gl.constexpr, STAGES: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    q_bufs, k_bufs, v_bufs, item_bufs = bufs
    q_full, q_empty, k_full, v_full, empty, _ = bars
    tile = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        b, h, i, row = _place(item, rows, heads, GROUP, TOGETHER, LISTS_SHARE)
        kv = h // GROUP
        start = gl.load(row_ptr + row).to(gl.int64)
        count = (gl.load(row_ptr + row + 1) - start).to(gl.int32)
        # the own block, which is masked, comes first
        listed = col + start
        own = gl.load(listed + (count - 1) * (1 - own_first)).to(gl.int32)
        listed += own_first
        side = turn % 2
        mbarrier.wait(q_empty.index(side), (turn // 2 & 1) ^ 1)
        item_bufs.index(side).store(gl.full([1], item, gl.int32, WRITTEN))
        mbarrier.expect(q_full.index(side), 2 * q.block_type.nbytes)
        for half in gl.static_range(2):
            _load(q, [b, h, i * 128 + half * 64, 0], q_full.index(side), q_bufs.index(side * 2 + half))
        n0 = own * BN
        for n in range(count):
            stage = tile % STAGES
            # its place is free: the values before these keys waited for it
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
            _load(k, [b, kv, n0, 0], k_full.index(stage), k_bufs.index(stage))
            # one arrival gives back a tile's keys and the values of the tile before
            mbarrier.wait(empty.index((tile + 1) % STAGES), ((tile + 1) // STAGES & 1) ^ 1)
            mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
            _load(v, [b, kv, n0, 0], v_full.index(stage), v_bufs.index(stage))
            n0 = gl.load(listed + n, n + 1 < count, 0).to(gl.int32) * BN
            tile += 1
            if n == 0:
                # this early, since the tiles that follow it wait for a free place anyway
                item = gl.atomic_add(taken, 1, sem="relaxed") + gl.num_programs(0)
        turn += 1
    mbarrier.wait(q_empty.index(turn % 2), (turn // 2 & 1) ^ 1)
    item_bufs.index(turn % 2).store(gl.full([1], item, gl.int32, WRITTEN))
    mbarrier.arrive(q_full.index(turn % 2), count=1)


@gluon.jit
def _next(turn, q_full, item_bufs):
    # a number past the last says that there is none
    mbarrier.wait(q_full.index(turn % 2), turn // 2 & 1)
    return gl.sum(item_bufs.index(turn % 2).load(READ), 0)


@gluon.jit
def _lane_sums(x, BN: gl.constexpr):
    # (64, BN) to (64, 4), without words between lanes: of each eight columns, a lane of the four that hold a row has two beside each other
    return gl.sum(gl.sum(x.reshape([64, BN // 8, 4, 2]), 3), 1)


@gluon.jit
def _attend(
    common, HALF: gl.constexpr, BY_TURNS: gl.constexpr, GROUP: gl.constexpr, TOGETHER: gl.constexpr, LISTS_SHARE: gl.constexpr,
    STAGES: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    out, lse, row_ptr, bufs, bars, items, rows, heads, queries, scale_log2 = common
    q_bufs, k_bufs, v_bufs, item_bufs = bufs
    q_full, q_empty, k_full, v_full, empty, turn_bars = bars
    of_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    of_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    of_p: gl.constexpr = gl.DotOperandLayout(0, of_o, 2)
    rows_s: gl.constexpr = gl.SliceLayout(1, of_s)
    x = gl.arange(0, 64, layout=rows_s)
    j = gl.arange(0, BN, layout=gl.SliceLayout(0, of_s))
    nothing = gl.zeros([64, BN], gl.float32, of_s)
    tile = 0
    turn = 0
    item = _next(turn, q_full, item_bufs)
    while item < items:
        b, h, i, row = _place(item, rows, heads, GROUP, TOGETHER, LISTS_SHARE)
        count = (gl.load(row_ptr + row + 1) - gl.load(row_ptr + row)).to(gl.int32)
        side = turn % 2
        own_q = q_bufs.index(side * 2 + HALF)
        q = own_q.reshape([64, D])

        stage = tile % STAGES
        mbarrier.wait(k_full.index(stage), tile // STAGES & 1)
        if BY_TURNS:
            mbarrier.wait(turn_bars.index(HALF), tile & 1)
        s = warpgroup_mma(q, k_bufs.index(stage).reshape([BN, D]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        if BY_TURNS:
            mbarrier.arrive(turn_bars.index(1 - HALF), count=1)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(empty.index(stage), count=1)
        s = gl.where(j[None, :] <= (HALF * 64 + x)[:, None], s, float("-inf"))
        m = gl.max(s, 1) * scale_log2
        pf = gl.exp2(s * scale_log2 - m[:, None])
        total = _lane_sums(pf, BN)
        p = gl.convert_layout(pf.to(k_bufs.dtype), of_p)
        acc = gl.zeros([64, D], gl.float32, of_o)
        mbarrier.wait(k_full.index((tile + 1) % STAGES), (tile + 1) // STAGES & 1, pred=count > 1)
        for n in range(1, count):
            v_stage = tile % STAGES
            v_phase = tile // STAGES & 1
            tile += 1
            stage = tile % STAGES
            if BY_TURNS:
                mbarrier.wait(turn_bars.index(HALF), tile & 1)
            s = warpgroup_mma(q, k_bufs.index(stage).reshape([BN, D]).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            acc = warpgroup_mma(p, v_bufs.index(v_stage).reshape([BN, D]), acc, is_async=True)
            if BY_TURNS:
                mbarrier.arrive(turn_bars.index(1 - HALF), count=1)
            s = warpgroup_mma_wait(1, deps=[s])
            m2 = gl.maximum(m, gl.max(s, 1) * scale_log2)
            a = gl.exp2(m - m2)
            pf = gl.exp2(s * scale_log2 - m2[:, None])
            total = total * gl.convert_layout(a, gl.SliceLayout(1, total.type.layout), assert_trivial=True)[:, None] + _lane_sums(pf, BN)
            m = m2
            p2 = gl.convert_layout(pf.to(k_bufs.dtype), of_p)
            # before the sums are waited for: a branch, over which the assembler does not move that wait to before the softmax
            mbarrier.wait(k_full.index((tile + 1) % STAGES), (tile + 1) // STAGES & 1, pred=n + 1 < count)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(stage), count=1)
            p = p2
            acc *= gl.convert_layout(a, gl.SliceLayout(1, of_o))[:, None]
        stage = tile % STAGES
        mbarrier.wait(v_full.index(stage), tile // STAGES & 1)
        acc = warpgroup_mma(p, v_bufs.index(stage).reshape([BN, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        tile += 1

        total = gl.convert_layout(gl.sum(total, 1), rows_s)
        # the output leaves through the place of its queries
        y = acc / gl.convert_layout(total, gl.SliceLayout(1, of_o))[:, None]
        q.store(y.to(k_bufs.dtype))
        fence_async_shared()
        _store(out, [b, h, i * 128 + HALF * 64, 0], own_q)
        at = i * 128 + HALF * 64 + x
        gl.store(lse + (b * heads + h).to(gl.int64) * queries + at, (m + gl.log2(total)) * 0.6931471805599453, at < queries)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(side), count=1)
        turn += 1
        item = _next(turn, q_full, item_bufs)


@gluon.jit(do_not_specialize=["items", "rows", "heads", "queries", "own_first"])
def _kernel(
    q, k, v, out, lse, row_ptr, col, taken, items, rows, heads, queries, own_first, scale_log2,
    BY_TURNS: gl.constexpr, GROUP: gl.constexpr, TOGETHER: gl.constexpr, LISTS_SHARE: gl.constexpr, STAGES: gl.constexpr,
    BN: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    q_bufs = gl.allocate_shared_memory(q.dtype, [4, 1, 1, 64, D], q.layout)
    k_bufs = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BN, D], k.layout)
    v_bufs = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BN, D], v.layout)
    item_bufs = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for side in gl.static_range(2):
        mbarrier.init(q_full.index(side), count=1)
        mbarrier.init(q_empty.index(side), count=2)
        mbarrier.init(turn_bars.index(side), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.arrive(turn_bars.index(0), count=1)
    bars = (q_full, q_empty, k_full, v_full, empty, turn_bars)
    bufs = (q_bufs, k_bufs, v_bufs, item_bufs)
    common = (out, lse, row_ptr, bufs, bars, items, rows, heads, queries, scale_log2)
    gl.warp_specialize(
        [
            (_attend, (common, 0, BY_TURNS, GROUP, TOGETHER, LISTS_SHARE, STAGES, BN, D)),
            (_attend, (common, 1, BY_TURNS, GROUP, TOGETHER, LISTS_SHARE, STAGES, BN, D)),
            (_fetch, (q, k, v, row_ptr, col, taken, bufs, bars, items, rows, heads, own_first, GROUP, TOGETHER, LISTS_SHARE, STAGES, BN)),
        ],
        [4, 1],
        [MULTIPLYING, FETCHING],
    )


def takes(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex) -> bool:
    """Whether this kernel computes the call: whole blocks of 128, heads 64 or 128 wide, sequences of one length that chunks of 128 precede."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype != torch.float32
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in (64, 128)
        and (index.block_m, index.block_n) == (128, 128)
        and {*index.q_len} == {q.shape[2]}
        and {*index.kv_len} == {k.shape[2]}
        and (k.shape[2] - q.shape[2]) % 128 == 0
        and index.tokens is None
        and index.skip_below() is None
        and all(box_fits(x) for x in (q, k, v))
    )


def block_sparse(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float, stages: int, by_turns: bool, together: int) -> tuple[Tensor, Tensor]:
    """As the reference, for what it `takes`.

    Args:
        stages: tiles of keys, and of values, on their way.
        by_turns: whether one warpgroup issues its products only after the other has, so that softmax of one meets products of the other.
        together: KV heads whose queries are worked on side by side.
    """
    assert takes(q, k, v, index)
    batch, heads, queries, width = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    tiles = [TensorDescriptor.from_tensor(x, [1, 1, n, width], layout) for x, n in ((q, 64), (k, 128), (v, 128), (out, 64))]
    items = batch * heads * index.shape[2]
    # blocks of queries that programs took, beyond the first of each
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):
        _kernel[(min(items, torch.cuda.get_device_properties(q.device).multi_processor_count),)](
            *tiles, lse, index.row_ptr, index.col, taken, items, index.shape[2], heads, queries, int(index.order == "priority"), scale / math.log(2),
            BY_TURNS=by_turns, GROUP=heads // k.shape[1], TOGETHER=together, LISTS_SHARE=heads // index.shape[1], STAGES=stages, BN=128, D=width,
            num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
    return out, lse
