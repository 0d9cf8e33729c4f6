"""Training a draft: rows, features from memory, from the target and from disk, states that go on exactly, and the command."""

import json
import shutil

import pytest
import torch
from torch import nn

from angelslim_core.calibration.packing import Order, cut, pack
from angelslim_core.calibration.spans import Document
from angelslim_core.cli.main import main
from angelslim_core.errors import ModelError, RecipeError, StoppedError, UsageError
from angelslim_core.loading import load_model
from angelslim_core.parallel import Group
from angelslim_core.training import TrainingOptions
from angelslim_specdec import registry
from angelslim_specdec.drafts.base import Draft, DraftConfig, Loss
from angelslim_specdec.folder import load_draft
from angelslim_specdec.target import Target
from angelslim_specdec.training.features import Source, computed
from angelslim_specdec.training.run import Plan, train
from angelslim_specdec.training.selection import coverage_of, read_selection, select, write_selection
from angelslim_specdec.training.trainer import DraftTraining, evaluate
from angelslim_specdec.vocabulary import Vocabulary


class Guess(Draft):
    """Guesses the target's own next choice from its features, and the one after it; noisy, so that random numbers matter."""

    name, architecture = "guess", "GuessDraft"

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = (nn.Linear(len(config.aux_hidden_state_layer_ids) * config.target_hidden_size, config.draft_vocab_size) for _ in range(2))
        if config.draft_vocab_size < config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @classmethod
    def from_target(cls, target, *, draft_vocab_size=None, **options):
        if options:
            raise UsageError(1, "guess", f"knows no option {', '.join(options)}")
        return cls(
            DraftConfig(
                hidden_size=target.hidden_size, intermediate_size=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2, vocab_size=target.vocab_size,
                draft_vocab_size=draft_vocab_size or target.vocab_size, max_position_embeddings=64, target_hidden_size=target.hidden_size,
                num_target_layers=target.num_layers, aux_hidden_state_layer_ids=(0, 1),
            )
        )  # fmt: skip

    def train_loss(self, batch, heads):
        sums, counts, hits = [], [], []
        for step, layer in enumerate((self.first, self.second)):
            ahead = batch.loss_mask.roll(-1 - step, 1) & (batch.documents.roll(-1 - step, 1) == batch.documents) & (batch.documents >= 0)
            ahead[:, -1 - step :] = False
            best = heads.logits(batch.final.roll(-step, 1)).argmax(-1)
            aux = batch.aux + (0.01 * torch.rand(()) if self.training else 0)
            logits = layer(aux)[ahead]
            if hasattr(self, "t2d"):
                known = self.t2d[best[ahead]]
                place = (self.t2d.cumsum(0) - 1)[best[ahead]].clamp(min=0)
            else:
                known, place = torch.ones_like(best[ahead], dtype=torch.bool), best[ahead]
            sums.append((nn.functional.cross_entropy(logits.float(), place, reduction="none") * known).sum())
            counts.append(known.sum())
            hits.append(((logits.argmax(-1) == place) & known).sum())
        asked = torch.stack([ahead.sum(), ahead.sum()])
        return Loss(torch.stack(sums), torch.stack(counts).float(), torch.tensor([1.0, 0.8]), torch.stack(hits), asked)

    def drafter(self, heads):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def guess():
    registry.drafts()
    registry.add_draft(Guess, "test")
    yield
    del registry._DRAFTS["guess"]


@pytest.fixture(scope="module")
def target(tiny):
    loaded = load_model(tiny(dtype="float32"), "cpu")
    return Target(loaded.model, loaded.tokenizer)


