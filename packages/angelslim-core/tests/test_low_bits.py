"""Weights of few levels from a pass to every layout that holds them: packed, compressed-tensors and GGUF, and back, bit for bit."""

import json
import shutil
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from angelslim_core import PassConfig, PluginHost, TensorPass, compress, hookimpl
from angelslim_core.conversion import convert
from angelslim_core.engines import kind
from angelslim_core.errors import AngelslimError, ModelError, NumericError, PlanError
from angelslim_core.evaluation import evaluate
from angelslim_core.exporters.compressed_tensors import CompressedTensors
from angelslim_core.exporters.few_levels import occurring, pack_digits, pack_quads, unpack_digits, unpack_quads
from angelslim_core.exporters.packed import Packed, packing
from angelslim_core.inspection import inspect_model
from angelslim_core.io.checkpoint import dtype_name
from angelslim_core.loading import OWN_READER, load_model
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_core.second_reader import SecondReader
from angelslim_core.source import open_any
from angelslim_core.validation import validate

SEQ2, TERNARY = (-3, -1, 1, 3), (-1, 0, 1)
UP = "model.layers.0.mlp.up_proj"


class Levels(TensorPass):
    """Rounds to few levels, in groups of 32."""

    id = "toy.levels"

    class Config(PassConfig):
        kind: str = Field("seq2", description="seq2, ternary or sparse.")
        group_size: int | None = Field(32, description="None: a channel.")

    def scheme(self, site):
        levels = SEQ2 if self.config.kind == "seq2" else TERNARY
        strategy = "channel" if self.config.group_size is None else "group"
        grid = Grid(4, "int", strategy, self.config.group_size, scale_dtype=site.scale_dtype or site.dtype, levels=levels)
        if self.config.kind == "sparse":
            grid = Grid(**{**vars(grid), "sparsity": (3, 4)})
        return Scheme(self.config.kind, grid, exporters=("compressed-tensors", "packed"))

    def apply(self, weights, context):
        found = {}
        for site, weight in weights.items():
            grouped = weight.float().unflatten(1, (-1, self.config.group_size or weight.shape[1]))
            dtype = weight.dtype
            if self.config.kind == "seq2":
                scale = (grouped.abs().amax(-1, keepdim=True) / 4).to(dtype)
                codes = ((grouped / scale.float() - 1) / 2).round().mul(2).add(1).clamp(-3, 3)
            else:
                kept = grouped.abs() > grouped.abs().mean(-1, keepdim=True) / 2
                if self.config.kind == "sparse":
                    quads = grouped.unflatten(-1, (-1, 4)).abs()
                    kept = torch.ones_like(quads, dtype=torch.bool).scatter_(-1, quads.argmin(-1, keepdim=True), False).flatten(-2)
                scale = ((grouped.abs() * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)).to(dtype)
                codes = torch.where(kept, torch.where(grouped < 0, -1, 1), 0)
            found[site] = Quantized(self.scheme(site), codes.flatten(1).char(), scale[..., 0])
        return found


@hookimpl
def angelslim_register_passes():
    return [Levels]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """made(kind, layout, **model): a compressed folder, made once."""
    done = {}

    def make(kind, layout, group_size="32", architecture="llama", **model):
        key = (kind, layout, group_size, architecture, *sorted(model.items()))
        if key not in done:
            host = PluginHost()
            host.register_module("toy", SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes))
            overrides = [f"steps[0].with.kind={kind}", f"steps[0].with.group_size={group_size}", f"export.format={layout}"]
            out = tmp_path_factory.mktemp("made") / "out"
            done[key] = compress(tiny(architecture, **model), ["toy.levels"], out, plugins=["toy"], host=host, overrides=overrides).path
        return done[key]

    return make


def weights(folder):
    source = open_any(folder)
    assert len(source.quantized) == 14
    return {m: source.read_quantized(m) for m in source.quantized}


# bytes ---------------------------------------------------------------------------------------------------------------


