import pytest
import torch

from angelslim_specdec.drafts.ttt import Flex, Plain, merged, segments

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 9 + [-1] * 2, [0] * 16, [7] * 3 + [0] * 13])
HEADS, KV_HEADS, SIZE = 6, 2, 16


def dense(q, k, v, later):
    """Row t at step k against every key of every step, under one mask."""
    b, _, t, d = q.shape
    steps = len(later)
    keys = torch.cat([k, *(a for a, _ in later)], 2).repeat_interleave(HEADS // KV_HEADS, 1)
    values = torch.cat([v, *(a for _, a in later)], 2).repeat_interleave(HEADS // KV_HEADS, 1)
    same = DOCUMENTS[:, :, None] == DOCUMENTS[:, None]
    mask = torch.cat([same & torch.ones(t, t, dtype=torch.bool).tril(), *[torch.eye(t, dtype=torch.bool).expand(b, t, t)] * steps], -1)
    scores = (q @ keys.mT / d**0.5).masked_fill(~mask[:, None], -torch.inf)
    return scores.softmax(-1) @ values


@pytest.fixture(params=[0, 1, 6], ids=lambda k: f"step{k}")
def case(request):
    torch.manual_seed(0)
    b, t = DOCUMENTS.shape

    def random(heads):
        return torch.randn(b, heads, t, SIZE, requires_grad=True)

    return random(HEADS), random(KV_HEADS), random(KV_HEADS), [(random(KV_HEADS), random(KV_HEADS)) for _ in range(request.param)]


def leaves(q, k, v, later):
    return [q, k, v, *(x for pair in later for x in pair)]


def test_merged_by_log_sum_exp_is_one_softmax_under_a_mask(case):
    q, k, v, *flat = [x.detach() for x in leaves(*case)]  # flex_attention has no way back on CPUs
    there = q, k, v, list(zip(flat[::2], flat[1::2], strict=True))
    torch.testing.assert_close(Flex(segments(DOCUMENTS), compiled=False)(*there), dense(*there))


def test_gradients_go_through_the_merge(case):
    q, k, v, later = case
    same = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None]).tril()[:, None]
    scores = (q @ k.repeat_interleave(HEADS // KV_HEADS, 1).mT / SIZE**0.5).masked_fill(~same, -torch.inf)
    out = merged(scores.softmax(-1) @ v.repeat_interleave(HEADS // KV_HEADS, 1), scores.logsumexp(-1), q, later)
    want = dense(*case)
    torch.testing.assert_close(out, want)
    up = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad((out * up).sum(), leaves(*case)), torch.autograd.grad((want * up).sum(), leaves(*case)))


@pytest.mark.gpu
def test_on_a_gpu_the_compiled_kernel_and_its_gradients_are_the_same(case):
    want, up = dense(*case), torch.randn(*case[0].shape)
    gradients = torch.autograd.grad((want * up).sum(), leaves(*case))
    q, k, v, *flat = [x.detach().cuda().requires_grad_() for x in leaves(*case)]
    there = q, k, v, list(zip(flat[::2], flat[1::2], strict=True))
    out = Flex(segments(DOCUMENTS).cuda())(*there)
    torch.testing.assert_close(out.cpu(), want, rtol=1e-2, atol=1e-2)  # its products are of TF32
    found = torch.autograd.grad((out * up.cuda()).sum(), leaves(*there))
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("few", [False, True], ids=["all rows", "some rows"])
def test_document_by_document_is_one_softmax_under_a_mask(case, few):
    def flat(x):
        return x.transpose(0, 1).flatten(1, 2)[None]

    q, k, v, later = case
    rows = torch.tensor([0, 3, 6, 7, 20, 33, 47]) if few else torch.arange(DOCUMENTS.numel())
    pairs = [(flat(a)[:, :, rows], flat(b)[:, :, rows]) for a, b in later]
    out = Plain(segments(DOCUMENTS).view(1, -1))(flat(q)[:, :, rows], flat(k), flat(v), pairs, rows if few else None)
    want = flat(dense(*case))[:, :, rows]
    torch.testing.assert_close(out, want)
    up = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad((out * up).sum(), leaves(*case)), torch.autograd.grad((want * up).sum(), leaves(*case)))
