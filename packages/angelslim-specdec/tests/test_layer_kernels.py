"""What stands between products: Triton's kernels (interpreted where there is no GPU) against the references, and how many launches a draft takes."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from angelslim_core.errors import EngineError
from angelslim_core.kernels import Kernel
from angelslim_specdec import Engine, Target
from angelslim_specdec.adaptive import Round
from angelslim_specdec.drafters.autoregressive import Autoregressive, Tree
from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.drafts import MTP, DFlash, DSpark, Eagle3
from angelslim_specdec.drafts.base import Heads, TargetShape
from angelslim_specdec.kernels import layer as kernels

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# an ulp or two of what is rounded on the way; the interpreter cuts off what BF16 does not hold
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.float16: (2e-3, 2e-6), torch.bfloat16: (1 / 128, 1e-2) if DEVICE == "cuda" else (1 / 32, 3e-2)}
H, V = 32, 40
TARGET = TargetShape(H, 48, 8, 4, 2, 8, V, 1e-6, {"rope_type": "default", "rope_theta": 1e4}, 128)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same(kernel, *args, dtype=torch.float32, **options):
    found, wanted = (kernel(*args, **options, executor=executor) for executor in ("triton", "reference"))
    rtol, atol = TOLERANCE[dtype]
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, wanted)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    return found


@pytest.mark.parametrize("rounding", ["once", "twice", "plus_one"])
@pytest.mark.parametrize("width", [1, 63, 576, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(width, rounding, dtype):
    wide = 3 * normal(2, 5, width + 3, dtype=dtype)
    weight = normal(width, seed=1, dtype=dtype)
    same(kernels.NORM, wide[..., 2 : 2 + width], weight, 1e-5, rounding, dtype=dtype)
    if rounding == "once":
        total, _ = same(kernels.ADD_NORM, wide[..., :width], normal(2, 5, width, seed=2, dtype=dtype), weight, 1e-5, dtype=dtype)
        if DEVICE == "cuda" or dtype != torch.bfloat16:
            assert torch.equal(total, wide[..., :width] + normal(2, 5, width, seed=2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 5.5])
@pytest.mark.parametrize(("width", "hidden"), [(48, 48), (17, 100)])
def test_embeddings_beside_what_is_carried(width, hidden, scale, dtype):
    tokens = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)[:, 1:5]
    carried, embedding = normal(3, 4, hidden, dtype=dtype), normal(V, width + 5, seed=1, dtype=torch.float16)[:, :width]
    same(kernels.EMBED_NORMS, tokens, carried, embedding, scale, normal(width, seed=2, dtype=dtype), normal(hidden, seed=3, dtype=dtype), 1e-6, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [1, 100, 2049])
def test_gated(inner, dtype):
    gate, up = (4 * normal(3, 2, 2 * inner, dtype=dtype)).chunk(2, -1)
    same(kernels.GATED, gate, up, dtype=dtype)


def heads_of(batch, tokens, heads, kv_heads, width, dtype):
    return normal(batch, tokens, heads + 2 * kv_heads, width, dtype=dtype).split([heads, kv_heads, kv_heads], -2)


def turns_of(*shape, dtype):
    """What no rope gives: halves that differ."""
    return normal(*shape, seed=8, dtype=dtype), normal(*shape, seed=9, dtype=dtype)


def norms_of(width, dtype, rounding):
    return normal(width, seed=4, dtype=dtype), normal(width, seed=5, dtype=dtype), 1e-5, rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [None, "once", "twice", "plus_one"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 1, 6), (2, 2, 80)])
def test_turned(heads, kv_heads, width, norms, dtype):
    q, k, _ = heads_of(2, 3, heads, kv_heads, width, dtype)
    for rows in (1, 2):
        cos, sin = turns_of(rows, 3, width, dtype=dtype)
        same(kernels.TURNED, q, k, cos, sin, None if norms is None else norms_of(width, dtype, norms), dtype=dtype)
    same(kernels.TURNED, q, k, cos, torch.cat((sin, sin), -1)[..., :width], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [None, "once"])
@pytest.mark.parametrize(("tokens", "offset", "level"), [(1, 0, None), (1, 2, 1), (5, 0, None), (3, 4, 2)])
def test_turned_and_stored(tokens, offset, level, norms, dtype):
    slots = 12
    lengths = torch.tensor([0, 7, 11, 3], device=DEVICE)  # of which some find no slot
    args = heads_of(4, tokens, 4, 2, 8, dtype)
    of_heads = None if norms is None else norms_of(8, dtype, norms)
    for turns in (turns_of(slots - 1, 8, dtype=dtype), turns_of(4, tokens, 8, dtype=dtype), turns_of(1, tokens, 8, dtype=dtype)):
        if turns[0].dim() == 3 and level is not None:
            continue
        stored = {}
        for executor in ("triton", "reference"):
            keys, values = (normal(4, 2, slots + 1, 8, seed=seed, dtype=dtype)[:, :, :slots] for seed in (6, 7))
            q = kernels.TURN_AND_STORE(*args, *turns, keys, values, lengths, offset, level, of_heads, executor=executor)
            stored[executor] = q, keys[:, :, :-1], values[:, :, :-1]  # several may fall into the last slot
        for found, wanted in zip(*stored.values(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [3, 8192, 20000, 40001])
def test_choice(vocabulary, dtype):
    logits = normal(4, vocabulary + 2, dtype=dtype)[:, :vocabulary]
    logits[0] = 0.0  # of equals the first
    logits[1, vocabulary // 2 :] = 9.0
    logits[2, -1] = 12.0
    columns = torch.arange(vocabulary, device=DEVICE) * 3
    for of in (None, columns):
        ids, sure = kernels.CHOOSE(logits, of, executor="triton")
        wanted, chance = kernels.CHOOSE(logits, of, executor="reference")
        assert torch.equal(ids, wanted) and ids.dtype == torch.int64
        torch.testing.assert_close(sure, chance, rtol=1e-4, atol=1e-7)
    assert ids[:3].tolist() == [0, 3 * (vocabulary // 2), 3 * (vocabulary - 1)]


def test_says_what_it_does_not_take():
    x, weight = normal(2, 8), normal(8)
    with pytest.raises(EngineError, match="no gradients"):
        kernels.NORM(x.requires_grad_(), weight, 1e-6, executor="triton")
    with pytest.raises(EngineError, match="up to FP32"):
        kernels.GATED(normal(2, 4).double(), normal(2, 4).double(), executor="triton")
    q, k, _ = heads_of(1, 2, 2, 1, 8, torch.float32)
    with pytest.raises(EngineError, match="all of it turned"):
        kernels.TURNED(q, k, *turns_of(1, 2, 4, dtype=torch.float32), executor="triton")
    with pytest.raises(EngineError, match="beside each other"):
        kernels.CHOOSE(normal(5, 3).T, executor="triton")


def random_draft(draft, **options):
    torch.manual_seed(0)
    made = draft.from_target(TARGET, draft_vocab_size=12, **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3).add_(0.1 * torch.randn_like(parameter))
    heads = Heads(torch.randn(V, H), torch.randn(V, H))
    return made.to(DEVICE), Heads(heads.embedding.to(DEVICE), heads.head.to(DEVICE))


def proposed(drafter, k=3):
    """What a drafter proposes after two ragged rounds, and what it then holds."""
    generator = torch.Generator().manual_seed(1)
    n = len(drafter.layer_ids)
    ids, aux = torch.randint(V, (2, 12), generator=generator).to(DEVICE), torch.randn(2, 12, n * H, generator=generator).to(DEVICE)
    drafter.start(ids, torch.tensor([5, 3], device=DEVICE), 30, Warp())
    drafter.observe(ids[:, 1:6], aux[:, :5], torch.tensor([5, 3], device=DEVICE))
    drafter.propose(k)
    drafter.observe(ids[:, 6:9], aux[:, 6:9], torch.tensor([2, 3], device=DEVICE))
    return drafter.propose(k)


BLOCK = {"num_hidden_layers": 2, "block_size": 4, "mask_token_id": 3}


@pytest.mark.parametrize("tree", [None, Tree(3, 2, 5)], ids=["chain", "tree"])
@pytest.mark.parametrize("draft", [Eagle3, partial(Eagle3, norm_output=True, norm_before_residual=True), MTP, DFlash, DSpark], ids=str)
def test_drafters_propose_the_same(draft, tree, monkeypatch):
    options = draft.keywords if isinstance(draft, partial) else {}
    kind = draft.func if isinstance(draft, partial) else draft
    block = kind in (DFlash, DSpark)
    if block and tree:
        pytest.skip("blocks are no trees")
    made, heads = random_draft(kind, **options, **(BLOCK if block else {}))
    found = {}
    for executor in ("reference", "triton"):
        for name in ("NORM", "ADD_NORM", "EMBED_NORMS", "GATED", "TURNED", "TURN_AND_STORE", "CHOOSE"):
            monkeypatch.setattr(kernels, name, partial(getattr(kernels, name), executor=executor))
        found[executor] = proposed(made.drafter(heads) if block else Autoregressive(made, heads, tree, static=True))
        monkeypatch.undo()
    assert torch.equal(found["triton"].tokens, found["reference"].tokens)
    torch.testing.assert_close(found["triton"].confidence, found["reference"].confidence, rtol=3e-3, atol=1e-5)
    if tree:
        assert torch.equal(found["triton"].parents, found["reference"].parents)


class Launches(TorchDispatchMode):
    """Counts operations that a GPU would have to be given: all but views and empty memory. What is a kernel of ours, or one of torch's there, is one."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.inside = Counter(), False
        for owner, name, counts in ((Kernel, "__call__", lambda args: args[0].op), (torch.nn.functional, "rms_norm", lambda args: "rms_norm")):
            monkeypatch.setattr(owner, name, self.one(getattr(owner, name), counts))

    def one(self, function, name):
        def call(*args, **options):
            self.found[name(args)] += not self.inside
            before, self.inside = self.inside, True
            try:
                return function(*args, **options)
            finally:
                self.inside = before

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.inside and not func.is_view and not func.__name__.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            self.found[func.__name__] += any(isinstance(x, torch.Tensor) and x.numel() > 0 for x in (out if isinstance(out, tuple | list) else [out]))
        return out


