"""D-Cut: of a batch's proposals the likeliest are verified, rows' beginnings, by scores that say nothing of a drawn token itself."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from angelslim_core.errors import UsageError
from angelslim_specdec import Drafter, Engine, Proposal, Target, Warp, engine, generate
from angelslim_specdec.adaptive import Pace, Round
from angelslim_specdec.dcut import Line, kept, scores
from angelslim_specdec.drafters.autoregressive import Tree
from angelslim_specdec.exactness import mutants
from angelslim_specdec.exactness.checks import CUTS, WARPS, sampled
from angelslim_specdec.exactness.drafters import Table
from angelslim_specdec.exactness.statistics import joint
from angelslim_specdec.exactness.subject import SAMPLED_PROMPT, Way, bigrams, small_target, ways
from angelslim_specdec.verification import match, ratio


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_are_beginnings_and_the_highest_scores(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, most = 1 + seed % 7, 1 + seed % 5
    confidence = (torch.rand(rows, most, generator=generator) * 4).round() / 4  # many ties, zeros and ones
    of = scores(Proposal(torch.zeros(rows, most, dtype=torch.int64), confidence=confidence), torch.ones(rows).bool())
    assert (of.diff(dim=1) <= 0).all()
    for size in range(rows * most + 1):
        counts = kept(of, size)
        assert int(counts.sum()) == size and (counts <= most).all()
        total = sum(float(of[r, : int(counts[r])].sum()) for r in range(rows))
        assert total == pytest.approx(float(of.flatten().sort(descending=True).values[:size].sum()))  # beginnings, and yet the highest there are


def test_ties_keep_the_earlier_token_of_every_row():
    assert kept(torch.ones(4, 4), 4).tolist() == [1, 1, 1, 1] and kept(torch.ones(2, 3), 3).tolist() == [2, 1]


def test_scores_are_of_tokens_that_are_there():
    tokens, live = torch.zeros(3, 2, dtype=torch.int64), torch.tensor([True, False, True])
    confidence, counts = torch.tensor([[0.5, 0.5], [0.9, 0.9], [0.8, 0.1]]), torch.tensor([2, 2, 1])
    assert scores(Proposal(tokens, confidence=confidence, counts=counts), live).tolist() == [[0.5, 0.25], [0, 0], [pytest.approx(0.8), 0]]
    assert scores(Proposal(tokens, counts=counts), live).tolist() == [[1, 1], [0, 0], [1, 0]]
    above = torch.full((1, 5), 1 + 1e-7)
    assert scores(Proposal(tokens[:1, :1].expand(1, 5), confidence=above), live[:1]).tolist() == [[1.0] * 5]


def test_scores_say_nothing_of_what_was_drawn():
    q = torch.rand(3, 4, 7).softmax(-1)
    one, other = (Proposal(torch.full((3, 4), token), q=q, confidence=q[..., token]) for token in (0, 6))
    assert torch.equal(scores(one, torch.ones(3).bool()), scores(other, torch.ones(3).bool()))


def test_line_holds_what_is_kept_and_gives_it_back():
    counts = torch.tensor([2, 0, 3])
    x = torch.arange(12).view(3, 4)
    line = Line.of(counts, 4, 5)
    assert line.line(x).tolist() == [[0, 1, 2, 4, 8, 9, 10, 11]]
    back = line.rows(line.line(x[..., None].expand(-1, -1, 2)))
    assert back.shape == (3, 4, 2) and back[..., 0].tolist() == [[0, 1, 2, 2], [4, 4, 4, 4], [8, 9, 10, 11]]


# two rows, two tokens each of two, as next-token probabilities [row, before, token]; what comes after the second does not matter
_P = torch.tensor([[[0.5, 0.5], [0.8, 0.2], [0.3, 0.7]], [[0.35, 0.65], [0.1, 0.9], [0.6, 0.4]]], dtype=torch.float64)
_Q = torch.tensor([[[0.75, 0.25], [0.55, 0.45], [0.9, 0.1]], [[0.6, 0.4], [0.5, 0.5], [0.97, 0.03]]], dtype=torch.float64)


def two_tokens(p, q, drawn, count):
    """Probability [2, 2] of a row's first two tokens, given what was drafted and how much of it was verified."""
    found = torch.zeros(2, 2, dtype=torch.float64)

    def first(at):  # of one position: what its token is, and whether that was the drafted one
        probability, quotient, token = p[at], p[at] / q[at], drawn[0 if at == 0 else 1]
        accepted = min(1.0, float(quotient[token]))
        left = (p[at] - q[at]).clamp(min=0)
        return [(token, True, accepted)] + [(t, False, (1 - accepted) * float(left[t] / left.sum())) for t in (0, 1) if accepted < 1], probability

    outcomes, plain = first(0)
    for token, goes_on, weight in outcomes if count else [(t, False, float(plain[t])) for t in (0, 1)]:
        second, target = first(1 + token)
        if goes_on and count > 1:
            for next_token, _, chance in second:
                found[token, next_token] += weight * chance
        else:
            found[token] += weight * target
    return found


