"""What takes few launches, on a GPU: real sizes, BF16, CUDA graphs, and how many kernels there are."""

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from angelslim_specdec import Engine, Target
from angelslim_specdec.adaptive import Round
from angelslim_specdec.drafters.autoregressive import Autoregressive, Tree
from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.drafts import MTP, DFlash, Eagle3
from angelslim_specdec.kernels import layer as kernels
from angelslim_specdec.kernels.settle import SETTLE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def normal(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def near(found, wanted):
    """To an ulp of BF16, and equal nearly everywhere."""
    torch.testing.assert_close(found, wanted, rtol=1 / 128, atol=1 / 128)
    assert (found == wanted).float().mean() > 0.99


@pytest.mark.parametrize("rows", [1, 6, 700])
@pytest.mark.parametrize("width", [576, 4096, 16384])
def test_rows(rows, width):
    x, residual, weight = normal(rows, width), normal(rows, width, seed=1), normal(width, seed=2)
    for rounding in ("once", "twice", "plus_one"):
        near(kernels.NORM(x, weight, 1e-5, rounding, executor="triton"), kernels.NORM(x, weight, 1e-5, rounding, executor="reference"))
    total, normed = kernels.ADD_NORM(x, residual, weight, 1e-5, executor="triton")
    assert torch.equal(total, x + residual)
    near(normed, kernels.NORM(total, weight, 1e-5, "once", executor="reference"))
    near(kernels.GATED(3 * x, residual, executor="triton"), kernels.GATED(3 * x, residual, executor="reference"))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (32, 8, 128)])
def test_heads(heads, kv_heads, width, tokens, norms):
    q, k, v = normal(2, tokens, heads + 2 * kv_heads, width).split([heads, kv_heads, kv_heads], -2)
    cos, sin = normal(900, width, seed=1), normal(900, width, seed=2)
    of_heads = (normal(width, seed=3), normal(width, seed=4), 1e-6, "twice") if norms else None
    lengths, made = torch.tensor([0, 511], device="cuda"), []
    for executor in ("triton", "reference"):
        keys, values = (normal(2, kv_heads, 900, width, seed=seed) for seed in (5, 6))
        made.append((kernels.TURN_AND_STORE(q, k, v, cos, sin, keys, values, lengths, norms=of_heads, executor=executor), keys, values))
    for found, wanted in zip(*made, strict=True):
        near(found, wanted) if norms else torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("vocabulary", [8192, 32000, 49152, 151936])
@pytest.mark.parametrize("rows", [1, 64])
def test_choice(vocabulary, rows):
    logits = 3 * normal(rows, vocabulary)
    ids, sure = kernels.CHOOSE(logits, executor="triton")
    assert torch.equal(ids, logits.float().argmax(-1)) or torch.equal(logits.gather(1, ids[:, None]), logits.amax(-1, keepdim=True))
    torch.testing.assert_close(sure, logits.float().softmax(-1).amax(-1), rtol=1e-3, atol=1e-6)


def test_auto_takes_triton():
    x, ids = normal(1, 64), torch.zeros(1, dtype=torch.int64, device="cuda")
    assert kernels.NORM.choose(x, x[0], 1e-6).name == kernels.GATED.choose(x, x).name == kernels.CHOOSE.choose(x).name == "triton"
    assert SETTLE.choose(ids[:, None], ids, ids, None, ids[:0], ids, ids, ids[:, None]).name == "triton"


def pair(tiny, draft, dtype, fused=True, **options):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama", dtype="float32"), dtype=dtype).eval().cuda()
    target = Target(model, fused=fused)
    torch.manual_seed(0)
    made = draft.from_target(target.shape, draft_vocab_size=64, **options).to("cuda", dtype).eval()
    return target, made.drafter(target.heads())


@pytest.mark.parametrize("draft", [Eagle3, MTP, DFlash])
def test_text_in_graphs_is_the_plain_one(tiny, draft):
    options = {"num_hidden_layers": 2, "block_size": 4, "mask_token_id": 3, "aux_hidden_state_layer_ids": (0, 1)} if draft is DFlash else {}
    ids, lengths, texts = torch.randint(3, 256, (3, 9), generator=torch.Generator().manual_seed(0)), torch.tensor([9, 1, 5]), []
    for fused in (False, True):
        target, drafter = pair(tiny, draft, torch.float32, fused, **options)
        for proposer in (None, drafter):
            texts.append(Engine(target, proposer, 3, 60, k=3).decode(ids, lengths, 40).tokens)
    assert texts[0] == texts[1] == texts[2] == texts[3]


@pytest.mark.parametrize(("draft", "most"), [(Eagle3, 20), (MTP, 22)])
def test_a_step_takes_few_kernels(tiny, draft, most):
    """Products may take two each: a part of the sum in several places, and then their sum."""
    target, drafter = pair(tiny, draft, torch.bfloat16)
    n, ids = len(drafter.layer_ids), torch.randint(3, 200, (1, 9), device="cuda")
    drafter.start(ids, torch.tensor([8], device="cuda"), 40, Warp())
    drafter.observe(ids[:, 1:], normal(1, 8, n * target.shape.hidden_size), torch.tensor([8], device="cuda"))
    counted = []
    for k in (3, 4):
        with torch.no_grad():
            drafter.propose(k)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                drafter.propose(k)
                torch.cuda.synchronize()
        counted.append(sum(event.device_type == DeviceType.CUDA and not event.name.startswith(("Memset", "Memcpy")) for event in found.events()))
    assert 0 < counted[1] - counted[0] <= most


def kernels_of_a_round(tiny, tree, layers):
    target = Target(AutoModelForCausalLM.from_pretrained(tiny("llama", dtype="float32", num_hidden_layers=layers), dtype=torch.bfloat16).eval().cuda())
    draft = Eagle3.from_target(target.shape, aux_hidden_state_layer_ids=(0, 1), draft_vocab_size=64).to("cuda", torch.bfloat16).eval()
    engine = Engine(target, Autoregressive(draft, target.heads(), tree), 1, 60, k=5)
    ids, lengths = torch.ones(1, 4, dtype=torch.int64), torch.tensor([4])
    with torch.no_grad():
        aux, followers = engine.admit([0], ids, lengths, 20, {})
        engine._start(ids, lengths, followers, aux)
        engine._round(Round(5))
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            engine._round(Round(5))
            torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA and not event.name.startswith(("Memset", "Memcpy")) for event in found.events())


def test_a_tree_takes_few_kernels_more_than_a_chain(tiny):
    """Of a level: its candidates, the nodes to go on from and what these carry; products of more rows may take two kernels instead of one."""
    chain, tree = (kernels_of_a_round(tiny, shape, 2) for shape in (None, Tree(5, 8, 32)))
    assert 0 < tree - chain <= 60
    more = [kernels_of_a_round(tiny, shape, 4) - kernels_of_a_round(tiny, shape, 2) for shape in (None, Tree(5, 8, 32))]
    assert more[1] - more[0] <= 10