def documents(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        ids = torch.randint(3, 250, (size,), generator=generator).tolist()
        made.append(Document(ids, [False] * (size // 3) + [True] * (size - size // 3)))
    return made


def source(target, rows, **options):
    return Source(rows, computed(target, rows, (0, 1)), torch.device("cpu"), torch.float32, **options)


def draft_for(target, seed=0, **options):
    torch.manual_seed(seed)
    return Guess.from_target(target.shape, **options)


def test_rows_hold_whole_documents_and_little_else():
    made = documents(*(4 + 37 * i % 41 for i in range(150)))
    rows = pack(made, 64, seed=3)
    assert sum(map(len, rows)) == sum(len(d.ids) for d in made) and max(map(len, rows)) <= 64
    assert sum(map(len, rows)) / (64 * len(rows)) > 0.95
    found = []
    for row in rows:
        for number in range(int(row.documents[-1]) + 1):
            mine = row.documents == number
            assert row.positions[mine].tolist() == list(range(int(mine.sum())))
            found.append((row.ids[mine].tolist(), row.loss_mask[mine].tolist()))
    assert sorted(found) == sorted((d.ids, d.mask) for d in made)
    assert [len(r) for r in pack(documents(30, 20, 10), 64)] != [60], "small data make more steps than one an epoch"


def test_documents_are_cut_and_left_out_where_no_answer_remains():
    kept, dropped = cut([*documents(30, 6), Document([1] * 9, [False] * 8 + [True])], 11)
    assert [(len(d.ids), sum(d.mask)) for d in kept] == [(11, 1)] * 0 + [(6, 4)] and dropped == 2


def test_every_epoch_takes_each_row_once_in_an_order_of_its_own():
    order = Order(10, 4, seed=1)
    taken = [n for batch in range(5) for n in order.numbers(batch)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10)) and taken[:10] != taken[10:]
    assert Order(10, 4, seed=1).numbers(3) == taken[12:16] and Order(3, 8, 0).batch == 3


def test_packing_and_padding_change_no_loss(target):
    made = documents(9, 17, 30, 21)
    draft = draft_for(target).eval()
    rows = pack(made, 80)
    alone = [row for d in made for row in pack([d], 80)]
    assert len(rows) < len(alone)
    found = [evaluate(draft, target.heads(), source(target, r), b) for r, b in ((rows, 1), (rows, 2), (alone, 1), (alone, 4))]
    for other in found[1:]:
        assert other.loss == pytest.approx(found[0].loss, rel=1e-5) and other.rates == pytest.approx(found[0].rates)


def test_kept_features_are_those_computed_and_come_from_one_forward(target, monkeypatch):
    rows = pack(documents(9, 17, 30), 32)
    calls = []
    plain = Target.features
    monkeypatch.setattr(Target, "features", lambda self, *a: (calls.append(a[0].shape), plain(self, *a))[1])
    kept, anew = source(target, rows, keep="host"), source(target, rows)
    first = [kept.batch([0, 1]), kept.batch([1, 0])]
    assert len(calls) == 1
    second = [anew.batch([0, 1]), anew.batch([1, 0])]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.aux, b.aux)
        torch.testing.assert_close(a.final, b.final)
        assert torch.equal(a.ids, b.ids) and torch.equal(a.documents, b.documents)


class Rank(Group):
    """One of two processes, run one after the other: the second sums what both say."""

    size = 2

    def __init__(self, rank, heard):
        self.rank, self.heard, self.at = rank, heard, 0

    def reduce(self, tensor, op="sum"):
        if self.rank == 0:
            self.heard.append(tensor.clone())
            return tensor
        other = self.heard[self.at]
        self.at += 1
        return torch.maximum(tensor, other) if op == "max" else tensor + other


def test_validation_counts_every_row_once_however_many_processes_share_them(target):
    rows = pack(documents(9, 17, 30, 21, 12), 32)
    draft, heard = draft_for(target).eval(), []
    alone = evaluate(draft, target.heads(), source(target, rows), 2)
    evaluate(draft, target.heads(), source(target, rows), 1, Rank(0, heard))
    shared = evaluate(draft, target.heads(), source(target, rows), 1, Rank(1, heard))
    assert shared.loss == pytest.approx(alone.loss, rel=1e-5) and shared.rates == pytest.approx(alone.rates)
    with pytest.raises(UsageError, match="cannot be shared by 2"):
        DraftTraining(draft, target.heads(), source(target, rows), TrainingOptions(steps=1), batch=3, group=Rank(0, []))


def test_expected_acceptance_counts_the_bonus():
    from angelslim_specdec.training.trainer import Accuracy

    assert Accuracy.of(0.0, [8, 4, 0], [10, 8, 0]).expected == pytest.approx(1 + 0.8 + 0.4)


def plan(target, rows, **options):
    draft = draft_for(target)
    settings = TrainingOptions(steps=options.pop("steps", 12), lr=options.pop("lr", 0.01), seed=5)
    return Plan(draft, target.heads(), source(target, rows, keep="host"), options.pop("held", None), settings, 2, [], {"data": "x"}, **options)


def test_a_killed_training_ends_as_one_that_ran_through(target, tmp_path):
    rows = pack(documents(9, 17, 30, 21, 12), 32)
    whole = train(plan(target, rows, every=4), None, tmp_path / "whole")
    count = iter(range(100))
    with pytest.raises(StoppedError):  # a state is kept at 4, and at 7, where it is stopped
        train(plan(target, rows, every=4), None, tmp_path / "out", stop_requested=lambda: next(count) == 6)
    assert not (tmp_path / "out").exists()
    shutil.copytree(tmp_path / ".out.angelslim", tmp_path / ".killed.angelslim")
    shutil.rmtree(tmp_path / ".killed.angelslim/states/step-00000007")
    with pytest.raises(RecipeError, match="unfinished run with another steps"):
        train(plan(target, rows, every=4, steps=13), None, tmp_path / "out")
    again = train(plan(target, rows, every=4), None, tmp_path / "out")
    train(plan(target, rows, every=4), None, tmp_path / "killed")  # without any state it begins anew
    assert again["steps"] == whole["steps"] == 12 and again["training"]["loss"] > 0
    ends = [load_draft(tmp_path / name).state_dict() for name in ("whole", "out", "killed")]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]) and torch.equal(tensor, ends[2][name]), name
    assert not list(tmp_path.glob(".*"))


