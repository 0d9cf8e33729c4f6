"""Rules of the whole code base, checked on its source."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for p in ROOT.glob("packages/*/src/**/*.py"))


def test_model_type_lives_in_adapters_only():
    allowed = ("/adapters/", "/testing/")
    found = [p for p in SOURCES if re.search(r"\bmodel_type\b", p.read_text()) and not any(a in p.as_posix() for a in allowed)]
    assert not found


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
            yield name, node


def test_no_pickle_no_eval_no_shell_no_remote_code():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "shelve", "dill"} & set(names), path
        for name, node in calls(tree):
            if isinstance(node.func, ast.Name):
                assert name not in ("eval", "exec", "compile", "__import__"), path
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                assert not (keyword.arg in ("shell", "trust_remote_code") and value is True), path
                assert not (keyword.arg == "weights_only" and value is False), path


def test_error_numbers_are_unique():
    seen = Counter()
    for path in SOURCES:
        for name, node in calls(ast.parse(path.read_text())):
            if name.endswith("Error") and node.args and isinstance(node.args[0], ast.Constant) and type(node.args[0].value) is int:
                seen[name, node.args[0].value] += 1
    assert seen and not [key for key, count in seen.items() if count > 1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 400
