"""The recipe: what to do, as data. Every error names file, line and column, and every field is one something reads."""

from __future__ import annotations

import difflib
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from .errors import RecipeError
from .passes import Pass, PassConfig
from .recipe_errors import dotted, first_problem, where_of
from .strict_yaml import parse

_SIZE = re.compile(r"(\d{1,30}(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)
Selector = Annotated[str, Field(max_length=1000)]
_PATH_FIELDS = (("model", "path"), ("calibration", "data"), ("eval", "text"), ("export", "to"))


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" (powers of 1000) or 800MB."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no size such as 5GB or 800MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())


class ModelSection(_Model):
    """Where the model comes from."""

    path: str | None = Field(None, description="Model folder, or a hub id (owner/name) when online.")


class Runtime(_Model):
    """How to run."""

    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything random.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where passes compute; auto takes a GPU if there is one.")
    max_ram: str = Field(
        "auto",
        description='Memory to plan for, such as "8GB": a plan that needs more is refused, and hidden states of a GPU run that would not fit stay in files. '
        "auto: what is free, and nothing is refused.",
    )

    @field_validator("max_ram")
    @classmethod
    def _known_size(cls, value: str) -> str:
        if value != "auto":
            parse_size(value)
        return value

    @property
    def max_ram_bytes(self) -> int | None:
        return None if self.max_ram == "auto" else parse_size(self.max_ram)


class Calibration(_Model):
    """Text that calibrated passes look at."""

    data: str = Field(description="JSONL or text file, or `self` for samples the model writes itself.")
    field: str | None = Field(None, description="Field of a JSONL row that holds the text or messages; found by itself if not given.")
    template: Literal["chat", "none"] = Field("chat", description="Render conversations by the model's chat template, or join their contents.")
    samples: int = Field(128, ge=1, le=10**6, description="Number of samples.")
    tokens: int = Field(2048, ge=1, le=10**7, description="Tokens per sample, at most.")
    batch_size: int = Field(1, ge=1, description="Samples per forward pass.")


class StepSection(_Model):
    """One pass with its options, and the linears it treats."""

    use: str = Field(description="Pass id, `plugin.name`.")
    options: dict[str, Any] = Field(default_factory=dict, alias="with", description="Options of the pass.")
    targets: list[Selector] | None = Field(
        None, description="Roles, groups, exact names, `re:` patterns or ranges (layers[0:4].mlp); the pass's default if not given."
    )
    ignore: list[Selector] = Field(default_factory=list, description="Selectors taken out of the targets.")
    optional: bool = Field(False, description="Selectors that match nothing are no error.")


class Gates(_Model):
    """Limits on the evaluation and on calibration; if one is not met, nothing is published."""

    max_kl: float | None = Field(None, ge=0, description="Largest mean KL(base, output), nats per token.")
    min_top1: float | None = Field(None, ge=0, le=1, description="Smallest share of tokens with the base's first choice.")
    min_expert_tokens: int | None = Field(None, ge=1, description="Calibration tokens that the router must send to every expert, at least.")

    @property
    def needs_eval(self) -> bool:
        """Whether a limit is on the evaluation."""
        return self.max_kl is not None or self.min_top1 is not None


class Evaluation(_Model):
    """Evaluation of the finished output before it is published."""

    text: str = Field(description="Text file.")
    windows: int = Field(32, ge=1, description="Consecutive windows.")
    length: int = Field(1024, ge=2, description="Tokens a window.")


class Export(_Model):
    """What is written, and where."""

    format: str = Field("auto", description="Layout: auto, compressed-tensors, fp8, gptq, awq, modelopt, packed, or one a plugin brings.")
    to: str | None = Field(None, description="Output folder.")
    max_shard: str = Field("5GB", description="Largest weight file.")
    engines: list[str] = Field(default_factory=list, description="Engines that must be able to load the result; refused before any work if one cannot.")

    @field_validator("max_shard")
    @classmethod
    def _known_size(cls, value: str) -> str:
        if parse_size(value) < 1:
            raise ValueError("must be at least one byte")
        return value

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard)


