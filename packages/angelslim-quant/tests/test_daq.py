"""DAQ: each tile keeps at least what absmax keeps, read back from the file; figures of the paper's synthetic case."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from angelslim_core import compress
from angelslim_core.cli.main import cli
from angelslim_core.errors import AngelslimError, ModelError, NumericError, RecipeError
from angelslim_core.rounding import cast_e4m3, round_e4m3
from angelslim_core.schemes import Grid, Quantized
from angelslim_core.source import open_any
from angelslim_quant.numerics import delta, fp8, integer
from angelslim_quant.numerics.microscale import weight_scale_of

BLOCK = Grid(8, "float", "block", block_structure=(128, 128))
GRIDS = {
    "block": BLOCK,
    "channel": Grid(8, "float", "channel", scale_dtype="BF16"),
    "int4": Grid(4, "int", "group", 64, scale_dtype="BF16"),
    "int4 asym": Grid(4, "int", "group", 64, symmetric=False, scale_dtype="F32"),
    "nvfp4": Grid(4, "float", "tensor_group", 16, scale_dtype="F8_E4M3"),
}


def pair(rows, columns, delta_std=3e-4, seed=0, dtype=torch.float32):
    """A weight and the base it was trained from."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator) * 0.02
    return (base + delta_std * torch.randn(rows, columns, generator=generator)).to(dtype), base.to(dtype)


def stored(weight, base, grid, search=None):
    """(what `quantize` found, the dequantized weight)."""
    t = weight_scale_of(weight.abs().amax()) if grid.strategy == "tensor_group" else None
    found = delta.quantize(weight, base, grid, search or delta.Search(), t)
    from angelslim_core.schemes import Scheme

    return found, Quantized(Scheme("x", grid), found.codes, found.scale, found.zero_point, global_scale=t).dequantize()


def measured(weight, base, value, grid):
    """SPR [T] and cosine [T] of each tile, by their definitions."""
    w, b, q = (delta.tiles(x.float(), grid) for x in (weight, base, value))
    d, found = w - b, q - b
    moved = d.abs() > delta.THRESHOLD
    kept = ((d.sign() == found.sign()) & moved).sum(1) / moved.sum(1).clamp(min=1)
    return kept, (d * found).sum(1) / (d.norm(dim=1).clamp(min=1e-10) * found.norm(dim=1).clamp(min=1e-10))


def test_e4m3_in_fp32_is_the_cast():
    x = torch.cat([torch.randn(4096) * 10.0**e for e in range(-5, 4)] + [torch.arange(-500, 500, 0.0625)])
    assert round_e4m3(x).equal(cast_e4m3(x).float())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_tiles_and_back(grid):
    weight = torch.randn(130, 192)
    assert delta.untiled(delta.tiles(weight, grid), grid, (130, 192)).equal(weight)


@pytest.mark.parametrize("metric", ["mse", "cosine", "sign", "joint"])
def test_figures_of_thirty_blocks(metric):
    """Means over random blocks, within .003 of those of the design (sign: of the scales tried here, absmax's among them)."""
    weight, base = pair(128 * 10, 128 * 12)
    found, _ = stored(weight, base, BLOCK, delta.Search(metric))
    tiles = found.totals.counts[2]
    absmax, chosen = ([sums[0] / tiles, sums[1] / tiles, sums[2] / weight.numel() * 1e7] for sums in (found.totals.absmax, found.totals.chosen))
    wanted = {"mse": (0.733, 0.4964, 2.749), "cosine": (0.735, 0.5014, 2.773), "sign": (0.738, 0.4954, 2.815)}
    assert absmax == pytest.approx([0.733, 0.4925, 2.796], abs=0.003, rel=0.02)
    if metric != "joint":
        assert chosen[0] == pytest.approx(wanted[metric][0], abs=0.003)
        assert chosen[1] == pytest.approx(wanted[metric][1], abs=0.003 if metric != "sign" else 0.006)
    else:
        assert chosen[0] > absmax[0] and chosen[1] > absmax[1]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("metric", ["cosine", "sign", "joint"])
def test_no_tile_keeps_less_than_under_absmax(name, metric, dense):
    grid = GRIDS[name]
    weight, base = pair(130, 192)  # ragged blocks
    _, value = stored(weight, base, grid, delta.Search(metric, dense=dense))
    _, plain = stored(weight, weight, grid)
    own, absmax = measured(weight, base, value, grid), measured(weight, base, plain, grid)
    for i, of in enumerate(("sign", "cosine")):
        if metric in (of, "joint"):
            assert (own[i] >= absmax[i] - 1e-5).all()
            assert (own[i] > absmax[i] + 1e-4).any()


def test_the_scale_is_the_best_of_those_tried():
    weight, base = pair(128, 128)
    found, value = stored(weight, base, BLOCK, delta.Search("cosine", dense=True))
    ours = measured(weight, base, value, BLOCK)[1]
    absmax = fp8.quantize(weight, BLOCK)[1]
    for ratio in [1.0, *(0.8 + 0.7 / 48 * torch.arange(48)).tolist()]:
        codes, scale = fp8.quantize(weight, BLOCK, absmax * ratio)
        assert measured(weight, base, codes.float() * scale, BLOCK)[1] <= ours + 1e-6
    assert found.scale != absmax


