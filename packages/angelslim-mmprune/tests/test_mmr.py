"""Maximal marginal relevance, held against a slow oracle in float64."""

import pytest
import torch

from angelslim_core.errors import NumericError, UsageError
from angelslim_mmprune.kernels import mmr as kernel
from angelslim_mmprune.marginal_relevance import mmr, mmr_order, scaled

EXECUTORS = ["reference", "torch", "triton"]


def oracle(x, importance, k, lam, parallel_k=1):
    """Order of picks; of one sample, each score made anew from all that was picked, in float64."""
    x, w = x.double(), importance.double()
    x = torch.nn.functional.normalize(x, dim=-1)
    w = (w - w.min()) / (w.max() - w.min() + 1e-6)
    picked = []
    while len(picked) < k:
        left = [i for i in range(len(x)) if i not in picked]
        score = {i: float(w[i]) if not picked else lam * float(w[i]) - (1 - lam) * max(float(x[i] @ x[j]) for j in picked) for i in left}
        # rounding in float64 is far below 1e-12, and differences are far above
        picked += sorted(left, key=lambda i: (-round(score[i], 12), i))[: min(parallel_k, k - len(picked))]
    return picked


def fan():
    """Fixture M of the design note."""
    angle = torch.tensor([0, 10, 20, 90, 100, 180]).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], -1)[None], torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.1]])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("lam", "parallel_k", "order"),
    [(1, 1, [0, 1, 2, 3]), (0.7, 1, [0, 3, 1, 2]), (0.5, 1, [0, 5, 3, 1]), (0.3, 1, [0, 5, 3, 1]), (0, 1, [0, 5, 3, 2]), (0.5, 2, [0, 1, 5, 4])],
)
def test_a_fan_of_six(executor, lam, parallel_k, order):
    x, w = fan()
    assert mmr_order(x, w, 4, lam, parallel_k, executor=executor)[0].tolist() == order
    assert mmr(x, w, 4, lam, parallel_k, executor=executor)[0].tolist() == sorted(order)