def test_it_learns_and_says_how_well_on_rows_it_never_saw(target, tmp_path):
    rows, held = pack(documents(*[16] * 12), 32), pack(documents(*[16] * 4, seed=9), 32)
    made = plan(target, rows, steps=60, lr=0.1, held=source(target, held), every=30, export_every=30)
    before = evaluate(made.draft.eval(), target.heads(), source(target, held), 1)
    found = train(made, None, tmp_path / "d")
    record = json.loads((tmp_path / "d/training.json").read_text())
    assert [e["step"] for e in record["history"]] == [30, 60] and record["validation"] == found["validation"]
    assert found["training"]["loss"] < before.loss / 2 and found["training"]["accuracy"][0] > 0.5
    assert found["validation"]["loss"] > 2 * found["training"]["loss"] and found["tokens_per_second"] > 0  # what it never saw is random
    early, last = load_draft(tmp_path / "d.step-30"), load_draft(tmp_path / "d", target.shape)
    assert not torch.equal(early.first.weight, last.first.weight) and torch.equal(last.first.weight, load_draft(tmp_path / "d.step-60").first.weight)


def test_exports_and_looks_come_each_in_their_own_time(target, tmp_path):
    rows = pack(documents(*[16] * 6), 32)
    train(plan(target, rows, steps=13, every=4, export_every=3), None, tmp_path / "d")
    assert {p.name for p in tmp_path.glob("d.step-*")} == {f"d.step-{n}" for n in (3, 6, 9, 12)}
    assert [e["step"] for e in json.loads((tmp_path / "d/training.json").read_text())["history"]] == [4, 8, 12, 13]


def test_an_answer_without_a_question_is_no_prompt_to_decode(target, monkeypatch):
    from angelslim_specdec.training import prepare as module

    spoken = [Document([5, 6, 7, 8], [True] * 4), Document([5, 6, 7, 8], [False, True, True, True])]

    class Rendered:
        template = ""

        def documents(self, conversations, turns):
            return spoken

    found = module.prepare([], Rendered(), 16)
    assert found.documents == 2 and found.prompts == [[5]]


def test_processes_share_the_memory_of_their_machine(target, monkeypatch):
    from angelslim_specdec.training import features

    rows = pack(documents(*[16] * 4), 32)
    nbytes = 64 * 8 * 4
    monkeypatch.setattr(features, "free_ram_bytes", lambda: 5 * nbytes)
    where = [features.where_to_keep(rows, 8, torch.float32, torch.device("cpu"), n) for n in (1, 2, 3)]
    assert where == [("host", nbytes), ("host", nbytes), ("nowhere", nbytes)]


