"""Kernels of trees: Triton's (interpreted where there is no GPU) against the references."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from angelslim_core.errors import EngineError
from angelslim_specdec import Engine, Target, cache, engine, target
from angelslim_specdec.cache import SlotCache
from angelslim_specdec.drafters import autoregressive
from angelslim_specdec.drafters.autoregressive import Autoregressive, Tree
from angelslim_specdec.drafts.eagle3 import Eagle3
from angelslim_specdec.kernels import tree as kernels
from angelslim_specdec.kernels.tree import Candidates, Front, Stored

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def tree_of(rows, proposed, generator, chain=False):
    """Parents [B, N] that come before their children."""
    if chain:
        return torch.arange(-1, proposed - 1).expand(rows, -1).to(DEVICE)
    return ((torch.rand(rows, proposed, generator=generator) * torch.arange(1, proposed + 1)).long() - 1).to(DEVICE)


def equal(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def stored(rows, slots, width, dtype, layers=3):
    """Keys and values of layers, no two values equal in a layer."""
    numbers = torch.arange(rows * 2 * slots * width, device=DEVICE).view(rows, slots, 2, width).transpose(1, 2)
    return [(numbers + layer).to(dtype) for layer in range(2 * layers)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("path", [[0, 1, 2], [1, 2, 3], [2, 5, 6], [0, 4, -1], [3, -1, -1], [-1, -1, -1]], ids=str)
def test_an_accepted_path_is_kept(path, rows, dtype):
    lengths = torch.tensor([4, 0, 9], device=DEVICE)[:rows]
    paths = torch.tensor([path, [0, 1, 6], [-1, -1, -1]], device=DEVICE)[:rows]
    before, found, wanted = (stored(rows, 17, 5, dtype) for _ in range(3))
    kernels.KEEP_PATH(Stored.of(found), lengths, paths, executor="triton")
    kernels.KEEP_PATH(Stored.of(wanted), lengths, paths, executor="reference")
    equal(found, wanted)
    for whole, was in zip(found, before, strict=True):
        for row, (length, at) in enumerate(zip(lengths.tolist(), paths.tolist(), strict=True)):
            for i, place in enumerate(at):
                assert torch.equal(whole[row, :, length + 1 + i], was[row, :, length + 1 + (i if place < 0 else place)])
            assert torch.equal(whole[row, :, : length + 1], was[row, :, : length + 1])


def test_layers_of_other_shapes_move_by_themselves():
    made, paths = stored(1, 17, 5, torch.float32), torch.tensor([[2, 5]], device=DEVICE)
    mixed = Stored.of([*made, made[0][..., :3]])
    assert mixed.table is None and Stored.of(made).table is not None
    with pytest.raises(EngineError, match="one shape"):
        kernels.KEEP_PATH(mixed, torch.tensor([4], device=DEVICE), paths, executor="triton")


def test_a_cache_that_grows_keeps_all_layers():
    kept = SlotCache(1, 16, DEVICE, static=True)
    for layers in (1, 2):
        kept.begin(4)
        for layer in range(layers):
            kept.update(*(torch.arange(4.0, device=DEVICE).view(1, 1, 4, 1) + 10 * layer for _ in range(2)), layer)
        kept.commit(torch.tensor([0], device=DEVICE), torch.tensor([[1, 2]], device=DEVICE))
    assert [kept.seen(layer)[0][0, 0, :4, 0].tolist() for layer in range(2)] == [[0, 2, 3, 3], [10, 12, 13, 13]]


def accepts(logits, tokens, parents, depth):
    found, wanted = (kernels.ACCEPT_TREE(logits, tokens, parents, depth, executor=executor) for executor in ("triton", "reference"))
    equal(found, wanted)
    return found


@pytest.mark.parametrize(("rows", "proposed", "vocabulary"), [(1, 1, 3), (3, 12, 3), (1, 32, 2100), (1, 40, 4)], ids=str)
def test_accepted_paths(proposed, vocabulary, rows):
    generator = random(proposed)
    tokens = torch.randint(-1, 3, (rows, proposed + 1), generator=generator).to(DEVICE)[:, 1:]
    logits = torch.randn(rows, proposed + 1, vocabulary, generator=generator).to(DEVICE)
    logits[..., 3:] -= 20.0
    accepts(logits, tokens, tree_of(rows, proposed, generator), proposed)
    # a chain of what is chosen, to its end; and nothing of it
    chain, choices = tree_of(rows, proposed, generator, chain=True), logits.argmax(-1)
    assert (accepts(logits, choices[:, :-1], chain, proposed)[1] == proposed).all()
    assert (accepts(logits, torch.full_like(tokens, -1), chain, proposed)[1] == 0).all()


def test_paths_of_many_trees():
    generator = random()
    tokens, logits = torch.randint(-1, 2, (12, 6), generator=generator).to(DEVICE), torch.randn(12, 7, 2, generator=generator).to(DEVICE)
    _, accepted, _, _ = accepts(logits, tokens, tree_of(12, 6, generator), 6)
    assert {0, 1, 2} <= set(accepted.tolist())


def test_of_paths_as_long_the_first():
    tokens, parents = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE), torch.tensor([[-1, -1, 1, 0]], device=DEVICE)
    path, accepted, _, taken = accepts(torch.zeros(1, 5, 7, device=DEVICE), tokens, parents, 2)
    assert path.tolist() == [[1, 2]] and accepted.tolist() == [2] and taken.tolist() == [[0, 0]]


def test_parents_shared_by_rows():
    parents = torch.tensor([-1, -1, 0, 1], device=DEVICE).expand(3, -1)
    accepts(torch.randn(3, 5, 2, generator=random()).to(DEVICE), torch.randint(2, (3, 4), generator=random()).to(DEVICE), parents, 2)
    equal(kernels.ANCESTORS_OF(parents, executor="triton"), kernels.ANCESTORS_OF(parents, executor="reference"))


@pytest.mark.parametrize(("rows", "proposed"), [(1, 0), (3, 1), (1, 5), (3, 6), (1, 32)], ids=str)
def test_ancestors(proposed, rows):
    for parents in (tree_of(rows, proposed, random(proposed)), tree_of(rows, min(proposed, 9), random(), chain=True)):
        equal(kernels.ANCESTORS_OF(parents, executor="triton"), kernels.ANCESTORS_OF(parents, executor="reference"))


def nodes(rows, width, level, generator):
    """As if so many levels were expanded."""
    tokens, numbers = (torch.randint(9, (rows, width), generator=generator).to(DEVICE) for _ in range(2))
    scores, visible = -torch.rand(rows, width, generator=generator), torch.rand(rows, width, level * width, generator=generator) < 0.5
    return Front(tokens, tokens, numbers, scores.to(DEVICE), visible.to(DEVICE))


def grown(executor, logits, columns, front, base, k, last):
    count = base + logits.shape[1] * k + 2
    into = Candidates(*(x.fill_(-7) for x in Candidates.room(len(logits), count, logits.device)))
    return kernels.EXPAND(logits, columns, front, into, base, k, last, executor=executor), into


@pytest.mark.parametrize("executor", ["triton", pytest.param("torch", marks=pytest.mark.skipif(DEVICE == "cuda", reason="for CPUs"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 1, 1), (3, 1, 40), (3, 3, 3), (1, 4, 2100), (2, 11, 64)], ids=str)
def test_a_level_of_a_tree(rows, width, vocabulary, dtype, executor):
    generator = random(vocabulary)
    columns = torch.arange(vocabulary, device=DEVICE) * 3
    for level in (0, 2):
        front = nodes(rows, width, level, generator) if level else None
        logits = torch.randn(rows, width if level else 1, vocabulary + 1, generator=generator).to(DEVICE, dtype)[..., :vocabulary]
        ties, some = (4 * logits).round(), logits.clone()
        some[..., vocabulary // 2 :] = -torch.inf  # fewer than are wanted
        some[..., 0] = 0.0
        for given in (logits, ties, some, torch.zeros_like(logits)):
            for last in (False, True):
                found, wanted = (grown(name, given, None if level else columns, front, level * width, width, last) for name in (executor, "reference"))
                for a, b in zip((*found[1], *(found[0] or ())), (*wanted[1], *(wanted[0] or ())), strict=True):
                    assert a.dtype == b.dtype and a.shape == b.shape
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 if a.is_floating_point() else 0)
                assert (found[0] is None) is last


def test_of_equal_tokens_and_nodes_the_first():
    for executor in ("triton", "reference"):
        found, into = grown(executor, torch.zeros(1, 3, 5000, device=DEVICE), None, nodes(1, 3, 1, random())._replace(scores=torch.zeros(1, 3, device=DEVICE)), 0, 3, False)  # fmt: skip
        assert into.tokens[0, :9].tolist() == 3 * [0, 1, 2] and found.numbers.tolist() == [[0, 1, 2]] and found.origin.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (8, 8), (40, 11), (264, 32), (264, 63), (1000, 5)])
def test_the_best_of_all_candidates(size, count, rows):
    generator = random(size)
    parents, scores = tree_of(rows, size, generator), torch.zeros(rows, size, device=DEVICE)
    for i in range(size):  # no child is better than its parent, and some are as good
        of = torch.where(parents[:, i] < 0, 0.0, scores.gather(1, parents[:, i : i + 1].clamp(min=0))[:, 0])
        scores[:, i] = of - torch.randint(3, (rows,), generator=generator).to(DEVICE)
    tokens, sure = torch.randint(99, (rows, size), generator=generator).to(DEVICE), torch.rand(rows, size, generator=generator).to(DEVICE)
    for given in (scores, torch.zeros_like(scores)):
        found, wanted = (kernels.CHOOSE_TREE(Candidates(tokens, parents, given, sure), count, executor=executor) for executor in ("triton", "reference"))
        equal(found, wanted)
        assert (found[1] < torch.arange(count, device=DEVICE)).all()


def test_says_what_it_does_not_take():
    logits, ids = torch.zeros(1, 66, 9, device=DEVICE), torch.zeros(1, 65, dtype=torch.int64, device=DEVICE)
    with pytest.raises(EngineError, match="fewer than 64"):
        kernels.ACCEPT_TREE(logits, ids, ids - 1, 3, executor="triton")
    with pytest.raises(EngineError, match="fewer than 64"):
        kernels.ANCESTORS_OF(ids - 1, executor="triton")
    with pytest.raises(EngineError, match="up to 1024 candidates"):
        kernels.CHOOSE_TREE(Candidates.room(1, 1025, torch.device(DEVICE)), 4, executor="triton")
    with pytest.raises(EngineError, match="up to 16 nodes"):
        grown("triton", torch.zeros(1, 1, 99, device=DEVICE), None, None, 0, 17, True)


@pytest.fixture
def pair(tiny):
    made = Target(AutoModelForCausalLM.from_pretrained(tiny("llama", dtype="float32"), dtype=torch.float32).eval().to(DEVICE), fused=True)
    torch.manual_seed(0)
    return made, Eagle3.from_target(made.shape, aux_hidden_state_layer_ids=(0, 1), draft_vocab_size=64).eval().to(DEVICE)


def test_an_engine_decodes_the_same(pair, monkeypatch):
    model, draft = pair
    ids, found, used = torch.randint(3, 200, (2, 6), generator=random()), {}, set()
    for executor in ("reference", "triton"):
        with monkeypatch.context() as patch:
            for where, name in ((autoregressive, "EXPAND"), (autoregressive, "CHOOSE_TREE"), (target, "ANCESTORS_OF"), (engine, "ACCEPT_TREE"), (cache, "KEEP_PATH")):  # fmt: skip

                def run(*args, name=name, executor=executor):
                    used.add(name)
                    return getattr(kernels, name)(*args, executor=executor)

                patch.setattr(where, name, run)
            made = Engine(model, Autoregressive(draft, model.heads(), Tree(3, 2, 5), static=True), 2, 30, k=3, stops=[11], static=True)
            found[executor] = made.decode(ids, torch.tensor([6, 4]), 16)
    plain = Engine(model, None, 2, 30, stops=[11]).decode(ids, torch.tensor([6, 4]), 16)
    assert found["triton"].tokens == found["reference"].tokens == plain.tokens and len(used) == 5
    assert found["triton"].by_position == found["reference"].by_position and found["triton"].rounds == found["reference"].rounds
