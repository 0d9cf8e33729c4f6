"""A training steps as torch's AdamW would, goes on exactly where it was, and does not depend on who has which rows."""

import pytest
import torch
from torch import nn

from angelslim_core import muon
from angelslim_core.errors import ModelError, NumericError
from angelslim_core.muon import Muon, orthogonal
from angelslim_core.parallel import Group
from angelslim_core.training import Terms, Training, TrainingOptions


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False).to(dtype)
    rows = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    return model, rows, rows @ torch.randn(5, 3, generator=torch.Generator().manual_seed(2))


def terms(model, x, y):
    error = (model(x.to(model.weight.dtype)).float() - y).square().mean(-1)
    return Terms(error.sum()[None], torch.tensor([float(len(x))]), torch.ones(1), torch.tensor([float(len(x))]))


def run(model, rows, targets, options, group=None, folder=None, stop=None, matrices=()):
    training = Training(dict(model.named_parameters()), options, group, matrices)
    if folder is not None:
        training.resume(folder)
    while not training.is_done and training.step != stop:
        training.advance(lambda step, part: terms(model, rows[8 * step % 64 :][:8] + torch.rand(()), targets[8 * step % 64 :][:8]))
    return training


def test_the_schedule_rises_from_above_zero_and_falls_along_a_cosine():
    options = TrainingOptions(steps=100, lr=1.0, warmup=0.04, final_lr=0.1)
    rates = [options.rate(s) for s in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] < 1 and rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1) and TrainingOptions(steps=1, lr=0.5).rate(0) == 0.5


def test_a_step_is_adamw_on_clipped_gradients():
    model, rows, targets = problem()
    other, _, _ = problem()
    options = TrainingOptions(steps=3, lr=0.1, clip=0.25, weight_decay=0.1, warmup=0)
    training = Training(dict(model.named_parameters()), options)
    adam = torch.optim.AdamW(other.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        training.advance(lambda s, part: terms(model, rows, targets))
        (other(rows) - targets).square().mean(-1).mean().backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.25)
        adam.param_groups[0]["lr"] = options.rate(step)
        adam.step()
        adam.zero_grad()
        seen = training.seen()
        assert seen.norm == pytest.approx(float(norm)) and seen.extra == [64.0] and seen.steps == 1
    torch.testing.assert_close(model.weight, other.weight)
    assert training.seen() is None and training.is_done


def test_a_step_of_matrices_may_be_muons_and_of_the_rest_is_adamw():
    torch.manual_seed(0)
    rows, targets = torch.randn(16, 5), torch.randn(16, 3)
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    other.load_state_dict(model.state_dict())
    options = TrainingOptions(steps=3, lr=0.1, rates={"bias": 0.02}, clip=9.0, weight_decay=0.1, undecayed=("bias",), warmup=0)
    training = Training(dict(model.named_parameters()), options, matrices=["weight"])
    muon = torch.optim.Muon([other.weight], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([other.bias], lr=0.02, betas=(0.9, 0.95), weight_decay=0)
    for step in range(3):
        training.advance(lambda s, part: terms(model, rows, targets))
        (other(rows) - targets).square().mean(-1).mean().backward()
        for optimizer, highest in ((muon, 0.1), (adam, 0.02)):
            optimizer.param_groups[0]["lr"] = options.rate(step, highest)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.weight, other.weight)
    torch.testing.assert_close(model.bias, other.bias)


