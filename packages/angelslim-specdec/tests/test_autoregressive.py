import pytest
import torch

from angelslim_specdec.drafters.autoregressive import Autoregressive, Tree
from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.drafts.base import Heads, TargetShape
from angelslim_specdec.drafts.eagle3 import Eagle3
from angelslim_specdec.vocabulary import Vocabulary

H, V = 32, 40
TARGET = TargetShape(H, 48, 8, 4, 2, 8, V, 1e-6, {"rope_type": "default", "rope_theta": 1e4}, 128)
CAPACITY = 40


@pytest.fixture(scope="module")
def eagle():
    torch.manual_seed(0)
    draft = Eagle3.from_target(TARGET, draft_vocab_size=12)
    chosen = Vocabulary(torch.randperm(V)[:12].sort().values, V)
    draft.d2t.copy_(chosen.d2t), draft.t2d.copy_(chosen.t2d)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.mul_(4) if "proj" in name else parameter.mul_(2)
    return draft, Heads(torch.randn(V, H), torch.randn(V, H))


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(1)
    return torch.randint(V, (3, 30)), torch.randn(3, 30, 3 * H)


def observed(drafter, text, lengths, rows=slice(None)):
    """Positions below lengths[b] of each row, in one call."""
    ids, aux = (part[rows] for part in text)
    drafter.start(ids, torch.tensor(lengths), CAPACITY, Warp())
    most = max(lengths)
    drafter.observe(ids[:, 1 : most + 1], aux[:, :most], torch.tensor(lengths))
    return drafter


def alone(eagle, text, row, length, tokens):
    """Log-probabilities [Vd] of the draft after a text and own tokens, one dense attention over all positions."""
    draft, heads = eagle
    ids = torch.cat([text[0][row, 1 : length + 1], torch.tensor(tokens, dtype=torch.int64)])
    carried = list(draft.features(text[1][row, :length]))
    outs = []
    for t in range(len(ids)):
        source = carried[t] if t < length else outs[-1][0]
        residual, x = draft.mix(heads.embed(ids[t]), source)
        if t < length:
            carried[t] = source
        outs.append((None, residual, x))
        positions = torch.arange(t + 1)[None]
        attention, turn = draft.attention, draft.rope(positions)
        xs = torch.stack([o[2] for o in outs])[None]
        q, k, v = attention.queries(xs, turn)[:, :, -1:], attention.keys(xs, turn).repeat_interleave(2, 1), attention.values(xs).repeat_interleave(2, 1)
        out = attention.out((q @ k.mT / 8**0.5).softmax(-1) @ v)[0, 0]
        hidden, read = draft.finish(residual + out)
        outs[-1] = (hidden, residual, x)
    return (draft.lm_head.weight @ read).log_softmax(-1)


def chain_by_hand(eagle, text, row, length, k):
    ids, tokens, sure = eagle[0].t2d.nonzero()[:, 0], [], []
    for _ in range(k):
        logs = alone(eagle, text, row, length, tokens)
        tokens.append(int(ids[logs.argmax()]))
        sure.append(logs.max().exp().item())
    return tokens, sure


def tree_by_hand(eagle, text, row, length, tree, levels):
    """The same rule with dictionaries: path -> score."""
    ids, scores, beam = eagle[0].t2d.nonzero()[:, 0], {}, [()]
    for level in range(levels):
        children = {}
        for path in beam:
            logs, chosen = alone(eagle, text, row, length, list(path)).topk(tree.top_k)
            children |= {(*path, int(ids[c])): scores.get(path, 0.0) + float(s) for s, c in zip(logs, chosen, strict=True)}
        scores |= children
        beam = sorted(children, key=children.get, reverse=True)[: tree.top_k]
        assert level or len(beam) == tree.top_k
    return set(sorted(scores, key=scores.get, reverse=True)[: tree.total])


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_chain_is_the_drafts_own_greedy_text(eagle, text, static):
    drafter = observed(Autoregressive(*eagle, static=static), text, [9, 4, 1])
    found = drafter.propose(5)
    for row, length in enumerate([9, 4, 1]):
        tokens, sure = chain_by_hand(eagle, text, row, length, 5)
        assert found.tokens[row].tolist() == tokens
        torch.testing.assert_close(found.confidence[row], torch.tensor(sure))
    assert found.q is None and found.parents is None and drafter.size(5) == 5


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("tree", [None, Tree(4, 3, 11)], ids=["chain", "tree"])
def test_rounds_leave_only_confirmed_positions_behind(eagle, text, static, tree):
    """Proposals in between, ragged and idle rows among them, change nothing."""
    ids, aux = text
    drafter = observed(Autoregressive(*eagle, tree, static=static), text, [5, 3, 7])
    lengths = torch.tensor([5, 3, 7])
    for counts in ([2, 4, 1], [0, 1, 3], [5, 1, 0]):
        drafter.propose(4)
        places = lengths[:, None] + torch.arange(5)
        drafter.observe(ids.gather(1, (places + 1).clamp(max=29)), aux.gather(1, places[..., None].expand(-1, -1, 3 * H)), torch.tensor(counts))
        lengths += torch.tensor(counts)
    found, fresh = drafter.propose(4), observed(Autoregressive(*eagle, tree), text, lengths.tolist()).propose(4)
    assert torch.equal(found.tokens, fresh.tokens)
    torch.testing.assert_close(found.confidence, fresh.confidence)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("tree", "levels"), [(Tree(4, 3, 11), 4), (Tree(4, 3, 11), 2), (Tree(3, 4, 100), 3), (Tree(5, 2, 6), 1)], ids=str)
