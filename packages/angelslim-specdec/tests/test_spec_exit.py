"""SpecExit: nothing changes while signals do not pass; where they do the thought ends at its paragraph, and what follows is the target's own."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from angelslim_core.cli.main import main
from angelslim_core.errors import UsageError
from angelslim_specdec import SpecExit, Target, Warp, generate
from angelslim_specdec.drafters.autoregressive import Autoregressive, Tree
from angelslim_specdec.drafters.base import Proposal
from angelslim_specdec.drafts.base import Batch, Heads, TargetShape
from angelslim_specdec.drafts.eagle3 import Eagle3
from angelslim_specdec.drafts.exit_signals import SIGNALS, labels, losses
from angelslim_specdec.engine import Engine
from angelslim_specdec.folder import load_draft, save_draft
from angelslim_specdec.spec_exit import Exits, Marks, exits_of, marks_of

OPENS, CLOSES = 3, 4
PASSED = SpecExit(confidence=0.4, progress=0.4, remain=2)  # an untrained draft says .5, .5 and 1


def tokenizer_with(splits, think=True):
    names = {OPENS: "<think>", CLOSES: "</think>"} if think else {}
    names |= {i: "." * n + "ĊĊ" for n, i in enumerate(splits)}
    vocab = {names.get(i, f"t{i}"): i for i in range(256)}
    vocab |= {"<pad>": 0, "<s>": 1, "</s>": 2}
    made = Tokenizer(models.BPE(vocab={t: i for t, i in vocab.items() if t not in ("t0", "t1", "t2")}, merges=[]))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny("llama", dtype="float32"), dtype=torch.float32).eval()


def ids_of(*shape, seed=0):
    return torch.randint(5, 256, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def following(model, ids, count):
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def by_hand(model, prompt, new, splits, opens=OPENS):
    """Plain greedy tokens, one at a time; a paragraph of a thought that ends is followed by what closes the thought."""
    ids, cuts = list(prompt), 0
    marks = [t for t in ids if t in (opens, CLOSES)]
    thinks = bool(marks) and marks[-1] == opens
    while len(ids) < len(prompt) + new:
        came = following(model, ids, 1)[-1]
        ids.append(came)
        thinks = came == opens or (thinks and came != CLOSES)
        if thinks and came in splits and len(prompt) + 1 < len(ids) < len(prompt) + new:
            ids.append(CLOSES)
            thinks, cuts = False, cuts + 1
    return ids[len(prompt) :], cuts


def draft_of(model, signals=SIGNALS, **options):
    torch.manual_seed(0)
    return Eagle3.from_target(Target(model).shape, draft_vocab_size=256, exit_signals=signals, **options).eval()


class Sure(Autoregressive):
    """Proposes what the target will say."""

    def __init__(self, model, draft, heads):
        super().__init__(draft, heads)
        self.model = model

    def start(self, prompts, lengths, capacity, warp):
        super().start(prompts, lengths, capacity, warp)
        self.texts = [ids[:n] for ids, n in zip(prompts.tolist(), lengths.tolist())]

    def observe(self, tokens, aux, counts):
        super().observe(tokens, aux, counts)
        for text, new, count in zip(self.texts, tokens.tolist(), counts.tolist()):
            text += new[:count]

    def propose(self, k, uniforms=None):
        return Proposal(torch.tensor([following(self.model, text, k)[-k:] for text in self.texts]))


@pytest.fixture(scope="module")
def case(model):
    """Prompts that are padded on the left, the last of which opens no thought; and which tokens end paragraphs."""
    ids = ids_of(4, 6, seed=2)
    ids[0, 2], ids[1, 4], ids[2, 1], ids[2, 3], ids[3, 1], ids[3, 2] = OPENS, OPENS, CLOSES, OPENS, OPENS, CLOSES
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    plain = [following(model, row[m.bool()].tolist(), 24)[int(m.sum()) :] for row, m in zip(ids, mask)]
    splits = [plain[0][5], plain[1][9]]  # neither said before by the row
    return ids, mask, splits, plain, [by_hand(model, row[m.bool()].tolist(), 24, splits) for row, m in zip(ids, mask)]


@pytest.mark.parametrize(("proposes", "static"), [("draft", False), ("tree", True), ("truth", False)])
def test_nothing_changes_where_signals_do_not_pass(model, case, proposes, static):
    ids, mask, splits, plain, _ = case
    target, draft = Target(model, tokenizer_with(splits)), draft_of(model)
    made = []
    for how in (None, SpecExit(), SpecExit(confidence=0.4, progress=0.4, remain=1), SpecExit(confidence=0.4, progress=0.5, remain=9)):
        drafter = Sure(model, draft, target.heads()) if proposes == "truth" else draft.drafter(target.heads())
        tree = Tree(3, 2, 5) if proposes == "tree" else None
        made.append(generate(target, ids, drafter, 24, k=3, tree=tree, attention_mask=mask, static=static, stop_ids=[], spec_exit=how).decoded)
    assert made[0].tokens == plain and made[0].lossless and made[0].exited is None
    for one in made[1:]:
        assert (one.tokens, one.rounds, one.accepted, one.by_position) == (plain, made[0].rounds, made[0].accepted, made[0].by_position)
        assert one.exited == 0 and not one.lossless


@pytest.mark.parametrize(
    ("proposes", "k", "static"),
    [("draft", 1, True), ("draft", 4, False), ("tree", 1, False), ("tree", 4, True), ("truth", 1, False), ("truth", 4, True), ("truth", 7, False)],
)
def test_where_they_pass_the_thought_ends_with_its_paragraph(model, case, proposes, k, static):
    ids, mask, splits, plain, want = case
    target, draft = Target(model, tokenizer_with(splits)), draft_of(model)
    drafter = Sure(model, draft, target.heads()) if proposes == "truth" else draft.drafter(target.heads())
    assert [cuts > 0 for _, cuts in want][::3] == [True, False] and want[0][0][:7] == [*plain[0][:6], CLOSES] and want[3][0] == plain[3]
    tree = Tree(k, 2, 5) if proposes == "tree" else None
    found = generate(target, ids, drafter, 24, k=k, tree=tree, attention_mask=mask, static=static, stop_ids=[], spec_exit=PASSED)
    assert found.decoded.tokens == [tokens for tokens, _ in want]
    assert found.decoded.exited == found.stats["exited"] == sum(cuts > 0 for _, cuts in want) and not found.stats["lossless"]
    if proposes == "truth":
        assert found.acceptance_length > 1 + k / 3


def test_the_draft_goes_on_from_what_was_kept(model, case):
    """After a cut its state is that of a draft that read the kept text afresh."""
    ids, _, splits, _, _ = case
    target, draft = Target(model, tokenizer_with(splits)), draft_of(model)
    drafter = Sure(model, draft, target.heads())
    exits = exits_of(PASSED, drafter, target, 1)
    decoded = Engine(target, drafter, 1, 40, k=5, exits=exits).decode(ids[:1], torch.tensor([6]), 24)
    assert exits.cuts.tolist() == [1]
    text = torch.tensor([[*ids[0].tolist(), *decoded.tokens[0]]])
    aux, _ = target.features(text[:, :-1], draft.config.aux_hidden_state_layer_ids)
    fresh = draft.drafter(target.heads())
    fresh.start(text[:, :-1], torch.tensor([text.shape[1] - 1]), 60, Warp())
    fresh.observe(text[:, 1:], aux, torch.tensor([text.shape[1] - 1]))
    torch.testing.assert_close(drafter._carried, fresh._carried, rtol=1e-4, atol=1e-4)


def test_a_thought_that_the_text_opens_is_ended_and_one_that_it_closes_is_not(model, case):
    ids, _, _, plain, _ = case
    fourth, eighth = plain[3][3], plain[3][7]
    for splits, opens in (([eighth], fourth), ([fourth], eighth)):
        marks = Marks(opens, CLOSES, tuple(splits))
        drafter = Sure(model, draft_of(model), Target(model).heads())
        exits = Exits(PASSED, drafter.draft.signals, SIGNALS, marks, 1, torch.device("cpu"))
        found = Engine(Target(model), drafter, 1, 40, k=5, exits=exits).decode(ids[3:], torch.tensor([6]), 20)
        want = by_hand(model, ids[3].tolist(), 20, splits, opens)
        assert found.tokens == [want[0]] and exits.cuts.tolist() == [want[1]]


def test_it_may_be_the_last_token_or_a_stop(model, case):
    ids, _, splits, plain, _ = case
    target = Target(model, tokenizer_with(splits))
    drafter = Sure(model, draft_of(model), target.heads())
    for new in (6, 7):
        tokens = generate(target, ids[:1], drafter, new, stop_ids=[], spec_exit=PASSED).decoded
        assert tokens.tokens == [[*plain[0][:6], CLOSES][:new]] and tokens.exited == (new > 6)
    for stop in (splits[0], CLOSES):
        found = generate(target, ids[:1], drafter, 24, stop_ids=[stop], spec_exit=PASSED).decoded
        assert found.tokens == [[*plain[0][:6], CLOSES][: 6 + (stop == CLOSES)]]


@pytest.mark.parametrize("smoothing", ["ewma", "mean", "window", "paragraph"])
def test_smoothing(smoothing):
    """Rounds of two rows by scripted signals, compared with sums by hand; a round's own value is the mean of its accepted rows."""
    generator = torch.Generator().manual_seed(0)
    scripted = iter([])
    exits = Exits(
        SpecExit(confidence=1.0, smoothing=smoothing), lambda aux: next(scripted), ("confidence", "remain"), Marks(3, 4, (9,)), 2, torch.device("cpu")
    )
    exits.start(torch.tensor([[3, 5], [5, 3]]), torch.tensor([2, 2]), torch.tensor([5, 5]))
    pasts: list[list[torch.Tensor]] = [[], []]
    seen = []
    smoothed, exits_smoothed = [], exits._smoothed
    exits._smoothed = lambda *given: smoothed.append(exits_smoothed(*given).clone()) or smoothed[-1]
    for number in range(30):
        signals = torch.rand(2, 4, 2, generator=generator)
        scripted = iter([signals])
        kept = torch.tensor([1 if number == 14 else 1 + number % 4, number % 3])
        emitted = torch.full((2, 4), 5)
        emitted[0, 0] = {14: 4, 15: 5, 16: 3}.get(number, 9 if number % 6 == 5 else 5)
        if number == 14:  # its thought ends, and two rounds later another begins
            pasts[0].clear()
        stays, ended = exits.cut(emitted, torch.zeros(2, 4, 1), kept, torch.zeros(2, dtype=torch.bool))
        assert stays.tolist() == kept.tolist() and not ended.any() and not exits.cuts.any()
        for row in range(2):
            if kept[row] and (row or number not in (14, 15)):
                pasts[row].append(signals[row, : kept[row]].mean(0))
                past = pasts[row]
                if smoothing == "ewma":
                    want = past[0]
                    for value in past[1:]:
                        want = 0.9 * want + 0.1 * value
                else:
                    want = torch.stack(past[-10:] if smoothing == "window" else past).mean(0)
                torch.testing.assert_close(smoothed[-1][row], want)
                seen.append(number)
            if smoothing == "paragraph" and 9 in emitted[row, : kept[row]]:
                pasts[row].clear()
    assert len(seen) > 35


