"""Recall against attention weights summed by hand, densities against masks."""

import pytest
import torch

from angelslim_sparseattn import make_policy, select, sparse_attention
from angelslim_sparseattn.recall import Dense, densities, everything, low


def attention_weights(q, k, scale):
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


@pytest.mark.parametrize("policy", ["a_shape", "minference", "vecattention"])
def test_recall_is_the_weight_of_what_is_kept(policy):
    torch.manual_seed(0)
    q, k, v = 3 * torch.randn(1, 4, 90, 16), torch.randn(1, 2, 131, 16), torch.randn(1, 2, 131, 24)
    options = {"a_shape": {"n_init": 16, "n_local": 20}, "minference": {"vertical": 20, "slash": 3}, "vecattention": {"theta": 0.5}}[policy]
    index = select(q, k, v, make_policy(policy, **options), block=16, scale=0.2)
    kept = index.to_bool().repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :90, :131]
    if index.tokens is not None:
        rows = torch.repeat_interleave(torch.arange(len(index.tokens.ptr) - 1), index.tokens.ptr.diff())
        single = torch.zeros(len(index.tokens.ptr) - 1, 131, dtype=torch.bool)
        single[rows, index.tokens.col.long()] = True
        kept = kept | single.view(1, 4, -1, 131).repeat_interleave(16, 2)[:, :, :90]
    dense = Dense.of(q, k, v, 0.2, block=16)
    out, lse = sparse_attention(q, k, v, index, return_lse=True, scale=0.2)
    wanted = (attention_weights(q, k, 0.2) * kept).sum(-1)[0]
    assert 0 < wanted.min() < 0.9
    assert torch.allclose(dense.recall(lse).double(), wanted, atol=1e-5)
    exact = attention_weights(q, k, 0.2) @ v.double().repeat_interleave(2, 1)
    assert torch.allclose(dense.out.double(), exact, atol=1e-5)
    assert dense.error(out) == pytest.approx(float((out - exact).norm() / exact.norm()), rel=1e-3)


def test_densities_are_those_of_each_head():
    q, k, v = torch.randn(1, 4, 70, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    index = select(q, k, v, make_policy("xattention", tau=0.5), block=16)
    causal = everything(q, k, 16).to_bool()[0, 0].sum()
    assert torch.allclose(densities(index), index.to_bool()[0].sum((1, 2)) / causal.double())
    assert densities(everything(q, k, 16)).tolist() == [1, 1] and everything(q, k, 16).check().density() == 1
    assert float(densities(index).mean()) == pytest.approx(index.density())


def test_low_is_a_quantile():
    assert low(torch.arange(1, 101).float()) == 5 and low(torch.tensor([3.0])) == 3
