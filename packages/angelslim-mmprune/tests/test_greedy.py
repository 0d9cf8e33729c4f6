"""Greedy picks by a rule: every form makes the reference's picks, on what is drawn by lot and on what leaves little to choose by."""

import pytest
import torch

from angelslim_mmprune.kernels.greedy import GREEDY
from angelslim_mmprune.kernels.triton import greedy as on_device
from angelslim_mmprune.plan import Pool
from angelslim_mmprune.strategies import make_strategy

RULES = [("apart", 0.0), ("damped", 20.0), ("damped", 0.5), ("covering", 0.0), ("covering_or", 0.0)]


def drawn(seed=0, width=6, middle=0.0, counts=(21, 12, 5)):
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
    for seed in range(1 if executor == "triton" else 3):
        x, w, counts = drawn(seed, middle=middle)
        for ks in ((8, 12, 0), (1, 2, 5)):
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
        for what, x, w in list(odd())[:: 3 if executor == "triton" else 1]:
            found = GREEDY(x[None], w[None], (13,), (13,), rule, strength, executor=executor)[0].tolist()
            assert sorted(found) == list(range(13)), (what, executor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_on_16_bits_and_in_turns(dtype):
    x, w, counts = drawn(5, 16)
    x = x.to(dtype)
    for rule, strength in RULES[::2]:
        wanted = GREEDY(x, w, counts, (5, 3, 2), rule, strength, executor="reference")
        # cosines of one pool fit
        found = on_device.picks(x, w, counts, (5, 3, 2), rule, strength, 4 * 21 * 36 if dtype == torch.float16 else 1 << 20)
        assert found.tolist() == wanted.tolist(), rule


def test_what_a_pick_covers_leaves_no_rounding():
    """Gains that are kept from pick to pick are those that are summed anew: picks to the last of tokens that all lie close, whose gains are small
    differences of large sums."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 5, generator=generator) * 0.2 + 1
    w = torch.rand(1, 40, generator=generator) + 0.5
    found = GREEDY(x, w, (40,), (38,), "covering", executor="triton")[0]
    assert len(set(found.tolist())) == 38
    cosine = torch.nn.functional.normalize(x[0].double(), dim=-1)
    cosine = cosine @ cosine.T
    covered = torch.zeros(40, dtype=torch.float64)
    free = torch.ones(40, dtype=torch.bool)
    for best in found:
        score = ((cosine - covered).clamp(min=0).sum(1) * w[0]).masked_fill(~free, -1)
        # cosines of FP32 differ by 1e-7, and a sum is of 40 of them
        assert float(score[best]) > float(score.max()) - 2e-5
        covered, free[best] = covered.maximum(cosine[best]), False


def gpu_pools(dtype, tokens=2048, width=1024):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, width, generator=generator) + torch.randn(2, 1, width, generator=generator)
    x[:, tokens // 2 :: 7] = x[:, : tokens // 2 : 7][:, : len(range(tokens // 2, tokens, 7))]  # copies
    return x.to("cuda", dtype), torch.rand(2, tokens, generator=generator).cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rule", ["apart", "covering", "covering_or"])
def test_picks_on_a_gpu_are_the_references(rule, dtype):
    """But for scores that FP32, or the products of features in halves, do not tell apart: each pick is as good as the best, after the same picks."""
    x, w = gpu_pools(dtype)
    counts, ks = (2048, 1500), (512, 90)
    found = GREEDY(x, w, counts, ks, rule, executor="triton")
    for p, (count, k) in enumerate(zip(counts, ks, strict=True)):
        cosine, weight, picked = checked(x[p], w[p], found[p], count, k)
        near, free = torch.full_like(weight, -1.0), torch.ones_like(weight, dtype=torch.bool)
        for t, best in enumerate(picked):
            if rule == "apart":
                score = -(near if t else cosine.clone().fill_diagonal_(-1).amax(0))
            else:
                gain = (cosine - near.clamp(min=0)).clamp(min=0).sum(1)
                score = gain * weight if rule == "covering" else gain + weight
            allowed = (1e-4 if dtype == torch.float32 else 2e-6) * (1 if rule == "apart" else count)
            assert float(score[best]) > float(score.masked_fill(~free, -torch.inf).max()) - allowed, t
            near, free[best] = near.maximum(cosine[best]), False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("strength", [20.0, 2.0])
def test_damped_picks_on_a_gpu_are_the_references(strength):
    """As good as the best, where a score that rounding can make 0, or keep above it, counts either way."""
    x, w = gpu_pools(torch.bfloat16)
    found = GREEDY(x, w, (2048, 1500), (512, 90), "damped", strength, executor="triton")
    for p, (count, k) in enumerate(((2048, 512), (1500, 90))):
        cosine, weight, picked = checked(x[p], w[p], found[p], count, k)
        left, free = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
        surely_none = torch.zeros_like(free)
        for t, best in enumerate(picked):
            low, high = torch.where(left > 1e-4, left, weight - 1), torch.where(surely_none, weight - 1, left)
            assert float(high[best]) > float(low.masked_fill(~free, -torch.inf).max()) - 1e-4, t
            left = left - torch.exp(-strength * (1 - cosine[best]).clamp(min=0) ** 2) * left[best]
            surely_none |= left < -1e-4
            left, free[best] = left.clamp(min=0), False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["divprune", "scope", "id_selection", "vispruner", "prunesid"])
def test_strategies_choose_on_a_gpu_as_on_a_cpu(name):
    """But for near ties, and those of PruneSID between components."""
    strategy = make_strategy(name)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 576, 256, generator=generator).bfloat16() + 0.5
    statistics = {need: torch.rand(2, 576, generator=generator) for need in strategy.needs}
    here = strategy.plan(Pool(features, (576, 400), None, (), statistics), (144, 100)).keep
    there = strategy.plan(Pool(features.cuda(), (576, 400), None, (), {need: of.cuda() for need, of in statistics.items()}), (144, 100)).keep.cpu()
    for one, other, k in zip(here.tolist(), there.tolist(), (144, 100), strict=True):
        kept, found = ({i for i in row if i >= 0} for row in (one, other))
        assert len(found) == k and len(kept & found) >= 0.9 * k


def checked(x, w, order, count, k):
    """Cosines and weights in FP64, and the picks, of which none is made twice."""
    picked = order[:k].tolist()
    assert len(set(picked)) == k and max(picked) < count and bool((order[k:] == -1).all())
    u = torch.nn.functional.normalize(x[:count].double(), dim=-1)
    return u @ u.T, w[:count].double(), picked


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("rule", "strength"), RULES)
def test_picks_of_copies_on_a_gpu_come_in_their_order(rule, strength):
    """Tokens along axes, whose cosines are exact: the order is the reference's to the last pick."""
    x = torch.eye(64, 512)[torch.arange(600) % 64][None].cuda().bfloat16()
    w = ((torch.arange(600) * 37 % 128) / 128.0)[None].cuda()
    found, wanted = (GREEDY(x, w, (600,), (599,), rule, strength, executor=name) for name in ("triton", "reference"))
    assert found.tolist() == wanted.tolist()
