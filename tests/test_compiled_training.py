"""Linears that round are trained alike, one by one and layer by layer as transformers runs them, or together and compiled."""

import pytest
import torch

from angelslim_core import compress, fake_quant, load
from angelslim_core.kernels import Kernel
from angelslim_core.testing.training import chats


@pytest.mark.parametrize(
    ("use", "options"),
    [("quant.seq2", {}), ("quant.tequila", {}), ("quant.sherry", {"learn_scale": True}), ("quant.lsq", {}), ("quant.focus", {"format": "mxfp4"})],
    ids=str,
)
def test_together_and_compiled_is_what_one_by_one_is(tiny, tmp_path, monkeypatch, use, options):
    found, calls, run = torch._dynamo.lookup_backend, [], Kernel.__call__
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: found({"inductor": "aot_eager"}.get(name, name)))
    monkeypatch.setattr(Kernel, "__call__", lambda self, *args, **given: (calls.append(self.op), run(self, *args, **given))[1])
    data = chats(tmp_path / "chats.jsonl")
    given = {"data": str(data), "steps": 4, "batch": 4, "length": 160, "every": 4, "held_out": 0.0, "lr": 1e-3, "quantizer_lr": 1e-2, "keep": "last"}
    given["also"] = ["norm"]
    sizes = {} if "format" in options else {"group_size": 32}
    left = {}
    for compiled in (False, True):
        calls.clear()
        steps = [{"use": use, "with": {**options, **sizes}}, {"use": "distill.qad", "with": {**given, "compile": compiled}}]
        with monkeypatch.context() as alone:
            if not compiled:
                alone.setattr(fake_quant, "can_hold", lambda linear: False)
            result = compress(tiny("llama", dtype="float32"), out=tmp_path / str(compiled), recipe={"steps": steps})
        left[compiled] = (load(tmp_path / str(compiled))[0].state_dict(), result.passes[-1]["metrics"], list(calls))
    assert not torch.equal(
        left[True][0]["model.layers.0.input_layernorm.weight"], load(tiny("llama", dtype="float32"))[0].model.layers[0].input_layernorm.weight
    )
    assert left[True][1]["way"] == "compiled layers" and left[True][1]["graphs"] == 2
    for name, wanted in left[False][0].items():
        torch.testing.assert_close(left[True][0][name], wanted, rtol=1e-4, atol=1e-5, msg=name)
    for back in ("quant.round_levels_back", "quant.round_ternary_back"):
        alone, together = (kept[2].count(back) for kept in (left[False], left[True]))
        # 14 linears of two widths in each of 4 steps, and in two trials of the first batch
        assert not alone or (alone == 4 * 14 and together == 6 * 2), (alone, together)
