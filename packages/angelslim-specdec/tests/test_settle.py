"""What a round leaves: Triton's kernel (interpreted where there is no GPU) writes what the reference writes."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from angelslim_core.errors import EngineError
from angelslim_specdec import Engine, Target, engine
from angelslim_specdec.drafters.autoregressive import Autoregressive, Tree
from angelslim_specdec.drafts.eagle3 import Eagle3
from angelslim_specdec.kernels import layer
from angelslim_specdec.kernels.settle import SETTLE

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("stops", [[], [5], [3, 7, 9]], ids=str)
@pytest.mark.parametrize("proposals", [0, 1, 4, 7])
@pytest.mark.parametrize("counted", [False, True])
def test_matches_the_reference(proposals, stops, counted):
    batch, generator, said = 40, torch.Generator().manual_seed(proposals), {}
    tokens = torch.randint(12, (batch, proposals + 2), generator=generator).to(DEVICE)[:, 1 : proposals + 1]
    accepted, following, counts = (torch.randint(high, (batch,), generator=generator).to(DEVICE) for high in (proposals + 1, 12, proposals + 1))
    left = torch.randint(proposals + 3, (batch,), generator=generator).to(DEVICE)
    for executor in ("triton", "reference"):
        last, remaining = torch.full_like(left, -7), left.clone()
        out = torch.full((batch, 5 + 8), -7, device=DEVICE)
        made = SETTLE(
            tokens, accepted, following, counts if counted else None, torch.tensor(stops, dtype=torch.int64, device=DEVICE), last, remaining, out,
            executor=executor,
        )  # fmt: skip
        said[executor] = *made, last, remaining, out
    for found, wanted in zip(*said.values(), strict=True):
        assert torch.equal(found, wanted) and found.dtype == torch.int64
    assert (said["triton"][1] == 0).any() and (said["triton"][3] > 0).any() and (said["triton"][3] == 0).any()


def test_says_what_it_does_not_take():
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(EngineError, match="pairs"):
        SETTLE(one[:, None], one, one, None, torch.arange(5000, device=DEVICE), one, one, one[:, None], executor="triton")


@pytest.mark.parametrize("tree", [None, Tree(3, 2, 5)], ids=["chain", "tree"])
def test_an_engine_decodes_the_same(tiny, tree, monkeypatch):
    """All our kernels at once, on a pair whose draft is right now and then."""
    target = Target(AutoModelForCausalLM.from_pretrained(tiny("llama", dtype="float32"), dtype=torch.float32).eval().to(DEVICE))
    torch.manual_seed(0)
    draft = Eagle3.from_target(target.shape, aux_hidden_state_layer_ids=(0, 1), draft_vocab_size=64).eval().to(DEVICE)
    ids = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    found = {}
    for executor in ("reference", "triton"):
        with monkeypatch.context() as patch:
            for name in ("NORM", "ADD_NORM", "EMBED_NORMS", "GATED", "TURNED", "TURN_AND_STORE", "CHOOSE"):
                patch.setattr(layer, name, partial(getattr(layer, name), executor=executor))
            for name in ("SETTLE", "ACCEPT_GREEDY"):
                patch.setattr(engine, name, partial(getattr(engine, name), executor=executor))
            made = Engine(target, Autoregressive(draft, target.heads(), tree, static=True), 2, 30, k=3, stops=[11], static=True)
            found[executor] = made.decode(ids, torch.tensor([6, 4]), 16)
    plain = Engine(target, None, 2, 30, stops=[11]).decode(ids, torch.tensor([6, 4]), 16)
    assert found["triton"].tokens == found["reference"].tokens == plain.tokens
    assert found["triton"].by_position == found["reference"].by_position and found["triton"].rounds == found["reference"].rounds