class Recipe(_Model):
    """What to do with a model."""

    version: Literal[1] = Field(1, description="Version of this language.")
    model: ModelSection = Field(default_factory=lambda: ModelSection.model_validate({}), description="The model to compress.")
    runtime: Runtime = Field(default_factory=lambda: Runtime.model_validate({}), description="How to run.")
    calibration: Calibration | None = Field(None, description="Calibration data, for passes that need it.")
    steps: list[StepSection] = Field(min_length=1, max_length=100, description="Passes in order.")
    gates: Gates | None = Field(None, description="Limits that must be met; those on the output need `eval`.")
    eval: Evaluation | None = Field(None, description="Evaluate the output before it is published.")
    export: Export = Field(default_factory=lambda: Export.model_validate({}), description="The output.")

    _name: str = PrivateAttr("recipe")
    _positions: dict[tuple[str | int, ...], tuple[int, int]] = PrivateAttr(default_factory=dict)
    _overridden: dict[str, str] = PrivateAttr(default_factory=dict)
    _home: Path | None = PrivateAttr(None)
    _path_options: set[tuple[int, str]] = PrivateAttr(default_factory=set)

    def where(self, path: str) -> str:
        """Place of a value for messages: file, line and column, or the --set that gave it."""
        return where_of(self._name, _split(path), self._positions, self._overridden)