@pytest.mark.parametrize("lam", [0, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("parallel_k", [1, 3])
@pytest.mark.parametrize("executor", ["reference", "torch"])
def test_equals_the_oracle(lam, parallel_k, executor):
    torch.manual_seed(0)
    for tokens, k, width in ((1, 1, 3), (2, 1, 1), (33, 33, 8), (50, 7, 16), (64, 40, 5)):
        x, w = torch.randn(2, tokens, width), torch.randn(2, tokens)
        if width == 1:
            w = torch.tensor([[0.1, 0.9], [0.5, 0.2]])
        found = mmr_order(x, w, k, lam, parallel_k, executor=executor)
        wanted = [oracle(x[b], w[b], k, lam, parallel_k) for b in range(2)]
        assert [sorted(row) for row in wanted] == mmr(x, w, k, lam, parallel_k, executor=executor).tolist()
        assert k == tokens or found.tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["cosines", "steps"])
def test_triton_equals_the_oracle(form, dtype):
    """On tokens that differ in number, behind which stands NaN, several tiles and programs' rows; the last sample keeps all."""
    from angelslim_mmprune.kernels.triton.mmr import picks

    torch.manual_seed(1)
    counts, ks = (37, 18, 5), (6, 3, 5)
    x, w = torch.randn(3, 37, 24 if dtype == torch.float16 else 21).to(dtype), torch.randn(3, 37)
    for b, count in enumerate(counts):
        x[b, count:], w[b, count:] = torch.nan, torch.nan
    found = picks(x, scaled(w, counts), counts, ks, 0.4, 1, gram_bytes=8000 if form == "cosines" else 100)
    assert bool(found.finite) and found.order.dtype == torch.int64
    for b, (count, k) in enumerate(zip(counts, ks, strict=True)):
        assert found.order[b].tolist() == oracle(x[b, :count], w[b, :count], k, 0.4) + [-1] * (6 - k)
    x[1, 2, 3] = torch.inf
    assert not bool(picks(x[1:2], scaled(w[1:2], counts[1:2]), counts[1:2], (2,), 0.4, 1, gram_bytes=8000 if form == "cosines" else 100).finite)


def test_cosines_of_two_halves_are_as_good_as_fp32s():
    from angelslim_mmprune.kernels.triton.mmr import cosines

    torch.manual_seed(0)
    x = torch.randn(1, 21, 70)
    x[0, 20] = x[0, 3]
    found = cosines(x, torch.tensor([21], dtype=torch.int32))[0][0, :, :21]
    exact = torch.nn.functional.normalize(x[0].double(), dim=-1)
    assert float((found - exact @ exact.T).abs().max()) < 3e-6
    assert float(found[20, 3]) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosines_on_a_gpu_are_symmetric_to_the_bit(dtype):
    from angelslim_mmprune.kernels.triton.mmr import cosines

    torch.manual_seed(0)
    x = torch.randn(2, 300, 520, device="cuda").to(dtype)
    x[:, 290] = x[:, 3]
    found = cosines(x, torch.tensor([300, 300], dtype=torch.int32, device="cuda"))[0][..., :300]
    exact = torch.nn.functional.normalize(x.double(), dim=-1)
    assert float((found - exact @ exact.mT).abs().max()) < 1e-4
    assert torch.equal(found, found.mT) and torch.equal(found[:, 290], found[:, 3])


@pytest.mark.parametrize("parallel_k", [1, 2])
def test_triton_takes_turns_and_rounds(parallel_k):
    from angelslim_mmprune.kernels.triton.mmr import picks

    torch.manual_seed(2)
    x, w = torch.randn(1, 20, 16).half(), torch.rand(1, 20)
    x[0, 7], w[0, 7] = x[0, 3], w[0, 3]
    wanted = oracle(x[0], w[0], 9, 0.5, parallel_k)
    for gram_bytes in (1 << 20, 100):
        assert picks(x, scaled(w, (20,)), (20,), (9,), 0.5, parallel_k, gram_bytes=gram_bytes).order[0].tolist() == wanted


def test_forms_agree(monkeypatch):
    """All cosines or those of a pick, many samples or one, padded or not."""
    torch.manual_seed(3)
    counts, ks = (40, 13, 27), (11, 4, 20)
    x, w = torch.randn(3, 40, 12), torch.rand(3, 40)
    for b in range(3):
        x[b, counts[b] :], w[b, counts[b] :] = 100, 50
    whole = mmr(x, w, ks, counts=counts)
    assert (whole >= 0).sum(1).tolist() == list(ks) and all(bool((row[row >= 0].diff() > 0).all()) for row in whole)
    monkeypatch.setattr(kernel, "GRAM_TOKENS", 0)
    assert torch.equal(mmr(x, w, ks, counts=counts), whole)
    monkeypatch.setattr(kernel, "GRAM_BYTES", 1)
    assert torch.equal(mmr(x, w, ks, counts=counts), whole)
    for b in range(3):
        assert mmr(x[b : b + 1, : counts[b]], w[b : b + 1, : counts[b]], ks[b])[0].tolist() == whole[b, : ks[b]].tolist()


@pytest.mark.parametrize("parallel_k", [1, 4])
def test_lam_1_takes_the_most_important(parallel_k):
    torch.manual_seed(4)
    x, w = torch.randn(2, 60, 8), torch.randn(2, 60)
    assert torch.equal(mmr(x, w, 20, 1.0, parallel_k), w.topk(20).indices.sort().values)


@pytest.mark.parametrize("executor", ["reference", "torch"])
def test_a_copy_is_taken_by_the_rule_of_exchange(executor):
    """The copy, of importance I and similarity 1, beats another, of I' and m, iff lam (I - I') > (1 - lam) (1 - m)."""
    lam, m, high = 0.6, 0.7, 0.9
    for other, wins in ((high - (1 - lam) * (1 - m) / lam - 0.01, "copy"), (high - (1 - lam) * (1 - m) / lam + 0.01, "other")):
        x = torch.tensor([[[1.0, 0], [1, 0], [m, (1 - m * m) ** 0.5], [-1, 0]]])
        # the first is the seed; the last, of importance 0, sets the scale and is far away
        w = torch.tensor([[1.0, high, other, 0.0]])
        order = mmr_order(x, w, 3, lam, executor=executor)[0].tolist()
        rest = [i for i in order if i in (1, 2)]
        assert rest[0] == (1 if wins == "copy" else 2), (order, other)
    copies = torch.eye(5).repeat(3, 1)[None]
    assert sorted(i % 5 for i in mmr_order(copies, torch.rand(1, 15), 5, 0.0, executor=executor)[0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_ties_go_to_the_lowest(executor):
    torch.manual_seed(5)
    one = torch.randn(1, 1, 33)
    assert mmr_order(one.repeat(1, 19, 1), torch.ones(1, 19), 4, executor=executor)[0].tolist() == [0, 1, 2, 3]
    # each of five tokens four times, far apart in the matrix
    x, w = torch.randn(1, 5, 33).repeat(1, 4, 1), torch.full((1, 20), 2.0)
    wanted = oracle(x[0], w[0], 9, 0.5)
    assert mmr_order(x, w, 9, executor=executor)[0].tolist() == wanted and sorted(i % 5 for i in wanted[:5]) == [0, 1, 2, 3, 4]
    assert mmr_order(torch.zeros(1, 6, 4), torch.zeros(1, 6), 3, executor=executor)[0].tolist() == [0, 1, 2]


def test_scale_and_order_of_the_input_do_not_matter():
    torch.manual_seed(6)
    x, w = torch.randn(1, 50, 16), torch.rand(1, 50)
    kept = mmr(x, w, 12)
    assert torch.equal(mmr(x * 37.5, w, 12), kept) and torch.equal(mmr(x, 3 * w - 5, 12), kept)
    order = torch.randperm(50)
    assert sorted(order[mmr(x[:, order], w[:, order], 12)[0]].tolist()) == kept[0].tolist()


def test_what_is_refused():
    x, w = torch.randn(2, 10, 4), torch.rand(2, 10)
    for options in (
        {"k": 0}, {"k": 11}, {"k": [3, 11]}, {"k": [3]}, {"k": [3, 6], "counts": [10, 5]}, {"k": 3, "counts": [10, 11]}, {"k": 3, "lam": 1.01},
        {"k": 3, "lam": float("nan")}, {"k": 3, "parallel_k": 0}, {"k": 3, "parallel_k": True},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            mmr(x, w, **options)
    for features, importance in ((x[0], w), (x, w[:, :9]), (x.long(), w), (x[:, :0], w[:, :0]), (x, w.to("meta"))):
        with pytest.raises(UsageError):
            mmr(features, importance, 1)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("what", ["features", "importance"])
def test_nan_is_an_error_of_both_kinds(executor, k, what):
    x, w = torch.randn(1, 8, 4), torch.rand(1, 8)
    (x if what == "features" else w).view(-1)[5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        mmr(x, w, k, executor=executor)
    with pytest.raises(NumericError):
        mmr(x, w, k, executor=executor)
    assert mmr(x, w, k, executor=executor, check=False).shape == (1, k)