def test_a_tree_is_the_best_of_what_beams_reach(eagle, text, static, tree, levels):
    drafter = observed(Autoregressive(*eagle, tree, static=static), text, [9, 4], rows=slice(2))
    found = drafter.propose(levels)
    assert found.tokens.shape[1] == drafter.size(levels) and found.q is None
    for row, length in enumerate([9, 4]):
        tokens, parents = found.tokens[row].tolist(), found.parents[row].tolist()
        paths = []
        for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            assert parent < i
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
            assert found.confidence[row, i].item() == pytest.approx(
                alone(eagle, text, row, length, list(paths[-1][:-1])).exp()[eagle[0].t2d.nonzero()[:, 0] == token].item(), rel=1e-4
            )
        assert set(paths) == tree_by_hand(eagle, text, row, length, tree, levels) and len(set(paths)) == len(paths)


@torch.no_grad()
def test_a_tree_of_one_child_is_the_chain(eagle, text):
    tree, chain = (observed(Autoregressive(*eagle, shape), text, [9, 4, 6]).propose(5) for shape in (Tree(5, 1, 5), None))
    assert torch.equal(tree.tokens, chain.tokens) and tree.parents[0].tolist() == [-1, 0, 1, 2, 3]


@torch.no_grad()
def test_one_row_whose_length_the_host_knows_is_like_any(eagle, text):
    known, other = (observed(Autoregressive(*eagle, Tree(4, 3, 11), static=static), text, [9], rows=slice(1)).propose(4) for static in (False, True))
    assert torch.equal(known.tokens, other.tokens) and torch.equal(known.parents, other.parents)
    torch.testing.assert_close(known.confidence, other.confidence)


@torch.no_grad()
def test_drawn_tokens_come_with_what_they_were_drawn_from(eagle, text):
    drafter = observed(Autoregressive(*eagle), text, [9, 4], rows=slice(2))
    drafter.warp = Warp(0.7, top_k=6)
    uniforms = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    found = drafter.propose(4, uniforms)
    ids = eagle[0].t2d.nonzero()[:, 0]
    assert torch.equal(found.columns, ids) and found.q.shape == (2, 4, 12)
    for row, length in enumerate([9, 4]):
        for i in range(4):
            q = Warp(0.7, top_k=6)(alone(eagle, text, row, length, found.tokens[row, :i].tolist()))
            torch.testing.assert_close(found.q[row, i], q, rtol=1e-4, atol=1e-6)
            at = int((ids == found.tokens[row, i]).nonzero())
            below = q.cumsum(0)
            assert (below[at - 1] if at else 0) <= uniforms[row, i] < below[at] and found.confidence[row, i].item() == pytest.approx(q[at].item(), rel=1e-4)


@torch.no_grad()
def test_rows_that_stay(eagle, text):
    drafter = observed(Autoregressive(*eagle), text, [9, 4, 6])
    want = drafter.propose(3).tokens
    drafter.keep(torch.tensor([2, 0]))
    assert torch.equal(drafter.propose(3).tokens, want[[2, 0]])


@torch.no_grad()
def test_static_storage_stays_in_place(eagle, text):
    drafter = observed(Autoregressive(*eagle, static=True), text, [9, 4, 6])
    before = drafter.propose(3).tokens
    places = [x.data_ptr() for x in (drafter._carried, drafter._read, drafter._cache._keys, drafter._cache.lengths)]
    observed(drafter, text, [7, 5, 6])
    drafter.observe(text[0][:, 3:6], text[1][:, 2:5], torch.tensor([1, 2, 0]))
    assert places == [x.data_ptr() for x in (drafter._carried, drafter._read, drafter._cache._keys, drafter._cache.lengths)]
    assert torch.equal(observed(drafter, text, [9, 4, 6]).propose(3).tokens, before)