def joint_law(size, of):
    """Probability [2, 2, 2, 2] of two tokens of both rows, all drafts that may come being tried."""
    found = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    for drawn in itertools.product((0, 1), repeat=4):
        tokens = torch.tensor(drawn).view(2, 2)
        q = torch.stack([torch.stack([_Q[row, 0], _Q[row, 1 + tokens[row, 0]]]) for row in range(2)])
        weight = float(q.gather(2, tokens[..., None]).prod())
        counts = kept(of(Proposal(tokens, q=q.float()), torch.ones(2).bool()), size).tolist()
        one, two = (two_tokens(_P[row], _Q[row], tokens[row].tolist(), counts[row]) for row in range(2))
        found += weight * one[:, :, None, None] * two
    return found


@pytest.mark.parametrize("size", range(5))
def test_the_ratio_rule_stays_exact_for_all_rows_together(size):
    wanted = [_P[row, 0][:, None] * _P[row, 1:] for row in range(2)]
    both = wanted[0][:, :, None, None] * wanted[1]
    assert (joint_law(size, scores) - both).abs().max() < 1e-12
    if size in (1, 2, 3):  # cut by what is verified, the wrong build
        assert (joint_law(size, mutants._of_what_was_drawn) - both).abs().max() > 0.005


def test_the_note_s_trap():
    """One row of each pair drafts token 0 or 1 from q = (.75, .25), and of the pair one token is verified; the target says .5, .5."""
    generator, samples = torch.Generator().manual_seed(0), 100_000
    q = torch.tensor([0.75, 0.25]).expand(samples, 1, 2)
    tokens = (torch.rand(samples, 1, generator=generator) >= 0.75).long()
    p, uniforms = torch.full((samples, 2, 2), 0.5), torch.rand(samples, 2, generator=generator)
    # the other row's token is sure by one half
    counts = {token: int(kept(torch.tensor([[(0.75, 0.25)[token]], [0.5]]), 1)[0]) for token in (0, 1)}
    assert counts == {0: 1, 1: 0}
    cut = torch.where(tokens[:, 0] == 0, 1, 0)

    def share_of_zero(accepted, following):
        return float(torch.where(accepted > 0, tokens[:, 0], following).eq(0).float().mean())

    assert share_of_zero(*ratio(p, tokens, q, None, uniforms, cut)) == pytest.approx(0.625, abs=0.01)
    assert share_of_zero(*match(p, tokens, uniforms, cut)) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("rule", ["ratio", "match"])
def test_sampled_text_keeps_its_distribution(rule):
    target = small_target()
    table, warp = bigrams(target), WARPS["temperature 1.2"]
    way, expected = Way("table", lambda: Table(table), samples=True), joint(target.model, SAMPLED_PROMPT, 4, warp)
    assert sampled(target, way, rule, warp, expected, 2048, CUTS) > 1e-4
    if rule == "ratio":
        with mutants.replaced(*mutants.SAMPLED["cut by the confidence of what is verified"]):
            assert sampled(target, way, rule, warp, expected, 2048, CUTS) < 1e-6


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny("llama", dtype="float32"), dtype=torch.float32).eval()


