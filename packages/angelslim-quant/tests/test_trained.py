"""Trained schemes: what is stored is what was trained, gradients are autograd's, and a tiny model learns."""

import copy

import pytest
import torch

import angelslim_quant.plugin as plugin
from angelslim_core import fake_quant
from angelslim_core.emulation import round_input, round_inputs
from angelslim_core.errors import NumericError, PlanError
from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.loading import load_model
from angelslim_core.rounding import cast_e4m3, round_e2m1
from angelslim_core.testing.conformance import check_pass, check_plugin, tiny_site
from angelslim_quant.numerics import microscale
from angelslim_quant.trained.sherry import residual

SHAPES = [(24, 576), (19, 128)]
# pass -> options, all of what rounds otherwise
SCHEMES = [
    ("quant.seq2", {}),
    ("quant.seq2", {"group_size": 32, "search": False}),
    ("quant.seq2", {"group_size": None}),
    ("quant.tequila", {"group_size": 64}),
    ("quant.tequila", {"group_size": 32, "threshold": "twn", "learn_reactivation": True}),
    ("quant.tequila", {"group_size": None, "reactivation": 0}),
    ("quant.sherry", {"group_size": 64}),
    ("quant.sherry", {"group_size": 64, "pattern": "strided", "learn_scale": True}),
    ("quant.sherry", {"group_size": 32, "learn_scale": True, "arenas": False}),
    ("quant.sherry", {"group_size": None}),
    ("quant.lsq", {"group_size": 32}),
    ("quant.lsq", {"group_size": 64, "bits": 3, "symmetric": False, "train_weights": True}),
    ("quant.lsq", {"group_size": None, "bits": 2, "search": False}),
    ("quant.lsq", {"group_size": None, "bits": 8, "symmetric": False, "train_weights": True}),
    ("quant.focus", {}),
    ("quant.focus", {"format": "mxfp4"}),
    ("quant.focus", {"format": "mxfp4", "weight_only": False}),
]


@pytest.fixture(scope="module")
def host():
    return check_plugin("quant", plugin)


def make(host, pass_id, options, weight, scale_dtype=None):
    """The quantizer of a linear."""
    pass_class = host.registry.find_pass(pass_id)
    pass_ = pass_class.bind(pass_class.Config(**options))
    names = {torch_dtype(name): name for name in ("BF16", "F16", "F32")}
    site = tiny_site(tuple(weight.shape), names[weight.dtype])
    if scale_dtype:
        site = type(site)(**{**site.__dict__, "scale_dtype": scale_dtype})
    quantizer = pass_.quantizer(site, weight)
    assert quantizer.scheme == pass_.scheme(site)
    return quantizer