@pytest.mark.parametrize("name", GRIDS)
def test_without_a_change_it_is_absmax(name):
    grid = GRIDS[name]
    weight, _ = pair(130, 192)
    found, _value = stored(weight, weight, grid, delta.Search(max_projection=2.0))
    if name in ("block", "channel"):
        codes, scale = fp8.quantize(weight, grid)
        assert found.codes.float().equal(codes.float()) and found.scale.equal(scale)
    if name.startswith("int4"):
        codes, scale, zero = integer.quantize(weight, grid)
        assert found.codes.equal(codes) and found.scale.equal(scale) and (zero is None or found.zero_point.equal(zero))
    assert found.totals.counts[1:] == [0, 0, 0, 0] and found.totals.learned == 0


@pytest.mark.parametrize("name", GRIDS)
def test_delta_rounding_goes_to_neighbours_as_far_as_allowed(name):
    grid = GRIDS[name]
    weight, base = pair(256, 256)
    near, plain = stored(weight, base, grid, delta.Search("mse"))
    pulled, value = stored(weight, base, grid, delta.Search("mse", max_projection=1.5))
    assert pulled.scale.float().equal(near.scale.float())
    d = weight - base
    projection = [((v - base) * d).sum() / d.square().sum() for v in (plain, value)]
    assert projection[0] < 1.3 < projection[1] <= 1.501
    # never past the neighbour: the two values lie on either side of the weight
    other = value != plain
    assert other.any() and ((value - weight)[other].sign() != (plain - weight)[other].sign()).all()
    assert (((value - plain) * d)[other] > 0).all()
    own, absmax = (measured(weight, base, v, grid)[1] for v in (value, stored(weight, weight, grid)[1]))
    assert own.mean() > absmax.mean() + 0.02


def test_delta_rounding_brings_back_what_vanished():
    """From a base on the grid nothing is left under the same scale; delta rounding keeps as much as training did."""
    generator = torch.Generator().manual_seed(3)
    base = cast_e4m3(torch.randn(256, 256, generator=generator) * 100).float()
    base[::128, ::128] = 448
    post = base + torch.randn(base.shape, generator=generator) * base.abs() * 0.01
    post[base.abs() == 448] = base[base.abs() == 448]
    d = post - base
    projection = []
    for limit in (None, 1.0):
        _, value = stored(post, base, BLOCK, delta.Search("mse", 1.0, 1.9, max_projection=limit))
        projection.append(float(((value - base) * d).sum() / d.square().sum()))
    assert projection[0] < 0.1 and 0.9 < projection[1] <= 1.001


def test_a_base_on_the_grid_is_counted():
    """Changes below half a step vanish when the base itself lies on the grid under the same scale."""
    base = cast_e4m3(torch.randn(128, 128, generator=torch.Generator().manual_seed(5)).mul_(100).clamp_(-400, 400)).float()
    post = base + 5e-4
    base[0, 0] = post[0, 0] = 448  # the scale stays 1
    found, _ = stored(post, base, BLOCK, delta.Search("joint", lowest=1.0, highest=1 + 1e-9))
    assert found.totals.counts[2:] == [1, found.totals.counts[3], 1]


# whole runs


