"""Whatever is proposed, greedy output is transformers' own and sampled output has the target's distribution."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from angelslim_core.errors import UsageError
from angelslim_specdec import Engine, Target, Warp, generate, stream
from angelslim_specdec.adaptive import Round
from angelslim_specdec.drafters.base import Drafter, Proposal
from angelslim_specdec.registry import drafters
from angelslim_specdec.stops import cut
from angelslim_specdec.uniforms import Uniforms


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny("llama", dtype="float32"))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids_of(*shape, seed=0):
    return torch.randint(3, 256, shape, generator=torch.Generator().manual_seed(seed))


class Scripted(Drafter):
    """Proposes a row's true continuation, each token wrong with some probability, as a chain or as a tree with decoys; checks what it is told."""

    graphable = True

    def __init__(self, truth, wrong=0.0, tree=False, features=None):
        self.truth, self.wrong, self.tree, self.features = truth, wrong, tree, features
        self.layer_ids = (0, 1) if features is not None else ()
        self.random = torch.Generator().manual_seed(7)

    def size(self, k):
        return 2 * k if self.tree else k

    def start(self, prompts, lengths, capacity, warp):
        self.at = torch.zeros_like(lengths)

    def observe(self, tokens, aux, counts):
        for row, count in enumerate(counts.tolist()):
            start = int(self.at[row])
            assert tokens[row, :count].tolist() == self.truth[row, start + 1 : start + 1 + count].tolist()
            if self.features is not None:
                torch.testing.assert_close(aux[row, :count], self.features[row, start : start + count], rtol=1e-4, atol=1e-4)
        self.at += counts

    def propose(self, k, uniforms=None):
        index = self.at[:, None] + 1 + torch.arange(k)
        tokens = self.truth.gather(1, index.clamp(max=self.truth.shape[1] - 1))
        bad = torch.rand(tokens.shape, generator=self.random) < self.wrong
        tokens = torch.where(bad, (tokens + 1) % 256, tokens)
        if not self.tree:
            return Proposal(tokens)
        # beside each token a decoy, which sometimes is the better one and then carries the path on
        decoys = torch.where(bad, (tokens - 1) % 256, (tokens + 5) % 256)
        both = torch.stack([decoys, tokens], 2).flatten(1)
        parents = torch.tensor([-1 if level == 0 else 2 * level - 2 + (not bad[0, level - 1]) for level in range(k) for _ in "ab"])
        return Proposal(both, parents=parents[None].expand_as(both))