def of(levels, codes, group=None, **more):
    grid = Grid(4, "int", "group" if group else "channel", group, levels=levels, **more)
    codes = torch.tensor(codes, dtype=torch.int8)
    return Quantized(Scheme("t", grid), codes, torch.ones(grid.scale_shape((codes.shape[0], codes.shape[1]))))


def test_two_bits_by_hand():
    """Four codes a byte by their place among the levels, the first lowest; a row is filled up with the lowest level."""
    stored = Packed().pack(of(SEQ2, [[-3, -1, 1, 3, 3, 3], [3, 1, -1, -3, -3, 1]]))
    assert stored["weight_packed"].tolist() == [[0b11100100, 0b1111], [0b00011011, 0b1000]]
    assert stored["weight_shape"].tolist() == [2, 6]


def test_base_three_by_hand():
    """Five codes a byte: the first counts 1, the last 81."""
    stored = Packed().pack(of(TERNARY, [[-1, 0, 1, -1, 1, 1, 1], [1, 1, 1, 1, 1, 0, -1]]))
    assert stored["weight_packed"].tolist() == [[0 + 1 * 3 + 2 * 9 + 0 + 2 * 81, 2 + 2 * 3], [242, 1]]


def test_three_of_four_by_hand():
    """A slot is the zero's place, then whether the third and the second kept have another sign than the first; a bit is the first's sign."""
    codes = [[0, 1, 1, 1, 1, 0, 1, -1, -1, 1, 0, -1, -1, -1, -1, 0] + [0, 1, 1, 1] * 4 + [-1, 1, 1, 0]]
    stored = Packed().pack(of(TERNARY, codes, 4, sparsity=(3, 4)))
    slots = [0b0000, 0b0110, 0b1001, 0b1100, 0, 0, 0, 0, 0b1111]
    assert stored["weight_packed"].tolist() == [[low | high << 4 for low, high in zip(slots[::2], [*slots[1::2], 0], strict=True)]]
    assert stored["weight_signs"].tolist() == [[0b1100, 0b1]]


GRIDS = [
    Grid(4, "int", "group", 4, levels=SEQ2, scale_dtype="BF16"),
    Grid(2, "int", "channel", levels=TERNARY, scale_dtype="F16"),
    Grid(2, "int", "group", 4, levels=TERNARY, sparsity=(3, 4)),
    Grid(8, "int", "tensor", levels=(-128, 5, 127)),
    Grid(8, "int", "group", 2, levels=(-128, -7, 5, 127)),
    Grid(4, "int", "group", 4, levels=(-2, -1, 0, 1, 2)),
    Grid(2, "int", "group", 4),
    Grid(3, "int", "group", 2, symmetric=False),
    Grid(8, "int", "channel"),
]


