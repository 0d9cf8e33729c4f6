"""The plugin host: named plugins only, one distribution each, everything checked before a hook runs."""

from types import SimpleNamespace

import pytest

from angelslim_core import plugins
from angelslim_core.errors import PluginError, RecipeError
from angelslim_core.hookspecs import hookimpl, hookspec
from angelslim_core.passes import TensorPass
from angelslim_core.plugins import Installed, PluginHost, required_plugins


class Toy(TensorPass):
    """Leaves weights alone."""

    id = "toy.nothing"

    def apply(self, weights, context):
        return weights


def module(**attributes):
    return SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, **attributes)


@hookimpl
def angelslim_register_passes():
    return [Toy]


def failure(function, *args):
    with pytest.raises(PluginError) as caught:
        function(*args)
    assert caught.value.exit_code == 4
    return caught.value


def pretend(monkeypatch, **offers):
    monkeypatch.setattr(plugins, "installed", lambda: {n: [Installed(n, d, "1", f"{n}_module", "", "") for d in dists] for n, dists in offers.items()})


def test_registers_what_a_module_brings():
    host = PluginHost()
    host.register_module("toy", module(angelslim_register_passes=angelslim_register_passes))
    assert host.registry.find_pass("toy.nothing") is Toy
    with pytest.raises(RecipeError, match="nothin'") as caught:
        host.registry.find_pass("toy.nothin")
    assert "toy.nothing" in caught.value.hint


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_hook_version_is_refused(version):
    wrong = module(angelslim_register_passes=angelslim_register_passes)
    wrong.ANGELSLIM_HOOKS = version
    assert "hook version" in failure(PluginHost().register_module, "toy", wrong).what


def test_misspelt_hooks_are_refused():
    error = failure(PluginHost().register_module, "toy", module(angelslim_register_pases=angelslim_register_passes))
    assert "angelslim_register_passes" in error.hint and "docs/hooks.md" in error.hint
    assert "docs/hooks.md" in failure(PluginHost().register_module, "toy", module(angelslim_zzz=angelslim_register_passes)).hint
    unmarked = module(angelslim_register_passes=lambda: [Toy])
    assert "hookimpl" in failure(PluginHost().register_module, "toy", unmarked).what

    @hookimpl
    def angelslim_default_steps(devise):
        return []

    assert "devise" in failure(PluginHost().register_module, "toy", module(angelslim_default_steps=angelslim_default_steps)).what


def test_a_plugin_adds_hooks_of_its_own():
    class Specs:
        @hookspec(firstresult=True)
        def toy_greet(self, name): ...

    @hookimpl
    def angelslim_addhooks(pluginmanager):
        pluginmanager.add_hookspecs(Specs)

    @hookimpl
    def toy_greet(name):
        return f"hello {name}"

    host = PluginHost()
    host.register_module("toy", module(angelslim_addhooks=angelslim_addhooks, toy_greet=toy_greet))
    assert host.hook.toy_greet(name="zebra") == "hello zebra"


def test_ids_belong_to_their_plugin_and_to_one_owner():
    assert "must be named" in failure(PluginHost().register_module, "other", module(angelslim_register_passes=angelslim_register_passes)).what

    @hookimpl
    def angelslim_register_passes_twice():
        return [Toy, Toy]

    angelslim_register_passes_twice.__name__ = "angelslim_register_passes"
    assert "already registered" in failure(PluginHost().register_module, "toy", module(angelslim_register_passes=angelslim_register_passes_twice)).what


def test_a_failing_plugin_is_isolated():
    @hookimpl
    def angelslim_register_passes():
        raise ZeroDivisionError("oops")

    error = failure(PluginHost().register_module, "toy", module(angelslim_register_passes=angelslim_register_passes))
    assert "ZeroDivisionError" in error.what


def test_unknown_blocked_and_ambiguous(monkeypatch):
    pretend(monkeypatch, acme=["angelslim-acme"], twice=["a", "b"], quant=["evil-quant"])
    assert "acme" in failure(PluginHost().load, ["acmee"]).hint
    assert "a and b" in failure(PluginHost().load, ["twice"]).what
    assert "reserved" in failure(PluginHost().load, ["quant"]).what
    assert "blocked" in failure(PluginHost(["acme"]).load, ["acme"]).what
    monkeypatch.setenv("ANGELSLIM_BLOCK_PLUGINS", "acme")
    assert "blocked" in failure(PluginHost().load, ["acme"]).what


def test_broken_import_is_one_line(monkeypatch):
    pretend(monkeypatch, acme=["angelslim-acme"])
    error = failure(PluginHost().load, ["acme"])
    assert "ModuleNotFoundError" in error.what and "\n" not in error.what


def test_only_named_or_official_plugins_are_loaded():
    assert required_plugins(["quant.a", "sparseattn.b"], []) == ["quant", "sparseattn"]
    assert required_plugins(["acme.a"], ["acme"]) == ["acme"]
    assert "--plugins acme" in failure(required_plugins, ["acme.a"], []).hint
    assert "--plugins acme,quant" in failure(required_plugins, ["quant.a"], ["acme"]).hint


def test_plugins_without_a_default_preset_say_why():
    host = PluginHost()
    host.load(["distill"])
    host.register_module("toy", module())
    assert "registers no passes yet" in failure(host.default_steps, ["toy"], "cpu").what
    with pytest.raises(RecipeError, match="needs a teacher") as caught:
        host.default_steps(["distill"], "cpu")
    assert caught.value.exit_code == 3 and "needs a teacher" in caught.value.what


def test_loaded_plugins_are_recorded():
    host = PluginHost()
    host.load(["quant"])
    plugin = host.loaded["quant"]
    assert plugin.official and plugin.dist == "angelslim-quant" and len(plugin.record_sha256) == 64


def test_default_steps_follow_the_device():
    host = PluginHost()
    host.load(["quant"])
    assert host.default_steps(["quant"], "cpu")[0]["use"] == "quant.int8_dynamic"
    assert host.default_steps(["quant"], "cuda:8.0")[0]["use"] == "quant.int8_dynamic"
    assert host.default_steps(["quant"], "cuda:9.0")[0]["use"] == "quant.fp8_dynamic"
