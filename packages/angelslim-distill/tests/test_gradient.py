"""The kernels of losses and gradients against autograd, a few tokens at a time so that rows are of several tiles."""

import pytest
import torch

from angelslim_core.errors import EngineError
from angelslim_distill.chunked import head_loss
from angelslim_distill.kernels.gradient import LOSS_GRADIENT, Finish, Task
from angelslim_distill.kinds import KINDS, MODES, Loss
from angelslim_distill.losses import kd_sums, top_k_of
from angelslim_distill.targets import Hidden

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
R, V = 3, 100
KEPT = [(kind, mode) for kind in KINDS for mode in MODES if kind != "mse" and not (mode == "zero" and kind in ("rkl", "cakld"))]
FINISHES = {"plain": (Finish(), Finish()), "all": (Finish(torch.linspace(-1, 1, V, device=DEVICE), 9.0, 0.5), Finish(torch.ones(V, device=DEVICE), 5.0, 2.0))}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    pytest.importorskip("triton")
    from angelslim_distill.kernels.triton import kept, whole

    for module in (whole, kept):
        monkeypatch.setattr(module, "tile", lambda vocabulary: {"BLOCK": 64, "num_warps": 4})


def made(*shape, seed=0, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def labels():
    return torch.randint(V, (R,), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def agrees(x, teacher, given, task, dtype=torch.float32):
    """Against the reference; that of the gradient is a relative norm."""
    wanted, found = torch.empty(R, V, device=DEVICE), torch.full((R, V + 10), torch.nan, dtype=dtype, device=DEVICE)[:, :V]
    want = LOSS_GRADIENT(x, teacher, given, task, wanted, executor="reference")
    got = LOSS_GRADIENT(x, teacher, given, task, found, executor="triton")
    look = LOSS_GRADIENT(x, teacher, given, task, None, executor="triton")
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(look, want, rtol=2e-5, atol=2e-6)
    # Triton's interpreter cuts bf16 off rather than round it
    assert (found.float() - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "given"), [(kind, given) for kind in KINDS for given in (True, False) if given or kind != "cakld"])
def test_whole_distributions(kind, given, temperature, finish):
    ours, theirs = FINISHES[finish]
    task = Task(Loss(kind, temperature, 0.3), 0.7, 0.4 if given else 0.0, ours, theirs)
    agrees(made(R, V), made(R, V, seed=1), labels() if given else None, task)


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("given", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize(("kind", "mode", "temperature"), [(*kept, t) for kept in KEPT for t in (1.0, 2.0) if t == 1 or kept[1] != "bucket"])
def test_kept_tokens(kind, mode, temperature, given, finish):
    teacher = top_k_of(made(R, V, seed=1), 7, labels())
    own = labels()
    own[0] = teacher.ids[0, 3]  # one label is kept, others may not be
    task = Task(Loss(kind, temperature, 0.3, mode), 0.7, 0.4 if given else 0.0, FINISHES[finish][0])
    agrees(made(R, V), teacher, own if given else None, task)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    x, t = made(R, V).to(dtype), made(R, V, seed=1).to(dtype)
    agrees(x, t, labels(), Task(Loss(), 0.7, 0.4), torch.bfloat16)
    agrees(x, top_k_of(t, 7, labels()), labels(), Task(Loss(), 0.7, 0.4), torch.bfloat16)
    agrees(x, None, labels(), Task(Loss(), 1.0, 0.4), torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_and_equal(kind):
    far = torch.zeros(R, V, device=DEVICE)
    far[0, 3], far[0, 90], far[1, 99], far[2] = 1e4, -1e4, 1e4, 5
    into = torch.empty(R, V, device=DEVICE)
    for x, t in ((far, far.roll(1, 0)), (made(R, V), made(R, V))):
        got = LOSS_GRADIENT(x, t, labels(), Task(Loss(kind), 1.0, 0.0), into, executor="triton")
        assert got.kd.isfinite().all() and into.isfinite().all()
    assert got.kd.abs().max() < 1e-5 and into.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_is_not_a_number_shows(kind, side):
    x, t = made(R, V), made(R, V, seed=1)
    (x if side == "student" else t)[1, 77] = torch.nan
    into = torch.empty(R, V, device=DEVICE)
    got = LOSS_GRADIENT(x, t, labels(), Task(Loss(kind)), into, executor="triton")
    assert got.kd.isnan().tolist() == [False, True, False] and into[1].isnan().any() and into[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mse"])
def test_tokens_that_both_exclude_change_nothing(kind):
    x, t = made(R, V), made(R, V, seed=1)
    x[:, 60:70] = t[:, 60:70] = -torch.inf
    agrees(x, t, torch.tensor([0, 1, 2], device=DEVICE), Task(Loss(kind, beta=0.3), 0.7, 0.4))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_from_hidden_states_use_it(dtype, kept):
    s, w, t = made(2, 7, 6, scale=1.0).to(dtype), made(V, 6, seed=1, scale=1.0).to(dtype), made(2, 7, V, seed=3)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 1, 1, 1]], device=DEVICE)
    ours = Hidden(s.requires_grad_(), w.requires_grad_())
    theirs = top_k_of(t, 9) if kept else Hidden(made(2, 7, 4, seed=4), made(V, 4, seed=5))
    found = head_loss(ours, theirs, mask, Loss(), rows=3, executor="triton").total
    wanted = kd_sums(s.double() @ w.double().T, theirs if kept else theirs.states @ theirs.weight.T, mask, Loss()).total
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=0)
    for got, exact in zip(torch.autograd.grad(found, (s, w)), torch.autograd.grad(wanted, (s, w)), strict=True):
        assert (got - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 0.02)