def random_weight(grid, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (grid.bits - 1)
    levels = torch.tensor(grid.levels or range(-half, half), dtype=torch.int8)
    codes = levels[torch.randint(len(levels), (rows, columns), generator=generator)]
    if grid.sparsity:
        codes = torch.randint(2, (rows, columns), generator=generator).mul(2).sub(1).char().view(rows, -1, 4)
        codes = codes.scatter_(2, torch.randint(4, (rows, columns // 4, 1), generator=generator), 0).view(rows, columns)
    shape = grid.scale_shape((rows, columns))
    scale = torch.rand(shape, generator=generator).add(0.1).to({"BF16": torch.bfloat16, "F16": torch.float16}.get(grid.scale_dtype, torch.float32))
    zero = None if grid.symmetric else torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    return Quantized(Scheme("t", grid), codes, scale, zero)


@pytest.mark.parametrize("grid", GRIDS, ids=packing)
def test_what_is_packed_unpacks_the_same(grid):
    """For any shape, through the config, and read alike by a reader that shares no code with it."""
    exporter = Packed()
    for rows, columns in product((1, 7), (4, 8, 12, 20, 36, 100, 132)):
        original = random_weight(grid, rows, columns, columns)
        stored = exporter.pack(original)
        announced = exporter.layout((rows, columns), original.scheme)
        assert {s: (dtype_name(t.dtype), tuple(t.shape)) for s, t in stored.items()} == {s: (t.dtype, t.shape) for s, t in announced.items()}
        config = json.loads(json.dumps(exporter.config({"m": original.scheme}, [])))
        scheme = exporter.schemes(config, {"m": tuple(stored), "norm": ("weight",)})["m"]
        assert scheme.weights == grid
        found = exporter.unpack(stored, scheme)
        assert found.codes.equal(original.codes) and found.codes.dtype == torch.int8 and found.scale.equal(original.scale)
        assert found.dequantize().equal(original.dequantize())
        assert SecondReader(config).weight("m", stored).equal(original.dequantize())


def test_columns_that_no_byte_divides():
    for levels, columns in product(((-3, -1, 1, 3), TERNARY), range(1, 14)):
        original = random_weight(Grid(4, "int", "channel", levels=levels), 3, columns)
        assert Packed().unpack(Packed().pack(original), original.scheme).codes.equal(original.codes)
    for base, per_byte, columns in product((2, 3, 4, 16), (2, 4, 5), range(1, 9)):
        if base**per_byte <= 256:
            digits = torch.randint(base, (3, columns), dtype=torch.uint8)
            assert unpack_digits(pack_digits(digits, base, per_byte), base, per_byte, columns).equal(digits)


def test_all_32_patterns_of_three_of_four():
    patterns = torch.tensor([p for p in product(TERNARY, repeat=4) if p.count(0) == 1], dtype=torch.int8)
    slots, signs = pack_quads(patterns)
    assert len({(int(a), int(b)) for a, b in zip(slots, signs, strict=True)}) == 32 and int(slots.amax()) == 15
    assert unpack_quads(slots, signs).equal(patterns)
    for wrong in ([1, 2, 0, 1], [1, -2, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1], [127, 0, 1, 1], [-128, 0, 1, 1]):
        with pytest.raises(NumericError):
            pack_quads(torch.tensor([[*[0, 1, 1, 1] * 3, *wrong]], dtype=torch.int8))


@pytest.mark.parametrize(
    ("grid", "bits"),
    [(GRIDS[0], 2.0), (GRIDS[1], 1.6), (GRIDS[2], 1.25), (Grid(3, "int", "channel"), 3.0)],
)
def test_bits_a_weight(grid, bits):
    codes = {s: t for s, t in Packed().pack(random_weight(grid, 8, 320)).items() if s in ("weight_packed", "weight_signs")}
    assert 8 * sum(t.nbytes for t in codes.values()) == bits * 8 * 320


def test_codes_that_a_scheme_does_not_name():
    with pytest.raises(NumericError, match="levels"):
        Packed().pack(of(SEQ2, [[-3, -1, 0, 3]]))
    for codes in ([[0, 0, 1, 1]], [[1, 1, 1, 1]]):
        with pytest.raises(NumericError, match="one zero in every four"):
            Packed().pack(of(TERNARY, codes, 4, sparsity=(3, 4)))


def test_what_it_does_not_hold():
    inputs = Grid(8, "int", "token", dynamic=True)
    refused = [Scheme("a", Grid(8, "float", "channel")), Scheme("b", Grid(8, "int", "channel"), inputs), Scheme("c", Grid(8, "int", "block", None, (4, 4)))]
    for scheme in refused:
        with pytest.raises(PlanError, match="weight-only integers"):
            Packed().layout((8, 8), scheme)
    with pytest.raises(PlanError, match="in fours"):
        Packed().layout((8, 6), Scheme("d", Grid(2, "int", "channel", levels=TERNARY, sparsity=(3, 4))))


# hostile input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, {"weight_packed": torch.zeros(3, 4, dtype=torch.uint8)}),
        (0, {"weight_packed": torch.zeros(4, 5, dtype=torch.int32)}),
        (0, {"weight_packed": None}),
        (0, {"weight_scale": torch.ones(4, 4)}),
        (0, {"weight_scale": torch.ones(4, 5, dtype=torch.int32)}),
        (0, {"weight_shape": torch.tensor([4, 1 << 60])}),
        (0, {"weight_shape": torch.tensor([4, 18])}),
        (0, {"weight_shape": torch.tensor([4, -20])}),
        (0, {"weight_shape": torch.tensor([80])}),
        (0, {"weight_shape": torch.tensor([4, float("nan")])}),
        (0, {"weight_shape": None}),
        (1, {"weight_packed": torch.full((4, 4), 243, dtype=torch.uint8)}),
        (2, {"weight_signs": None}),
        (2, {"weight_signs": torch.zeros(4, 2, dtype=torch.uint8)}),
        (3, {"weight_scale": torch.ones(2)}),
        (7, {"weight_zero_point": torch.zeros(4, 1, dtype=torch.int8)}),
    ],
)
def test_tensors_that_do_not_fit(index, change):
    original = random_weight(GRIDS[index], 4, 20)
    stored = {s: t for s, t in {**Packed().pack(original), **change}.items() if t is not None}
    with pytest.raises(ModelError):
        Packed().unpack(stored, original.scheme)


def test_an_index_beyond_the_levels():
    original = random_weight(Grid(2, "int", "channel", levels=(-1, 1)), 4, 20)
    with pytest.raises(ModelError, match="each one of 2 levels"):
        Packed().unpack({**Packed().pack(original), "weight_packed": torch.full((4, 4), 2, dtype=torch.uint8)}, original.scheme)


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": 0}, {"num_bits": 9}, {"num_bits": "4"}, {"num_bits": True}, {"num_bits": None}, {"strategy": "block"}, {"strategy": ["group"]},
        {"group_size": 0}, {"group_size": None}, {"group_size": 1.5}, {"symmetric": 1}, {"scale_dtype": "I8"}, {"scale_dtype": []}, {"levels": []},
        {"levels": [3, 1]}, {"levels": [-9, 1]}, {"levels": [1, 8]}, {"levels": "13"}, {"levels": [None]}, {"levels": [0.5]}, {"sparsity": [3]},
        {"sparsity": {"3": 4}}, {"sparsity": [0, 4]}, {"packing": "base-3"}, {"packing": None}, {"packing": []},
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_make_no_sense(change):
    config = Packed().config({"m": Scheme("t", GRIDS[0])}, [])
    config["config_groups"]["group_0"]["weights"].update(change)
    with pytest.raises(ModelError):
        Packed().schemes(config, {"m": ("weight_scale",)})


@pytest.mark.parametrize(
    "config",
    [{}, {"version": 2, "config_groups": {}}, {"version": 1}, {"version": 1, "config_groups": []}]
    + [{"version": 1, "config_groups": {"g": g}} for g in (None, {}, {"targets": "Linear", "weights": {}}, {"targets": [1], "weights": {}})],
    ids=str,
)  # fmt: skip
def test_configs_of_another_form(config):
    with pytest.raises(ModelError):
        Packed().schemes(config, {"m": ("weight_scale",)})


def test_a_module_that_no_group_names():
    config = Packed().config({"a": Scheme("t", GRIDS[0]), "b": Scheme("t", GRIDS[1])}, [])
    assert Packed().schemes(config, {"b": ("weight_scale",), "c": ("weight",)})["b"].weights == GRIDS[1]
    with pytest.raises(ModelError, match="no config group"):
        Packed().schemes(config, {"c": ("weight_scale",)})


@pytest.mark.parametrize("kind", ["seq2", "sparse"])
def test_broken_folders_are_refused_in_one_line(made, tmp_path, kind):
    for number, change in enumerate(
        (
            {"weight_shape": torch.tensor([1 << 40, 1 << 40])},
            {"weight_shape": torch.zeros(2, 2, dtype=torch.int64)},
            {"weight_packed": torch.zeros(1, 1, dtype=torch.uint8)},
            {"weight_packed": torch.zeros(3)},
            {"weight_packed": torch.zeros(128, dtype=torch.uint8)},
            {"weight_packed": torch.zeros((), dtype=torch.uint8)},
            {"weight_shape": torch.tensor([float("nan"), 1])},
            {"weight_scale": torch.ones(1)},
            {"weight_scale": None},
        )
    ):
        folder = shutil.copytree(made(kind, "packed"), tmp_path / str(number))
        tensors = load_file(folder / "model.safetensors")
        for suffix, value in change.items():
            tensors[f"{UP}.{suffix}"] = value
        save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AngelslimError):
            load_model(folder, "cpu", packed=False)


# folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["seq2", "ternary", "sparse"])
def test_both_layouts_hold_the_same_model(made, tiny, kind, dtype):
    folders = [made(kind, layout, dtype=dtype) for layout in ("compressed-tensors", "packed")]
    engine, packed = map(weights, folders)
    assert all(engine[m].dequantize().equal(packed[m].dequantize()) and engine[m].codes.equal(packed[m].codes) for m in engine)
    levels = SEQ2 if kind == "seq2" else TERNARY
    assert all(q.scheme.weights.levels == levels and q.scheme.weights.sparsity == ((3, 4) if kind == "sparse" else None) for q in packed.values())
    assert all(occurring(q.codes) == levels for q in packed.values())
    loaded = [load_model(folder, "cpu", packed=False, own_reader=True) for folder in folders]
    assert loaded[1].backend == OWN_READER
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert loaded[0].model(ids).logits.equal(loaded[1].model(ids).logits)
    for folder in folders:
        found = validate(folder, tiny(dtype=dtype))
        assert found["ok"], found["problems"]
        assert found["readers"] == {"linears": 14, "second": True, "differ": []}
    assert found["engines"]["transformers"] == {"ok": False, "why": found["engines"]["transformers"]["why"]} and "load()" in found["engines"]["vllm"]["why"]


def test_several_schemes_in_one_folder(tiny, tmp_path):
    host = PluginHost()
    host.register_module("toy", SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes))
    steps = [{"use": "toy.levels", "targets": ["attention"]}, {"use": "toy.levels", "targets": ["mlp"], "with": {"kind": "sparse"}}]
    recipe = {"steps": steps}
    folders = [
        compress(tiny(), out=tmp_path / f, recipe={**recipe, "export": {"format": f}}, plugins=["toy"], host=host).path
        for f in ("packed", "compressed-tensors", "auto")
    ]
    packed, engine, chosen = map(weights, folders)
    assert {packing(q.scheme.weights) for q in packed.values()} == {"2-bit", "3:4"} and open_any(folders[2]).exporter.name == "compressed-tensors"
    assert all(packed[m].dequantize().equal(engine[m].dequantize()) and packed[m].dequantize().equal(chosen[m].dequantize()) for m in packed)
    assert validate(folders[0], tiny())["ok"]
    convert(folders[2], tmp_path / "again", "packed")
    assert all(q.scheme == packed[m].scheme and q.codes.equal(packed[m].codes) for m, q in weights(tmp_path / "again").items())