def test_a_selection_is_of_answers_only_and_keeps_what_ends_them(target, tmp_path):
    rows = pack([Document([9, 9, 9, 20, 21, 20, 22], [False] * 3 + [True] * 4)] * 3, 64)
    found = select(rows, target, 5)
    assert found.ids.tolist() == [0, 1, 2, 20, 21] and coverage_of(found, rows) == pytest.approx(0.75)
    write_selection(found, tmp_path / "v.safetensors")
    assert torch.equal(read_selection(tmp_path / "v.safetensors", 256).ids, found.ids)
    with pytest.raises(ModelError, match="t2d"):
        read_selection(tmp_path / "v.safetensors", 257)
    assert isinstance(found, Vocabulary)


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [("what is it", "a thing of things"), ("why so", "because it was and is"), ("who", "nobody knows for sure")]
    rows = [{"id": str(i), "conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for i, (q, a) in enumerate(turns * 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cli(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["specdec", *map(str, arguments)])
    return ended.value.code


def test_the_command(tiny, chats, tmp_path, capsys):
    common = ("--model", tiny(dtype="float32"), "--data", chats, "--device", "cpu")
    assert cli("vocab", *common[:4], "--size", 40, "--out", tmp_path / "v", "--json") == 0
    assert json.loads(capsys.readouterr().out)["coverage"] > 0.9
    arguments = ("train", *common, "--draft", "guess", "--steps", 6, "--validation", 0.34, "--json")
    assert cli(*arguments, "--draft-vocab", 40, "--out", tmp_path / "a") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 6 and found["vocabulary_coverage"] > 0.9 and found["conversations"] == 6 and "validation" in found and found["features"] == "host"
    assert cli(*arguments, "--vocab", tmp_path / "v", "--out", tmp_path / "b") == 0
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["draft_vocab_size"] == 40 and config["architectures"] == ["GuessDraft"] and config["vocab_size"] == 256
    d2t = load_draft(tmp_path / "a").d2t
    assert torch.equal(torch.arange(40) + d2t, load_draft(tmp_path / "b").t2d.nonzero()[:, 0]) or len(d2t) == 40
    capsys.readouterr()
    assert cli(*arguments[:-1], "--draft-vocab", 40, "--out", tmp_path / "c") == 0
    assert "held out: loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "code", "what"),
    [
        ({"--draft": "nothing"}, 2, "is no draft model"), ({"--set": "speed=3"}, 2, "knows no option speed"), ({"--set": "speed"}, 2, "KEY=VALUE"),
        ({"--draft-vocab": "300"}, 2, "the target has 256"), ({"--features": "x"}, 2, "exclude each other"), ({"--length": "8"}, 3, "no answer of 6"),
        ({"--data": None, "--features": "x", "--length": "64"}, 2, "is of --data"), ({"--data": None, "--features": "x", "--turns": "joined"}, 2, "is of --data"),
        ({"--vocab": "nowhere"}, 5, "is no file"), ({"--data": "nowhere"}, 3, "does not exist"),
    ],
    ids=lambda v: str(v),
)  # fmt: skip
def test_wrong_arguments_end_it_before_work_starts(tiny, chats, tmp_path, capsys, changes, code, what):
    given = {"--model": str(tiny(dtype="float32")), "--data": str(chats), "--draft": "guess", "--out": str(tmp_path / "o"), "--steps": "2", "--device": "cpu"}
    assert cli("train", *(word for pair in (given | changes).items() if pair[1] is not None for word in pair)) == code
    assert what in capsys.readouterr().err and not (tmp_path / "o").exists() and not (tmp_path / ".o.angelslim").exists()


def test_a_file_without_answers_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    assert cli("train", "--model", tiny(dtype="float32"), "--data", tmp_path / "p.jsonl", "--draft", "guess", "--out", tmp_path / "o") == 3
    assert "holds an assistant turn" in capsys.readouterr().err