def weight_of(shape, dtype, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[3, :64], weight[5], weight[7, 5] = 0, weight[5] * 1e-3, 1.0
    return weight.to(dtype)


def moved(quantizer, seed=0):
    """As after some steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in quantizer.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
    quantizer.progress = 0.5
    return quantizer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("pass_id", "options"), SCHEMES, ids=str)
def test_what_is_stored_is_what_was_trained(host, pass_id, options, dtype, shape):
    if options.get("format") == "mxfp4" and dtype == torch.float16:
        pytest.skip("powers of two reach beyond F16")
    for seed, scale_dtype in ((0, None), (1, "F16")):
        weight = weight_of(shape, dtype, seed)
        quantizer = moved(make(host, pass_id, options, weight, scale_dtype), seed).eval()
        before = weight.clone()
        found, grid = quantizer.quantized(weight), quantizer.scheme.weights
        assert found.dequantize(dtype).equal(quantizer.weight(weight)) and weight.equal(before)
        assert found.scale.dtype == torch_dtype(grid.scale_dtype) and tuple(found.scale.shape) == grid.scale_shape(shape)
        if grid.levels:
            assert found.codes.dtype == torch.int8 and set(found.codes.unique().tolist()) == set(grid.levels)
        assert bool((found.scale.float() > 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("pass_id", "options"), SCHEMES, ids=str)
def test_gradients_reach_weights_in_their_dtype_and_scales_in_fp32(host, pass_id, options, dtype):
    weight = weight_of((24, 576), dtype).requires_grad_()
    quantizer = make(host, pass_id, options, weight.detach()).train()
    quantizer.progress = 0.5
    x = torch.randn(3, 7, 576, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = quantizer.product(x, weight, None)
    assert y.shape == (3, 7, 24) and y.dtype == dtype
    y.float().square().sum().backward()
    for tensor in (x, weight, *quantizer.parameters()):
        assert tensor.grad is not None and tensor.grad.dtype == tensor.dtype and bool(tensor.grad.isfinite().all()) and bool(tensor.grad.any())
    assert all(p.dtype == torch.float32 and p.ndim for p in quantizer.parameters())
    weight.requires_grad_(False)
    quantizer.product(x, weight, None).sum().backward()  # as if frozen


@pytest.mark.parametrize(("pass_id", "options"), SCHEMES, ids=str)
def test_conformance(tmp_path, pass_id, options):
    check_pass("quant", plugin, pass_id, tmp_path, **options)


@pytest.mark.parametrize(("pass_id", "options"), SCHEMES, ids=str)
def test_groups_must_divide_the_inputs(host, pass_id, options):
    if options.get("group_size", 64) is not None:
        with pytest.raises(PlanError, match="multiple"):
            make(host, pass_id, options, torch.ones(4, 72))


# SEQ --------------------------------------------------------------------------------------------------------------------


def straight(x, dtype=None):
    """Rounded, its gradient that of x."""
    return x + ((x.round() if dtype is None else x.to(dtype).float()) - x).detach()


@pytest.mark.parametrize("scale_dtype", [None, "F16", "BF16"])
def test_seq2_is_its_definition_with_the_gradients_of_autograd(host, scale_dtype):
    weight = weight_of((24, 128), torch.float32).requires_grad_()
    quantizer = moved(make(host, "quant.seq2", {}, weight, scale_dtype))
    found = quantizer.weight(weight)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    found.backward(slope)
    learnt = quantizer.learnt.detach().requires_grad_()
    a = 4 * straight(learnt / 4, torch_dtype(scale_dtype or "F32"))[..., None]
    w = weight.detach().requires_grad_()
    u = (w.unflatten(1, (-1, 64)) / a).clamp(-0.99, 0.99)
    wanted = (a * (straight(2 * u - 0.5) + 0.5) / 2).flatten(1)
    wanted.backward(slope)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(weight.grad, w.grad)
    torch.testing.assert_close(quantizer.learnt.grad, learnt.grad / 8, rtol=1e-4, atol=1e-5)  # the square root of 64 weights
    levels = (found.detach().unflatten(1, (-1, 64)) / a.detach()).unique()
    assert len(levels.mul(4).round().unique()) == 4 and float(levels.abs().min()) > 0.24


def test_seq2_begins_with_the_range_of_least_error(host):
    weight = weight_of((64, 256), torch.float32)
    errors = [(make(host, "quant.seq2", {"search": s}, weight).weight(weight) - weight).square().unflatten(1, (-1, 64)).sum(-1) for s in (True, False)]
    assert bool((errors[0] <= errors[1]).all()) and float(errors[0].sum()) < 0.8 * float(errors[1].sum())


def test_seq2_keeps_a_floor(host):
    weight = weight_of((8, 64), torch.float32)
    quantizer = make(host, "quant.seq2", {}, weight, "F16")
    with torch.no_grad():
        quantizer.learnt.fill_(-1.0)
    found = quantizer.quantized(weight)
    assert bool((found.scale > 0).all()) and found.dequantize().equal(quantizer.weight(weight))


# ternary ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "part"), [("absmean", 0.5), ("twn", 0.75)])
def test_ternary_is_its_definition(host, threshold, part):
    weight = weight_of((24, 128), torch.float32)
    found = make(host, "quant.tequila", {"group_size": 32, "threshold": threshold}, weight).quantized(weight)
    groups = weight.reshape(-1, 32)
    for group, codes, scale in zip(groups, found.codes.reshape(-1, 32), found.scale.flatten(), strict=True):
        kept = group.abs() > part * group.abs().mean()
        assert codes.equal((group.sign() * kept).to(torch.int8))
        wanted = group.abs().mean() if threshold == "absmean" else group[kept].abs().mean() if bool(kept.any()) else 0
        torch.testing.assert_close(float(scale), max(float(wanted), 1e-8))


def test_dead_weights_get_the_straight_gradient_and_lambda_times_the_bias(host):
    weight = weight_of((24, 128), torch.float32).requires_grad_()
    quantizer = make(host, "quant.tequila", {"group_size": 32, "reactivation": 0.01, "learn_reactivation": True}, weight)
    x, slope = (torch.randn(5, n, generator=torch.Generator().manual_seed(n)) for n in (128, 24))
    bias = torch.zeros(24, requires_grad=True)
    quantizer.product(x, weight, bias).backward(slope)
    dead = quantizer.quantized(weight).codes == 0
    wanted = slope.T @ x + 0.01 * dead * slope.sum(0)[:, None]
    torch.testing.assert_close(weight.grad, wanted)
    torch.testing.assert_close(bias.grad, slope.sum(0))
    torch.testing.assert_close(quantizer.rate.grad, ((weight.detach() * dead).sum(1) @ slope.sum(0))[None])
    torch.testing.assert_close(quantizer.bias(weight), 0.01 * (weight * dead).sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_bias_is_folded_exactly(host, dtype, has_bias):
    linear = torch.nn.Linear(128, 24, bias=has_bias, dtype=dtype)
    x, plain = torch.randn(5, 128, dtype=dtype), copy.deepcopy(linear)
    fake_quant.place(linear, make(host, "quant.tequila", {"group_size": 32, "reactivation": 0.5}, linear.weight.data))
    with torch.no_grad():
        trained = linear(x)
        fake_quant.remove(linear)
        assert linear(x).equal(trained) and linear.bias is not None
        fake_quant.place(plain, make(host, "quant.tequila", {"group_size": 32, "reactivation": 0}, plain.weight.data))
        assert plain.quantizer.bias(plain.weight) is None
        assert not trained.equal(plain(x))
        fake_quant.remove(plain)
        assert (plain.bias is not None) is has_bias


def test_only_with_a_bias_the_pass_says_it_adds_one(host):
    pass_class = host.registry.find_pass("quant.tequila")
    for reactivation, adds in ((1e-3, True), (0, False)):
        pass_ = pass_class.bind(pass_class.Config(reactivation=reactivation))
        assert pass_.adds_bias is adds and pass_.id == "quant.tequila"
    with pytest.raises(ValueError, match="reactivation"):
        pass_class.Config(reactivation=0, learn_reactivation=True)


@pytest.mark.parametrize("pattern", ["contiguous", "strided"])
def test_of_four_weights_just_the_smallest_is_zero(host, pattern):
    weight = weight_of((24, 576), torch.float32)
    weight[1, :4], weight[1, :64:16] = torch.tensor([0.2, -0.1, 0.1, 0.1]), torch.tensor([0.2, -0.1, 0.1, 0.1])
    found = make(host, "quant.sherry", {"group_size": 64, "pattern": pattern}, weight).quantized(weight)
    places = [[(q // 16) * 64 + q % 16 + 16 * p if pattern == "strided" else 4 * q + p for p in range(4)] for q in range(144)]
    for row, codes in zip(weight, found.codes, strict=True):
        for four in places:
            lane = min(range(4), key=lambda i: abs(float(row[four[i]])))
            wanted = [0 if p == lane else -1 if row[j] < 0 else 1 for p, j in enumerate(four)]
            assert codes[four].tolist() == wanted
    assert found.scheme.weights.sparsity == ((3, 4) if pattern == "contiguous" else None)
    kept = (weight * found.codes).unflatten(1, (-1, 64)).sum(-1) / 48
    torch.testing.assert_close(found.scale, kept.clamp(min=1e-8))


def test_sherry_holds_five_bits_per_four_weights(host):
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    fours = make(host, "quant.sherry", {"group_size": 64}, weight).quantized(weight).codes.reshape(-1, 4)
    assert len(fours.unique(dim=0)) == 2**5


def test_the_residual_opens_and_closes(host):
    assert [residual(p) for p in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    weight = weight_of((24, 128), torch.float32).requires_grad_()
    quantizer = make(host, "quant.sherry", {"group_size": 32, "learn_scale": True}, weight)
    x, slope = (torch.randn(5, n, generator=torch.Generator().manual_seed(n)) for n in (128, 24))
    quantizer.progress = 0.55
    y = quantizer.product(x, weight, None)
    rounded = quantizer.weight(weight).detach()
    torch.testing.assert_close(y, x @ rounded.T + 0.5 * x @ weight.T)
    y.backward(slope)
    torch.testing.assert_close(weight.grad, 1.5 * slope.T @ x)
    codes = quantizer.quantized(weight).codes
    wanted = ((slope.T @ x) * codes).unflatten(1, (-1, 32)).sum(-1) / 32**0.5
    torch.testing.assert_close(quantizer.scale.grad, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantizer.eval().product(x, weight, None), x @ rounded.T)


def test_sherry_says_which_sizes_fit(host):
    for options, columns in (({"group_size": 96, "pattern": "strided"}, 192), ({"group_size": None}, 66), ({"group_size": None, "pattern": "strided"}, 96)):
        with pytest.raises(PlanError, match="multiple of"):
            make(host, "quant.sherry", options, torch.ones(4, columns))


# LSQ --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_lsq_has_the_gradients_of_autograd(host, symmetric):
    weight = weight_of((24, 128), torch.float32).requires_grad_()
    quantizer = moved(make(host, "quant.lsq", {"group_size": 32, "bits": 3, "symmetric": symmetric}, weight))
    slope = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    quantizer.weight(weight).backward(slope)
    w, factor = weight.detach().requires_grad_(), quantizer.learnt.detach().requires_grad_()
    s = factor * quantizer.unit
    zero = 0 if symmetric else quantizer.zero.float()[..., None]
    ratio = w.unflatten(1, (-1, 32)) / s[..., None]
    codes = straight(torch.minimum(torch.maximum(ratio, -4 - zero + 0 * ratio.detach()), 3 - zero + 0 * ratio.detach()))
    (codes * s[..., None]).flatten(1).backward(slope)
    inner = ((ratio + zero - 3).abs() > 1e-6) & ((ratio + zero + 4).abs() > 1e-6)  # at the very end of the range autograd takes half
    torch.testing.assert_close((weight.grad.unflatten(1, (-1, 32)) * inner), w.grad.unflatten(1, (-1, 32)) * inner)
    rows = inner.all(-1)
    torch.testing.assert_close(quantizer.learnt.grad[rows], factor.grad[rows] / (32 * 3) ** 0.5, rtol=1e-4, atol=1e-5)
    assert int(rows.sum()) > 60 and bool((weight.grad == 0).any())


def test_lsq_begins_where_rounding_to_nearest_or_a_search_leaves_off(host):
    weight = weight_of((24, 128), torch.bfloat16)
    site = tiny_site((24, 128))
    nearest = host.registry.find_pass("quant.int4_rtn")
    nearest = nearest(nearest.Config(group_size=32)).apply({site: weight}, None)[site]
    plain, searched = (make(host, "quant.lsq", {"group_size": 32, "search": s}, weight).quantized(weight) for s in (False, True))
    assert plain.codes.equal(nearest.codes) and plain.scale.equal(nearest.scale)
    errors = [float((q.dequantize() - weight.float()).square().sum()) for q in (plain, searched)]
    assert errors[1] < errors[0]


INT8 = {"group_size": None, "bits": 8, "activations": "int8"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inputs_are_rounded_as_engines_do_under_one_learnt_scale(host, dtype):
    weights = [weight_of((24, 128), dtype, seed) for seed in range(3)]
    pass_class = host.registry.find_pass("quant.lsq")
    pass_ = pass_class.bind(pass_class.Config(**INT8))
    assert pass_.joins_fused and "linear.input" in pass_.claims
    sites = [tiny_site((24, 128), {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype], role) for role in ("q", "k", "v")]
    made = list(pass_.quantizers(dict(zip(sites, weights, strict=True))).values())
    generator = torch.Generator().manual_seed(0)
    x, later = (torch.randn(2, 5, 128, generator=generator).to(dtype) for _ in range(2))
    with pytest.raises(NumericError, match="no step was trained"):
        made[0].quantized(weights[0])
    assert made[0].eval().inputs(x).equal(x)  # nothing is known yet
    for quantizer in made:
        quantizer.train().inputs(x)
        assert quantizer.input_log is made[0].input_log
    torch.testing.assert_close(made[0].input_log.exp(), x.abs().amax().float().reshape(1) / 127)
    found = made[1].quantized(weights[1])
    assert found.input_scale.shape == (1,) and found.input_scale.dtype == torch.float32
    assert made[2].inputs(later).equal(round_input(later, found.scheme.input_activations, found.input_scale))


def test_the_scale_of_inputs_has_the_gradient_of_autograd(host):
    quantizer = make(host, "quant.lsq", INT8, weight_of((24, 128), torch.float32))
    x = torch.randn(10, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    quantizer.inputs(x * 0.5)
    slope = torch.randn(10, 128, generator=torch.Generator().manual_seed(2))
    quantizer.inputs(x).backward(slope)
    log, y = quantizer.input_log.detach().requires_grad_(), x.detach().requires_grad_()
    s = log.exp()
    (straight((y / s).clamp(-128, 127)) * s).backward(slope)
    assert bool((x.grad == 0).any())
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(quantizer.input_log.grad, log.grad / (128 * 127) ** 0.5, rtol=1e-4, atol=1e-5)


def test_lsq_says_which_inputs_engines_multiply(host):
    config = host.registry.find_pass("quant.lsq").Config
    for options in ({"bits": 4}, {"group_size": 64}, {"symmetric": False}):
        with pytest.raises(ValueError, match="INT8 inputs"):
            config(**{**INT8, **options})


# FOCUS ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_focus_that_cuts_nothing_is_rounding_to_nearest(host, format):
    weight = weight_of((24, 128), torch.bfloat16)
    quantizer = make(host, "quant.focus", {"format": format}, weight)
    with torch.no_grad():
        quantizer.logit.fill_(1000.0)
    found, grid = quantizer.quantized(weight), quantizer.scheme.weights
    t = quantizer.global_scale
    wanted = microscale.quantize_nvfp4(weight, grid, t, search=False) if t is not None else microscale.quantize_mx(weight, grid, "ceil")
    assert found.codes.equal(wanted[0]) and found.scale.view(torch.uint8).equal(wanted[1].view(torch.uint8))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_focus_has_the_gradients_of_autograd(host, format):
    weight = weight_of((24, 128), torch.float32)
    weight[3] += 0.01
    weight.requires_grad_()
    quantizer = moved(make(host, "quant.focus", {"format": format}, weight))
    with torch.no_grad():
        quantizer.logit.sub_(4 / quantizer.rate)
    slope = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    quantizer.weight(weight).backward(slope)
    w, m, logit = (p.detach().requires_grad_() for p in (weight, quantizer.range, quantizer.logit))
    size = quantizer.scheme.weights.group_size
    blocks = w.unflatten(1, (-1, size))
    amax = blocks.detach().abs().amax(-1)
    if format == "nvfp4":
        t = quantizer.global_scale
        number = m * amax / 6 / t
        step = (number + (cast_e4m3(number).float() - number).detach()) * t
    else:
        exponent = (m * amax / 6).log2()
        step = 2 ** (exponent + (exponent.ceil() - exponent).detach())
    ratio = w.unflatten(1, (-1, size // 8, 8)) / (step[..., None, None] * (6 + quantizer.rate * logit).sigmoid().unflatten(1, (-1, size // 8))[..., None])
    cut = ratio.clamp(-6, 6)
    value = ((cut + (round_e2m1(cut.detach()) - cut).detach()) * step[..., None, None]).flatten(1)
    value.backward(slope)
    torch.testing.assert_close(quantizer.weight(weight), value)
    assert bool((ratio.abs() > 6).any())
    for found, wanted in ((weight.grad, w.grad), (quantizer.range.grad, m.grad), (quantizer.logit.grad, logit.grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_fused_linears_share_the_scale_of_the_tensor(host):
    weights = {tiny_site((24, 128), role=role): weight_of((24, 128), torch.bfloat16, seed) * 4**seed for seed, role in enumerate(("gate", "up"))}
    pass_ = host.registry.find_pass("quant.focus")()
    assert pass_.joins_fused
    scales = [q.quantized(weights[site]).global_scale for site, q in pass_.quantizers(weights).items()]
    assert scales[0].equal(scales[1])
    alone = pass_.quantizer(*next(iter(weights.items())))
    assert not alone.global_scale.equal(scales[0])


def test_nvfp4_inputs_are_refused(host):
    with pytest.raises(ValueError, match=r"quant\.nvfp4"):
        host.registry.find_pass("quant.focus").Config(weight_only=False)


# a model ----------------------------------------------------------------------------------------------------------------


def kl(teacher, student):
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize(("pass_id", "options"), [s for s in SCHEMES if s[1].get("group_size", 32) is not None] + [("quant.lsq", INT8)], ids=str)
def test_a_tiny_model_learns_and_is_stored_as_it_was_trained(host, tiny, pass_id, options):
    if options.get("group_size") and "pattern" not in options:
        options = {**options, "group_size": 32}
    model = load_model(tiny("llama", dtype="float32", initializer_range=0.2), "cpu").model
    teacher, ids = copy.deepcopy(model), torch.randint(3, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = teacher(ids).logits
    for name, linear in list(model.named_modules()):
        if type(linear) is torch.nn.Linear and name != "lm_head":
            fake_quant.place(linear, make(host, pass_id, options, linear.weight.data))
    placed = fake_quant.placed(model)
    rate, goal = {"quant.focus": (2e-2, 0.9), "quant.lsq": (5e-3, 0.9), "quant.sherry": (2e-3, 0.7)}.get(pass_id, (2e-3, 0.5))
    if options.get("activations"):
        rate, goal = 2e-3, 0.95  # little is lost, and large steps lose more
    trained = [p for m in placed.values() for p in (m.parameters() if m.quantizer.trains_weight else m.quantizer.parameters())]
    adam = torch.optim.Adam(list(dict.fromkeys(trained)), lr=rate)
    losses = []
    for step in range(30):
        fake_quant.set_progress(model, step / 30)
        model.train()
        loss = kl(wanted, model(ids).logits)
        losses.append(float(loss))
        adam.zero_grad()
        loss.backward()
        adam.step()
        adam.param_groups[0]["lr"] = rate * (1 - step / 30)
    model.eval()
    with torch.no_grad():
        trained = model(ids).logits
        assert float(kl(wanted, trained)) < goal * losses[0]
        stored = {name: fake_quant.remove(linear) for name, linear in placed.items()}
        assert not fake_quant.placed(model)
        for name, found in stored.items():
            if found.scheme.input_activations:
                round_inputs(model.get_submodule(name), found.scheme.input_activations, found.input_scale)
        assert model(ids).logits.equal(trained)
    for name, found in stored.items():
        assert found.dequantize(torch.float32).equal(model.get_submodule(name).weight)


@pytest.mark.parametrize("joint", [1 << 27, 5000])
@pytest.mark.parametrize(("pass_id", "options"), SCHEMES)
def test_linears_that_round_together_are_rounded_as_each_alone(host, pass_id, options, joint, monkeypatch):
    monkeypatch.setattr(fake_quant, "JOINT", joint)
    shapes = [(24, 128), (8, 128), (16, 128), (12, 256)]
    found = []
    for together in (False, True):
        linears = []
        for i, shape in enumerate(shapes):
            linear = torch.nn.Linear(shape[1], shape[0], bias=i == 1, dtype=torch.bfloat16)
            with torch.no_grad():
                linear.weight.copy_(weight_of(shape, torch.bfloat16, i))
                if linear.bias is not None:
                    linear.bias.fill_(0.5)
            linears.append(fake_quant.place(linear, make(host, pass_id, options, linear.weight.detach())).train())
            linear.quantizer.progress = 0.05
        inputs = [torch.randn(5, shape[1], dtype=torch.bfloat16, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
        if together:
            with fake_quant.held(linears):
                outs = [linear(x) for linear, x in zip(linears, inputs, strict=True)]
        else:
            outs = [linear(x) for linear, x in zip(linears, inputs, strict=True)]
        assert all(linear.held is None for linear in linears)
        sum(out.float().square().sum() for out in outs).backward()
        found.append([*outs, *(p.grad for linear in linears for p in linear.parameters())])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=0, atol=0)