@pytest.mark.parametrize("together", [1, 71, 1 << 26])
def test_matrices_of_one_shape_step_together_as_torchs_muon_steps_each(monkeypatch, together):
    made = []
    monkeypatch.setattr(muon, "TOGETHER", together)
    monkeypatch.setattr(muon, "orthogonal", lambda x: (made.append(x.numel()), orthogonal(x))[1])
    torch.manual_seed(0)
    shapes = [(6, 6), (12, 5), (6, 6), (5, 12), (6, 6)]
    ones, others = ([nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(shapes)] for _ in range(2))
    ours = Muon([{"params": ones[:3], "weight_decay": 0.1}, {"params": ones[3:], "weight_decay": 0.0, "lr": 0.02}], lr=0.1)
    theirs = [torch.optim.Muon(p, lr=lr, weight_decay=d, adjust_lr_fn="match_rms_adamw") for p, lr, d in ((others[:3], 0.1, 0.1), (others[3:], 0.02, 0.0))]
    for _ in range(4):
        for one, other in zip(ones, others, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        ones[1].grad = others[1].grad = None
        for optimizer in (ours, *theirs):
            optimizer.step()
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)
    assert max(made) == (72 if together > 72 else 60), "as many matrices of one shape as have so few numbers, or one"
    singular = torch.linalg.svdvals(orthogonal(torch.randn(3, 40, 24)).float())
    assert float(singular.min()) > 0.5 and float(singular.max()) < 1.4


def test_parameters_have_their_own_rates_by_name():
    def moved(**given):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
        before = [p.detach().clone() for p in model.parameters()]
        training = Training(dict(model.named_parameters()), TrainingOptions(steps=2, warmup=1, **given))
        x = torch.ones(1, 5)
        training.advance(lambda s, part: Terms(model(x).square().sum()[None], torch.ones(1), torch.ones(1), torch.zeros(0)))
        return [float((p - b).abs().max()) for p, b in zip(model.parameters(), before, strict=True)]

    found = moved(lr=0.2, rates={"1.weight": 0.02, "weight": 2.0})
    assert found == pytest.approx([1.0, 0.1, 0.01, 0.1], rel=1e-3), "half way up, a first step of Adam is the rate"
    assert moved(lr=0.2) == pytest.approx([0.1] * 4, rel=1e-3)