def load_recipe(source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a YAML file, the name of a shipped recipe, or the content itself.
        overrides: "path=value" strings as for `--set`; values are recipe YAML.

    Raises:
        RecipeError: with file, line and column, what is wrong and what is allowed.
    """
    positions: dict[tuple[str | int, ...], tuple[int, int]] = {}
    if isinstance(source, Mapping):
        name, data, home = "recipe", dict(source), None
    else:
        name, text, home = _read(source)
        data, positions = parse(text, name)
    if not isinstance(data, dict):
        raise RecipeError(11, name, "holds no recipe (a mapping with `steps`)")
    data = _extended(data, name, positions)
    _make_absolute(data, home)
    overridden: dict[str, str] = {}
    for override in overrides:
        _apply(data, override, overridden)
    _refuse_urls(data, name, positions, overridden)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise first_problem(error, name, (), positions, overridden, Recipe, ("extends",)) from error
    recipe._name, recipe._positions, recipe._overridden, recipe._home = name, positions, overridden, home
    if recipe.gates is not None and recipe.gates.needs_eval and recipe.eval is None:
        raise RecipeError(12, recipe.where("gates"), "max_kl and min_top1 need an `eval` section to measure", "add `eval: {text: FILE}`")
    return recipe


def steps_from_use(ids: Sequence[str], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of passes with default options, as `--use` gives them."""
    return load_recipe({"steps": [{"use": pass_id} for pass_id in ids]}, overrides=overrides)


def bind_options(index: int, recipe: Recipe, pass_class: type[Pass]) -> PassConfig:
    """Options of a step, checked against its pass.

    Raises:
        RecipeError: an unknown or impossible option, with its place.
    """
    options = dict(recipe.steps[index].options)
    for name in _path_options(pass_class):
        if isinstance(options.get(name), str):
            options[name] = _option_path(recipe, index, name, options[name])
    try:
        return pass_class.Config.model_validate(options)
    except ValidationError as error:
        raise first_problem(error, recipe._name, ("steps", index, "with"), recipe._positions, recipe._overridden, pass_class.Config) from error


def _path_options(pass_class: type[Pass]) -> list[str]:
    return [name for name, field in pass_class.Config.model_fields.items() if Path in (field.annotation, *get_args(field.annotation))]


def _option_path(recipe: Recipe, index: int, name: str, value: str) -> str:
    """A file that a step names; in a recipe file a relative one counts from the file, given by --set from where the command runs."""
    where = f"steps[{index}].with.{name}"
    if "://" in value:
        raise RecipeError(291, recipe.where(where), "is a URL; recipes name local files only")
    recipe._path_options.add((index, name))
    given = any(where == path or where.startswith((f"{path}.", f"{path}[")) for path in recipe._overridden)
    return value if given or recipe._home is None else str(recipe._home / value)


def shipped() -> dict[str, str]:
    """Names of the recipes in this package -> their text."""
    folder = importlib.resources.files(__package__) / "recipes"
    return {f.name.removesuffix(".yaml"): f.read_text() for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith(".yaml")}


def recipe_schema(pass_classes: Iterable[type[Pass]]) -> dict[str, Any]:
    """JSON Schema of a recipe whose steps are those of `pass_classes`."""
    schema = Recipe.model_json_schema(by_alias=True)
    step = schema["$defs"]["StepSection"]
    variants = []
    for pass_class in pass_classes:
        options = pass_class.Config.model_json_schema(ref_template="#/$defs/{model}")
        schema["$defs"].update(options.pop("$defs", {}))
        properties = {**step["properties"], "use": {"const": pass_class.id, "description": pass_class.summary()}, "with": options}
        variants.append({**step, "title": pass_class.id, "properties": properties})
    if variants:
        schema["properties"]["steps"]["items"] = {"anyOf": variants}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def to_yaml(recipe: Recipe) -> str:
    """The recipe as it was run, for the artifact: paths shortened to names, so that no machine's layout is published."""
    data = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    for section, key in _PATH_FIELDS:
        value = data.get(section, {}).get(key)
        if value and (section != "model" or Path(value).exists()):  # what is no folder is a hub id
            data[section][key] = Path(value).absolute().name
    for index, key in recipe._path_options:
        data["steps"][index]["with"][key] = Path(data["steps"][index]["with"][key]).name
    return yaml.safe_dump(data, sort_keys=False)


def _read(source: str | Path) -> tuple[str, str, Path | None]:
    path = Path(source)
    known = shipped()
    if str(source) in known and not path.exists():
        return f"{source}.yaml", known[str(source)], None
    try:
        return path.name, path.read_bytes().decode("utf-8"), path.absolute().parent
    except UnicodeDecodeError as error:
        raise RecipeError(13, path.name, "is not UTF-8") from error
    except OSError as error:
        close = difflib.get_close_matches(str(source), known, 1)
        hint = f"did you mean {close[0]}?" if close else f"shipped recipes: {', '.join(known)}"
        raise RecipeError(14, str(source), f"is no recipe file ({error.strerror}) and no shipped recipe", hint) from error


def _extended(data: dict[str, Any], name: str, positions: Mapping[Any, tuple[int, int]]) -> dict[str, Any]:
    base = data.pop("extends", None)
    if base is None:
        return data
    known = shipped()
    if not isinstance(base, str) or base not in known:
        raise RecipeError(15, where_of(name, ("extends",), positions, {}), f"no shipped recipe {base!r}", f"shipped: {', '.join(known)}")
    below, _ = parse(known[base], f"{base}.yaml")
    return {**below, **data}


def _make_absolute(data: dict[str, Any], home: Path | None) -> None:
    """Relative paths of a recipe file count from the file."""
    if home is None:
        return
    for section, key in _PATH_FIELDS:
        holder = data.get(section)
        if not isinstance(holder, dict):
            continue
        value = holder.get(key)
        if isinstance(value, str) and (section, value) != ("calibration", "self"):
            # what is no folder beside the recipe may be a hub id
            if section == "model" and not value.startswith((".", "/")) and not (home / value).exists():
                continue
            holder[key] = str(home / value)


_KEY = re.compile(r"([A-Za-z_][\w-]*)|\[(\d+)\]")


def _split(path: str) -> tuple[str | int, ...]:
    parts: list[str | int] = []
    for piece in path.split("."):
        matched = 0
        for match in _KEY.finditer(piece):
            if match.start() != matched:
                break
            matched = match.end()
            parts.append(match[1] if match[1] else int(match[2]))
        if matched != len(piece) or not piece:
            raise RecipeError(16, f"--set {path}", "is no path such as steps[0].with.group_size")
    return tuple(parts)


def _apply(data: dict[str, Any], override: str, overridden: dict[str, str]) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(17, f"--set {override}", "has no `=`", "write --set path=value")
    parts = _split(path.strip())
    parsed, _ = parse(value, f"--set {path}")
    holder: Any = data
    for part, following in zip(parts, (*parts[1:], None), strict=True):
        last = following is None
        if isinstance(part, int):
            if not isinstance(holder, list) or part >= len(holder):
                raise RecipeError(18, f"--set {path}", f"there is no element [{part}]")
        elif not isinstance(holder, dict):
            raise RecipeError(19, f"--set {path}", f"{part!r} lies in something that has no keys")
        if last:
            holder[part] = parsed
        elif isinstance(part, str):
            if holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]
        else:
            holder = holder[part]
    overridden[dotted(parts)] = f"--set {override}"


def _refuse_urls(data: Mapping[str, Any], name: str, positions: Mapping[Any, tuple[int, int]], overridden: Mapping[str, str]) -> None:
    for section, key in _PATH_FIELDS:
        holder = data.get(section)
        value = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(value, str) and "://" in value:
            raise RecipeError(20, where_of(name, (section, key), positions, overridden), "is a URL; recipes name local files only")