def test_values_that_are_none():
    for wrong in ({"confidence": 2}, {"progress": -1}, {"remain": -1}, {"smoothing": "best"}, {"confidence": "much"}):
        with pytest.raises(UsageError, match="spec_exit") as caught:
            SpecExit(**wrong)
        assert caught.value.number == 784
    with pytest.raises(UsageError, match="no threshold"):
        SpecExit.of({"speed": 3})
    assert SpecExit.of({"remain": 9}) == SpecExit(remain=9)


def test_marks_and_what_cannot_exit(model):
    assert marks_of(tokenizer_with([9, 7, 8])) == Marks(OPENS, CLOSES, (7, 8, 9))
    ids, heads = ids_of(1, 4), Target(model).heads()
    drafter = draft_of(model).drafter(heads)
    for tokenizer, what in ((None, "no tokenizer"), (tokenizer_with([9], think=False), "no token </think>"), (tokenizer_with([]), "ends a paragraph")):
        with pytest.raises(UsageError, match=what) as caught:
            generate(Target(model, tokenizer), ids, drafter, 4, spec_exit=SpecExit())
        assert caught.value.number == 781
    for without in (draft_of(model, ()).drafter(heads), "ngram", None):
        with pytest.raises(UsageError, match="this drafter has no signals to end thoughts by") as caught:
            generate(Target(model, tokenizer_with([9])), ids, without, 4, spec_exit=SpecExit())
        assert caught.value.number == 780