@pytest.mark.parametrize(("draft", "most"), [(Eagle3, 12), (MTP, 14)], ids=["eagle3", "mtp"])
def test_a_step_takes_few_launches(draft, most, monkeypatch):
    made, heads = random_draft(draft)
    drafter, counted = Autoregressive(made, heads, static=True), []
    proposed(drafter)
    for k in (3, 4):
        with monkeypatch.context() as patch, Launches(patch) as launches:
            drafter.propose(k)
        counted.append(launches.found)
    assert (counted[1] - counted[0]).total() <= most, counted[1] - counted[0]


def test_a_layer_of_a_block_takes_few_launches(monkeypatch):
    counted = []
    for layers in (2, 3):
        made, heads = random_draft(DFlash, **{**BLOCK, "num_hidden_layers": layers})
        drafter = made.drafter(heads)
        proposed(drafter)
        with monkeypatch.context() as patch, Launches(patch) as launches:
            drafter.propose(3)
        counted.append(launches.found)
    assert (counted[1] - counted[0]).total() <= 10, counted[1] - counted[0]


@pytest.mark.parametrize(("fused", "least", "most"), [(False, 30, 50), (True, 1, 14)])
def test_a_layer_of_a_target_takes_few_launches(tiny, fused, least, most, monkeypatch):
    counted = []
    for layers in (2, 3):
        folder = tiny("llama", dtype="float32", num_hidden_layers=layers)
        target = Target(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(DEVICE), fused=fused)
        engine = Engine(target, None, 1, 20, static=True)
        with torch.no_grad():
            engine.admit([0], torch.ones(1, 4, dtype=torch.int64), torch.tensor([4]), 9, {})
            with monkeypatch.context() as patch, Launches(patch) as launches:
                engine._round(Round(0))
        counted.append(launches.found)
    assert least <= (counted[1] - counted[0]).total() <= most, counted[1] - counted[0]