def test_the_records_name_the_levels(made):
    folder = made("seq2", "packed")
    grid = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert grid["levels"] == [*SEQ2] and grid["packing"] == "2-bit" and "seq2" in (folder / "angelslim/plan.json").read_text()
    assert json.loads(json.dumps(open_any(folder).quantized[UP].as_dict()))["weights"]["levels"] == [*SEQ2]
    found = inspect_model(folder)
    assert found["quantization"] == "angelslim-packed" and found["parameters"] == inspect_model(made("seq2", "compressed-tensors"))["parameters"]
    rows = json.loads((folder / "angelslim/analysis.json").read_text())["linears"]
    bits = [row["bits"] for row in rows.values() if "sqnr_db" in row]
    assert len(bits) == 14 and all(2.5 <= b < 2.6 for b in bits)  # 2, and a BF16 scale for 32; the shape is 16 bytes a linear
    assert kind(open_any(folder).quantized[UP]) == "w4a16"


@pytest.mark.parametrize("kind", ["seq2", "ternary"])
def test_engines_read_the_levels_as_plain_int4(made, kind):
    """compressed-tensors' own decompressor, and transformers with it."""
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert")
    folder = made(kind, "compressed-tensors")
    theirs = converters.CompressedTensorsDequantizer(folder, ignore=["model.embed_tokens"]).process(load_file(folder / "model.safetensors"))
    source = open_any(folder)
    assert all(theirs[name].equal(source.read(name)) for name in source.dtypes)
    assert source.quantized[UP].weights.levels is None and validate(folder)["engines"]["vllm"]["ok"]
    native, own = load_model(folder, "cpu", packed=False), load_model(folder, "cpu", own_reader=True)
    assert native.backend == "transformers"
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(native.model(ids).logits.float(), own.model(ids).logits.float(), atol=0.02)