@pytest.fixture
def trained(tiny, tiny_copy):
    """trained(architecture): (base folder, folder of the model trained from it)."""

    def make(architecture="llama", **overrides):
        base, post = tiny(architecture, **overrides), tiny_copy(architecture, name="post", **overrides)
        generator = torch.Generator().manual_seed(7)
        for file in post.glob("*.safetensors"):
            weights = load_file(file)
            for name, weight in weights.items():
                if "norm" not in name:
                    weights[name] = (weight.float() + 1e-3 * weight.float().std() * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
            save_file(weights, file, metadata={"format": "pt"})
        return base, post

    return make


def run(post, out, base, *options, format="fp8"):
    sizes = {"fp8": ["block_size=16"], "int4": ["group_size=16"], "nvfp4": []}[format]
    overrides = [f"steps[0].with.{o}" for o in (f"base={base}", f"format={format}", *(o for o in sizes if "channel" not in str(options)), *options)]
    return compress(model=post, use=["quant.daq"], out=out, overrides=overrides)


def report(base, post, out):
    done = CliRunner().invoke(cli, ["quant", "delta", str(base), str(post), str(out), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("options", [(), ("granularity=channel",)])
def test_a_run_keeps_more_than_absmax(trained, tmp_path, architecture, options):
    base, post = trained(architecture)
    result = run(post, tmp_path / "daq", base, *options)
    plain = ("quant.fp8_dynamic", []) if options else ("quant.fp8_block", ["steps[0].with.block_size=16"])
    compress(model=post, use=[plain[0]], out=tmp_path / "absmax", overrides=plain[1])
    ours, absmax = report(base, post, tmp_path / "daq"), report(base, post, tmp_path / "absmax")
    assert ours["cosine"] > absmax["cosine"] and ours["weights"] == absmax["weights"] and ours["spr"] >= absmax["spr"]
    # what the run says of itself is what the saved file has
    said = result.passes[0]["metrics"]
    assert said["cosine"] == pytest.approx(ours["cosine"], abs=2e-3) and said["spr"] == pytest.approx(ours["spr"], abs=2e-3)
    assert said["cosine_absmax"] == pytest.approx(absmax["cosine"], abs=2e-3)
    assert not result.fallbacks


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_other_formats(trained, tmp_path, format):
    base, post = trained()
    run(post, tmp_path / "daq", base, "metric=cosine", format=format)
    run(post, tmp_path / "plain", post, "metric=cosine", format=format)
    run(post, tmp_path / "pulled", base, "rounding=delta", "max_projection=1.5", format=format)
    plain, ours, pulled = (report(base, post, tmp_path / name)["cosine"] for name in ("plain", "daq", "pulled"))
    assert ours > plain and pulled > plain


def test_an_fp8_base_is_its_dequantization(trained, tmp_path):
    base, post = trained()
    compress(model=base, use=["quant.fp8_block"], out=tmp_path / "base8", overrides=["steps[0].with.block_size=16"])
    source = open_any(tmp_path / "base8")
    plain = {name: source.read(name) for name in source.dtypes}
    (tmp_path / "base16").mkdir()
    save_file(plain, tmp_path / "base16" / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    (tmp_path / "base16" / "config.json").write_text(json.dumps(config))
    outs = [tmp_path / name for name in ("a", "b")]
    for out, folder in zip(outs, ("base8", "base16"), strict=True):
        run(post, out, tmp_path / folder)
    one, two = ((out / "model.safetensors").read_bytes() for out in outs)
    assert one == two


def test_the_report_counts_every_weight(trained, tmp_path):
    base, post = trained()
    run(post, tmp_path / "daq", base)
    found = report(base, post, tmp_path / "daq")
    assert sum(found["outcomes"].values()) == found["weights"] == sum(row["weights"] for row in found["tensors"])
    assert found["changed"] == sum(sum(row.values()) for name, row in found["bins"].items() if name != "below 1e-5")
    kept = sum(row["preserved"] for name, row in found["bins"].items() if name != "below 1e-5")
    assert found["spr"] == pytest.approx(kept / found["changed"])
    whole = report(base, post, post)
    assert whole["spr"] == 1 and whole["cosine"] == pytest.approx(1) and whole["mse"] == 0 and not whole["outcomes"]["noise"]


@pytest.mark.parametrize("options", [(), ("metric=mse",)])
def test_what_the_base_lacks_gets_absmax_and_is_counted(trained, tiny_copy, tmp_path, options):
    _base, post = trained()
    poor = tiny_copy("llama", name="poor")
    file = poor / "model.safetensors"
    weights = load_file(file)
    lacking = "model.layers.0.mlp.up_proj.weight"
    del weights[lacking]
    save_file(weights, file, metadata={"format": "pt"})
    assert len(run(post, tmp_path / "out", poor, *options).fallbacks) == 1
    compress(model=post, use=["quant.fp8_block"], out=tmp_path / "plain", overrides=["steps[0].with.block_size=16"])
    ours, plain = (load_file(tmp_path / name / "model.safetensors")[f"{lacking}_scale_inv"] for name in ("out", "plain"))
    assert ours.equal(plain)


def test_bad_bases_are_refused(trained, tiny, tiny_copy, tmp_path):
    base, post = trained()
    with pytest.raises(RecipeError):
        compress(model=post, use=["quant.daq"], out=tmp_path / "out")
    with pytest.raises(RecipeError, match="power-of-two"):
        run(post, tmp_path / "out", base, "scale_fmt=ue8m0")
    with pytest.raises(RecipeError, match="group_size is an option of format int4"):
        run(post, tmp_path / "out", base, "group_size=32")
    with pytest.raises(ModelError, match="is Qwen3MoeForCausalLM"):
        run(post, tmp_path / "out", tiny("qwen3_moe"))
    other = tiny_copy("llama", name="other")
    weights = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name][:-8].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="has shape"):
        run(post, tmp_path / "out", other)
    weights[name] = load_file(base / "model.safetensors")[name]
    weights[name][0, 0] = float("nan")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError):
        run(post, tmp_path / "out", other)
    assert not (tmp_path / "out").exists()


def test_a_changed_base_is_not_resumed(trained, tmp_path, monkeypatch):
    base, post = trained()
    import angelslim_core.pipeline as pipeline

    def broken(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_records", broken)
        with pytest.raises(KeyboardInterrupt):
            run(post, tmp_path / "out", base)
    file = base / "model.safetensors"
    file.touch()
    with pytest.raises(AngelslimError, match="other sources"):
        run(post, tmp_path / "out", base)
