"""Loading plugins: only those that are named, each resolved to exactly one distribution.

A plugin is an entry point of the group `angelslim`; its name is the plugin's id. pluggy would take the first entry
point of a name from any distribution, so names are resolved here: official names belong to our distributions, one name
in two distributions is refused, and everything about a plugin is checked before a hook of it runs.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs
from .errors import AngelslimError, PluginError
from .hookspecs import HOOK_VERSION, OFFICIAL
from .registry import Registry

if TYPE_CHECKING:
    from .packed import PackedLinear

GROUP = "angelslim"


@dataclass(frozen=True)
class Installed:
    """An installed plugin, known from metadata alone."""

    id: str
    dist: str
    version: str
    module: str
    summary: str
    record_sha256: str

    @property
    def official(self) -> bool:
        return OFFICIAL.get(self.id) == self.dist


def installed() -> dict[str, list[Installed]]:
    """Plugin id -> distributions that offer it; imports none of them."""
    found: dict[str, dict[str, Installed]] = {}
    for dist in metadata.distributions():
        for entry in dist.entry_points:
            if entry.group == GROUP:
                name = _normal(dist.metadata["Name"])
                record = dist.read_text("RECORD") or ""
                plugin = Installed(entry.name, name, dist.version, entry.value, dist.metadata["Summary"] or "", hashlib.sha256(record.encode()).hexdigest())
                found.setdefault(entry.name, {}).setdefault(name, plugin)  # the first on sys.path is the one imported
    return {name: list(dists.values()) for name, dists in sorted(found.items())}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def required_plugins(pass_ids: Iterable[str], named: Sequence[str]) -> list[str]:
    """Plugins to load for these passes: the named ones, and official ones that a pass id implies.

    Raises:
        PluginError: a pass belongs to a third party's plugin that was not named.
    """
    needed = list(dict.fromkeys(named))
    for pass_id in pass_ids:
        plugin = pass_id.partition(".")[0]
        if plugin in needed:
            continue
        if plugin not in OFFICIAL:
            raise PluginError(3, pass_id, f"plugin {plugin!r} is not an official one and was not named", f"if you trust it: --plugins {plugin}")
        if named:
            raise PluginError(4, pass_id, f"plugin {plugin!r} is not among --plugins {','.join(named)}", f"--plugins {','.join([*named, plugin])}")
        needed.append(plugin)
    return needed


class PluginHost:
    """Loads named plugins and holds what they register.

    Args:
        blocked: plugins that may not be loaded, whoever names them; `ANGELSLIM_BLOCK_PLUGINS` adds to them.
    """

    def __init__(self, blocked: Iterable[str] = ()) -> None:
        from .adapters import builtin_layouts
        from .exporters import builtin_exporters

        self.manager = pluggy.PluginManager("angelslim")
        self.manager.add_hookspecs(hookspecs)
        self.manager.hook.angelslim_addhooks.call_historic(kwargs={"pluginmanager": self.manager})
        self.manager.register(_CoreHooks(), "core")
        self.blocked = {*blocked, *filter(None, os.environ.get("ANGELSLIM_BLOCK_PLUGINS", "").split(","))}
        for name in self.blocked:
            self.manager.set_blocked(name)
        self.registry = Registry()
        self.registry.add_layouts("core", builtin_layouts())
        self.registry.add_exporters("core", builtin_exporters())
        self.loaded: dict[str, Installed] = {}

    @property
    def hook(self) -> Any:
        return self.manager.hook

    def load(self, names: Iterable[str]) -> None:
        """Import and check plugins by id; loaded ones are left alone.

        Raises:
            PluginError: blocked, not installed, ambiguous, broken, or made for another hook version.
        """
        for name in names:
            if name in self.loaded:
                continue
            if name in self.blocked:
                raise PluginError(5, name, "this plugin is blocked", "remove it from --block-plugins or ANGELSLIM_BLOCK_PLUGINS")
            plugin = self._resolve(name)
            try:
                module = _import(plugin.module)
            except Exception as error:  # a broken plugin must not look like a bug of ours
                raise PluginError(6, name, f"cannot be imported: {type(error).__name__}: {error}", f"reinstall {plugin.dist}") from error
            self.register_module(name, module, plugin)

    def register_module(self, name: str, module: ModuleType | Any, plugin: Installed | None = None) -> None:
        """Check a plugin's module and register what it brings; also the way to plug something in from Python."""
        version = getattr(module, "ANGELSLIM_HOOKS", None)
        if version != HOOK_VERSION:
            says = "does not say which hook version it needs" if version is None else f"was made for hook version {version}"
            raise PluginError(7, name, f"{says}, this is version {HOOK_VERSION}", "install a release of it made for this angelslim-core")
        for attribute in dir(module):
            if attribute.startswith("angelslim_") and not hasattr(hookspecs, attribute):
                close = difflib.get_close_matches(attribute, [h for h in dir(hookspecs) if h.startswith("angelslim_")], 1)
                raise PluginError(
                    8, name, f"{attribute} is no hook", f"did you mean {close[0]}? docs/hooks.md lists them" if close else "docs/hooks.md lists them"
                )
            marked = attribute.startswith("angelslim_") and callable(getattr(module, attribute))
            if marked and not hasattr(getattr(module, attribute), "angelslim_impl"):
                raise PluginError(9, name, f"{attribute} lacks @hookimpl and would never be called", "see docs/hooks.md")
        try:
            self.manager.register(module, name)
            self.manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(10, name, f"is not valid: {str(error).splitlines()[-1].strip()}", "see docs/hooks.md") from error
        registry = self.registry
        for hook, add in (
            ("angelslim_register_passes", registry.add_passes), ("angelslim_register_adapters", registry.add_layouts),
            ("angelslim_register_exporters", registry.add_exporters), ("angelslim_register_kernels", registry.add_kernels),
        ):  # fmt: skip
            if hasattr(module, hook):
                add(name, self._call(name, module, hook))
        self.loaded[name] = plugin or Installed(name, "", "", getattr(module, "__name__", name), "", "")

    def default_steps(self, names: Sequence[str], device: str, model: str | Path | None = None) -> list[dict[str, Any]]:
        """Steps of each plugin's default preset, in the order named.

        Args:
            model: folder or hub id, or None.

        Raises:
            PluginError: a plugin has none.
        """
        steps: list[dict[str, Any]] = []
        folder = Path(model) if model is not None and Path(model).is_dir() else None
        for name in names:
            module = self.manager.get_plugin(name)
            found = self._call(name, module, "angelslim_default_steps", device=device, model=folder) if hasattr(module, "angelslim_default_steps") else []
            if not found:
                has = [p for p in self.registry.passes if p.startswith(f"{name}.")]
                what = "has no default preset" if has else "registers no passes yet"
                raise PluginError(11, name, what, f"choose with --use: {', '.join(sorted(has))}" if has else "leave it out of --plugins")
            steps += found
        return steps

    def linears(self) -> list[type[PackedLinear]]:
        """Classes that run linears as they are stored, of all loaded plugins, in the order loaded; quant is loaded if it is installed."""
        if "quant" not in self.loaded and "quant" not in self.blocked and "quant" in installed():
            self.load(["quant"])
        found: list[type[PackedLinear]] = []
        for name in self.loaded:
            module = self.manager.get_plugin(name)
            if hasattr(module, "angelslim_register_linears"):
                found += self._call(name, module, "angelslim_register_linears")
        return found

    def add_commands(self, name: str, group: Any) -> bool:
        """Let one plugin add its commands to a click group; false if it has none."""
        module = self.manager.get_plugin(name)
        if not hasattr(module, "angelslim_register_commands"):
            return False
        self._call(name, module, "angelslim_register_commands", cli=group)
        return True

    def _call(self, name: str, module: Any, hook: str, **arguments: Any) -> Any:
        """One plugin's implementation of a hook, with the arguments it takes."""
        function = getattr(module, hook)
        wanted = inspect.signature(function).parameters
        try:
            return function(**{k: v for k, v in arguments.items() if k in wanted})
        except AngelslimError:
            raise
        except Exception as error:
            raise PluginError(12, name, f"{hook} failed: {type(error).__name__}: {error}") from error

    def _resolve(self, name: str) -> Installed:
        everything = installed()
        candidates = everything.get(name, [])
        if name in OFFICIAL:
            strangers = [c.dist for c in candidates if not c.official]
            if strangers:
                raise PluginError(13, name, f"{strangers[0]} claims a name reserved for {OFFICIAL[name]}", f"uninstall {strangers[0]}")
        if len(candidates) > 1:
            raise PluginError(14, name, f"offered by {' and '.join(c.dist for c in candidates)}", "uninstall one of them")
        if not candidates:
            close = difflib.get_close_matches(name, [*everything, *OFFICIAL], 1)
            if close and close[0] != name:
                hint = f"did you mean {close[0]}? installed: {', '.join(everything) or 'none'}"
            else:
                hint = f"pip install {OFFICIAL[name]}" if name in OFFICIAL else f"installed: {', '.join(everything) or 'none'}"
            raise PluginError(15, name, "no such plugin is installed", hint)
        return candidates[0]


class _CoreHooks:
    """The core's own part in the lifecycle."""

    @hookspecs.hookimpl(trylast=True)
    def angelslim_run_pass(self, execute: Any) -> Any:
        return execute()


def _import(target: str) -> Any:
    return metadata.EntryPoint("plugin", target, GROUP).load()
