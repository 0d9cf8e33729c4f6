"""The kernel that reads logits once from memory against autograd, with slices so short that a row is of several."""

import pytest
import torch

from angelslim_core.errors import EngineError
from angelslim_distill.chunked import head_loss
from angelslim_distill.kernels.gradient import LOSS_GRADIENT, Finish, Task
from angelslim_distill.kinds import Loss
from angelslim_distill.losses import kd_sums, top_k_of
from angelslim_distill.targets import Hidden

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
R, V = 5, 300  # of five slices, the last one short
LOSSES = {"kl": Loss(), "kd": Loss("kd"), "rkl": Loss("rkl"), "jsd at 0": Loss("jsd", beta=0.0), "jsd at 1": Loss("jsd", beta=1.0)}
PLAIN = (Finish(), Finish())
ALL = (Finish(torch.linspace(-1, 1, V, device=DEVICE), scale=0.5), Finish(torch.ones(V, device=DEVICE), scale=2.0))


@pytest.fixture(autouse=True)
def short_slices(monkeypatch):
    pytest.importorskip("triton")
    from angelslim_distill.kernels.triton import held

    monkeypatch.setattr(held, "TUNING", (64, 2, 128))
    monkeypatch.setattr(held, "FEWEST", 1)
    monkeypatch.setattr(held, "SHORTEST", 1)
    return monkeypatch


def made(*shape, seed=0, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def labels(rows=R):
    return torch.randint(V, (rows,), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def padded(x):
    """The same, of rows with gaps between."""
    wide = torch.full((len(x), x.shape[1] + 20), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def agrees(x, teacher, given, task, dtype=torch.float32):
    wanted, found = torch.empty(x.shape, device=DEVICE), padded(torch.full(x.shape, torch.nan, dtype=dtype, device=DEVICE))
    want = LOSS_GRADIENT(x, teacher, given, task, wanted, executor="reference")
    got = LOSS_GRADIENT(x, teacher, given, task, found, executor="triton_held")
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    # Triton's interpreter cuts bf16 off rather than round it
    assert (found.float() - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float32 else 6e-3)
    assert found._base[:, x.shape[1] :].isnan().all()
    return got, found


@pytest.mark.parametrize("finish", [PLAIN, ALL], ids=["plain", "all"])
@pytest.mark.parametrize(("temperature", "given"), [(1.0, True), (1.0, False), (2.0, False)])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_the_references(name, given, temperature, finish):
    loss = Loss(LOSSES[name].kind, temperature, LOSSES[name].beta)
    agrees(padded(made(R, V)), padded(made(R, V, seed=1)), labels() if given else None, Task(loss, 0.7, 0.4 if given else 0.0, *finish))


@pytest.mark.parametrize("programs", [40, 57, 400])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 300), (2, 64), (7, 129), (16, 30)])
def test_any_number_of_programs_rows_and_slices(programs, rows, vocabulary, short_slices):
    """Groups of one row and of many, and places that are left over."""
    from angelslim_distill.kernels.triton import held

    short_slices.setattr(held, "programs", lambda x: programs)
    agrees(made(rows, vocabulary), made(rows, vocabulary, seed=1), labels(rows) % vocabulary, Task(Loss(), 0.7, 0.4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["kl", "rkl"])
def test_dtypes(dtype, name):
    agrees(made(R, V).to(dtype), made(R, V, seed=1).to(dtype), labels(), Task(LOSSES[name], 0.7, 0.4), torch.bfloat16)


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_twice_to_the_bit(name):
    x, t, task = made(R, V), made(R, V, seed=1), Task(LOSSES[name], 0.7, 0.4)
    (first, of_first), (second, of_second) = (agrees(x, t, labels(), task) for _ in range(2))
    assert torch.equal(first.kd, second.kd) and torch.equal(first.ce, second.ce) and torch.equal(of_first, of_second)


@pytest.mark.parametrize("name", LOSSES)
def test_far_apart_and_equal(name):
    far = torch.zeros(3, V, device=DEVICE)
    far[0, 3], far[0, 290], far[1, 299], far[2] = 1e4, -1e4, 1e4, 5
    into = torch.empty(3, V, device=DEVICE)
    for x, t in ((far, far.roll(1, 0)), (made(3, V), made(3, V))):
        got = LOSS_GRADIENT(x, t, labels(3), Task(LOSSES[name], 1.0, 0.0), into, executor="triton_held")
        assert got.kd.isfinite().all() and into.isfinite().all()
    assert got.kd.abs().max() < 1e-5 and into.abs().max() < 1e-5


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_is_not_a_number_shows(name, side):
    x, t = made(3, V), made(3, V, seed=1)
    (x if side == "student" else t)[1, 177] = torch.nan
    into = torch.empty(3, V, device=DEVICE)
    got = LOSS_GRADIENT(x, t, labels(3), Task(LOSSES[name]), into, executor="triton_held")
    assert got.kd.isnan().tolist() == [False, True, False] and into[1].isnan().any() and into[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_tokens_that_both_exclude_change_nothing(name):
    """A whole slice of them, too."""
    x, t = made(R, V), made(R, V, seed=1)
    x[:, 60:200] = t[:, 60:200] = -torch.inf
    agrees(x, t, torch.arange(R, device=DEVICE), Task(LOSSES[name], 0.7, 0.4))


@pytest.mark.parametrize("name", ["kl", "jsd at 0"])
def test_what_the_student_excludes_costs_without_end_but_is_a_number(name):
    x, t = made(R, V), made(R, V, seed=1)
    x[:, 70] = -torch.inf
    into = torch.empty(R, V, device=DEVICE)
    got = LOSS_GRADIENT(x, t, None, Task(LOSSES[name]), into, executor="triton_held")
    assert got.kd.isfinite().all() and (got.kd > 1e20).all() and into.isfinite().all()


@pytest.mark.parametrize("name", ["kl", "rkl"])
@pytest.mark.parametrize("vocabulary", [256, 300])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_a_row_without_any_token_is_no_number(side, vocabulary, name):
    """Whatever the number of slices is beside a power of 2."""
    x, t, into = made(3, vocabulary), made(3, vocabulary, seed=1), torch.empty(3, vocabulary, device=DEVICE)
    for given in {"student": [x], "teacher": [t], "both": [x, t]}[side]:
        given[1] = -torch.inf
    got = LOSS_GRADIENT(x, t, labels(3) % vocabulary, Task(LOSSES[name], 0.7, 0.4), into, executor="triton_held")
    assert got.kd.isnan().tolist() == [False, True, False] and into[1].isnan().any() and into[[0, 2]].isfinite().all()
    assert got.ce.isnan().tolist() == [False, side != "teacher", False]


@pytest.mark.parametrize("low", [-torch.inf, -1e9, -6e8, -1e5])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.25, 1.0), (1.0, 16.0)])
def test_slices_far_below_the_others_change_nothing(temperature, scale, low):
    """On GPUs a product and a difference are one operation, of which the product is not rounded."""
    x, t, finish = made(R, V), made(R, V, seed=1), Finish(scale=scale)
    x[:, 60:200] = t[:, 60:200] = low
    agrees(x, t, None, Task(Loss(temperature=temperature), 0.7, 0.0, finish, finish))


