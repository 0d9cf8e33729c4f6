"""Observers: hand-computed cases, and independence of order, batch size and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from angelslim_core.calibration.observers import EMA, OBSERVERS, AbsMax, Groupwise, Histogram
from angelslim_core.errors import NumericError

FREE_OF_ORDER = {
    "tensor": lambda: AbsMax("tensor"),
    "channel": lambda: AbsMax("channel"),
    "group": lambda: AbsMax("group", 4),
    "groupwise": lambda: Groupwise(3),
    "histogram": Histogram,
    "median": lambda: Histogram(0.5),
}


def rows(seed, num=37, columns=11):
    """Rows whose size varies by many powers of two, some zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, columns, generator=generator) * torch.exp2(torch.randint(-30, 30, (num, 1), generator=generator))
    x[torch.rand(num, generator=generator) < 0.1] = 0
    return x


def result(make, *parts):
    observer = make()
    for part in parts:
        observer.observe(part)
    return observer.result()


@pytest.mark.parametrize("make", FREE_OF_ORDER.values(), ids=FREE_OF_ORDER)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 40), padding=st.integers(0, 5))
def test_independent_of_order_batch_size_and_padding(make, seed, size, padding):
    x = rows(seed)
    expected = result(make, x)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    assert torch.equal(result(make, *shuffled.split(size)), expected)
    parts = []
    for part in x.split(size):
        padded = torch.cat([part, torch.full((padding, x.shape[1]), 1e9)])
        mask = torch.arange(len(padded)) < len(part)
        parts += [padded[mask], padded[:0]]
    assert torch.equal(result(make, *parts), expected)


@pytest.mark.parametrize("make", FREE_OF_ORDER.values(), ids=FREE_OF_ORDER)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 37))
def test_merge(make, seed, cut):
    x = rows(seed)
    left, right = make(), make()
    left.observe(x[:cut])
    right.observe(x[cut:])
    kept = x[cut:].clone()
    left.merge(right)
    assert torch.equal(left.result(), result(make, x)) and left.rows == len(x)
    # the other one is left as it was
    left.observe(torch.full((1, x.shape[1]), 1e30))
    if len(kept):
        assert torch.equal(right.result(), result(make, kept))


def test_absmax_by_hand():
    x = torch.tensor([[1.0, -5.0, 0.5, 0.0, 2.0], [-3.0, 4.0, 0.25, 0.0, -7.0]])
    assert result(AbsMax, x).tolist() == [7]
    assert result(lambda: AbsMax("channel"), x).tolist() == [3, 5, 0.5, 0, 7]
    assert result(lambda: AbsMax("group", 2), x).tolist() == [5, 0.5, 7]
    assert result(lambda: AbsMax("group", 8), x).tolist() == [7]
    assert result(OBSERVERS["groupwise"], x.repeat(1, 60)).shape == (3,)
    with pytest.raises(ValueError, match="group_size"):
        AbsMax("group")


def test_result_is_no_view():
    observer = AbsMax("channel")
    x = torch.ones(1, 2)
    observer.observe(x)
    observer.result().zero_()
    x.zero_()
    assert observer.result().tolist() == [1, 1]


def test_ema_by_hand():
    peaks = [2.0, 8.0, 4.0]
    observer = EMA()
    mean = 0.0
    for step, peak in enumerate(peaks, 1):
        observer.observe(torch.tensor([[0.5, -peak]]))
        mean = 0.98 * mean + 0.02 * peak
        assert observer.result().item() == pytest.approx(mean / (1 - 0.98**step), rel=1e-6)
    # without the correction the first result would be 0.04
    assert result(EMA, torch.tensor([[2.0]])).item() == pytest.approx(2)
    assert result(EMA, torch.tensor([[2.0]]), torch.zeros(0, 1)).item() == pytest.approx(2)
    assert not hasattr(observer, "merge")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(1, 300), p=st.floats(0, 1), scale=st.sampled_from([1e-20, 1e-3, 1.0, 3e7]))
def test_quantile_within_a_bin(seed, num, p, scale):
    x = torch.randn(num, 5, generator=torch.Generator().manual_seed(seed)) ** 3 * scale
    observer = Histogram()
    for part in x.split(17):
        observer.observe(part)
    width = 2 * x.abs().max().item() / Histogram.BINS
    exact = torch.quantile(x.abs().flatten().double(), p).item()
    assert abs(observer.quantile(p).item() - exact) <= width
    assert observer.quantile(1).item() == x.abs().max().item()


def test_histogram_leaves_outliers_out():
    x = torch.linspace(-1, 1, 100_000).view(-1, 10)
    observer = Histogram()
    observer.observe(x)
    observer.observe(torch.tensor([[4.0]]))
    assert observer.result().item() == pytest.approx(0.9999, abs=8 / 2048)
    assert observer.quantile(1).item() == 4


@pytest.mark.parametrize("peak", [0.0, 1e-44, 2.0**-100, 1.0, 2.0**127, 3.4e38])
def test_histogram_edges(peak):
    assert result(Histogram, torch.full((3, 2), peak)).item() == pytest.approx(peak, rel=1e-3)
    assert result(Histogram, torch.zeros(2, 2), torch.full((1, 2), peak)).item() <= peak


def test_histogram_counts_in_parts(monkeypatch):
    x = rows(1)
    expected = result(Histogram, x)
    monkeypatch.setattr(Histogram, "_CHUNK", 5)
    assert torch.equal(result(Histogram, x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", OBSERVERS)
def test_dtypes(name, dtype):
    x = rows(2).clamp(-1000, 1000).to(dtype)
    found = result(OBSERVERS[name], x)
    assert found.dtype == torch.float32
    assert torch.allclose(found, result(OBSERVERS[name], x.float()))
    assert torch.equal(result(OBSERVERS[name], x[None]), found)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(name, bad):
    observer = OBSERVERS[name]()
    observer.observe(torch.ones(1, 3))
    with pytest.raises(NumericError, match=r"column 1.*not finite") as caught:
        observer.observe(torch.tensor([[1.0, bad, 2.0]]))
    assert caught.value.exit_code == 8
    assert observer.result().max().item() == pytest.approx(1)


@pytest.mark.parametrize("name", OBSERVERS)
def test_no_token_seen(name):
    observer = OBSERVERS[name]()
    observer.observe(torch.zeros(0, 3))
    with pytest.raises(NumericError, match="no token"):
        observer.result()