def truth_of(model, prompts, lengths, new):
    rows = []
    for ids, length in zip(prompts, lengths.tolist()):
        own = ids[:length][None]
        made = model.generate(own, attention_mask=torch.ones_like(own), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        rows.append(made[0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class InPlace:
    """Stands for a graph: calls the same function, whose storage may not move."""

    def __init__(self, function):
        self.function, self.where = function, None

    def __call__(self):
        owner = self.function.__closure__[1].cell_contents if self.function.__closure__ else self.function.__self__
        if not isinstance(owner, Engine):  # of prompts
            self.function()
            return
        held = [owner.cache.lengths, owner._last, owner._remaining, owner._out, owner._tokens, owner._counts, *owner._uniforms.values()]
        held += [x for pair in owner.cache._stored.values() for x in pair]
        where = [(x.data_ptr(), tuple(x.shape)) for x in held]
        assert self.where in (None, where)
        self.where = where
        self.function()
        assert [(x.data_ptr(), tuple(x.shape)) for x in held] == where


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("k", "batch"), [(1, 2), (3, 1), (4, 4), (8, 3)])
def test_greedy_is_the_targets_own(model, k, batch, wrong, tree, static):
    prompts, lengths, new = ids_of(batch, 7, seed=k), torch.tensor([7, 1, 5, 3])[:batch], 21
    truth = truth_of(model, prompts, lengths, new + 9)
    with torch.no_grad():
        states = model(truth, output_hidden_states=True).hidden_states
    drafter = Scripted(truth, wrong, tree, torch.cat([states[1], model.model.layers[1](states[1], position_embeddings=rope(model, truth))], -1))
    target = Target(model)
    engine = Engine(target, drafter, batch, 7 + new, k=k, static=static, runner=InPlace if static else None)
    for _ in range(2):  # an engine serves many batches
        decoded = engine.decode(prompts, lengths, new)
        assert decoded.tokens == [truth[b, n : n + new].tolist() for b, n in enumerate(lengths.tolist())]
        if wrong == 0:
            assert decoded.rounds == [-(-(new - 1) // (k + 1))] * batch
            assert decoded.acceptance_length == k + 1
        if wrong == 1 and not tree:
            assert decoded.rounds == [new - 1] * batch and decoded.acceptance_length == 1 and decoded.accepted == 0
    assert decoded.drafted == sum(decoded.rounds) * drafter.size(k)
    assert sum(decoded.by_position) == decoded.accepted


def rope(model, ids):
    return model.model.rotary_emb(torch.zeros(1, 1, 64), torch.arange(ids.shape[1])[None])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", [None, "ngram", "suffix"])
@pytest.mark.parametrize("batch", [1, 3])
def test_names_give_what_transformers_generates(model, name, batch, static):
    phrase = ids_of(1, 4, seed=3)
    ids = torch.cat([ids_of(batch, 2, seed=1), phrase.repeat(batch, 3)], 1)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, :5] = 0
        mask[2, :-1] = 0
    want = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    got = generate(model, ids, name, 40, attention_mask=mask, k=4, static=static)
    assert torch.equal(got.sequences, want)
    assert got.stats["tokens"] == sum(map(len, got.decoded.tokens))
    if name is None:
        assert got.acceptance_length == 1.0
    else:
        assert got.acceptance_length > 1.0


@pytest.mark.parametrize("new", [1, 2, 5, 30])
def test_a_stop_inside_an_accepted_run_ends_the_row_there(model, new):
    prompts, lengths = ids_of(3, 6), torch.tensor([6, 6, 2])
    truth = truth_of(model, prompts, lengths, 40)
    tokens = [truth[b, n : n + 30].tolist() for b, n in enumerate(lengths.tolist())]
    stops = [tokens[0][9], tokens[1][0]]
    engine = Engine(Target(model), Scripted(truth), 3, 6 + new, k=6, stops=stops)
    told = [[], [], []]
    decoded = engine.decode(prompts, lengths, new, tell=lambda rows: [t.extend(r) for t, r in zip(told, rows)])
    for row, whole in zip(decoded.tokens, tokens):
        ends = [i + 1 for i, t in enumerate(whole) if t in stops]
        assert row == whole[: min([new, *ends])]
    assert told == decoded.tokens


def test_ends_as_transformers_pads_them(model):
    ids = ids_of(3, 5, seed=9)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    stop = int(plain[1, 5 + 6])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=stop)
    assert torch.equal(generate(model, ids, "suffix", 24, stop_ids=[stop]).sequences, want)


@pytest.mark.parametrize("drafter", [None, "ngram", "ratio", "match", "tree"])
def test_sampled_tokens_have_the_targets_distribution(model, drafter):
    rows, ids = 4000, ids_of(1, 5, seed=2)
    warp, target = Warp(0.7, top_k=4), Target(model)

    def exact(ids):
        with torch.no_grad():
            return warp(model(ids).logits[:, -1])[0]

    first = exact(ids)
    cells = {}
    for a in first.nonzero()[:, 0].tolist():
        second = exact(torch.cat([ids, torch.tensor([[a]])], 1))
        cells |= {(a, b): float(first[a] * second[b]) for b in second.nonzero()[:, 0].tolist()}

    class Guess(Drafter):
        """Always the same tokens, or drawn evenly from a few."""

        def start(self, prompts, lengths, capacity, warp):
            pass

        def observe(self, tokens, aux, counts):
            pass

        def propose(self, k, uniforms=None):
            likely = torch.tensor(sorted({b for _, b in cells}))
            if drafter == "ratio" and uniforms is not None:
                drawn = likely[(uniforms * len(likely)).long()]
                return Proposal(drawn, q=torch.full((rows, k, len(likely)), 1 / len(likely)), columns=likely)
            if drafter == "tree":
                return Proposal(likely[:k].repeat(rows, 1), parents=torch.full((rows, k), -1))
            return Proposal(likely[:1].repeat(rows, k))

    made = "ngram" if drafter == "ngram" else None if drafter is None else Guess()
    got = generate(
        target, ids.repeat(rows, 1), made, 3, 0.7, top_k=4, k=2, rule="match" if drafter == "match" else "auto", seed=5, stop_ids=[]
    )  # fmt: skip
    counts = dict.fromkeys(cells, 0)
    for a, b, _ in got.decoded.tokens:
        counts[a, b] += 1
    chi = sum((counts[c] - rows * p) ** 2 / (rows * p) for c, p in cells.items())
    assert chi < 45  # 15 degrees of freedom: p = 8e-5


@pytest.mark.parametrize("name", [None, "suffix"])
def test_what_a_row_samples_does_not_depend_on_its_batch(model, name):
    ids = torch.cat([ids_of(4, 2, seed=6), ids_of(1, 5, seed=4).repeat(4, 2)], 1)
    together = generate(model, ids, name, 30, 0.8, top_p=0.9, seed=11).decoded.tokens
    assert len({tuple(t) for t in together}) == 4
    for row in range(4):
        assert generate(model, ids[row : row + 1], name, 30, 0.8, top_p=0.9, seed=11 + row).decoded.tokens == together[row : row + 1]


def test_uniforms_follow_each_other_without_gaps():
    one, many = Uniforms([3], 1), Uniforms([0, 3, 9], 1)
    short = torch.cat([one.take(7) for _ in range(300)], 1)[0]
    long = torch.cat([many.take(w) for w in itertools.islice(itertools.cycle([700, 350]), 2)], 1)
    assert torch.equal(short[:1050], long[1])
    many.restart(0, 3)
    assert torch.equal(many.take(600)[0], short[:600])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_stream_gives_what_each_prompt_gives_alone(model, static, temperature):
    prompts = [ids_of(1, n, seed=n)[0].tolist() for n in (3, 9, 1, 6, 4, 8, 2, 5, 7, 11, 3)]
    alone = {
        i: generate(model, torch.tensor([ids]), None, 20, temperature, seed=40 + i, stop_ids=range(0, 256, 12)).decoded.tokens[0]
        for i, ids in enumerate(prompts)
    }  # fmt: skip
    assert len({len(tokens) for tokens in alone.values()}) > 2
    made = list(
        stream(
            Target(model),
            enumerate(prompts),
            3,
            40,
            20,
            warp=Warp(temperature),
            stops=range(0, 256, 12),
            seed=40,
            static=static,
            runner=InPlace if static else None,
        )
    )
    assert dict(made) == alone and len(made) == len(prompts)
    assert list(stream(Target(model), [], 3, 40, 20)) == []


class _Steady:
    """Proposes 0, 1 ... k in turn and keeps what it is shown."""

    def __init__(self, k):
        self.turns, self.seen = itertools.cycle(range(k + 1)), []

    def next(self):
        return Round(next(self.turns))

    def saw(self, done, seconds, accepted, verified, scores):
        self.seen.append((done.k, verified.tolist()))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["scripted", "ngram"])
def test_pace_changes_rounds_but_no_tokens(model, name, static):
    prompts, lengths = ids_of(2, 6).repeat(1, 2), torch.tensor([12, 7])
    truth, pace = truth_of(model, prompts, lengths, 40), _Steady(3)
    drafter = Scripted(truth) if name == "scripted" else drafters()["ngram"]()
    decoded = Engine(Target(model), drafter, 2, 42, k=3, pace=pace, static=static).decode(prompts, lengths, 30)
    assert decoded.tokens == [truth[b, n : n + 30].tolist() for b, n in enumerate(lengths.tolist())]
    if name == "scripted":
        assert pace.seen[:6] == [(k, [k, k]) for k in (0, 1, 2, 3, 0, 1)]


def test_cut():
    tokens = torch.tensor([[5, 9, 5, 2], [9, 1, 1, 1], [1, 2, 3, 9], [9, 9, 9, 9], [1, 2, 3, 4]])
    kept, ended = cut(tokens, torch.tensor([4, 3, 3, 2, 4]), torch.tensor([9, 9, 9, 0, 3]), torch.tensor([9, 8]))
    assert kept.tolist() == [2, 1, 3, 0, 3] and ended.tolist() == [True, True, False, True, True]
    assert cut(tokens, torch.tensor([4] * 5), torch.tensor([9] * 5), torch.tensor([], dtype=torch.int64))[0].tolist() == [4] * 5


def test_wrong_use(model):
    target = Target(model)
    with pytest.raises(UsageError, match="do not fit"):
        Engine(target, None, 1, 10).decode(ids_of(1, 6), torch.tensor([6]), 5)
    with pytest.raises(UsageError, match="do not fit"):
        Engine(target, None, 1, 10).decode(ids_of(1, 6), torch.tensor([0]), 5)
    with pytest.raises(UsageError, match="into 2 rows of 10"):
        Engine(target, None, 2, 10).decode(ids_of(1, 6), torch.tensor([6]), 2)
    with pytest.raises(UsageError, match="cannot be proposed"):
        generate(model, ids_of(1, 3), "ngram", 4, k=0)
    with pytest.raises(UsageError, match="padding on the left"):
        generate(model, ids_of(1, 3), None, 4, attention_mask=torch.tensor([[1, 1, 0]]))