def of_a_round(tiny, tree, k, monkeypatch, layers=2):
    """What a round asks a GPU for; for some products the CPU makes copies that a GPU does not."""
    folder = tiny("llama", dtype="float32", num_hidden_layers=layers)
    target = Target(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(DEVICE), fused=True)
    draft = Eagle3.from_target(target.shape, aux_hidden_state_layer_ids=(0, 1), draft_vocab_size=64).eval().to(DEVICE)
    engine = Engine(target, Autoregressive(draft, target.heads(), tree, static=True), 1, 60, k=k, static=True)
    ids, lengths = torch.ones(1, 4, dtype=torch.int64), torch.tensor([4])
    with torch.no_grad():
        aux, followers = engine.admit([0], ids, lengths, 20, {})
        engine._start(ids, lengths, followers, aux)
        engine._round(Round(k))
        with monkeypatch.context() as patch, Launches(patch) as launches:
            engine._round(Round(k))
    launches.found.pop("clone.default", None)
    return launches.found


def test_a_tree_takes_few_launches_more_than_a_chain(tiny, monkeypatch):
    chain, tree = (of_a_round(tiny, shape, 5, monkeypatch) for shape in (None, Tree(5, 8, 32)))
    assert (tree - chain).total() <= 20, tree - chain


def test_layers_of_a_target_cost_a_tree_what_they_cost_a_chain(tiny, monkeypatch):
    more = []
    for tree in (None, Tree(5, 8, 32)):
        fewer, all_layers = (of_a_round(tiny, tree, 5, monkeypatch, layers) for layers in (2, 3))
        more.append(all_layers - fewer)
    assert more[0] == more[1]