@pytest.mark.parametrize("label", [V, -1, -100])
def test_a_label_that_is_no_token_costs_without_end(label):
    given = labels()
    given[2] = label
    got = LOSS_GRADIENT(made(R, V), made(R, V, seed=1), given, Task(Loss(), 0.7, 0.4), torch.empty(R, V, device=DEVICE), executor="triton_held")
    assert got.ce.isinf().tolist() == [False, False, True, False, False]


def test_losses_from_hidden_states_use_it():
    s, w, t = made(2, 7, 6, scale=1.0), made(V, 6, seed=1, scale=1.0), Hidden(made(2, 7, 4, seed=4), made(V, 4, seed=5))
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 1, 1, 1]], device=DEVICE)
    found = head_loss(Hidden(s.requires_grad_(), w.requires_grad_()), t, mask, Loss(), rows=3, executor="triton_held").total
    wanted = kd_sums(s.double() @ w.double().T, t.states @ t.weight.T, mask, Loss()).total
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=0)
    for got, exact in zip(torch.autograd.grad(found, (s, w)), torch.autograd.grad(wanted, (s, w)), strict=True):
        assert (got - exact).norm() / exact.norm() < 1e-5


def test_what_it_cannot_do_is_left_to_the_other_kernel(short_slices):
    from angelslim_distill.kernels.triton import held

    x, t, into = made(R, V), made(R, V, seed=1), torch.empty(R, V, device=DEVICE)

    def refused(teacher, task, into):
        with pytest.raises(EngineError, match="triton_held"):
            LOSS_GRADIENT(x, teacher, labels(), task, into, executor="triton_held")

    for kind in ("jsd", "tvd", "mse", "cakld"):
        refused(t, Task(Loss(kind)), into)
    refused(t, Task(Loss(temperature=2.0), 0.7, 0.4), into)
    refused(t, Task(Loss(), student=Finish(softcap=9.0)), into)
    refused(t, Task(Loss(), teacher=Finish(scale=-1.0)), into)
    refused(t, Task(Loss(), student=Finish(scale=0.0)), into)
    refused(t, Task(Loss()), None)
    refused(top_k_of(t, 7), Task(Loss()), into)
    short_slices.setattr(held, "programs", lambda x: 39)
    refused(t, Task(Loss()), into)
    short_slices.setattr(held, "programs", lambda x: 40)
    assert LOSS_GRADIENT.choose(x, t, None, Task(Loss()), into, executor="triton_held").name == "triton_held"
    for limit, value in (("FEWEST", R * V + 1), ("SHORTEST", 6)):
        with short_slices.context() as one:
            one.setattr(held, limit, value)
            refused(t, Task(Loss()), into)
            one.setattr(held, limit, value - 1)
            assert LOSS_GRADIENT.choose(x, t, None, Task(Loss()), into, executor="triton_held").name == "triton_held"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("name", ["kl", "rkl"])
def test_a_large_vocabulary_is_as_by_the_other_kernel(name, streams, short_slices):
    """On two streams at once, too, whose programs share the GPU."""
    short_slices.undo()
    shape = 512, 151_936
    x, t = torch.empty(2, *shape, device="cuda").normal_(generator=torch.Generator("cuda").manual_seed(0)).mul_(3)
    given, task = torch.randint(shape[1], shape[:1], device="cuda"), Task(LOSSES[name], 0.7, 0.4)
    old, *new = (torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(1 + streams))
    assert LOSS_GRADIENT.choose(x, t, given, task, old).name == "triton_held"
    wanted = LOSS_GRADIENT(x, t, given, task, old, executor="triton")
    own = [torch.cuda.Stream() for _ in range(streams)]
    torch.cuda.synchronize()
    for _ in range(20):  # an order of programs that comes seldom would show as another result
        found = []
        for stream, into in zip(own, new, strict=True):
            with torch.cuda.stream(stream):
                found.append(LOSS_GRADIENT(x, t, given, task, into.fill_(torch.nan)))
        torch.cuda.synchronize()
        for got, into in zip(found, new, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)
            assert (into.float() - old.float()).norm() / old.float().norm() < 1e-3