class Sure(Drafter):
    """Knows the true continuation, is wrong now and then, and mostly says so; checks what it is told."""

    graphable = True

    def __init__(self, truth, features, gaps=False):
        self.truth, self.features, self.gaps = truth, features, gaps
        self.layer_ids, self.random = (0,), torch.Generator().manual_seed(3)

    def start(self, prompts, lengths, capacity, warp):
        self.at = torch.zeros_like(lengths)

    def observe(self, tokens, aux, counts):
        for row, count in enumerate(counts.tolist()):
            start = int(self.at[row])
            assert tokens[row, :count].tolist() == self.truth[row, start + 1 : start + 1 + count].tolist()
            torch.testing.assert_close(aux[row, :count], self.features[row, start : start + count], rtol=1e-4, atol=1e-4)
        self.at += counts

    def propose(self, k, uniforms=None):
        index = self.at[:, None] + 1 + torch.arange(k)
        tokens = self.truth.gather(1, index.clamp(max=self.truth.shape[1] - 1))
        bad = torch.rand(tokens.shape, generator=self.random) < 0.3
        sure = torch.where(bad, 0.2, 0.9) + 0.1 * torch.rand(tokens.shape, generator=self.random)
        counts = torch.randint(0, k + 1, (len(tokens),), generator=self.random) if self.gaps else None
        return Proposal((tokens + bad) % 256, confidence=sure, counts=counts)


class Turns:
    """Rounds in turn; keeps what it is shown."""

    def __init__(self, *rounds):
        self.turns, self.seen = itertools.cycle(rounds), []

    def next(self):
        return next(self.turns)

    def saw(self, *shown):
        self.seen.append(shown)


def subject(model, rows, new):
    prompts = torch.randint(3, 256, (rows, 7), generator=torch.Generator().manual_seed(rows))
    lengths = torch.tensor([7, 1, 5, 3, 6])[:rows]
    made = [model.generate(p[:n][None], attention_mask=torch.ones(1, n), max_new_tokens=new + 9, do_sample=False, eos_token_id=None)[0] for p, n in zip(prompts, lengths.tolist())]  # fmt: skip
    truth = torch.nn.utils.rnn.pad_sequence(made, batch_first=True)
    with torch.no_grad():
        features = model(truth, output_hidden_states=True).hidden_states[1]
    return prompts, lengths, truth, features


@pytest.mark.parametrize("gaps", [False, True], ids=["whole", "gaps"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("rows", "k"), [(1, 4), (2, 1), (5, 4)])
def test_greedy_text_is_the_target_s_and_only_what_is_kept_is_run(model, rows, k, static, gaps, monkeypatch):
    new, sizes = 30, sorted({math.ceil(share * rows * k) for share in (0.1, 0.3, 0.5, 0.8)})
    prompts, lengths, truth, features = subject(model, rows, new)
    pace = Turns(*(Round(k, size) for size in sizes), Round(k), Round(0))
    runs = []
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: runs.append(args[0].shape[:2].numel()))
    decoder = Engine(Target(model, fused=static), Sure(truth, features, gaps), rows, 7 + new, k=k, pace=pace, static=static)
    wanted = [truth[b, n : n + new].tolist() for b, n in enumerate(lengths.tolist())]
    decoded = decoder.decode(prompts, lengths, new)
    hook.remove()
    assert decoded.tokens == wanted
    for number, (how, seconds, accepted, verified, of) in enumerate(pace.seen):
        assert runs[1 + number] == rows + (rows * how.k if how.size is None else min(how.size, rows * how.k))
        assert (accepted <= verified).all() and (how.size is None or verified.sum() <= how.size) and seconds > 0
        assert of.shape == (len(accepted), k) and (of.diff(dim=1) <= 0).all()
    if rows > 1:  # wrong builds: what was not verified counts; tokens come back to other places than theirs
        monkeypatch.setattr(engine, "replace", lambda value, **changes: replace(value, **{n: v for n, v in changes.items() if n != "counts"}))
        with pytest.raises(AssertionError):  # of `Sure`, which is told another text
            Engine(Target(model), Sure(truth, features), rows, 7 + new, k=k, pace=Turns(Round(k, 1)), static=static).decode(prompts, lengths, new)
        monkeypatch.undo()
        monkeypatch.setattr(Line, "rows", lambda self, x: x[0][self.at.flip(0)])
        with pytest.raises(AssertionError):
            Engine(Target(model), Sure(truth, features), rows, 7 + new, k=k, pace=Turns(Round(k, 1)), static=static).decode(prompts, lengths, new)