# training ---------------------------------------------------------------------------------------------------------------

H, V, EOS = 16, 24, 2
TARGET = TargetShape(H, 24, 4, 2, 1, 8, V, 1e-6, {"rope_type": "default", "rope_theta": 1e4}, 64, special_ids=[1, EOS], thought_end_id=CLOSES)


def spoken(*parts):
    """One row of documents of (tokens of a prompt, tokens of an answer) turns."""
    ids, mask, documents, positions = [], [], [], []
    for number, turns in enumerate(parts):
        for asked, said in turns:
            ids += [*asked, *said]
            mask += [False] * len(asked) + [True] * len(said)
        size = len(ids) - len(documents)
        documents += [number] * size
        positions += range(size)
    generator = torch.Generator().manual_seed(1)
    aux, final = (torch.randn(1, len(ids), n * H, generator=generator) for n in (3, 1))
    heads = Heads(torch.randn(V, H, generator=generator), torch.randn(V, H, generator=generator))
    return Batch(*(torch.tensor([x]) for x in (ids, mask, documents, positions)), aux, final), heads


THOUGHT, SHORT = ([7, 8], [9, 10, 11, CLOSES, 12, 13, EOS]), ([7], [14, 15, 16, EOS])


def test_labels_are_what_the_text_says():
    """A thought with its answer, an answer without, one that was cut off, and a document that begins with an answer."""
    batch, heads = spoken([THOUGHT, SHORT, ([6], [17, 18, 19])], [([], [20, 21, EOS])], [([5], [9, CLOSES])])
    found = labels(batch, heads, CLOSES, [1, EOS])
    chances = heads.logits(batch.final)[0].softmax(-1)

    def sure(*tokens):
        return math.exp(sum(math.log(chances[t - 1, batch.ids[0, t]]) for t in tokens) / len(tokens))

    want = {  # row: remaining, length, confidence
        2: (2, 3, sure(6, 7, 8)), 3: (1, 3, sure(6, 7, 8)), 4: (0, 3, sure(6, 7, 8)),
        10: (2, 3, sure(11, 12, 13)), 11: (1, 3, sure(12, 13)), 12: (0, 3, sure(13)),
        18: (1, 2, sure(19, 20)), 19: (0, 2, sure(20)),
        22: (0, 1, math.nan),
    }  # fmt: skip
    assert found.rows.tolist() == list(want)
    assert found.remain.tolist() == [r for r, _, _ in want.values()]
    assert found.progress.tolist() == pytest.approx([(n - r) / n for r, n, _ in want.values()])
    assert found.confidence.tolist() == pytest.approx([c for _, _, c in want.values()], rel=1e-5, nan_ok=True)
    assert labels(batch, heads, CLOSES, [1, EOS], confidence=False).confidence.isnan().all()
    assert labels(spoken([([6], [17, 18, 19])])[0], heads, CLOSES, [EOS]).rows.tolist() == []


