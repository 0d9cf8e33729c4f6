"""Tokens without near copies: every form leaves those that the reference leaves."""

import pytest
import torch

from angelslim_mmprune.kernels.distinct import DISTINCT, rounds


def drawn(seed, copies=False):
    """Three pools, NaN behind their tokens, of which some are to choose among."""
    generator = torch.Generator().manual_seed(seed)
    sizes, counts = (41, 23, 9), (33, 20, 4)
    x = torch.randn(3, 41, 6, generator=generator)
    if copies:
        x = x[:, torch.arange(41) % 5]
    tokens = torch.full((3, 33), -1)
    for p, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        x[p, size:] = torch.nan
        tokens[p, :count] = torch.randperm(size, generator=generator)[:count].sort().values
    return x, tokens, sizes, counts


@pytest.mark.parametrize("executor", ["torch", "triton"])
def test_every_form_leaves_what_the_reference_leaves(executor):
    for wanted, step in (((7, 19, 2), 3), ((1, 0, 4), 8), ((15, 1, 1), 1)):
        x, tokens, sizes, counts = drawn(step)
        found = DISTINCT(x, tokens, sizes, counts, wanted, step, executor=executor)
        assert [int((row >= 0).sum()) for row in found] == list(wanted)
        assert found.tolist() == DISTINCT(x, tokens, sizes, counts, wanted, step, executor="reference").tolist()


def test_of_copies_the_first_go():
    for wanted in ((7, 19, 2), (12, 3, 0)):
        x, tokens, sizes, counts = drawn(1, copies=True)
        found, exact = (DISTINCT(x, tokens, sizes, counts, wanted, 4, executor=name).tolist() for name in ("triton", "reference"))
        assert found == exact


@pytest.mark.parametrize("executor", ["torch", "triton", "reference"])
def test_none_wanted(executor):
    x, tokens, sizes, counts = drawn(0)
    assert DISTINCT(x, tokens, sizes, counts, (0, 0, 0), 8, executor=executor).shape == (3, 0)


def test_rounds_end_where_as_many_are_left_as_wanted():
    for counts, wanted, step in (((33, 20, 4), (7, 19, 2), 3), ((9, 5), (1, 0), 8), ((6,), (6,), 2)):
        goings = rounds(counts, wanted, step)
        assert [sum(of) for of in zip(*goings, strict=True)] == ([n - k if k else 0 for n, k in zip(counts, wanted, strict=True)] if goings else [])
        assert all(0 <= gone <= step for going in goings for gone in going)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_what_is_left_on_a_gpu():
    """The reference's tokens where cosines are told apart; 99 in 100 where they are drawn, as a near tie changes which are held against which."""
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(64, 512)[torch.arange(600) % 64][None].repeat(2, 1, 1).cuda().bfloat16()
    tokens = torch.arange(600).repeat(2, 1).cuda()
    for wanted in ((100, 300), (7, 0)):
        found, exact = (DISTINCT(x, tokens, (600, 600), (600, 600), wanted, 8, executor=name) for name in ("triton", "reference"))
        assert found.tolist() == exact.tolist()
    x = torch.randn(1, 2048, 1024, generator=generator).cuda().bfloat16()
    tokens = torch.arange(0, 2048).cuda()[None]
    found, exact = (set(DISTINCT(x, tokens, (2048,), (2048,), (512,), 8, executor=name)[0].tolist()) for name in ("triton", "reference"))
    assert len(found) == 512 and len(found & exact) >= 507