def test_the_surest_tokens_of_the_batch_are_verified(model):
    prompts, lengths, truth, features = subject(model, 5, 60)
    few, all_of_them = ([sum(int(accepted.sum()) for _, _, accepted, _, _ in pace.seen), len(pace.seen)] for pace in (Turns(Round(4, 10)), Turns(Round(4)))
        if Engine(Target(model), Sure(truth, features), 5, 67, k=4, pace=pace).decode(prompts, lengths, 60))  # fmt: skip
    assert few[0] / few[1] > 0.75 * all_of_them[0] / all_of_them[1]  # half the tokens would give some half of it, were they any


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["ngram", "suffix"])
def test_adaptive_lookups_change_no_text(model, name, static):
    ids = torch.randint(3, 256, (4, 5), generator=torch.Generator().manual_seed(2)).repeat(1, 3)
    found = generate(model, ids, name, 120, k=4, adaptive=True, static=static)
    assert torch.equal(found.sequences, generate(model, ids, None, 120).sequences) and found.acceptance_length > 1


def test_what_cannot_be_cut_is_refused(model):
    ids = torch.randint(3, 256, (2, 5))
    with pytest.raises(UsageError, match="nothing is proposed") as refused:
        generate(model, ids, None, 4, adaptive=True)
    assert refused.value.number == 786
    with pytest.raises(UsageError, match="and pace both"):
        generate(model, ids, "ngram", 4, adaptive=True, pace=Turns(Round(5)))

    class Two(Sure):
        def propose(self, k, uniforms=None):
            return Proposal(torch.zeros(2, k, dtype=torch.int64), parents=torch.full((2, k), -1))

    prompts, lengths, truth, features = subject(model, 2, 4)
    with pytest.raises(UsageError, match="tree") as refused:
        Engine(Target(model), Two(truth, features), 2, 12, k=3, pace=Turns(Round(3, 2))).decode(prompts, lengths, 4)
    assert refused.value.number == 785


def test_adaptive_trees_change_their_levels_only():
    target = small_target()
    way = next(w for w in ways(target) if w.name == "eagle3")
    ids = torch.tensor([SAMPLED_PROMPT, SAMPLED_PROMPT[::-1]])
    found = generate(target, ids, way.make(), 60, k=3, tree=Tree(3, 2, 5), adaptive=True, stop_ids=[])
    assert torch.equal(found.sequences, generate(target, ids, None, 60, stop_ids=[]).sequences)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["eagle3", "dflash", "ngram"])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_each_kind_of_round_is_a_graph(name, temperature):
    target = Target(small_target().model.cuda())
    way = next(w for w in ways(small_target()) if w.name == name)
    if name != "ngram":
        drafter = way.make()
        way = Way(name, lambda: type(drafter)(drafter.draft.cuda(), target.heads()))
    ids, lengths = torch.randint(3, 12, (5, 8), generator=torch.Generator().manual_seed(1)), torch.full((5,), 8)
    pace = Pace(3, 5)
    found = Engine(target, way.make(), 5, 108, k=3, warp=Warp(temperature), pace=pace)
    decoded = [found.decode(ids, lengths, 100).tokens for _ in range(3)]
    assert all(count >= pace.FRESH + pace.TIMED for count in pace._done.values())
    if not temperature:
        plain = Engine(target, None, 5, 108).decode(ids, lengths, 100).tokens
        assert decoded == [plain] * 3