def test_terms_by_hand_and_beside_the_drafts_own():
    batch, heads = spoken([THOUGHT, SHORT])
    torch.manual_seed(3)
    draft = Eagle3.from_target(TARGET, draft_vocab_size=V, exit_signals="remain_confidence_progress", ttt_steps=2)
    assert draft.config.exit_signals == ("remain", "confidence", "progress") and draft.config.answer_end_ids == (1, EOS)
    assert not draft.fc.weight[H:].any() and draft.features(batch.aux).shape[-1] == H
    assert draft.signals(batch.aux[0, 0]).tolist() == [1, 0.5, 0.5]
    torch.nn.init.normal_(draft.fc.weight[H:].detach(), std=0.1)
    told, said = labels(batch, heads, CLOSES, [1, EOS]), draft.signals(batch.aux)[0]
    remain, confidence, progress = said[told.rows].unbind(-1)
    loss = draft.train_loss(batch, heads)
    want = [
        ((1 + remain).log() - (1 + told.remain).log()).square().sum(),
        -(told.confidence * confidence.log() + (1 - told.confidence) * (1 - confidence).log()).sum(), (progress - told.progress).square().sum(),
    ]  # fmt: skip
    torch.testing.assert_close(loss.sums[2:], torch.stack(want))
    assert loss.counts[2:].tolist() == [6, 6, 6] and len(loss.hits) == len(loss.asked) == 2 and len(loss.weights) == 5
    plain = Eagle3.from_target(TARGET, draft_vocab_size=V, ttt_steps=2)
    plain.load_state_dict({n: t[:H] if n == "fc.weight" else t for n, t in draft.state_dict().items()})
    alone = plain.train_loss(batch, heads)
    assert torch.equal(loss.sums[:2], alone.sums) and torch.equal(loss.hits, alone.hits)
    slopes = torch.autograd.grad(loss.sums[2:].sum(), list(draft.parameters()), allow_unused=True)
    assert sum(s is not None and bool(s.any()) for s in slopes) == 1  # fc's alone


