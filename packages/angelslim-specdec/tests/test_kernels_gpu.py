"""Kernels on a GPU: sizes that the interpreter has no time for, programs that run at once, and CUDA graphs."""

import pytest
import torch

from angelslim_specdec.attention import Visible
from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.kernels import tree
from angelslim_specdec.kernels.accept import ACCEPT_GREEDY, ACCEPT_RATIO
from angelslim_specdec.kernels.verify_attention import VERIFY_ATTENTION

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def case(batch, tokens, slots, heads, kv_heads, width, dtype, branches=False, seed=0):
    """q, k, v, and what is visible: rows of all lengths."""
    q = normal(batch, tokens, heads, width, seed=seed, dtype=dtype).transpose(1, 2)
    k, v = (normal(batch, kv_heads, slots, width, seed=seed + n, dtype=dtype) for n in (1, 2))
    lengths = torch.linspace(slots - tokens, 1, batch, device="cuda").long()
    if not branches:
        return q, k, v, Visible(lengths, torch.arange(tokens, device="cuda"))
    parents = (torch.rand(batch, tokens - 1, device="cuda") * torch.arange(1, tokens, device="cuda")).long() - 1
    ancestors, depths = tree.ancestors_of(parents)
    return q, k, v, Visible(lengths, depths, ancestors)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("branches", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("shape", [(1, 6, 2048, 9, 3, 64), (5, 8, 1500, 9, 3, 64), (2, 60, 5000, 32, 8, 128), (1, 1, 32768, 32, 8, 128), (3, 17, 900, 8, 4, 256), (64, 4, 700, 9, 3, 64)], ids=str)  # fmt: skip
def test_attention(shape, branches, window, dtype):
    q, k, v, visible = case(*shape, dtype, branches and shape[1] > 1)
    found = VERIFY_ATTENTION(q, k, v, visible, shape[-1] ** -0.5, window, executor="triton")
    wanted = VERIFY_ATTENTION(q.double(), k.double(), v.double(), visible, shape[-1] ** -0.5, window, executor="reference")
    assert (found.double() - wanted).norm() / wanted.norm() < TOLERANCE[dtype]
    for _ in range(20):  # whoever finishes last
        assert torch.equal(found, VERIFY_ATTENTION(q, k, v, visible, shape[-1] ** -0.5, window, executor="triton"))


def test_auto_takes_triton():
    q, k, v, visible = case(1, 4, 600, 9, 3, 64, torch.bfloat16)
    assert VERIFY_ATTENTION.choose(q, k, v, visible, 0.125).name == "triton"
    assert ACCEPT_GREEDY.choose(normal(1, 3, 100), torch.zeros(1, 2, device="cuda")).name == "triton"


def test_attention_in_a_graph_follows_lengths():
    q, k, v, visible = case(2, 5, 2048, 9, 3, 64, torch.bfloat16)
    assert visible.lengths is not None
    out = torch.empty_like(q)

    def step():
        fresh = Visible(visible.lengths, visible.depths)  # as every forward pass makes one
        for _ in range(3):  # layers, which share memory
            out.copy_(VERIFY_ATTENTION(q, k, v, fresh, 0.125, executor="triton"))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ((2000, 3), (511, 513), (1, 1024)):
        visible.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        wanted = VERIFY_ATTENTION(q, k, v, Visible(visible.lengths, visible.depths), 0.125, executor="reference")
        torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("vocabulary", [49152, 152064])
@pytest.mark.parametrize("batch", [1, 64])
def test_acceptance(vocabulary, batch):
    proposed, warp = 5, Warp(0.8)
    logits = 3 * normal(batch, proposed + 1, vocabulary, dtype=torch.bfloat16)
    tokens = logits[:, :proposed].argmax(-1)
    tokens[:, 3] += 1
    for a, b in zip(ACCEPT_GREEDY(logits, tokens, executor="triton"), ACCEPT_GREEDY(logits, tokens, executor="reference"), strict=True):
        assert torch.equal(a, b)
    columns = torch.arange(0, vocabulary, 6, device="cuda")
    near = logits[:, :proposed].float() + 0.2 * normal(batch, proposed, vocabulary, seed=1)
    for ids in (None, columns):
        q = warp(near if ids is None else near[..., ids])
        drawn = torch.multinomial(q.flatten(0, 1), 1).view(batch, proposed)
        uniforms = torch.rand(batch, proposed + 1, device="cuda")
        args = logits, warp, drawn if ids is None else ids[drawn], q, ids, uniforms
        found, wanted = ACCEPT_RATIO(*args, executor="triton"), ACCEPT_RATIO(*args, executor="reference")
        # rounding may turn a decision, or a draw to the token beside
        assert (found[0] == wanted[0]).float().mean() > 0.98 and (found[1] == wanted[1]).float().mean() > 0.95


@pytest.mark.parametrize("vocabulary", [8192, 32000, 151936])
@pytest.mark.parametrize(("batch", "children"), [(1, 8), (5, 8), (2, 10)])
def test_trees(vocabulary, batch, children):
    """All levels, the choice, what tokens see, and what is accepted of them."""
    logits, found = 3 * normal(batch, children, vocabulary), {}
    for executor in ("triton", "reference"):
        room, front, base = tree.Candidates.room(batch, children + 3 * children**2, logits.device), None, 0
        for level in range(4):
            given = logits[:, : children if level else 1].roll(level, 2).contiguous()
            front = tree.EXPAND(given, None, front, room, base, children, level == 3, executor=executor)
            base += given.shape[1] * children
        found[executor] = *room, *tree.CHOOSE_TREE(room, 60, executor=executor)
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 if a.is_floating_point() else 0)
    tokens, parents = found["reference"][4:6]
    for a, b in zip(*(tree.ANCESTORS_OF(parents, executor=executor) for executor in found), strict=True):
        assert torch.equal(a, b)
    said = normal(batch, 61, vocabulary, seed=1)
    said[:, 0].scatter_(1, tokens[:, :1], 99.0)
    for a, b in zip(*(tree.ACCEPT_TREE(said, tokens, parents, 4, executor=executor) for executor in found), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_an_accepted_path_is_kept(dtype):
    lengths, path = torch.tensor([1000, 0], device="cuda"), torch.tensor([[0, 3, 9, 17, 31], [5, 6, -1, -1, -1]], device="cuda")
    made = [[normal(2, 3, 1100, 64, seed=seed, dtype=dtype) for seed in range(60)] for _ in range(2)]
    for layers, executor in zip(made, ("triton", "reference"), strict=True):
        tree.KEEP_PATH(tree.Stored.of(layers), lengths, path, executor=executor)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
