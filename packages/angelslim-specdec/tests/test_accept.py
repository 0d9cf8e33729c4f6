"""Acceptance from logits: Triton's kernels (interpreted where there is no GPU) say what the rules of `verification` say for the same draws."""

import pytest
import torch

from angelslim_core.errors import EngineError
from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.kernels.accept import ACCEPT_GREEDY, ACCEPT_RATIO

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 6


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def uniforms_of(proposed, seed=3):
    return torch.rand(BATCH, proposed + 1, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def same(kernel, *args):
    """Both forms agree; returns what they say."""
    wanted = kernel(*args, executor="reference")
    found = kernel(*args, executor="triton")
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.int64 and torch.equal(a, b)
    return wanted


def counts_of(proposed):
    return torch.arange(BATCH, device=DEVICE) % (proposed + 1)


@pytest.mark.parametrize(("proposed", "vocabulary"), [(0, 300), (1, 2048), (5, 5000), (8, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy(proposed, vocabulary, dtype):
    logits = normal(BATCH, proposed + 1, vocabulary + 3, dtype=dtype)[..., :vocabulary]
    choices = logits.float().cpu().argmax(-1).to(DEVICE)  # of equals the first, which BF16 has
    for row in range(BATCH):  # right up to a token that differs from row to row
        choices[row, row:] = vocabulary // 2
    accepted, _ = same(ACCEPT_GREEDY, logits, choices[:, :proposed])
    assert accepted.tolist() == [min(row, proposed) for row in range(BATCH)]
    same(ACCEPT_GREEDY, logits, choices[:, :proposed], counts_of(proposed))


def test_of_equal_logits_the_first_is_chosen():
    logits = torch.zeros(1, 2, 6000, device=DEVICE)
    logits[:, 0, [4500, 2100, 2101]] = 1.0
    assert [x.tolist() for x in ACCEPT_GREEDY(logits, torch.tensor([[2100]], device=DEVICE), executor="triton")] == [[1], [0]]


@pytest.mark.parametrize("columns", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize(("proposed", "vocabulary"), [(1, 40), (4, 5000), (7, 2048)])
def test_ratio(proposed, vocabulary, columns):
    warp, seen = Warp(0.8), set()
    logits = 2 * normal(BATCH, proposed + 1, vocabulary)
    logits[..., ::3] += 5
    ids = torch.arange(0, vocabulary, 3, device=DEVICE) if columns else None
    near = logits[:, :proposed] + 0.2 * normal(BATCH, proposed, vocabulary, seed=1)
    q = warp(near if ids is None else near[..., ids])
    for seed in range(2):
        chosen = torch.multinomial(q.flatten(0, 1).cpu(), 1, generator=torch.Generator().manual_seed(seed)).view(BATCH, proposed).to(DEVICE)
        tokens = chosen if ids is None else ids[chosen]
        for counts in (None, counts_of(proposed)):
            accepted, _ = same(ACCEPT_RATIO, logits, warp, tokens, q, ids, uniforms_of(proposed, seed), counts)
            seen |= {a < proposed for a in accepted.tolist()}
    assert seen == {False, True}
    same(ACCEPT_RATIO, logits, warp, tokens.roll(1, 0), q, ids, uniforms_of(proposed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("proposed", [0, 3])
def test_ratio_of_tokens_that_were_not_drawn(proposed, dtype):
    logits = 4 * normal(BATCH, proposed + 1, 3000, dtype=dtype)
    tokens = logits[:, :proposed].float().argmax(-1)
    for counts in (None, counts_of(proposed)):
        same(ACCEPT_RATIO, logits, Warp(1.3), tokens, None, None, uniforms_of(proposed), counts)
    if proposed:
        same(ACCEPT_RATIO, logits, Warp(1.3), tokens - 5000, None, None, uniforms_of(proposed))  # padding is any number


def test_ratio_where_refusal_leaves_nothing():
    logits = normal(BATCH, 2, 300)
    tokens, certain = torch.zeros(BATCH, 1, dtype=torch.int64, device=DEVICE), torch.full((BATCH, 1, 300), 2.0, device=DEVICE)
    accepted, _ = same(ACCEPT_RATIO, logits, Warp(1.0), tokens, certain, None, uniforms_of(1).clamp(min=0.5))
    assert not accepted.any()


def test_says_what_it_does_not_take():
    logits, tokens = normal(1, 2, 30), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    for warp in (Warp(1.0, top_k=3), Warp(1.0, top_p=0.9)):
        with pytest.raises(EngineError, match="no top_k and no top_p"):
            ACCEPT_RATIO(logits, warp, tokens, None, None, uniforms_of(1)[:1], executor="triton")
    with pytest.raises(EngineError, match="in FP32"):
        ACCEPT_RATIO(logits, Warp(1.0), tokens, logits[:, :1].double(), None, uniforms_of(1)[:1], executor="triton")
    with pytest.raises(EngineError, match="beside each other"):
        ACCEPT_GREEDY(logits.mT, tokens, executor="triton")
