"""Samp and the DPP on a GPU, at sizes that the interpreter has no time for."""

import pytest
import torch

from angelslim_mmprune.dpp import DPP
from angelslim_mmprune.merging import SAMP_GROUPS, samp_plan
from angelslim_mmprune.plan import of_host

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def clips(batch=4, tokens=750, width=4096, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    kind = (torch.rand(batch, tokens, generator=generator) < 0.6).cumsum(1)
    base = torch.randn(batch, tokens + 1, width, generator=generator).gather(1, kind[..., None].expand(-1, -1, width))
    x = base + 0.3 * torch.randn(batch, tokens, width, generator=generator)
    return x.to("cuda", dtype), *(torch.rand(batch, tokens, generator=generator).cuda() for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_groups_and_picks_are_the_references(dtype):
    x, _, relevance = clips(dtype=dtype)
    counts, keep = of_host([750, 640, 1, 750], x.device), of_host([375, 640, 1, 100], x.device)
    found, wanted = (SAMP_GROUPS(x, counts, 0.85, executor=name) for name in ("triton", "reference"))
    assert torch.allclose(found, wanted, atol=1e-5)
    picks = DPP(x, relevance, keep, counts, 640, executor="triton")
    exact = DPP(x.double(), relevance.double(), keep, counts, 640, executor="reference")
    for b, k in enumerate(keep.tolist()):
        kept = picks[b, :k].tolist()
        assert len(set(kept)) == k and (picks[b, k:] == -1).all()
        # a pick that rounding decides changes what follows it
        assert len(set(kept) & set(exact[b, :k].tolist())) >= 0.98 * k


def test_plans_wait_once():
    x, weight, relevance = clips()
    plan = samp_plan(x, weight, relevance, [750] * 4, [300] * 4, 0.85)
    assert ((plan.keep >= 0).sum(1) == 300).all()
    counts = of_host([750] * 4, x.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        SAMP_GROUPS(x, counts, 0.85)
        DPP(x, relevance, counts // 2, counts, 375)
    finally:
        torch.cuda.set_sync_debug_mode("default")
