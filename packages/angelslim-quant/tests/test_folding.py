"""Passes that fold scales into what feeds a linear: the function stays, and what is written says so."""

import pytest
import torch

from angelslim_core import compress, load


def logits(folder, ids):
    with torch.no_grad():
        return load(folder, device="cpu")[0](ids).logits.float()


@pytest.fixture
def calibration(tmp_path):
    path = tmp_path / "calibration.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and runs on. " * 40)
    return [f"calibration.data={path}", "calibration.samples=4", "calibration.tokens=32"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3_moe", "gemma3_text", "deepseek_v3", "qwen3_5_text"])
@pytest.mark.parametrize(
    ("use", "options"), [("quant.smooth", ["steps[0].with.search=false"]), ("quant.awq", ["steps[0].with.rounding=none", "steps[0].with.group_size=8"])]
)
def test_folding_alone_keeps_the_function(tiny, tmp_path, calibration, architecture, use, options):
    folder = tiny(architecture, dtype="float32")
    compress(model=folder, use=[use], out=tmp_path / "out", overrides=[*calibration, *options])
    ids = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    before, after = logits(folder, ids), logits(tmp_path / "out", ids)
    assert torch.allclose(before, after, atol=1e-4, rtol=1e-3)
    changed = [n for n, t in load(tmp_path / "out", device="cpu")[0].state_dict().items() if not torch.equal(t, load(folder, device="cpu")[0].state_dict()[n])]
    assert any("norm" in name for name in changed) or any("up_proj" in name for name in changed)
