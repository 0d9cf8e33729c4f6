"""Kernels of DAQ's search against their references: what tiles keep, which scales are tried, which is chosen, what is reported."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from angelslim_core.schemes import Grid
from angelslim_quant.kernels import delta_sums
from angelslim_quant.kernels.delta_choice import DELTA_CHOICE, DELTA_SCALES, DELTA_TOTALS, SUMMING, Around, Choice, Span
from angelslim_quant.kernels.delta_sums import DELTA_CODES, DELTA_SUMS, Sums
from angelslim_quant.numerics import delta

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = ("sign", "cosine", "mse", "joint")
GRIDS = {
    "block": Grid(8, "float", "block", block_structure=(16, 32)),
    "channel": Grid(8, "float", "channel", scale_dtype="BF16"),
    "channel f16": Grid(8, "float", "channel", scale_dtype="F16"),
    "int4": Grid(4, "int", "group", 64, scale_dtype="BF16"),
    "int4 asym": Grid(4, "int", "group", 64, symmetric=False, scale_dtype="F32"),
    "int8 asym": Grid(8, "int", "group", 64, symmetric=False, scale_dtype="BF16"),
    "nvfp4": Grid(4, "float", "tensor_group", 16, scale_dtype="F8_E4M3"),
}
# one tile, no multiple of what a program holds, several programs
TILES = (1, 77, 300)


def there(value, device):
    """Whatever of it is a tensor, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        parts = [there(v, device) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def by_triton(kernel, *arguments):
    """Triton's result on the CPU; it says that it runs on GPUs only, which its interpreter is not."""
    pytest.importorskip("triton")
    return there({i.name: i.function for i in kernel.implementations}["triton"](*there(arguments, DEVICE)), "cpu")


def same(found, wanted):
    """Bit by bit, names and all."""
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and found.shape == wanted.shape and found.contiguous().view(torch.uint8).equal(wanted.contiguous().view(torch.uint8))
    return all(map(same, found, wanted)) and len(found) == len(wanted) if isinstance(wanted, tuple) else found == wanted


def pair(tiles, width, seed=0):
    """A weight and the base it was trained from."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tiles, width, generator=generator) * 0.02
    return (base + 3e-4 * torch.randn(tiles, width, generator=generator)).bfloat16(), base.bfloat16()


def span_of(weight, name, dtype=torch.bfloat16):
    low, high = weight.to(dtype).aminmax(dim=1)
    return Span(low, high, GRIDS[name], torch.tensor([2.0**-12]) if name == "nvfp4" else None)


def sums_of(count, tiles, seed=0):
    """Sums as a search finds them, with ties, tiles that did not change and tiles that lost everything."""
    generator = torch.Generator().manual_seed(seed)
    changed = torch.randint(0, 9, (tiles,), generator=generator).float()
    learned = torch.rand(tiles, generator=generator) * (changed > 0)
    kept = (torch.rand(count, tiles, generator=generator) * (changed + 1)).floor()
    found = torch.rand(count, tiles, generator=generator) * learned
    dot = (torch.rand(count, tiles, generator=generator) * 1.2 - 0.2) * (learned * found).sqrt()
    error = torch.rand(count, tiles, generator=generator) * 1e-3 + 1e-3
    tried = torch.stack([kept, dot, found, error], 1)
    tried[:, :, ::7] = tried[:1, :, ::7]  # all alike
    tried[-1, :, 1::7] = tried[-2, :, 1::7]
    tried[:, 1:3, 2::7] = 0
    return Sums(tried, torch.stack([changed, learned]))


@pytest.mark.parametrize("pulls", [(), (0.0, 0.5, 2.0)])
@pytest.mark.parametrize("name", ["channel", "int4", "int4 asym", "nvfp4"])
@pytest.mark.parametrize("shape", [(5, 16), (3, 192), (2, 9000)])
def test_sums_and_codes(name, pulls, shape):
    weight, base = pair(*shape)
    ratio = torch.tensor([1.0, 0.7, 1.3])[:, None].expand(-1, shape[0])
    scales = DELTA_SCALES(span_of(weight, name), ratio, None)[1]
    wanted = DELTA_SUMS.reference(weight, base, scales, pulls, 1e-5)
    for found in (delta_sums._chunked(weight, base, scales, pulls, 1e-5), by_triton(DELTA_SUMS, weight, base, scales, pulls, 1e-5)):
        assert torch.allclose(found.kept_CT, wanted.kept_CT, atol=2)
        assert found.changed_T.equal(wanted.changed_T)
        for of in ("dot_CT", "found_CT", "error_CT", "learned_T"):
            assert torch.allclose(getattr(found, of), getattr(wanted, of), rtol=1e-3, atol=1e-9), of
    one = scales._replace(scale_CT=scales.scale_CT[1:2], zero_CT=None if scales.zero_CT is None else scales.zero_CT[1:2])
    arguments = (weight, base if pulls else None, one, torch.linspace(0, 2, len(weight)) if pulls else None)
    found, wanted = by_triton(DELTA_CODES, *arguments), DELTA_CODES.reference(*arguments)
    assert found.dtype == wanted.dtype and (found.view(torch.uint8) == wanted.view(torch.uint8)).float().mean() > 0.999


@pytest.mark.parametrize("shared", [False, True])
def test_every_candidate_of_one_scale(shared):
    """Scales that all candidates share need not be repeated in memory."""
    weight, base = pair(5, 48)
    scales = DELTA_SCALES(span_of(weight, "int4 asym"), torch.ones(1, 5), None)[1]
    zero = scales.zero_CT.expand(3, -1)
    scales = scales._replace(scale_CT=scales.scale_CT.expand(3, -1), zero_CT=zero)
    if not shared:
        scales = scales._replace(scale_CT=scales.scale_CT.contiguous(), zero_CT=zero.contiguous())
    found, wanted = (f(DELTA_SUMS, weight, base, scales, (0.0, 1.0, 3.0), 1e-5) for f in (by_triton, lambda kernel, *a: kernel.reference(*a)))
    assert torch.allclose(found.tried_C4T, wanted.tried_C4T, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_scales(name, dtype, around):
    for tiles in TILES:
        weight = pair(tiles, 16)[0]
        weight[tiles // 3], weight[tiles // 2], weight[-1] = 0, weight[tiles // 2].abs(), -weight[-1].abs() * 1e-6
        center = 0.5 + 0.6 * torch.rand(tiles, generator=torch.Generator().manual_seed(1))
        points = torch.linspace(0, 1, 10) if around else torch.cat([torch.ones(1), torch.linspace(0.5, 1.9, 15)])
        arguments = (span_of(weight, name, dtype), points[:, None].expand(-1, tiles), Around(center, 0.6 / 8, 0.5, 1.1) if around else None)
        found, wanted = by_triton(DELTA_SCALES, *arguments), DELTA_SCALES.reference(*arguments)
        assert same(found[0], wanted[0]) and same(found[1], wanted[1])
        if around:
            assert wanted[0].min() >= 0.5 and wanted[0].max() <= 1.1 + 1e-6
            own = (arguments[0], wanted[0][3:4], None)  # ratios of each tile
            assert same(by_triton(DELTA_SCALES, *own)[1], DELTA_SCALES.reference(*own)[1])


@pytest.mark.parametrize("count", [2, 16, 49])
@pytest.mark.parametrize("metric", METRICS)
def test_choice(metric, count):
    for tiles in TILES:
        sums = sums_of(count, tiles)
        ratio = torch.cat([torch.ones(1), torch.linspace(0.8, 1.5, count - 1)])[:, None]
        for ratio_CT in (ratio.expand(-1, tiles), ratio + torch.rand(count, tiles) * (ratio != 1)):
            found, wanted = by_triton(DELTA_CHOICE, ratio_CT, sums, metric, None), DELTA_CHOICE.reference(ratio_CT, sums, metric, None)
            assert same(found, wanted)
        # a search in two steps finds what one over all finds
        first = DELTA_CHOICE.reference(ratio_CT[:-1], Sums(sums.tried_C4T[:-1], sums.own_2T), metric, None)
        rest = (ratio_CT[-1:], sums.only(count - 1), metric, first)
        assert same(by_triton(DELTA_CHOICE, *rest), wanted) and same(DELTA_CHOICE.reference(*rest), wanted)
        chosen = (wanted.ratio_T != 1).float().mean()
        assert tiles < 77 or 0.05 < chosen < 0.99


@pytest.mark.parametrize("executor", ["reference", "triton"])
@pytest.mark.parametrize("metric", METRICS)
def test_absmax_stays_unless_another_is_better_by_more_than_rounding(metric, executor):
    """Tiles: all alike; better by less than rounding; by more; two equally good; one that is better but (joint) keeps fewer signs."""
    tried = torch.tensor([40.0, 0.5, 1.0, 2.0])[:, None].repeat(4, 1, 5)
    for tile, by in ((1, SUMMING / 4), (2, 8 * SUMMING)):
        tried[2, :2, tile] *= 1 + by
        tried[2, 3, tile] *= 1 - by
    tried[1:3, :2, 3] *= 1.5
    tried[1:3, 3, 3] /= 1.5
    tried[3, 0, 4], tried[3, 1, 4], tried[3, 3, 4] = 39, 0.9, 1.0
    sums = Sums(tried, torch.tensor([64.0, 1.0])[:, None].repeat(1, 5))
    ratio = torch.tensor([1.0, 1.1, 1.2, 1.3])
    run = by_triton if executor == "triton" else lambda kernel, *a: kernel.reference(*a)
    found = run(DELTA_CHOICE, ratio[:, None].expand(-1, 5), sums, metric, None)
    places = [0, 0, 2, 1, 3 if metric in ("cosine", "mse") else 0]
    assert found.ratio_T.equal(ratio[places])
    assert found.sums.tried_C4T.equal(torch.stack([tried[0], tried[places, :, range(5)].T]))


@pytest.mark.parametrize("pulled", [False, True])
@pytest.mark.parametrize("tiles", [*TILES, 1500])
def test_totals(tiles, pulled):
    generator = torch.Generator().manual_seed(2)
    ratio = torch.where(torch.rand(tiles, generator=generator) < 0.3, 1.0, 0.4 + 0.8 * torch.rand(tiles, generator=generator))  # some beyond the range
    pull = (torch.rand(tiles, generator=generator) * 3).floor() if pulled else None
    arguments = (Choice(ratio, sums_of(2, tiles)), pull, 0.5, 1.1)
    found, wanted = by_triton(DELTA_TOTALS, *arguments), DELTA_TOTALS.reference(*arguments)
    # a square root of torch's on a CPU may be one unit in the last place off
    assert found.dtype == torch.float64 and torch.allclose(found, wanted, rtol=1e-6, atol=0)
    assert found[12:16].equal(wanted[12:16]) and found[17:].equal(wanted[17:]) and found[17:].sum() == found[13]


@pytest.mark.parametrize("kernel", [DELTA_SUMS, DELTA_CODES, DELTA_SCALES, DELTA_CHOICE, DELTA_TOTALS], ids=lambda k: k.op)
def test_triton_runs_on_gpus_only(kernel):
    weight, span = torch.zeros(4, 16), span_of(torch.zeros(4, 16), "int4")
    arguments = {"quant.delta_scales": (span,), "quant.delta_totals": (Choice(torch.ones(4), sums_of(2, 4)),)}.get(kernel.op, (weight,))
    assert not kernel.implementations[0].supports(*arguments)[0] and kernel.implementations[1].name == "torch"


@pytest.mark.parametrize("search", [delta.Search("joint"), delta.Search("cosine", dense=True), delta.Search("mse", max_projection=1.5)], ids=lambda s: s.metric)
@pytest.mark.parametrize("name", ["block", "int4 asym", "nvfp4"])
def test_a_whole_search(name, search, monkeypatch):
    """Steps fit each other, so that what a GPU stores is what a CPU does, but where sums in another order choose otherwise."""
    weight, base = pair(40, 64)  # ragged blocks
    arguments = (GRIDS[name], search, torch.tensor([2.0**-12]) if name == "nvfp4" else None)
    wanted = delta.quantize(weight, base, *arguments)
    for kernel in ("DELTA_SUMS", "DELTA_CODES", "DELTA_SCALES", "DELTA_CHOICE", "DELTA_TOTALS"):
        monkeypatch.setattr(delta, kernel, partial(by_triton, getattr(delta, kernel)))
    found = delta.quantize(weight, base, *arguments)
    for a, b in ((found.codes, wanted.codes), (found.scale, wanted.scale), (found.zero_point, wanted.zero_point)):
        assert a is b is None or (a.dtype == b.dtype and a.shape == b.shape and (a.float() == b.float()).float().mean() > 0.97)
    ours, theirs = found.totals, wanted.totals
    assert ours.absmax == pytest.approx(theirs.absmax, rel=2e-3) and ours.chosen == pytest.approx(theirs.chosen, rel=2e-2)
    assert ours.counts == pytest.approx(theirs.counts, rel=2e-2) and ours.learned == pytest.approx(theirs.learned)


class Launches(TorchDispatchMode):
    """Counts what a GPU would be asked for: operations that are no views and only allocate nothing, and kernels as one each."""

    def __init__(self):
        super().__init__()
        self.count, self.inside = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.inside and not func.is_view and not func.__name__.startswith(("empty", "new_empty", "detach", "_unsafe_view", "_local_scalar"))
        return func(*args, **(kwargs or {}))

    def kernel(self, kernel, *arguments):
        self.count, self.inside = self.count + 1, True
        found = kernel(*arguments)
        self.inside = False
        return found


@pytest.mark.parametrize(
    ("search", "most"), [(delta.Search("joint"), 15), (delta.Search("joint", dense=True), 11), (delta.Search("mse", max_projection=1.5), 38)]
)
def test_a_search_is_few_launches(search, most, monkeypatch):
    weight, base = torch.randn(256, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    delta.quantize(weight, base, GRIDS["block"], search)  # what is made once
    launches = Launches()
    for kernel in ("DELTA_SUMS", "DELTA_CODES", "DELTA_SCALES", "DELTA_CHOICE", "DELTA_TOTALS"):
        monkeypatch.setattr(delta, kernel, partial(launches.kernel, getattr(delta, kernel)))
    with launches:
        delta.quantize(weight, base, GRIDS["block"], search)
    assert launches.count <= most