def test_small_updates_are_not_lost_in_bf16():
    model, rows, targets = problem(torch.bfloat16)
    before = model.weight.detach().clone()
    training = run(model, rows, targets, TrainingOptions(steps=40, lr=1e-5))
    master = training._masters["weight"]
    assert model.weight.dtype == torch.bfloat16 and (master - before.float()).abs().min() > 1e-5
    torch.testing.assert_close(model.weight, master.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("matrices", [(), ("weight",)], ids=["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stopped_training_ends_where_one_that_ran_through_does(tmp_path, dtype, matrices):
    options = TrainingOptions(steps=12, lr=0.05, accumulate=2, seed=7)
    model, rows, targets = problem(dtype)
    run(model, rows, targets, options, matrices=matrices)
    other, _, _ = problem(dtype)
    first = run(other, rows, targets, options, stop=5, matrices=matrices)
    first.save(tmp_path)
    run(other, rows, targets, options, stop=9, matrices=matrices)  # is lost
    third, _, _ = problem(dtype)
    run(third, rows, targets, options, folder=tmp_path, matrices=matrices)
    assert torch.equal(third.weight, model.weight) and not torch.equal(other.weight, model.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    with pytest.raises(ModelError, match="other options"):
        Training(dict(third.named_parameters()), TrainingOptions(steps=13), None, matrices).resume(tmp_path)
    with pytest.raises(ModelError, match="other parameters"):
        Training(dict(nn.Linear(5, 4, bias=False).named_parameters()), options, None, matrices).resume(tmp_path)
    with pytest.raises(ModelError, match="other parameters"):
        Training(dict(third.named_parameters()), options, None, () if matrices else ("weight",)).resume(tmp_path)
    assert not Training(dict(third.named_parameters()), options).resume(tmp_path / "none")


def test_numbers_that_are_not_finite_end_it():
    model, rows, targets = problem()
    training = Training(dict(model.named_parameters()), TrainingOptions(steps=2))
    training.advance(lambda s, part: terms(model, rows * torch.inf, targets))
    with pytest.raises(NumericError, match="not finite"):
        training.seen()


class Two(Group):
    """One of two processes, which gets from the other what it would have."""

    size = 2

    def __init__(self, others):
        self.others = others

    def reduce(self, tensor, op="sum"):
        return tensor + self.others.pop(0)


def test_means_are_taken_over_all_processes():
    model, rows, targets = problem()
    alone = problem()[0]
    options = TrainingOptions(steps=1, lr=0.1)
    run_of = lambda m, x, y, group=None: Training(dict(m.named_parameters()), options, group).advance(lambda s, part: terms(m, x, y))  # noqa: E731
    run_of(alone, rows, targets)
    far = problem()[0]
    ((far(rows[:10]) - targets[:10]).square().mean(-1).sum() / 64).backward()
    error = float((far(rows[:10]) - targets[:10]).square().mean(-1).sum())
    run_of(model, rows[10:], targets[10:], Two([torch.tensor([10.0, error, 10.0]), far.weight.grad.reshape(-1)]))
    torch.testing.assert_close(model.weight, alone.weight)


def test_seeds_of_steps_differ_and_are_no_business_of_the_process():
    model, rows, targets = problem()
    seeds = []
    training = Training(dict(model.named_parameters()), TrainingOptions(steps=50, accumulate=2, seed=5))
    while not training.is_done:
        training.advance(lambda step, part: (seeds.append(torch.initial_seed()), terms(model, rows[:8], targets[:8]))[1])
    assert len(set(seeds)) == 100
    # Python salts hashes of text by process, not those of numbers: a state goes on with the same numbers
    assert seeds[:4] == [107835212329083, 89733736600510, 35645463642327, 43690943490952]


def test_gradients_are_summed_a_bucket_at_a_time(monkeypatch):
    """So that no copy of all of them is made."""

    class Two(Group):
        """Two processes whose rows are alike."""

        size = 2

        def __init__(self):
            self.sizes = []

        def reduce(self, tensor, op="sum"):
            self.sizes.append(tensor.numel())
            return tensor * 2 if op == "sum" else tensor

    monkeypatch.setattr("angelslim_core.training.BUCKET", 20)
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    rows = torch.randn(8, 5)
    group = Two()
    for model, where in zip(models, (group, Group()), strict=True):
        training = Training(dict(model.named_parameters()), TrainingOptions(steps=1, lr=0.1, clip=1e9), where)
        error = lambda step, part, model=model: model(rows).square().sum()[None]  # noqa: E731
        training.advance(lambda step, part, error=error: Terms(error(step, part), torch.ones(1), torch.ones(1), torch.zeros(1)))
    assert group.sizes[1:] == [20, 19, 12]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_gradients_of_16_bits_add_up_in_fp32():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    training = Training({"weight": weight}, TrainingOptions(steps=1, accumulate=64, clip=1e9))
    of_parts = [256.0, *[1.0] * 63]  # 256 + 1 is 256 in BF16
    training.advance(lambda _, part: Terms(weight.float() * of_parts[part], torch.ones(1), torch.ones(1), torch.zeros(1)))
    assert training.seen().norm == pytest.approx(sum(of_parts) / 64)


def test_some_parameters_have_no_weight_decay(tmp_path):
    shapes = {"a.weight": (2, 2), "a.quantizer.scale": (2, 2), "a.bias": (2,), "norm.weight": (2,)}
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    options = TrainingOptions(steps=2, lr=0.1, weight_decay=0.5, undecayed=(".quantizer.",))
    training = Training(named, options)
    nothing = lambda *_: Terms(0 * sum(p.sum() for p in named.values())[None], torch.ones(1), torch.ones(1), torch.zeros(1))  # noqa: E731
    training.advance(nothing)
    assert {name for name, p in named.items() if bool((p < 1).all())} == {"a.weight"}
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in named.items() if name != "a.weight")
    training.seen()
    training.save(tmp_path)
    assert Training(named, options).resume(tmp_path)
