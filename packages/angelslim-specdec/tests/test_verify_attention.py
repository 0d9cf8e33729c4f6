"""Attention of tokens under verification: Triton's kernel (interpreted where there is no GPU) against the reference."""

from functools import partial

import pytest
import torch

from angelslim_core.errors import EngineError
from angelslim_specdec.attention import Visible
from angelslim_specdec.kernels.tree import ancestors_of
from angelslim_specdec.kernels.verify_attention import VERIFY_ATTENTION
from angelslim_specdec.target import Target

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of tokens, slots, query heads, KV heads, width, width of values, window
CASES = [
    (1, 40, 9, 3, 64, 64, None), (1, 700, 3, 3, 16, 16, None), (5, 200, 9, 3, 64, 64, None), (8, 301, 8, 1, 80, 80, None), (3, 90, 4, 1, 192, 128, None),
    (7, 250, 6, 2, 96, 32, 33), (64, 100, 4, 1, 32, 32, None), (17, 177, 2, 2, 256, 256, 140), (2, 60, 8, 2, 128, 128, 4), (12, 60, 4, 2, 16, 16, 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def kernel():
    from angelslim_specdec.kernels.triton import verify_attention

    return verify_attention


def qkv(tokens, slots, heads, kv_heads, width, v_width, lengths, dtype=torch.float32, new=None):
    """q, k and v, views of something wider; what no token may see is NaN."""
    generator = torch.Generator().manual_seed(tokens)
    batch = len(lengths)
    q = torch.randn(batch, tokens, heads, width, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, slots + 3, n, generator=generator).to(DEVICE, dtype) for n in (width, v_width))
    for row, length in enumerate(lengths):
        k[row, :, length + (new or tokens) :] = v[row, :, length + (new or tokens) :] = torch.nan
    return q, k[:, :, :slots], v[:, :, :slots]


def tree_of(batch, proposed):
    """Parents [B, K] at random."""
    generator = torch.Generator().manual_seed(proposed)
    return torch.stack([torch.tensor([int(torch.randint(-1, i, (), generator=generator)) for i in range(proposed)]) for _ in range(batch)]).to(DEVICE)


def visible_of(lengths, tokens, tree):
    lengths = torch.tensor(lengths, device=DEVICE)
    if not tree:
        return Visible(lengths, torch.arange(tokens, device=DEVICE))
    ancestors, depths = ancestors_of(tree_of(len(lengths), tokens - 1))
    return Visible(lengths, depths, ancestors)


def wanted(q, k, v, visible, scale, window):
    """The reference; to what nobody sees it gives weight 0, which makes NaN of a NaN."""
    return VERIFY_ATTENTION(q, k.nan_to_num(), v.nan_to_num(), visible, scale, window, executor="reference")


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_matches_the_reference(kernel, case, tree):
    *sizes, window = case
    tokens, slots = sizes[:2]
    lengths = [0, slots - tokens, (slots - tokens) // 2]
    q, k, v = qkv(*sizes, lengths)
    visible = visible_of(lengths, tokens, tree)
    expected = wanted(q, k, v, visible, 0.2, window)
    for config in (None, kernel.Config(keys=64, alone=64, programs=4)):
        torch.testing.assert_close(kernel.verify_attention(q, k, v, visible, 0.2, window, config), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    lengths = [700, 90]
    q, k, v = qkv(6, 800, 9, 3, 64, 64, lengths, dtype)
    visible = visible_of(lengths, 6, True)
    found = VERIFY_ATTENTION(q, k, v, visible, 0.125, executor="triton")
    assert found.dtype == dtype and found.shape == (2, 9, 6, 64)
    torch.testing.assert_close(found, wanted(q, k, v, visible, 0.125, None), rtol=2e-2, atol=2e-3)


def test_parts_are_merged_whenever_they_come_and_counters_start_anew(kernel):
    lengths = [500, 3, 200]
    q, k, v = qkv(4, 560, 6, 2, 32, 32, lengths)
    visible = visible_of(lengths, 4, False)
    config = kernel.Config(keys=128, alone=128)
    first = kernel.verify_attention(q, k, v, visible, 0.2, config=config)
    assert torch.equal(first, kernel.verify_attention(q, k, v, visible, 0.2, config=config))
    counters = [made[2] for made in visible.rooms.values()]
    assert len(counters) == 1 and len(counters[0]) == 6 and not counters[0].any()


def test_tokens_that_see_earlier_ones_behind_what_is_confirmed():
    """As the levels of a draft's tree do: three tokens, after four of the levels before."""
    lengths = [20, 5]
    q, k, v = qkv(3, 64, 4, 2, 16, 16, lengths, new=7)
    seen = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    visible = Visible(torch.tensor(lengths, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE), seen.to(DEVICE))
    found = VERIFY_ATTENTION(q, k, v, visible, 0.25, executor="triton")
    torch.testing.assert_close(found, wanted(q, k, v, visible, 0.25, None), rtol=1e-4, atol=1e-5)


def test_says_what_it_does_not_take():
    def refused(why, tokens=2, width=16, lengths=True, gradients=False):
        q, k, v = (x.nan_to_num() for x in qkv(tokens, 80, 2, 2, width, 16, [3]))
        visible = Visible(torch.tensor([3], device=DEVICE) if lengths else None, torch.arange(tokens, device=DEVICE))
        with pytest.raises(EngineError, match=why):
            VERIFY_ATTENTION(q.requires_grad_(gradients), k, v, visible, 0.2, executor="triton")

    refused("up to 64 tokens", tokens=65)
    refused("up to 256 wide", width=257)
    refused("keys in slots", lengths=False)
    refused("no gradients", gradients=True)


@torch.no_grad()
def test_a_model_attends_by_it(tiny, monkeypatch):
    from transformers import AutoModelForCausalLM

    from angelslim_specdec import attention

    said = {}
    for executor in ("reference", "triton"):
        target = Target(AutoModelForCausalLM.from_pretrained(tiny("mistral", dtype="float32", sliding_window=5)).eval().to(DEVICE))
        cache = target.new_cache(2, 32, static=True)
        ids = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        target.prefill(ids, torch.tensor([12, 4], device=DEVICE), cache)
        monkeypatch.setattr(attention, "VERIFY_ATTENTION", partial(VERIFY_ATTENTION, executor=executor))
        chain = target.forward(ids[:, :4], cache).logits
        cache.commit(torch.tensor([4, 1], device=DEVICE))
        said[executor] = chain, target.forward(ids[:, :6], cache, parents=tree_of(2, 5)).logits
        monkeypatch.undo()
    for found, wanted in zip(said["triton"], said["reference"], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
