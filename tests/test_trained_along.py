"""What is trained beside quantized linears is stored with them: the folder measures as training said, beside a teacher that nothing moved."""

import pytest
import torch

from angelslim_core import compress
from angelslim_core.errors import StoppedError
from angelslim_core.loading import load_model, load_tokenizer
from angelslim_core.testing.training import chats
from angelslim_distill.data.rows import prepare
from angelslim_distill.evaluation import evaluate
from angelslim_distill.teacher import ModelTeacher

QAD = {"steps": 8, "batch": 8, "length": 64, "count": "all", "lr": 2e-3, "quantizer_lr": 1e-3, "optimizer": "muon", "every": 4, "held_out": 0.2}


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "packed"])
def test_norms_and_embeddings_that_are_trained_along_are_stored(tiny, tmp_path, is_tied, layout):
    folder = tiny("qwen3", initializer_range=0.1, tie_word_embeddings=is_tied)
    data, out = chats(tmp_path / "chats.jsonl", rows=60), tmp_path / "out"
    steps = [{"use": "quant.seq2", "with": {"group_size": 32}}, {"use": "distill.qad", "with": {**QAD, "data": str(data), "also": ["norm", "embed"]}}]
    said = compress(folder, out=out, recipe={"steps": steps, "export": {"format": layout}}).passes[-1]["metrics"]
    rows = prepare(data, load_tokenizer(folder), "model", length=64, count="all", held_out=0.2).held_out
    model, base = load_model(out, "cpu").model, load_model(folder, "cpu").model
    found = evaluate(model, ModelTeacher(base), rows, 8)
    assert said["kl"] < 0.8 * said["kl_before"] and found.kl == pytest.approx(said["kl"], rel=1e-3)
    assert found.perplexity == pytest.approx(said["perplexity"], rel=1e-3) and found.teacher_perplexity == pytest.approx(said["teacher_perplexity"], rel=1e-6)
    moved = {name for name, p in model.named_parameters() if name in dict(base.named_parameters()) and not torch.equal(p, base.get_parameter(name))}
    assert {n for n, _ in base.named_parameters() if "norm" in n or "embed" in n} <= moved and "lm_head.weight" not in moved
    head, embedding = (m.weight for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    assert (head is embedding) == is_tied


def test_rotated_weights_and_norms_that_are_trained_along_go_on_where_they_were(tiny, tmp_path):
    folder, data = tiny("llama", initializer_range=0.1), chats(tmp_path / "chats.jsonl", rows=60)
    qad = {**QAD, "data": str(data), "also": ["norm"]}
    recipe = {"steps": [{"use": "quant.rotate"}, {"use": "quant.seq2", "with": {"group_size": 32}}, {"use": "distill.qad", "with": qad}]}
    compress(folder, out=tmp_path / "through", recipe=recipe)
    with pytest.raises(StoppedError):
        compress(folder, out=tmp_path / "stopped", recipe=recipe, stop_requested=lambda: any(tmp_path.glob(".stopped*/measured/*/step-*")))
    compress(folder, out=tmp_path / "stopped", recipe=recipe)
    through, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("through", "stopped"))
    assert through == stopped
