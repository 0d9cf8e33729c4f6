"""Statistics of attention against eager softmax attention in FP64, one row of one head at a time."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from angelslim_core.errors import EngineError, UsageError
from angelslim_mmprune.kernels.received import LSE, RECEIVED, lse_blocked, received_blocked
from angelslim_mmprune.statistics import of_llm, of_pieces

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 1.5).to(DEVICE, dtype)


def qk(batch, heads, kv_heads, tokens, width, seed=0):
    """Views of something wider, as rotated queries and keys are."""
    q = made(batch, tokens, heads, width + 3, seed=seed)[..., :width].transpose(1, 2)
    return q, made(batch, tokens, kv_heads, width, seed=seed + 1).transpose(1, 2)


def weights(q, k, scale, seen):
    """[H, T, N] in FP64 of one row of a batch; seen(t, n): whether query t sees key n."""
    heads, queries, _ = q.shape
    out = torch.zeros(heads, queries, k.shape[1], dtype=torch.float64)
    for h in range(heads):
        for t in range(queries):
            keys = [n for n in range(k.shape[1]) if seen(t, n)]
            if keys:
                score = k[h * k.shape[0] // heads, keys].double().cpu() @ q[h, t].double().cpu() * scale
                out[h, t, keys] = (score - score.logsumexp(0)).exp()
    return out


def close(found, wanted, **tolerance):
    torch.testing.assert_close(found.double().cpu(), wanted, **({"rtol": 2e-5, "atol": 1e-6} | tolerance))


def units(x, unit):
    return x[: len(x) // unit * unit].view(-1, unit).sum(1)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["heads", "grouped"])
@pytest.mark.parametrize("unit", [1, 4])
def test_pieces_of_their_own(heads, unit):
    """Windows of several sizes: weights of each sum to 1 within it, and results keep the encoder's order."""
    pieces = [qk(1, *heads, size, 5, seed=i) for i, size in enumerate((8, 16, 8, 4))]
    all_of = [weights(q[0], k[0], 0.4, lambda t, n: True) for q, k in pieces]
    wanted = torch.cat([units(w.mean(0).sum(0), unit) for w in all_of])
    found = of_pieces("received", pieces, unit, False, 0.4)
    close(found, wanted[None])
    assert torch.equal(found, of_pieces("importance", pieces, unit, False, 0.4))
    assert math.isclose(float(found.sum()), 36, rel_tol=1e-5)
    keys = torch.cat([k[0].double().mean(0).view(-1, unit, 5).mean(1) for _, k in pieces])
    close(of_pieces("keys", pieces, unit, False, 0.4), keys[None].cpu())


def test_windows_in_another_order():
    """What is said of a window moves with it."""
    pieces = [qk(1, 2, 2, size, 8, seed=i) for i, size in enumerate((8, 4, 12))]
    parts = of_pieces("received", pieces, 4, False, 0.3).split([2, 1, 3], 1)
    order = [2, 0, 1]
    torch.testing.assert_close(of_pieces("received", [pieces[i] for i in order], 4, False, 0.3), torch.cat([parts[i] for i in order], 1))


def test_a_class_token_is_no_patch():
    """Its row is over patches only; as a query it counts in what they receive."""
    q, k = qk(3, 4, 4, 10, 6)
    found = of_pieces("importance", [(q, k)], 1, True, 0.5)
    received, keys = (of_pieces(name, [(q, k)], 1, True, 0.5) for name in ("received", "keys"))
    assert found.shape == (3, 9) and keys.shape == (3, 9, 6)
    for row in range(3):
        close(found[row], weights(q[row], k[row], 0.5, lambda t, n: n > 0)[:, 0].mean(0)[1:])
        close(received[row], weights(q[row], k[row], 0.5, lambda t, n: True).mean(0).sum(0)[1:])
        close(keys[row], k[row, :, 1:].double().mean(0).cpu())