def test_schemes_that_differ_in_levels_are_one_group_to_engines():
    schemes = {"a": Scheme("seq2", GRIDS[0]), "b": Scheme("ternary", Grid(**{**vars(GRIDS[0]), "levels": TERNARY}))}
    groups = CompressedTensors().config(schemes, [])["config_groups"]
    assert list(groups) == ["group_0"] and groups["group_0"]["targets"] == ["Linear"]
    assert len(Packed().config(schemes, [])["config_groups"]) == 2


def test_evaluation(made, tmp_path, tiny):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    found = [evaluate(made("seq2", layout), text=text, windows=2, length=32, device="cpu") for layout in ("packed", "compressed-tensors")]
    assert found[0]["backend"] == OWN_READER and abs(found[0]["perplexity"] / found[1]["perplexity"] - 1) < 0.01


# conversion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seq2", "ternary", "sparse"])
def test_there_and_back(made, tmp_path, kind):
    """A folder of int4 does not name its levels: they are found in the codes."""
    engine, packed = made(kind, "compressed-tensors"), made(kind, "packed")
    convert(engine, tmp_path / "packed", "packed")
    convert(tmp_path / "packed", tmp_path / "back", "compressed-tensors")
    for ours, theirs in ((tmp_path / "packed", packed), (tmp_path / "back", engine)):
        first, second = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
        assert first.keys() == second.keys() and all(first[n].equal(second[n]) and first[n].dtype == second[n].dtype for n in first)
        assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    assert validate(tmp_path / "packed")["ok"]


