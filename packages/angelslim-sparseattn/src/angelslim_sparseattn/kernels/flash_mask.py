"""Which keys of a masked block a query attends to, as FlashAttention 4 takes it; needs the flash-attn-4 package."""

import cutlass.cute as cute
import flash_attn.cute.utils as utils
from cutlass import Int32


@cute.jit
def causal(batch, head, query, key, seqlen_info, aux_tensors):
    """Keys up to the query's own position; the last query stands at the last key."""
    off = utils.scalar_to_ssa(seqlen_info.seqlen_k - seqlen_info.seqlen_q, Int32)
    return key <= query + off