def test_it_learns_what_features_tell():
    batch, heads = spoken(*[[THOUGHT, SHORT]] * 4)
    told = labels(batch, heads, CLOSES, [1, EOS])
    batch.aux[0, told.rows, 0], batch.aux[0, :, 1] = told.progress, 1.0
    draft = Eagle3.from_target(TARGET, draft_vocab_size=V, exit_signals=SIGNALS, ttt_steps=1)
    optimizer = torch.optim.Adam([draft.fc.weight], 0.05)
    for _ in range(150):
        sums, counts, _ = losses(batch.aux[0, told.rows] @ draft.fc.weight[H:].T, told, SIGNALS)
        (sums / counts).sum().backward()
        optimizer.step(), optimizer.zero_grad()
    said = draft.signals(batch.aux)[0, told.rows]
    assert (said[:, 1] - told.progress).abs().max() < 0.1 and (said[:, 2] - told.remain).abs().max() < 0.3
    assert (said[:, 0] - told.confidence).abs().mean() < 0.1


def cli(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["specdec", *map(str, arguments)])
    return ended.value.code


@pytest.fixture
def thinker(tiny_copy, tmp_path):
    """A model whose tokenizer knows thoughts, and conversations."""
    folder = tiny_copy("llama", dtype="float32", num_hidden_layers=4)
    path = folder / "tokenizer.json"
    made = json.loads(path.read_text())
    vocab = made["model"]["vocab"]
    for old, new in (("ñ", "<think>"), ("ò", "</think>"), ("ó", "ĊĊ")):
        vocab[new] = vocab.pop(old)
    path.write_text(json.dumps(made))
    chats = tmp_path / "chats.jsonl"
    turns = [("what is it", "a thing of things"), ("why so", "because it was and is"), ("who", "nobody knows")] * 2
    rows = [{"id": str(i), "conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for i, (q, a) in enumerate(turns)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, chats


def test_the_commands(thinker, tmp_path, capsys):
    folder, chats = thinker
    train = ("train", "--model", folder, "--data", chats, "--draft", "eagle3", "--steps", 2, "--set", "ttt_steps=2", "--device", "cpu", "--json")
    assert cli(*train, "--set", "exit_signals=[confidence, remain]", "--out", tmp_path / "d") == 3  # its template ends answers by no special token
    assert "nothing says how much of one was left" in capsys.readouterr().err and not (tmp_path / "d").exists()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        template.replace("{{ m['content'] }}\n", "{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}\n")
    )
    assert cli(*train, "--set", "exit_signals=[confidence, remain]", "--out", tmp_path / "d") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["training"]["accuracy"]) == 2
    draft = load_draft(tmp_path / "d")
    assert draft.config.exit_signals == ("confidence", "remain") and draft.fc.weight.shape[0] == 66 and draft.fc.weight[64:].any()
    assert draft.config.thought_end_id == json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["</think>"]
    decode = ("decode", "--model", folder, "--draft", tmp_path / "d", "--prompt", "x", "--max-new-tokens", 8)
    assert cli(*decode, "--json") == 0
    assert json.loads(capsys.readouterr().out)["lossless"] is True
    assert cli(*decode, "--spec-exit", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["lossless"] is False and said["exited"] == 0
    assert cli(*decode, "--spec-exit", "confidence=.1,smoothing=mean") == 0
    assert "NOT lossless" in capsys.readouterr().err
    for given, what in (("speed=3", "is no threshold"), ("confidence=3", "0 to 1"), ("fast", "KEY=VALUE")):
        assert cli(*decode, "--spec-exit", given) == 2
        assert what in capsys.readouterr().err
    assert cli("decode", "--model", folder, "--draft", "ngram", "--prompt", "x", "--spec-exit") == 2
    assert "this drafter has no signals" in capsys.readouterr().err


def test_engines_get_the_draft_without_them(model, tmp_path, tiny):
    from angelslim_core.io.checkpoint import Checkpoint
    from angelslim_specdec.export import export_draft

    draft = draft_of(model, aux_hidden_state_layer_ids=(0, 1))
    torch.nn.init.normal_(draft.fc.weight.detach())
    save_draft(draft, tmp_path / "d")
    for to in ("vllm", "speculators"):
        made = export_draft(tmp_path / "d", to, tmp_path / to, model=str(tiny("llama", dtype="float32")))
        assert any("confidence, progress, remain are left out" in line for line in made["warnings"])
        assert torch.equal(Checkpoint.open(tmp_path / to).read("fc.weight"), draft.fc.weight[:64])


@pytest.mark.parametrize("given", ["certainty", ["confidence", "confidence"], 3])
def test_signals_that_are_none(model, given):
    with pytest.raises(UsageError, match="exit_signals") as caught:
        draft_of(model, given)
    assert caught.value.number == 715
