"""What this package brings; nothing heavy is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from angelslim_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import click

    from angelslim_core.kernels import Kernel
    from angelslim_core.packed import PackedLinear
    from angelslim_core.passes import Pass

ANGELSLIM_HOOKS = 1


@hookimpl
def angelslim_register_passes() -> list[type[Pass]]:
    from .passes.awq import AWQ
    from .passes.daq import DAQ
    from .passes.focus import Focus
    from .passes.fp8_block import FP8Block
    from .passes.fp8_dynamic import FP8Dynamic
    from .passes.fp8_static import FP8Static
    from .passes.gptaq import GPTAQ
    from .passes.gptq import GPTQ
    from .passes.int4_rtn import INT4RTN
    from .passes.int8_dynamic import INT8Dynamic
    from .passes.kv_fp8 import KVFP8
    from .passes.learned_rounding import LearnedRounding
    from .passes.lepto import Lepto
    from .passes.lsq import LSQ
    from .passes.mixed import Mixed
    from .passes.mxfp4 import MXFP4
    from .passes.mxfp8 import MXFP8
    from .passes.nvfp4 import NVFP4
    from .passes.rotate import Rotate
    from .passes.seq2 import Seq2
    from .passes.sherry import Sherry
    from .passes.smooth import Smooth
    from .passes.tequila import Tequila
    from .passes.w4a8_fp8 import W4A8FP8
    from .passes.w4a8_int8 import W4A8Int8

    return [
        FP8Dynamic,
        FP8Static,
        Lepto,
        FP8Block,
        INT8Dynamic,
        INT4RTN,
        GPTQ,
        GPTAQ,
        AWQ,
        Smooth,
        LearnedRounding,
        Rotate,
        NVFP4,
        MXFP4,
        MXFP8,
        W4A8FP8,
        W4A8Int8,
        KVFP8,
        Mixed,
        DAQ,
        Seq2,
        Tequila,
        Sherry,
        LSQ,
        Focus,
    ]


@hookimpl
def angelslim_register_kernels() -> list[Kernel]:
    from .kernels.delta_choice import DELTA_CHOICE, DELTA_SCALES, DELTA_TOTALS
    from .kernels.delta_sums import DELTA_CODES, DELTA_SUMS
    from .kernels.gated_rows import GATED_ROWS
    from .kernels.int4_matmul import W4A8_MATMUL, W4A16_MATMUL
    from .kernels.lowbit_matmul import LOWBIT_MATMUL
    from .kernels.normed_rows import NORMED_ROWS
    from .kernels.quantize_fp8 import QUANTIZE_FP8
    from .kernels.quantize_groups import QUANTIZE_GROUPS
    from .kernels.quantize_rows import QUANTIZE_ROWS
    from .kernels.round_columns import ROUND_COLUMNS
    from .kernels.round_levels import ROUND_LEVELS, ROUND_LEVELS_BACK
    from .kernels.round_ternary import ROUND_TERNARY, ROUND_TERNARY_BACK
    from .kernels.scaled_matmul import FP8_MATMUL, INT8_MATMUL
    from .kernels.search_blocks import SEARCH_BLOCKS
    from .kernels.search_range import SEARCH_RANGE

    deltas = [DELTA_SUMS, DELTA_SCALES, DELTA_CHOICE, DELTA_TOTALS, DELTA_CODES]
    searches = [QUANTIZE_FP8, QUANTIZE_GROUPS, SEARCH_RANGE, SEARCH_BLOCKS, ROUND_COLUMNS]
    trained = [ROUND_LEVELS, ROUND_LEVELS_BACK, ROUND_TERNARY, ROUND_TERNARY_BACK]
    return [*searches, *deltas, *trained, QUANTIZE_ROWS, GATED_ROWS, NORMED_ROWS, FP8_MATMUL, INT8_MATMUL, W4A16_MATMUL, W4A8_MATMUL, LOWBIT_MATMUL]


@hookimpl
def angelslim_register_linears() -> list[type[PackedLinear]]:
    from .packed import FP8Linear, INT4Linear, INT8Linear
    from .packed_lowbit import LowBitLinear

    return [FP8Linear, INT8Linear, LowBitLinear, INT4Linear]  # INT4 runs codes of fewer levels as well, in 4 bits


@hookimpl
def angelslim_register_commands(cli: click.Group) -> None:
    from .commands import delta, sensitivity

    cli.add_command(sensitivity)
    cli.add_command(delta)


@hookimpl
def angelslim_default_steps(device: str) -> list[dict[str, Any]]:
    """FP8 where the GPU computes in it (compute capability 8.9 and above), else INT8."""
    kind, _, capability = device.partition(":")
    has_fp8 = kind == "cuda" and tuple(int(n) for n in capability.split(".")) >= (8, 9)
    return [{"use": "quant.fp8_dynamic" if has_fp8 else "quant.int8_dynamic"}]
