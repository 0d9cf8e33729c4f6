"""Greedy MAP of a DPP against determinants in FP64, on random and degenerate kernels, in every implementation."""

import pytest
import torch

from angelslim_core.errors import UsageError
from angelslim_mmprune import dpp as module
from angelslim_mmprune.dpp import DPP, NOTHING, dpp
from angelslim_mmprune.finite import NotFiniteError
from angelslim_mmprune.plan import of_host

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXECUTORS = ["reference", "steps", "triton"]
executors = pytest.mark.parametrize("executor", EXECUTORS)


def brute(x, r, k):
    """Picks in order: the token that multiplies the determinant of cosines times relevances most; none above rounding: the most relevant."""
    x, r = x.double().cpu(), r.double().cpu()
    lengths = x.norm(dim=1)
    cosines = (x @ x.T / lengths.clamp(min=1e-300)[:, None] / lengths.clamp(min=1e-300)).fill_diagonal_(0) + torch.diag((lengths > 0).double())
    r = (r / r.max() if r.max() > 0 else r * 0).clamp(min=1e-8)
    picks, det = [], 1.0
    for _ in range(k):
        rest = [i for i in range(len(x)) if i not in picks]
        dets = {i: float(torch.det(cosines[[*picks, i]][:, [*picks, i]])) for i in rest}
        differ = [i for i in rest if det > 0 and dets[i] / det > NOTHING]
        j = max(differ, key=lambda i: (r[i] ** 2 * dets[i] / det, -i)) if differ else max(rest, key=lambda i: (r[i], -i))
        det = dets[j] if differ else 0.0
        picks.append(j)
    return picks


def clips(seed, sizes, width, spread=0.0):
    generator = torch.Generator().manual_seed(seed)
    most = max(sizes)
    x = torch.randn(len(sizes), most, width, generator=generator)
    r = torch.rand(len(sizes), most, generator=generator) * 10 ** (-spread * torch.rand(len(sizes), most, generator=generator))
    for b, n in enumerate(sizes):
        x[b, n:], r[b, n:] = float("nan"), float("nan")
    return x.to(DEVICE), r.to(DEVICE)


@executors
@pytest.mark.parametrize("spread", [0, 5])
@pytest.mark.parametrize("seed", range(3))
def test_picks_are_those_of_determinants(seed, spread, executor):
    """Relevance of five orders of magnitude as well: v is told apart from nothing before relevance is multiplied to it."""
    sizes, keep = [12, 9, 1, 12], [7, 9, 1, 0]
    x, r = clips(seed, sizes, 16, spread)
    picks = DPP(x, r, of_host(keep, x.device), of_host(sizes, x.device), 9, executor=executor)
    for b, (n, k) in enumerate(zip(sizes, keep, strict=True)):
        wanted = brute(x[b, :n], r[b, :n], k)
        assert picks[b].tolist() == wanted + [-1] * (9 - k)
        assert dpp(x[b : b + 1, :n], r[b : b + 1, :n], [k], executor=executor)[0].tolist() == sorted(wanted)


@executors
def test_blocks_of_picks_leave_the_same(executor, monkeypatch):
    """The factor in blocks of 64, or of 4 between which the matrix is brought up to date."""
    x, r = clips(1, [80, 71], 90)
    args = (x, r, of_host([69, 71], x.device), of_host([80, 71], x.device), 71)
    whole = DPP(*args, executor="reference")
    if executor == "triton":
        from angelslim_mmprune.kernels.triton import dpp as kernel

        assert DPP(*args, executor=executor).equal(whole)
        monkeypatch.setattr(kernel, "BLOCK_PICKS", 16)
        monkeypatch.setattr(kernel, "TILE", 32)
    assert DPP(*args, executor=executor).equal(whole)


@executors
def test_after_the_rank_relevance_decides(executor):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 20, 3, generator=generator).to(DEVICE)
    r = torch.rand(1, 20, generator=generator).to(DEVICE)
    picks = DPP(x, r, of_host([20], x.device), of_host([20], x.device), 20, executor=executor)[0].tolist()
    assert sorted(picks) == list(range(20)) and picks[:3] == brute(x[0], r[0], 3)
    rest = sorted(set(range(20)) - set(picks[:3]), key=lambda i: -float(r[0, i]))
    assert picks[3:] == rest


@executors
def test_degenerate_kernels(executor):
    """Copies, tokens of length 0, no relevance anywhere, and almost none: distinct picks, and lower indices where nothing decides."""
    ones = torch.ones(1, 6, 4, device=DEVICE)
    some = torch.tensor([[0.2, 0.9, 0.9, 0.0, 0.4, 0.1]], device=DEVICE)
    assert dpp(ones, some, [4], executor=executor).tolist() == [[0, 1, 2, 4]]
    assert dpp(ones, some * 0, [4], executor=executor).tolist() == [[0, 1, 2, 3]]
    assert dpp(ones * 0, some, [2], executor=executor).tolist() == [[1, 2]]
    eye = torch.eye(6, device=DEVICE)[None]
    assert dpp(eye, some, [5], executor=executor).tolist() == [[0, 1, 2, 4, 5]]
    eye[0, 1] = 0  # silence differs from nothing, however relevant
    assert dpp(eye, some + 0.05, [5], executor=executor).tolist() == [[0, 2, 3, 4, 5]]
    # of tokens without relevance those that differ come first
    twice = torch.eye(3, device=DEVICE).repeat_interleave(2, 0)[None]
    assert dpp(twice, some * 0, [3], executor=executor).tolist() == [[0, 2, 4]]
    x, _ = clips(5, [12], 12)
    assert dpp(x, torch.ones(1, 12, device=DEVICE), [6], executor=executor)[0].tolist() == sorted(brute(x[0], torch.ones(12), 6))
    assert dpp(x[:, :0], some[:, :0], [0], executor=executor).shape == (1, 0)


@executors
def test_scale_and_order_do_not_matter(executor):
    x, r = clips(7, [30], 32, 2)
    found = dpp(x, r, [11], executor=executor)
    for scale in (1e5, 1e-12):
        assert dpp(x * 1e-4, r * scale, [11], executor=executor).equal(found)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert order[dpp(x[:, order], r[:, order], [11], executor=executor)[0]].sort().values.equal(found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    x, r = clips(8, [30], 32)
    x = x.to(dtype)
    wanted = dpp(x.double(), r, [13], executor="reference")
    for executor in ("auto", "steps", *(["triton"] if dtype != torch.float64 else [])):
        assert dpp(x, r, [13], executor=executor).equal(wanted)


def test_bad_input():
    x, r = clips(0, [5], 4)
    for keep, counts in (([6], None), ([-1], None), ([1, 1], None), ([3], [2]), ([3], [6])):
        with pytest.raises(UsageError, match="keep"):
            dpp(x, r, keep, counts)
    with pytest.raises(UsageError, match="relevance"):
        dpp(x, r[:, :4], [2])
    for bad in (float("nan"), float("inf")):
        x[0, 3, 1] = bad
        with pytest.raises(NotFiniteError):
            dpp(x, r, [2])
        assert dpp(x, r, [2], [3]).shape == (1, 2)


def test_wide_clips_go_elsewhere(monkeypatch):
    x, r = clips(0, [5], 4)
    monkeypatch.setattr(module, "MOST_TOKENS", 4)
    assert not DPP.implementations[1].supports(x, r)[0]
