"""Rules of acceptance: what comes out is distributed as the target alone would have it, and wrong rules are told from right ones."""

import pytest
import torch

from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.verification import draw, greedy, match, ratio, tree_greedy, tree_sample

# Shapes: S samples, K proposed tokens, V vocabulary
SAMPLES, K, V = 200_000, 2, 6


def chi_square(tokens_S2, table_VV, root=0):
    """p value of the first two tokens, jointly, against a bigram table."""
    expected = (len(tokens_S2) * table_VV[root, :, None] * table_VV).double().flatten()
    seen = torch.bincount(tokens_S2[:, 0] * V + tokens_S2[:, 1], minlength=V * V).double()
    possible = expected > 0
    if seen[~possible].any():
        return 0.0
    statistic = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    return float(torch.special.gammaincc((possible.sum() - 1) / 2.0, statistic / 2))


class Language:
    """A target and a draft that look at one token back, both warped alike."""

    def __init__(self, warp=None, columns=None, seed=1):
        self.generator = torch.Generator().manual_seed(seed)
        warp = warp or Warp(temperature=0.7)
        logits = 1.5 * torch.randn(V, V, generator=self.generator)
        self.p = warp(logits)
        self.columns = columns
        self.draft_logits = logits + torch.randn(V, V, generator=self.generator)
        if columns is not None:
            self.draft_logits = self.draft_logits[:, columns]
        self.q = warp(self.draft_logits)

    def uniforms(self, *shape):
        return torch.rand(*shape, generator=self.generator)

    def propose(self, q=None):
        """Tokens [S, K] drawn by the draft, and the rows of q they are said to come from."""
        token, tokens, rows = torch.zeros(SAMPLES, dtype=torch.long), [], []
        for _ in range(K):
            rows.append((self.q if q is None else q)[token])
            drawn = draw(self.q[token], self.uniforms(SAMPLES))
            token = drawn if self.columns is None else self.columns[drawn]
            tokens.append(token)
        return torch.stack(tokens, 1), torch.stack(rows, 1)

    def rows(self, tokens):
        """The target's p after the root, token 0, and after each proposed one."""
        return self.p[torch.nn.functional.pad(tokens, (1, 0))]

    def emitted(self, tokens, accepted, following):
        """The first two tokens of each sample; where a round gave but one, the second is drawn plainly."""
        padded = torch.nn.functional.pad(tokens, (0, 1))
        out = torch.where(torch.arange(K + 1) < accepted[:, None], padded, following[:, None])
        second = torch.where(accepted > 0, out[:, 1], draw(self.p[following], self.uniforms(SAMPLES)))
        return torch.stack([out[:, 0], second], 1)


WARPS = {"tempered": Warp(0.7), "top-p": Warp(1.3, top_p=0.8), "top-k": Warp(1.0, top_k=3)}
SUBSET = torch.tensor([1, 2, 4])


@pytest.mark.parametrize("columns", [None, SUBSET], ids=["all", "subset"])
@pytest.mark.parametrize("warp", WARPS.values(), ids=WARPS)
@pytest.mark.parametrize("rule", ["ratio", "match"])
def test_sampled_chain(rule, warp, columns):
    language = Language(warp, columns)
    tokens, q = language.propose()
    p, uniforms = language.rows(tokens), language.uniforms(SAMPLES, K + 1)
    accepted, following = ratio(p, tokens, q, columns, uniforms) if rule == "ratio" else match(p, tokens, uniforms)
    assert chi_square(language.emitted(tokens, accepted, following), language.p) > 1e-3
    share = float((accepted > 0).float().mean())
    q_V = torch.zeros(V) if columns is not None else language.q[0]
    q_V = q_V.index_add(0, columns, language.q[0]) if columns is not None else q_V
    want = torch.minimum(language.p[0], q_V).sum() if rule == "ratio" else language.p[0] @ q_V
    assert share == pytest.approx(float(want), abs=0.005)


