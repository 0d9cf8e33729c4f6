"""Whole folders through compressed-tensors' own decompressor and converters: the same weights to the last bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from angelslim_core import compress
from angelslim_core.conversion import convert
from angelslim_core.loading import OWN_READER, load_model
from angelslim_core.source import open_any
from angelslim_core.testing.models import add_mtp

converters = pytest.importorskip("compressed_tensors.entrypoints.convert")

GROUPS = "steps[0].with.group_size=32"
FOLDERS = {
    "int8": (["quant.int8_dynamic"], []),
    "fp8": (["quant.fp8_dynamic"], []),
    "int4": (["quant.int4_rtn"], [GROUPS]),
    "int4 asym": (["quant.int4_rtn"], [GROUPS, "steps[0].with.symmetric=false"]),
    "int3": (["quant.int4_rtn"], [GROUPS, "steps[0].with.bits=3"]),
    "w4a8": (["quant.w4a8_fp8"], [GROUPS, "steps[0].with.method=rtn"]),
    "nvfp4": (["quant.nvfp4"], ["steps[0].with.weight_only=true", "steps[0].with.gptq=false"]),
    "mxfp4": (["quant.mxfp4"], []),
    "mxfp8": (["quant.mxfp8"], []),
    "mixed": (
        ["quant.int4_rtn", "quant.int8_dynamic", "quant.mxfp8", "quant.nvfp4", "quant.fp8_dynamic"],
        [
            *(GROUPS, "steps[0].targets=['o']", "steps[1].targets=['q', 'k', 'v']"),
            *("steps[2].targets=['gate', 'up']", "steps[2].ignore=['layers[0:1]']"),
            *("steps[3].targets=['down']", "steps[3].with.weight_only=true", "steps[3].with.gptq=false"),
            *("steps[4].targets=['gate', 'up']", "steps[4].ignore=['layers[1:2]']"),
        ],
    ),
}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """made(case): a compressed folder, made once."""
    done = {}

    def make(case):
        if case not in done:
            use, overrides = FOLDERS[case]
            done[case] = compress(tiny(), use, tmp_path_factory.mktemp("made") / "out", overrides=overrides).path
        return done[case]

    return make


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# of W4A8 the library's tool disregards the format that the folder names; test_exporters.py has its linears
@pytest.mark.parametrize("case", [case for case in FOLDERS if case != "w4a8"])
def test_the_library_decompresses_a_folder(made, case):
    folder = made(case)
    theirs = converters.CompressedTensorsDequantizer(folder, ignore=["model.embed_tokens"]).process(tensors(folder))
    source = open_any(folder)
    assert len(source.quantized) == 14 and theirs.keys() >= source.dtypes.keys()
    assert all(theirs[name].equal(source.read(name)) for name in source.dtypes)


def test_a_mixed_folder_holds_what_its_recipe_says(made):
    config = json.loads((made("mixed") / "config.json").read_text())["quantization_config"]
    formats = {"pack-quantized", "int-quantized", "mxfp8-quantized", "nvfp4-pack-quantized", "float-quantized"}
    assert config["format"] == "mixed-precision" and {g["format"] for g in config["config_groups"].values()} == formats


@pytest.mark.parametrize("case", ["int8", "fp8", "int4", "w4a8", "nvfp4", "mxfp4", "mxfp8", "mixed"])
def test_our_reader_and_transformers_compute_the_same(made, case):
    native, own = load_model(made(case), "cpu", packed=False), load_model(made(case), "cpu", own_reader=True)
    assert native.backend == "transformers" and own.backend == OWN_READER
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs, ours = native.model(ids).logits.float(), own.model(ids).logits.float()
    assert float((theirs - ours).norm() / theirs.norm()) < 0.05


def test_the_library_reads_awq_words(made, tmp_path):
    convert(made("int4 asym"), tmp_path / "awq", "awq")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    theirs, ours = converters.AutoAWQConverter.from_autoawq_config(config).process(tensors(tmp_path / "awq")), tensors(made("int4 asym"))
    assert theirs.keys() == ours.keys() and all(theirs[name].float().equal(ours[name].float()) for name in ours)


def test_the_library_reads_model_optimizer_tensors(made, tmp_path):
    convert(made("nvfp4"), tmp_path / "modelopt", "modelopt")
    theirs, ours = converters.ModelOptNvfp4Converter(targets=["re:.*_proj"]).process(tensors(tmp_path / "modelopt")), tensors(made("nvfp4"))
    assert theirs.keys() == ours.keys() and all(theirs[name].float().flatten().equal(ours[name].float().flatten()) for name in ours)


def test_the_library_reads_fp8_blocks(tiny, tmp_path):
    folder = compress(tiny(), ["quant.fp8_block"], tmp_path / "out", overrides=["steps[0].with.block_size=24"]).path
    theirs = converters.FP8BlockDequantizer.from_pretrained(folder, weight_block_size=(24, 24)).process(tensors(folder))
    source = open_any(folder)
    assert source.exporter.name == "fp8" and all(theirs[name].equal(source.read(name)) for name in source.dtypes)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "glm4_moe", "hunyuan_v1_moe", "qwen3_5_moe_text", "qwen3_5_text"])
@pytest.mark.parametrize("mtp", [False, True])
def test_a_folder_of_which_only_attention_is_quantized_loads(tiny, tiny_copy, tmp_path, architecture, mtp):
    folder = tiny(architecture)
    if mtp:
        folder = tiny_copy(architecture)
        add_mtp(folder)
    out = tmp_path / "out"
    compress(folder, out=out, recipe={"steps": [{"use": "quant.int8_dynamic", "targets": ["attention"]}]})
    loaded, own = load_model(out, "cpu", packed=False), load_model(out, "cpu", own_reader=True)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs, ours = loaded.model(ids).logits.float(), own.model(ids).logits.float()
    assert float((theirs - ours).norm() / theirs.norm()) < 0.05
