"""Greedy picks by a rule: every form makes the reference's picks, on what is drawn by lot and on what leaves little to choose by."""

import pytest
import torch

from angelslim_mmprune.kernels.greedy import GREEDY
from angelslim_mmprune.kernels.triton import greedy as on_device

RULES = [("apart", 0.0), ("damped", 20.0), ("damped", 0.5), ("covering", 0.0), ("covering_or", 0.0)]


def drawn(seed=0, width=6, middle=0.0, counts=(37, 18, 5)):
    """Three pools of different length, NaN behind them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, max(counts), width, generator=generator)
    x[..., 0] += middle
    w = torch.rand(3, max(counts), generator=generator)
    for p, count in enumerate(counts):
        x[p, count:], w[p, count:] = torch.nan, torch.nan
    return x, w, counts


def odd():
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(13, 4, generator=generator), torch.rand(13, generator=generator)
    yield "equal tokens", torch.ones(13, 4), w
    yield "no features", torch.zeros(13, 4), w
    yield "equal weights", x, torch.ones(13)
    yield "no weights", x, torch.zeros(13)
    yield "copies", x[[0, 1, 2] * 4 + [0]], w
    yield "copies of equal weights", x[[0, 1, 2] * 4 + [0]], torch.ones(13)
    yield "all the same", torch.ones(13, 4), torch.ones(13)
    yield "opposites", torch.cat([x[:6], -x[:6], x[6:7]]), w
    yield "one direction", x[:, :1] * torch.ones(4), w


@pytest.mark.parametrize("executor", ["torch", "triton"])
@pytest.mark.parametrize(("rule", "strength"), RULES)
@pytest.mark.parametrize("middle", [0.0, 1.5])
def test_every_form_makes_the_references_picks(executor, rule, strength, middle):
    for seed in range(2):
        x, w, counts = drawn(seed, middle=middle)
        for ks in ((9, 18, 0), (1, 2, 5)):
            wanted = GREEDY(x, w, counts, ks, rule, strength, executor="reference")
            assert [int((row >= 0).sum()) for row in wanted] == list(ks)
            assert GREEDY(x, w, counts, ks, rule, strength, executor=executor).tolist() == wanted.tolist()


@pytest.mark.parametrize(("rule", "strength"), RULES)
def test_triton_picks_as_the_reference_where_tokens_tie(rule, strength):
    """In the order of the reference: of equal ones the first."""
    for what, x, w in odd():
        if what in ("opposites", "one direction"):
            continue  # which tie but for the rounding of features
        for k in (1, 12):
            found, wanted = (GREEDY(x[None], w[None], (13,), (k,), rule, strength, executor=name) for name in ("triton", "reference"))
            assert found.tolist() == wanted.tolist(), (what, k)


@pytest.mark.parametrize(("rule", "strength"), RULES)
def test_all_are_picked_once_whatever_comes(rule, strength):
    for executor in ("torch", "triton", "reference"):
        for what, x, w in odd():
            found = GREEDY(x[None], w[None], (13,), (13,), rule, strength, executor=executor)[0].tolist()
            assert sorted(found) == list(range(13)), (what, executor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_on_halves_and_in_turns(dtype):
    x, w, counts = drawn(5, 16)
    x = x.to(dtype)
    for rule, strength in RULES:
        wanted = GREEDY(x, w, counts, (8, 3, 2), rule, strength, executor="reference")
        for gram_bytes in (1 << 20, 4 * 37 * 52):
            assert on_device.picks(x, w, counts, (8, 3, 2), rule, strength, gram_bytes).tolist() == wanted.tolist(), rule


def test_what_a_pick_covers_leaves_no_rounding():
    """Gains that are kept from pick to pick are those that are summed anew: with 60 picks of 64 tokens, all of which lie close."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 64, 5, generator=generator) * 0.05 + 1
        w = torch.rand(1, 64, generator=generator) + 0.5
        found, wanted = (GREEDY(x, w, (64,), (60,), "covering", executor=name) for name in ("triton", "reference"))
        assert len(set(found[0].tolist())) == 60
        cosine = torch.nn.functional.normalize(x[0].double(), dim=-1)
        cosine = cosine @ cosine.T
        # by what they cover: of picks whose gains differ by less than FP32 tells, either may come first
        for k in (1, 5, 20, 40):
            one, other = (cosine[order[0, :k]].amax(0).clamp(min=0).sum() for order in (found, wanted))
            assert abs(float(one - other)) < 1e-3
