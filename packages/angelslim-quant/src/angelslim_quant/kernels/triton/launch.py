"""How kernels follow each other."""

from functools import cache

import torch
import triton.language as tl


def early(device: torch.device) -> dict[str, bool]:
    """Options of a launch that begins while the kernel before it ends, which saves most of the gap between short kernels.

    The kernel reads and writes nothing before `tl.extra.cuda.gdc_wait()`, which it calls where `EARLY` says so.
    Source: CUDA Programming Guide, programmatic dependent launch; Hopper and later.
    """
    return {"EARLY": True, "launch_pdl": True} if _can(device) else {"EARLY": False}


@cache
def _can(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0) and hasattr(tl.extra.cuda, "gdc_wait")
    )
