"""YAML without its surprises, with the line and column of every value.

Only `true` and `false` are booleans, `1e-4` is a number, `012` is text; duplicate keys, anchors, tags, several
documents, deep nesting and large files are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from .errors import RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")


class _Loader(yaml.SafeLoader):
    """Composes nodes; every plain scalar stays text, which `_scalar` reads."""


_Loader.yaml_implicit_resolvers = {}


def parse(text: str, name: str) -> tuple[Any, dict[Path, tuple[int, int]]]:
    """Data of a YAML text and the position (line, column, from 1) of every path in it.

    Args:
        name: file name for messages.

    Raises:
        RecipeError: not this subset of YAML, with file, line and column.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise RecipeError(1, name, f"is larger than {MAX_BYTES} bytes")
    try:
        _check_depth(text, name)
        events = list(yaml.parse(text, _Loader))
        for event in events:
            where = _at(name, event.start_mark)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise RecipeError(2, where, "anchors and aliases are not allowed")
            tag = getattr(event, "tag", None)
            if tag:
                raise RecipeError(3, where, f"tags are not allowed: {tag}")
        if sum(isinstance(e, yaml.DocumentStartEvent) for e in events) > 1:
            raise RecipeError(4, name, "holds more than one document")
        node = yaml.compose(text, _Loader)
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(5, _at(name, mark) if mark else name, f"is not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(6, name, f"is not YAML: {str(error).splitlines()[0]}") from error
    positions: dict[Path, tuple[int, int]] = {}
    return (None if node is None else _build(node, (), positions, name)), positions


def _check_depth(text: str, name: str) -> None:
    """Nesting, found without recursion: the composer would overflow the stack first."""
    depth = 0
    for token in yaml.scan(text, _Loader):
        if isinstance(token, yaml.BlockMappingStartToken | yaml.BlockSequenceStartToken | yaml.FlowMappingStartToken | yaml.FlowSequenceStartToken):
            depth += 1
            if depth > MAX_DEPTH:
                raise RecipeError(7, _at(name, token.start_mark), f"is nested deeper than {MAX_DEPTH}")
        elif isinstance(token, yaml.BlockEndToken | yaml.FlowMappingEndToken | yaml.FlowSequenceEndToken):
            depth -= 1


def _build(node: yaml.Node, path: Path, positions: dict[Path, tuple[int, int]], name: str) -> Any:
    positions[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*path, i), positions, name) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, value in node.value:
            where = _at(name, key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(8, where, "a key must be plain text")
            if key.value == "<<":
                raise RecipeError(9, where, "merge keys are not allowed")
            if key.value in found:
                raise RecipeError(10, where, f"key {key.value!r} occurs twice")
            found[key.value] = _build(value, (*path, key.value), positions, name)
            positions[(*path, key.value)] = (key.start_mark.line + 1, key.start_mark.column + 1)
        return found
    assert isinstance(node, yaml.ScalarNode)
    return node.value if node.style else _scalar(node.value)


def _scalar(text: str) -> Any:
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if _INT.fullmatch(text) and len(text) < 20:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _at(name: str, mark: Any) -> str:
    return f"{name}:{mark.line + 1}:{mark.column + 1}"
