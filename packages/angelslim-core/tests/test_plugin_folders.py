"""Folders that a third party's plugin wrote: readable by every command that names the plugin, and by none that does not."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from angelslim_core import plugins
from angelslim_core.adapters.llama import LAYOUTS
from angelslim_core.cli import main as cli
from angelslim_core.exporters.compressed_tensors import CompressedTensors
from angelslim_core.hookspecs import hookimpl
from angelslim_core.passes import TensorPass
from angelslim_core.plugins import Installed
from angelslim_core.schemes import Grid, Quantized, Scheme


class Layout(CompressedTensors):
    """compressed-tensors under another name."""

    name = quant_method = "zebra"


class Round(TensorPass):
    """Integers of 8 bits."""

    id = "zebra.round"
    claims = frozenset({"linear.weight"})

    def scheme(self, site):
        return Scheme("int8", Grid(8, "int", "channel"), exporters=("zebra",))

    def apply(self, weights, context):
        results = {}
        for site, weight in weights.items():
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            results[site] = Quantized(self.scheme(site), (weight.float() / scale).round().to(torch.int8), scale)
        return results


@pytest.fixture
def zebra(monkeypatch):
    module = ModuleType("zebra_module")
    module.ANGELSLIM_HOOKS = 1
    for name, found in {
        "passes": [Round],
        "exporters": [Layout],
        "adapters": [replace(LAYOUTS[0], model_types=("zebra",), loads_as={"zebra": "llama"})],
    }.items():

        def register(found=found):
            return found

        register.__name__ = f"angelslim_register_{name}"
        setattr(module, register.__name__, hookimpl(register))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(plugins, "installed", lambda: {"zebra": [Installed("zebra", "angelslim-zebra", "1", module.__name__, "", "")]})


def call(capsys, *arguments):
    capsys.readouterr()
    try:
        code = cli._guarded(list(map(str, arguments)))
    except SystemExit as ended:
        code = ended.code
    return code or 0, capsys.readouterr()


def test_commands_read_what_a_named_plugin_wrote(zebra, capsys, tiny_copy, tmp_path):
    model, out, text = tiny_copy(), tmp_path / "out", tmp_path / "t.txt"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "zebra"}))
    text.write_text("some text to score " * 20)
    code, said = call(capsys, "run", "--model", model, "--out", out, "--plugins", "zebra", "--use", "zebra.round")
    assert code == 0, said.err
    commands = {
        "eval": ("--text", text, "--base", model, "--windows", 1, "--length", 16),
        "validate": ("--base", model, "--run"),
        "inspect": (),
        "chat": ("--prompt", "hello", "--max-new-tokens", 2),
    }
    for command, options in commands.items():
        code, said = call(capsys, command, out, *options)
        assert code and "angelslim-zebra" in said.err + said.out and "--plugins zebra" in said.err + said.out, command
        code, said = call(capsys, command, out, *options, "--plugins", "zebra")
        assert code == 0, (command, said.err, said.out)


def test_an_unknown_architecture_names_its_plugin(zebra, capsys, tiny_copy):
    folder = tiny_copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "zebra"}))
    records = folder / "angelslim"
    records.mkdir()
    records.joinpath("provenance.json").write_text(json.dumps({"plugins": [{"id": "zebra", "dist": "angelslim-zebra"}]}))
    code, said = call(capsys, "inspect", folder)
    assert code == 5 and "--plugins zebra" in said.err
    records.joinpath("provenance.json").write_text(json.dumps({"plugins": [{"id": "x; rm -rf", "dist": "y"}, 3, {"id": "quant"}]}))
    code, said = call(capsys, "inspect", folder)
    assert code == 5 and "rm" not in said.err and "add a Layout" in said.err


def test_a_runtime_policy_names_its_plugin(zebra, capsys, tiny_copy):
    folder = tiny_copy()
    records = folder / "angelslim"
    records.mkdir()
    records.joinpath("runtime.json").write_text(json.dumps({"policies": [{"pass": "zebra.policy", "policy": {}}]}))
    records.joinpath("provenance.json").write_text(json.dumps({"plugins": [{"id": "zebra", "dist": "angelslim-zebra"}]}))
    code, said = call(capsys, "chat", folder, "--prompt", "hello")
    assert code == 5 and "AS-MOD-280" in said.err and "--plugins zebra" in said.err