def test_what_the_kernel_cannot_do_is_refused():
    with pytest.raises(EngineError, match="fp32"):
        LOSS_GRADIENT(made(R, V).double(), made(R, V).double(), None, Task(Loss()), None, executor="triton")
    with pytest.raises(EngineError, match="together"):
        LOSS_GRADIENT(made(V, R).T, made(R, V), None, Task(Loss()), None, executor="triton")
    with pytest.raises(ValueError, match="labels"):
        LOSS_GRADIENT(made(R, V), made(R, V), None, Task(Loss("cakld")), None, executor="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("rows", [512, 2048])
def test_memory_is_bounded_by_the_chunk(rows, monkeypatch):
    """Beside gradients of states and head: logits of a quarter of the rows in fp32, twice, and gradients of the rows in bf16."""
    monkeypatch.undo()
    count, vocabulary, width = 8192, 50_000, 512
    ours = Hidden(*(torch.randn(n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (count, vocabulary)))
    theirs = Hidden(*(torch.randn(n, width, device="cuda", dtype=torch.bfloat16) for n in (count, vocabulary)))
    mask = torch.ones(count, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = torch.autograd.grad(head_loss(ours, theirs, mask, Loss(), rows=rows).total, (ours.states, ours.weight))
        extra = torch.cuda.max_memory_allocated() - before
        own = sum(g.numel() * g.element_size() for g in found)
        del found
    assert extra - own < vocabulary * rows * 4 * 1.1 + (32 << 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("counted", ["all", "some"])
def test_a_mask_on_the_cpu_makes_the_host_wait_for_nothing(counted, monkeypatch):
    monkeypatch.undo()
    ours, theirs = (Hidden(*(torch.randn(n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (256, 1000))) for _ in range(2))
    mask = torch.ones(256) if counted == "all" else torch.arange(256) % 3

    def call():
        torch.autograd.grad(head_loss(ours, theirs, mask, Loss(), rows=100).total / 256, (ours.states, ours.weight))

    call()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_vocabulary_on_a_gpu(kind, monkeypatch):
    """Against fp64, of the same bf16 inputs."""
    monkeypatch.undo()
    count, vocabulary, width = 300, 151_936, 256
    given = [made(*shape, seed=i, scale=scale).bfloat16() for i, (shape, scale) in enumerate((((count, width), 1.0), ((vocabulary, width), 0.15)) * 2)]
    own = torch.randint(vocabulary, (count,), device="cuda")
    ours = Hidden(given[0].requires_grad_(), given[1].requires_grad_())
    found = head_loss(ours, Hidden(given[2], given[3]), torch.ones(count, device="cuda"), Loss(kind), own, ce_weight=0.5, rows=128).total
    exact = head_loss(
        Hidden(given[0].double(), given[1].double()), Hidden(given[2].double(), given[3].double()), torch.ones(count, device="cuda"), Loss(kind), own,
        ce_weight=0.5,
    ).total  # fmt: skip
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)
    for got, wanted in zip(torch.autograd.grad(found, given[:2]), torch.autograd.grad(exact, given[:2]), strict=True):
        assert (got.double() - wanted.double()).norm() / wanted.double().norm() < 0.02