@pytest.mark.parametrize("counts", [0, 1, "mixed"])
@pytest.mark.parametrize("rule", [ratio, match], ids=["ratio", "match"])
def test_point_mass_of_a_few(rule, counts):
    language = Language(Warp(1.3, top_p=0.8))
    first = language.p[0].argmax()
    tokens = torch.stack([first, language.p[first].topk(2).indices[1]]).expand(SAMPLES, K)
    counts = torch.arange(SAMPLES) % (K + 1) if counts == "mixed" else torch.full((SAMPLES,), counts)
    tokens = torch.where(torch.arange(K) < counts[:, None], tokens, -1)
    p, uniforms = language.rows(tokens.clamp(min=0)), language.uniforms(SAMPLES, K + 1)
    accepted, following = ratio(p, tokens, None, None, uniforms, counts) if rule is ratio else match(p, tokens, uniforms, counts)
    assert (accepted <= counts).all() and (counts.max() == 0 or (accepted == counts.max()).any())
    assert chi_square(language.emitted(tokens, accepted, following), language.p) > 1e-3


def resampled(p, tokens, q, columns, uniforms):
    accepted, _ = ratio(p, tokens, q, columns, uniforms)
    return accepted, draw(p[torch.arange(len(p)), accepted], uniforms[:, -1])


def unnormalised(p, tokens, q, columns, uniforms):
    accepted, following = ratio(p, tokens, q, columns, uniforms)
    at = accepted.clamp(max=K - 1)
    rows = torch.arange(len(p))
    below = (p[rows, at] - q[rows, at]).clamp(min=0).cumsum(-1)
    drawn = (below <= uniforms[:, -1:]).sum(-1).clamp(max=V - 1)
    return accepted, torch.where(accepted < K, drawn, following)


def same_uniform(p, tokens, q, columns, uniforms):
    return ratio(p, tokens, q, columns, torch.cat([uniforms[:, :K], uniforms[:, :1]], 1))


@pytest.mark.parametrize("wrong", [resampled, unnormalised, same_uniform, "untempered"], ids=lambda w: getattr(w, "__name__", w))
def test_wrong_rules_are_caught(wrong):
    language = Language()
    tokens, q = language.propose(language.draft_logits.softmax(-1) if wrong == "untempered" else None)
    p, uniforms = language.rows(tokens), language.uniforms(SAMPLES, K + 1)
    accepted, following = (ratio if wrong == "untempered" else wrong)(p, tokens, q, None, uniforms)
    assert chi_square(language.emitted(tokens, accepted, following), language.p) < 1e-6


def test_a_perfect_draft_is_accepted_whole():
    language = Language()
    language.q = language.p
    tokens, q = language.propose()
    accepted, _ = ratio(language.rows(tokens), tokens, q, None, language.uniforms(SAMPLES, K + 1))
    assert (accepted == K).all()
    edge = torch.full((SAMPLES, K + 1), 1 - 2**-24)  # the largest a draw can be
    assert (ratio(language.rows(tokens), tokens, q, None, edge)[0] == K).all()


def test_residual_of_nothing_is_the_target():
    p = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]])
    q = torch.tensor([[[0.5, 0.5, 1e-9]]])
    accepted, following = ratio(p, torch.tensor([[2]]), q, None, torch.tensor([[0.9, 0.7]]))
    assert accepted.tolist() == [0] and following.tolist() == [1]


def test_impossible_tokens_never_come():
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(5, 5)
    assert draw(p, torch.tensor([0.0, 0.2499999, 0.25, 0.5, 1 - 2**-24])).tolist() == [1, 1, 3, 3, 3]
    none = torch.zeros(1, 2)
    assert ratio(p[None, :2], torch.tensor([[0]]), None, None, none)[0].tolist() == [0]


def test_greedy():
    choices = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    tokens = torch.tensor([[1, 2], [1, 3], [2, 2], [1, 2]])
    accepted, following = greedy(choices, tokens)
    assert accepted.tolist() == [2, 1, 0, 2] and following.tolist() == [3, 2, 1, 3]
    accepted, following = greedy(choices, tokens, torch.tensor([1, 2, 2, 0]))
    assert accepted.tolist() == [1, 1, 0, 0] and following.tolist() == [2, 2, 1, 1]


def test_no_proposal_is_plain_decoding():
    none, p = torch.zeros(2, 0, dtype=torch.long), torch.tensor([[[0.5, 0.5]], [[0.0, 1.0]]])
    uniforms = torch.tensor([[0.2], [0.0]])
    for accepted, following in (ratio(p, none, None, None, uniforms), match(p, none, uniforms), greedy(torch.tensor([[0], [1]]), none)):
        assert accepted.tolist() == [0, 0] and following.tolist() == [0, 1]


