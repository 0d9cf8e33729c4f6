"""Fixtures every package's tests share."""

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Triton decides when it is imported; its kernels run on the CPU where no GPU is
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")

import pytest

from angelslim_core.testing.models import tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(architecture, **overrides): a model folder, made once per session; read it only."""
    made = {}

    def make(architecture="llama", **overrides):
        key = (architecture, *sorted(overrides.items()))
        if key not in made:
            made[key] = tiny_checkpoint(architecture, tmp_path_factory.mktemp(architecture) / "model", **overrides)
        return made[key]

    return make


@pytest.fixture
def tiny_copy(tiny, tmp_path):
    """tiny_copy(architecture, **overrides): a model folder of one's own."""

    def make(architecture="llama", name="model", **overrides):
        return shutil.copytree(tiny(architecture, **overrides), tmp_path / name)

    return make
