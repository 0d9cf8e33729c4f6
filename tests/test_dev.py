"""The one command that must be green."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("failing", ["ruff check", "ruff format", "mypy", "lint-imports", "python -m", None])
def test_check_fails_when_a_part_of_it_fails(failing, tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    for tool in ("ruff", "mypy", "lint-imports", "python"):
        (venv / "bin" / tool).write_text(f'#!/bin/sh\ncase "{tool} $1" in "{failing}"*) exit 1;; esac\n')
        (venv / "bin" / tool).chmod(0o755)
    stamp = subprocess.run("cat pyproject.toml packages/*/pyproject.toml dev | cksum", shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (venv / "stamp").write_text(stamp)
    done = subprocess.run([str(ROOT / "dev"), "check"], env={**os.environ, "ANGELSLIM_VENV": str(venv)}, check=False)
    assert done.returncode == (1 if failing else 0)