# two paths from the root, 4 5 and 7 8, with 4 6 beside, and 9 under what is wrong
TOKENS = torch.tensor([[4, 7, 5, 6, 8, 9, -1]])
PARENTS = torch.tensor([[-1, -1, 0, 0, 1, 2, 0]])


@pytest.mark.parametrize("depth", [3, None])
@pytest.mark.parametrize(
    ("choices", "path", "following"),
    [
        ([4, 5, 0, 9, 0, 0, 3, 0], [0, 2, 5], 3),
        ([4, 6, 0, 9, 2, 0, 3, 0], [0, 3], 2),
        ([7, 5, 8, 9, 0, 1, 3, 0], [1, 4], 1),
        ([7, 5, 9, 9, 0, 1, 3, 0], [1], 9),
        ([3, 5, 8, 9, 0, 1, 3, 0], [], 3),
    ],
    ids=str,
)
def test_tree_greedy(choices, path, following, depth):
    found, accepted, after = tree_greedy(torch.tensor([choices]), TOKENS, PARENTS, depth)
    assert [n for n in found[0].tolist() if n >= 0] == path == found[0, : len(path)].tolist()
    assert found.shape[1] == (depth or 7) and accepted.tolist() == [len(path)] and after.tolist() == [following]


def test_trees_of_a_batch_against_a_walk():
    generator = torch.Generator().manual_seed(1)
    rows, size = 300, 12
    tokens = torch.randint(-1, 3, (rows, size), generator=generator)
    parents = torch.stack([torch.randint(-1, n, (rows,), generator=generator) if n else torch.full((rows,), -1) for n in range(size)], 1)
    choices = torch.randint(0, 3, (rows, size + 1), generator=generator)
    path, accepted, following = tree_greedy(choices, tokens, parents)
    for row in range(rows):
        best = []
        for node in range(size):
            chain, at = [], node
            while at >= 0:
                chain, at = [at, *chain], int(parents[row, at])
            if all(tokens[row, n] == choices[row, parents[row, n] + 1] for n in chain) and len(chain) > len(best):
                best = chain
        assert path[row].tolist() == best + [-1] * (size - len(best)) and accepted[row] == len(best)
        assert following[row] == choices[row, best[-1] + 1 if best else 0]


@pytest.mark.parametrize("warp", WARPS.values(), ids=WARPS)
def test_sampled_tree(warp):
    language = Language(warp)
    a, b = language.p[0].topk(2).indices.tolist()
    c, d, e, f = language.p[a].topk(4).indices.tolist()
    tokens = torch.tensor([a, b, a, d, e, c, f, b]).expand(SAMPLES, 8)  # a twice under the root, each with its own children, and b
    parents = torch.tensor([-1, -1, -1, 0, 0, 2, 2, -1]).expand(SAMPLES, 8)
    p = language.rows(tokens)
    path, accepted, following = tree_sample(p, tokens, parents, language.uniforms(SAMPLES, 9), depth=2)
    kept = tokens.gather(1, path.clamp(min=0))
    assert int((accepted == 2).sum()) > 0 and chi_square(language.emitted(kept, accepted, following), language.p) > 1e-3
    eagle = language.p[0, [a, b]].sum()  # what its sequence of tries accepts at the first level
    assert float((accepted > 0).float().mean()) == pytest.approx(float(eagle), abs=0.005)


def test_the_better_of_two_copies_is_a_wrong_choice():
    language = Language()
    tokens = torch.tensor([1, 1, 5, 4]).expand(SAMPLES, 4)
    parents = torch.tensor([-1, -1, 0, 1]).expand(SAMPLES, 4)
    p, uniforms = language.rows(tokens), language.uniforms(SAMPLES, 5)
    wrong = tree_greedy(draw(p, uniforms), tokens, parents, depth=2)
    right = tree_sample(p, tokens, parents, uniforms, depth=2)
    values = [chi_square(language.emitted(tokens.gather(1, path.clamp(min=0)), *rest), language.p) for path, *rest in (wrong, right)]
    assert values[0] < 1e-6 and values[1] > 1e-3