def test_weights_of_many_levels_keep_their_bits(tiny, tmp_path):
    for bits in (2, 4):
        options = ["steps[0].with.group_size=32", f"steps[0].with.bits={bits}"]
        folder = compress(tiny(), ["quant.int4_rtn"], tmp_path / f"int{bits}", overrides=options).path
        found = convert(folder, tmp_path / f"packed{bits}", "packed")
        a, b = weights(folder), weights(tmp_path / f"packed{bits}")
        assert all(a[m].dequantize().equal(b[m].dequantize()) for m in a) and found["bytes_after"] <= found["bytes_before"] + 64
        assert validate(tmp_path / f"packed{bits}")["ok"]
    assert {packing(q.scheme.weights) for q in b.values()} == {"dense"}


def test_a_linear_of_other_levels_has_a_group_of_its_own(made, tmp_path):
    folder = shutil.copytree(made("seq2", "compressed-tensors"), tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.weight_packed"] = load_file(made("ternary", "compressed-tensors") / "model.safetensors")[f"{UP}.weight_packed"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "packed", "packed")
    found = weights(tmp_path / "packed")
    assert {m for m, q in found.items() if q.scheme.weights.levels == TERNARY} == {UP}
    assert all(found[m].dequantize().equal(q.dequantize()) for m, q in weights(folder).items())


def test_transforms_go_along(tiny, tmp_path):
    steps = [{"use": "quant.rotate", "with": {"r4": True, "randomize": True}}, {"use": "quant.int4_rtn", "with": {"group_size": 32}}]
    folder = compress(tiny(), out=tmp_path / "ct", recipe={"steps": steps}).path
    convert(folder, tmp_path / "packed", "packed")
    convert(tmp_path / "packed", tmp_path / "back", "compressed-tensors")
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert first.keys() == second.keys() and all(first[n].equal(second[n]) for n in first) and any("R4_input" in n for n in first)
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
    assert validate(tmp_path / "packed")["ok"]
    loaded = [load_model(path, "cpu", packed=False) for path in (folder, tmp_path / "packed")]
    assert loaded[1].backend.endswith("transform_config applied by AngelSlim")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert loaded[0].model(ids).logits.equal(loaded[1].model(ids).logits)
    for layout in ("gptq", "gguf"):
        with pytest.raises(PlanError, match="transform_config"):
            convert(folder, tmp_path / "x.gguf", layout)


def test_packed_cannot_hold_what_is_no_weight_only_integer(tiny, tmp_path):
    folder = compress(tiny(), ["quant.fp8_dynamic"], tmp_path / "fp8").path
    with pytest.raises(PlanError, match="weight-only integers"):
        convert(folder, tmp_path / "packed", "packed")
    assert not (tmp_path / "packed").exists()


def test_experts(made, tmp_path):
    folder = made("sparse", "packed", architecture="qwen3_moe")
    source = open_any(folder)
    assert any(".experts." in m for m in source.quantized) and validate(folder)["ok"]
    convert(folder, tmp_path / "back", "compressed-tensors")
    other = open_any(tmp_path / "back")
    assert all(other.read_quantized(m).dequantize().equal(source.read_quantized(m).dequantize()) for m in source.quantized)


# GGUF ----------------------------------------------------------------------------------------------------------------


def gguf_tensors(path):
    """name -> (number of its type, fp32 weights), also of types that the gguf library does not know."""
    gguf = pytest.importorskip("gguf")
    from angelslim_core.gguf.blocks import BLOCKS, decode, nbytes, number

    kinds = {number(kind): kind for kind in (*BLOCKS, "F32", "F16", "BF16")}
    found = {}

    class Reader(gguf.GGUFReader):
        def _build_tensors(self, start, fields):
            for field in fields:
                _, name, _, shape, kind, offset = field.parts
                rows, size = [int(n) for n in shape[::-1]], nbytes(kinds[int(kind[0])], int(shape.prod()))
                data = self._get(int(start + offset[0]), "uint8", size)
                data = data.reshape(-1, size // rows[0]).copy() if len(rows) == 2 else data.copy()
                name = bytes(name).decode()
                if kinds[int(kind[0])] not in ("F32", "F16", "BF16"):
                    found[name] = (kinds[int(kind[0])], decode(data, kinds[int(kind[0])]))
                else:
                    found[name] = (kinds[int(kind[0])], None)

    return found, {name: field.contents() for name, field in Reader(path).fields.items()}


def gguf_read(path):
    found, fields = gguf_tensors(path)
    return {name: kind for name, (kind, _) in found.items()}, {name: w for name, (_, w) in found.items()}, fields


@pytest.mark.parametrize("layout", ["compressed-tensors", "packed"])
@pytest.mark.parametrize(
    ("kind", "group_size", "inside", "down"),
    [("seq2", "64", "Q4_0", "Q4_0"), ("ternary", "64", "Q2_0", "Q2_0"), ("ternary", "null", "Q2_0", "TQ2_0"), ("ternary", "32", "Q4_0", "Q4_0")],
)
def test_auto_takes_the_smallest_exact_type(made, tmp_path, layout, kind, group_size, inside, down):
    """Levels that a folder of int4 does not name are seen in its codes. Rows are of 64 inputs, of the down projections of 256."""
    folder = made(kind, layout, group_size, hidden_size=64, intermediate_size=256)
    found = convert(folder, tmp_path / "m.gguf", "gguf")
    kinds, stored, fields = gguf_read(tmp_path / "m.gguf")
    assert found["rounded"] == 0 and kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_up.weight"] == inside and kinds["blk.0.ffn_down.weight"] == down
    assert fields["general.file_type"] == {"Q4_0": 2, "Q2_0": 41}[inside]
    source = open_any(folder)
    for name, ours in (("blk.0.ffn_down", "mlp.down_proj"), ("blk.0.ffn_up", "mlp.up_proj"), ("blk.0.attn_v", "self_attn.v_proj")):
        assert stored[f"{name}.weight"].equal(source.read_quantized(f"model.layers.0.{ours}").dequantize())
    k = source.read_quantized("model.layers.0.self_attn.k_proj").dequantize()
    assert stored["blk.0.attn_k.weight"].reshape(2, -1, 2, 64).transpose(1, 2).reshape(k.shape).equal(k)


def test_two_bit_codes_take_two_bits(tiny, tmp_path):
    folder = compress(tiny(hidden_size=64), ["quant.int4_rtn"], tmp_path / "int2", overrides=["steps[0].with.group_size=64", "steps[0].with.bits=2"]).path
    assert convert(folder, tmp_path / "m.gguf", "gguf")["tensors"]["Q2_0"] == 14
    assert gguf_read(tmp_path / "m.gguf")[1]["blk.0.ffn_up.weight"].equal(open_any(folder).read_quantized(UP).dequantize())


@pytest.mark.parametrize("kind", ["q2_0", "tq1_0"])
def test_a_type_asked_for_is_taken_where_it_holds_codes(made, tmp_path, kind):
    folder = made("ternary", "packed", "null", hidden_size=64, intermediate_size=256)
    assert convert(folder, tmp_path / "m.gguf", "gguf", kind)["rounded"] == 0
    kinds = gguf_read(tmp_path / "m.gguf")[0]
    assert kinds["blk.0.ffn_down.weight"] == kind.upper() and kinds["blk.0.ffn_up.weight"] == "Q2_0"
    with pytest.raises(PlanError, match="ternary"):
        convert(made("seq2", "packed"), tmp_path / "n.gguf", "gguf", kind)


@pytest.mark.parametrize("kind", ["q2_0", "stq1_0"])
def test_plain_weights_that_are_ternary(tiny_copy, tmp_path, kind):
    folder = tiny_copy(hidden_size=64, intermediate_size=256)
    with pytest.raises(PlanError, match="ternary"):
        convert(folder, tmp_path / "m.gguf", "gguf", kind)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2, (tensors[name].shape[0], 4, 16, 4), generator=generator).mul(2).sub(1)
    codes = codes.scatter_(3, torch.randint(4, (*codes.shape[:3], 1), generator=generator), 0).transpose(2, 3).flatten(1)
    tensors[name] = (codes * 0.03125).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = convert(folder, tmp_path / "m.gguf", "gguf", kind)
    kinds, stored, _ = gguf_read(tmp_path / "m.gguf")
    assert found["tensors"][kind.upper()] == 1 and found["rounded"] == 0 and kinds["blk.1.ffn_down.weight"] == "BF16"
    assert stored["blk.0.ffn_down.weight"].equal(tensors[name].float())


def test_biases_of_the_feed_forward_part(tiny_copy, tmp_path):
    """Which a trained ternary linear may have got: llama.cpp's Llama adds them."""
    folder = tiny_copy(attention_bias=True, mlp_bias=True)
    convert(folder, tmp_path / "m.gguf", "gguf", "f16")
    kinds = gguf_read(tmp_path / "m.gguf")[0]
    assert all(kinds[f"blk.1.{name}.bias"] == "F32" for name in ("ffn_up", "ffn_gate", "ffn_down", "attn_output", "attn_q"))
    config = json.loads((folder / "config.json").read_text())
    from angelslim_core.gguf.model import Shape

    with pytest.raises(PlanError, match="biases"):
        Shape(config, "qwen3")