@pytest.mark.parametrize("lengths", [None, [14, 7, 1]], ids=["whole", "padded"])
@pytest.mark.parametrize("unit", [2, 4])
def test_pooled(lengths, unit):
    """Samp: A' = mean over a unit's queries, sum over its keys; its diagonal with heads' mean, and its columns' mean with the highest head."""
    q, k = qk(3, 4, 2, 16, 5)
    if lengths:
        for row, length in enumerate(lengths):
            q[row, :, length:] = k[row, :, length:] = torch.nan
    diagonal, most = (of_pieces(name, [(q, k)], unit, False, 0.4, lengths) for name in ("pooled_diagonal", "pooled_max"))
    received, keys = (of_pieces(name, [(q, k)], unit, False, 0.4, lengths) for name in ("received", "keys"))
    assert diagonal.shape == most.shape == received.shape == (3, 16 // unit)
    for row, length in enumerate(lengths or [16] * 3):
        w = weights(q[row], k[row], 0.4, lambda t, n, length=length: t < length and n < length)
        tokens = length // unit
        rest = torch.zeros(16 // unit - tokens, dtype=torch.float64)

        def pooled(x, tokens=tokens):
            return x[: tokens * unit, : tokens * unit].view(tokens, unit, tokens, unit).mean(1).sum(2)

        close(diagonal[row], torch.cat([pooled(w.mean(0)).diagonal(), rest]))
        close(most[row], torch.cat([pooled(w.amax(0)).sum(0) / max(tokens, 1), rest]))
        close(received[row], torch.cat([units(w.mean(0).sum(0)[:length], unit), rest]))
        close(keys[row, :tokens], k[row].double().cpu().mean(0)[: tokens * unit].view(tokens, unit, 5).mean(1))
        assert not keys[row, tokens:].any()


@pytest.mark.parametrize("queries", [9, 4], ids=["prompt", "later turn"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("lengths", [None, [9, 6, 7]], ids=["whole", "padded"])
def test_a_language_model(lengths, left, queries):
    q, k = qk(3, 6, 2, 9, 8)
    q = q[:, :, 9 - queries :]
    spans = [(9 - n, 9) if left else (0, n) for n in lengths or [9] * 3]
    for row, (low, high) in enumerate(spans):
        k[row, :, :low] = k[row, :, high:] = torch.nan
    row_of, received, raw = (of_llm(name, q, k, 0.3, lengths, left) for name in ("last_row", "received", "raw_keys"))
    off = 9 - queries
    for row, (low, high) in enumerate(spans):
        w = weights(q[row], k[row], 0.3, lambda t, n, low=low, high=high: low <= t + off < high and low <= n < high and n <= t + off)
        close(row_of[row], w[:, high - 1 - off].mean(0))
        close(received[row], w.mean(0).sum(0))
        flat = k[row].transpose(0, 1).flatten(1)
        assert torch.equal(raw[row, low:high], flat[low:high]) and not raw[row, :low].any() and not raw[row, high:].any()


def test_nan_is_passed_on():
    q, k = qk(1, 2, 2, 6, 4)
    q[0, 1, 3] = torch.nan
    for name in ("received", "pooled_max"):
        assert of_pieces(name, [(q, k)], 2, False, 1.0).isnan().all()


def test_what_cannot_be_had():
    piece = qk(1, 2, 2, 6, 4)
    with pytest.raises(UsageError, match="none of an encoder's"):
        of_pieces("last_row", [piece], 1, False, 1.0)
    with pytest.raises(UsageError, match="units of 4"):
        of_pieces("received", [piece], 4, False, 1.0)
    with pytest.raises(UsageError, match="2 calls of attention with lengths"):
        of_pieces("received", [piece, piece], 1, False, 1.0, [3])
    with pytest.raises(UsageError, match="class token"):
        of_pieces("pooled_max", [piece], 1, True, 1.0)
    with pytest.raises(UsageError, match="none of a language model's"):
        of_llm("keys", *piece, 1.0)


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("statistic", ["received", "pooled_max", "pooled_diagonal"])
@pytest.mark.parametrize("batch", [1, 3])
def test_memory_is_that_of_some_rows(statistic, batch):
    heads, tokens = 2, 1400
    piece = qk(batch, heads, heads, tokens, 4)
    with Largest() as largest:
        of_pieces(statistic, [piece], 2, False, 0.5)
    assert largest.numbers <= heads * 512 * tokens < batch * heads * tokens**2


@pytest.mark.parametrize("block", [1, 5, 7, 64])
def test_blocks_that_do_not_divide(block):
    q, k = qk(2, 4, 2, 23, 8)
    q = q[:, :, 4:]
    span = torch.tensor([[3, 21], [0, 23]], device=DEVICE)
    for causal in (False, True):
        wanted = LSE(q, k, 0.3, span, causal, executor="reference")
        torch.testing.assert_close(lse_blocked(q, k, 0.3, span, causal, block), wanted)
        for highest in (False, True):
            wanted = RECEIVED(q, k, 0.3, span, None, causal, highest, executor="reference")
            torch.testing.assert_close(received_blocked(q, k, 0.3, span, None, causal, highest, block), wanted)


# of rows, queries, keys, query heads, KV heads, width
CASES = [(1, 64, 64, 1, 1, 64), (1, 37, 37, 3, 1, 20), (2, 20, 37, 4, 2, 16), (2, 1, 9, 2, 2, 80), (1, 34, 34, 1, 1, 160)]


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_triton_matches_the_reference(case, padded, causal):
    pytest.importorskip("triton")
    batch, queries, keys, heads, kv_heads, width = case
    q, k = qk(batch, heads, kv_heads, keys, width)
    q = q[:, :, keys - queries :]
    span = asking = None
    if padded:
        span = torch.tensor([[row * 3, max(row * 3 + 1, keys - row)] for row in range(batch)], device=DEVICE)
        asking = (span - 2).clamp(min=0) if not causal else span
        for row, (low, high) in enumerate(span.tolist()):
            k[row, :, :low] = k[row, :, high:] = torch.nan
    clean = k.nan_to_num()
    torch.testing.assert_close(LSE(q, k, 0.2, span, causal, executor="triton"), LSE(q, clean, 0.2, span, causal, executor="reference"), rtol=1e-5, atol=1e-5)
    for highest in (False, True):
        found = RECEIVED(q, k, 0.2, span, asking, causal, highest, executor="triton")
        torch.testing.assert_close(found, RECEIVED(q, clean, 0.2, span, asking, causal, highest, executor="reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_what_triton_does_not_take(dtype):
    pytest.importorskip("triton")
    q, k = (x.to(dtype) for x in qk(1, 4, 2, 20, 32))
    wanted = weights(q[0], k[0], 0.2, lambda t, n: True).mean(0).sum(0)
    for executor in ("triton", "torch" if DEVICE == "cpu" else "blocked", "reference"):
        close(RECEIVED(q, k, 0.2, executor=executor)[0], wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(EngineError, match="one dtype"):
        RECEIVED(q, k.float(), 0.2, executor="triton")
    with pytest.raises(EngineError, match="no gradients"):
        RECEIVED(q.float().requires_grad_(), k.float(), 0.2, executor="triton")


def test_triton_passes_nan_on():
    pytest.importorskip("triton")
    q, k = qk(1, 2, 2, 20, 16)
    q[0, 1, 3] = torch.nan
    for highest in (False, True):
        assert RECEIVED(q, k, 0.2, None, None, False, highest, executor="triton").isnan().all()
    lse = LSE(q, k, 0.2, executor="triton").isnan()
    assert lse[0, 1, 3] and lse.sum() == 1
