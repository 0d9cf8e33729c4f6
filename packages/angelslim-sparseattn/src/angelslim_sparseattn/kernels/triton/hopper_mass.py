"""Antidiagonal sums for Hopper: one warp fetches tiles of queries and keys, each warpgroup multiplies 64 groups of queries with the same keys.

Programs stay: while one's sums are reduced, its next tiles are fetched.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper import _load
from .mass import strided

FOUND: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0]))
# of a thread, by warpgroups that multiply: at the start, of those that multiply, of the warp that fetches
REGISTERS = {2: (168, 240, 24), 3: (128, 160, 24)}


@gluon.jit
def _place(item, units, column_tiles, WARPGROUPS: gl.constexpr, BESIDE: gl.constexpr):
    # KV head by KV head; of its units of queries, BESIDE times WARPGROUPS after the other, by columns
    tall = gl.cdiv(units, WARPGROUPS)
    kv = item // (tall * column_tiles)
    item = item % (tall * column_tiles)
    top = item // (BESIDE * column_tiles) * BESIDE
    item -= top * column_tiles
    side = gl.minimum(BESIDE, tall - top)
    return kv, (top + item % side) * WARPGROUPS, item // side


@gluon.jit
def _fetch(
    q, k, bufs, bars, sizes,
    GROUP: gl.constexpr, WARPGROUPS: gl.constexpr, BESIDE: gl.constexpr, STRIDE: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, BD: gl.constexpr,
    BN: gl.constexpr,
):  # fmt: skip
    q_bufs, k_bufs = bufs
    full, empty = bars
    items, units, column_tiles, row, off = sizes
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        kv, first, n = _place(item, units, column_tiles, WARPGROUPS, BESIDE)
        last = gl.minimum(first + WARPGROUPS, units) - 1
        if n * (BN * STRIDE) < off + (row + (last // GROUP + 1) * 64) * STRIDE:
            for i in range(STRIDE * STEPS):
                t = i // STEPS
                d = i % STEPS * BD
                stage = tile % STAGES
                mbarrier.wait(empty.index(stage), (tile // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(stage), WARPGROUPS * q.block_type.nbytes + k.block_type.nbytes)
                for w in gl.static_range(WARPGROUPS):
                    unit = gl.minimum(first + w, last)
                    _load(q, [kv * GROUP + unit % GROUP, STRIDE - 1 - t, row + unit // GROUP * 64, d], full.index(stage), q_bufs.index(stage * WARPGROUPS + w))
                _load(k, [kv, t, n * BN, d], full.index(stage), k_bufs.index(stage))
                tile += 1


@gluon.jit
def _reduce(
    x, out, m, n, row, off, groups, columns, kv_len, factor, STRIDE: gl.constexpr, PARTS: gl.constexpr, HIGHEST: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = x.shape[1]
    x *= factor
    if ((n + BN - 1) * STRIDE >= kv_len) | (n + BN - 1 >= off // STRIDE + row + m + 1):
        a = row + m + gl.arange(0, 64, layout=gl.SliceLayout(1, x.type.layout))
        e = n + gl.arange(0, BN, layout=gl.SliceLayout(0, x.type.layout))
        x = gl.where((e[None, :] * STRIDE < (off + (a + 1) * STRIDE)[:, None]) & (e * STRIDE < kv_len)[None, :], x, float("-inf"))
    if HIGHEST:
        found = gl.max(x.reshape([64, BN // PARTS, PARTS]), 2)
    else:
        # by the highest of the row: what then vanishes does so beside it too
        highest = gl.max(x, 1)
        safe = gl.where(highest > float("-inf"), highest, 0.0)
        found = gl.sum(gl.exp2(x - safe[:, None]).reshape([64, BN // PARTS, PARTS]), 2)
    found = gl.convert_layout(found, FOUND)
    if not HIGHEST:
        found = gl.log2(found) + gl.convert_layout(safe, gl.SliceLayout(1, FOUND))[:, None]
    r = m + gl.arange(0, 64, layout=gl.SliceLayout(1, FOUND))
    j = n // PARTS + gl.arange(0, BN // PARTS, layout=gl.SliceLayout(0, FOUND))
    gl.store(out + r.to(gl.int64)[:, None] * columns + j[None, :], found, (r < groups)[:, None] & (j < columns)[None, :])


@gluon.jit
def _multiply(
    out, bufs, bars, sizes, groups, columns, kv_len, factor, W: gl.constexpr,
    GROUP: gl.constexpr, WARPGROUPS: gl.constexpr, BESIDE: gl.constexpr, STRIDE: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, BD: gl.constexpr,
    BN: gl.constexpr, PARTS: gl.constexpr, HIGHEST: gl.constexpr,
):  # fmt: skip
    # with three warpgroups a product may have no more than half of the registers that sums take
    HALF: gl.constexpr = BN // 2 if WARPGROUPS == 3 else BN
    of_x: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    q_bufs, k_bufs = bufs
    full, empty = bars
    items, units, column_tiles, row, off = sizes
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        kv, first, n = _place(item, units, column_tiles, WARPGROUPS, BESIDE)
        last = gl.minimum(first + WARPGROUPS, units) - 1
        if n * (BN * STRIDE) < off + (row + (last // GROUP + 1) * 64) * STRIDE:
            x = gl.zeros([64, HALF], gl.float32, of_x)
            z = x
            for i in range(STRIDE * STEPS):
                stage = tile % STAGES
                mbarrier.wait(full.index(stage), tile // STAGES & 1)
                queries = q_bufs.index(stage * WARPGROUPS + W).reshape([64, BD])
                keys = k_bufs.index(stage).reshape([BN, BD])
                x = warpgroup_mma(queries, keys.slice(0, HALF).permute((1, 0)), x, is_async=True)
                # all before these are done
                if HALF < BN:
                    z = warpgroup_mma(queries, keys.slice(HALF, HALF).permute((1, 0)), z, is_async=True)
                    x, z = warpgroup_mma_wait(2, deps=[x, z])
                else:
                    x = warpgroup_mma_wait(1, deps=[x])
                mbarrier.arrive(empty.index((tile + STAGES - 1) % STAGES), count=1, pred=i > 0)
                tile += 1
            if HALF < BN:
                x, z = warpgroup_mma_wait(0, deps=[x, z])
            else:
                x = warpgroup_mma_wait(0, deps=[x])
            mbarrier.arrive(empty.index((tile + STAGES - 1) % STAGES), count=1)
            unit = first + W
            at = out + (kv * GROUP + unit % GROUP).to(gl.int64) * groups * columns
            rows = gl.where(unit <= last, groups, 0)
            _reduce(x, at, unit // GROUP * 64, n * BN, row, off, rows, columns, kv_len, factor, STRIDE, PARTS, HIGHEST)
            if HALF < BN:
                _reduce(z, at, unit // GROUP * 64, n * BN + HALF, row, off, rows, columns, kv_len, factor, STRIDE, PARTS, HIGHEST)


@gluon.jit(do_not_specialize=["items", "units", "column_tiles", "row", "off", "groups", "columns", "kv_len"])
def _kernel(
    q, k, out, items, units, column_tiles, row, off, groups, columns, kv_len, factor,
    GROUP: gl.constexpr, WARPGROUPS: gl.constexpr, BESIDE: gl.constexpr, STRIDE: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, BD: gl.constexpr,
    BN: gl.constexpr, PARTS: gl.constexpr, HIGHEST: gl.constexpr, MULTIPLYING: gl.constexpr, FETCHING: gl.constexpr,
):  # fmt: skip
    q_bufs = gl.allocate_shared_memory(q.dtype, [STAGES * WARPGROUPS, 1, 1, 64, BD], q.layout)
    k_bufs = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BN, BD], k.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    bufs = (q_bufs, k_bufs)
    bars = (full, empty)
    sizes = (items, units, column_tiles, row, off)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (out, bufs, bars, sizes, groups, columns, kv_len, factor, 0, GROUP, 2, BESIDE, STRIDE, STEPS, STAGES, BD, BN, PARTS, HIGHEST)),
                (_multiply, (out, bufs, bars, sizes, groups, columns, kv_len, factor, 1, GROUP, 2, BESIDE, STRIDE, STEPS, STAGES, BD, BN, PARTS, HIGHEST)),
                (_fetch, (q, k, bufs, bars, sizes, GROUP, 2, BESIDE, STRIDE, STEPS, STAGES, BD, BN)),
            ],
            [4, 1],
            [MULTIPLYING, FETCHING],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (out, bufs, bars, sizes, groups, columns, kv_len, factor, 0, GROUP, 3, BESIDE, STRIDE, STEPS, STAGES, BD, BN, PARTS, HIGHEST)),
                (_multiply, (out, bufs, bars, sizes, groups, columns, kv_len, factor, 1, GROUP, 3, BESIDE, STRIDE, STEPS, STAGES, BD, BN, PARTS, HIGHEST)),
                (_multiply, (out, bufs, bars, sizes, groups, columns, kv_len, factor, 2, GROUP, 3, BESIDE, STRIDE, STEPS, STAGES, BD, BN, PARTS, HIGHEST)),
                (_fetch, (q, k, bufs, bars, sizes, GROUP, 3, BESIDE, STRIDE, STEPS, STAGES, BD, BN)),
            ],
            [4, 4, 1],
            [MULTIPLYING, MULTIPLYING, FETCHING],
        )


def antidiagonal(
    q: Tensor, k: Tensor, out: Tensor, row: int, rows: int, columns: int, seen: int, kv_len: int, off: int, factor: float, stride: int, parts: int,
    highest: bool, tile: int, width: int, warpgroups: int, stages: int, beside: int,
) -> None:  # fmt: skip
    """Writes `out` [Hq, groups, Pk], of `rows` groups of queries from `row` and the first `seen` keys; lengths are multiples of `stride`, D of `width`."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=2 * width, element_bitwidth=16, rank=4)
    boxes = [TensorDescriptor(x, *strided(x, stride), [1, 1, n, width], layout) for x, n in ((q, 64), (k, tile))]
    group = len(q) // len(k)
    units, column_tiles = -(-rows // 64) * group, -(-seen // (stride * tile))
    items = len(k) * -(-units // warpgroups) * column_tiles
    registers, multiplying, fetching = REGISTERS[warpgroups]
    _kernel[(min(items, torch.cuda.get_device_properties(q.device).multi_processor_count),)](
        *boxes, out, items, units, column_tiles, row, off, out.shape[1], columns, kv_len, factor,
        GROUP=group, WARPGROUPS=warpgroups, BESIDE=max(1, 2 * beside // warpgroups), STRIDE=stride, STEPS=q.shape[2] // width, STAGES=stages, BD=width, BN=tile,
        PARTS=parts, HIGHEST=highest, MULTIPLYING=multiplying, FETCHING=fetching, num_warps=4, maxnreg=registers,
    )  # fmt: skip
