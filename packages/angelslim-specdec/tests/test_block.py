import math

import pytest
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from angelslim_core.errors import UsageError
from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.drafts import block_loss
from angelslim_specdec.drafts.base import Batch, Heads, TargetShape
from angelslim_specdec.drafts.block import feature_layers
from angelslim_specdec.drafts.block_mask import Sight, attention, choose_anchors
from angelslim_specdec.drafts.dflare import DFlare
from angelslim_specdec.drafts.dflash import DFlash
from angelslim_specdec.drafts.dfly import DFly
from angelslim_specdec.drafts.dspark import DSpark

V, H, L = 50, 32, 8
SHAPE = TargetShape(H, 48, L, 4, 2, 8, V, 1e-6, {"rope_type": "default", "rope_theta": 10000.0}, 256)
HEADS = Heads(torch.randn(V, H, generator=torch.Generator().manual_seed(1)), torch.randn(V, H, generator=torch.Generator().manual_seed(2)))
ALL = [DFlash, DFlare, DFly, DSpark]


def made(draft, seed=0, vocabulary=None, **options):
    """A draft all of whose weights matter."""
    torch.manual_seed(seed)
    out = draft.from_target(SHAPE, draft_vocab_size=vocabulary, **{"num_hidden_layers": 2, "block_size": 4, "mask_token_id": 3, **options})
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        if vocabulary:
            kept = torch.randperm(V)[:vocabulary].sort().values
            out.d2t.copy_(kept - torch.arange(vocabulary))
            out.t2d.zero_()[kept] = True
    return out


def text(draft, documents, seed=0, loss=None):
    """A batch of rows given by documents' lengths; -1 is padding."""
    torch.manual_seed(seed)
    number = [[n if size > 0 else -1 for n, size in enumerate(row) for _ in range(abs(size))] for row in documents]
    places = [[i for size in row for i in range(abs(size))] for row in documents]
    documents, positions = torch.tensor(number), torch.tensor(places)
    shape = documents.shape
    n = len(draft.config.aux_hidden_state_layer_ids)
    mask = (documents >= 0) if loss is None else torch.tensor(loss) & (documents >= 0)
    return Batch(torch.randint(V, shape), mask, documents, positions, torch.randn(*shape, n * H), torch.randn(*shape, H))


def total(loss):
    return (loss.weights * loss.sums / loss.counts).sum()


def test_anchors_are_of_answers_with_room_in_their_document():
    draft = made(DFlash)
    loss = torch.rand(2, 24, generator=torch.Generator().manual_seed(3)) < 0.8
    batch = text(draft, [[10, 9, -5], [24]], loss=loss.tolist())
    for room in (1, 3):
        anchors, kept = choose_anchors(batch, 100, room)
        assert anchors.shape == (2, 24)
        for row in range(2):
            want = [
                t for t in range(24 - room)
                if batch.loss_mask[row, t] and batch.loss_mask[row, t + 1] and batch.documents[row, t] == batch.documents[row, t + room] >= 0
            ]  # fmt: skip
            assert anchors[row][kept[row]].tolist() == want
            assert not kept[row, len(want) :].any()
    anchors, kept = choose_anchors(batch, 4, 1)
    assert anchors.shape == (2, 4) and kept.all() and (anchors.diff() > 0).all()
    assert not choose_anchors(batch, 4, 24)[1].any()


def test_flex_attention_and_the_dense_mask_see_what_the_rule_says():
    documents = torch.tensor([[0] * 7 + [1] * 6, [0] * 10 + [-1] * 3])
    sight = Sight(torch.tensor([[2, 5, 9], [4, 6, 12]]), torch.tensor([[True] * 3, [True, True, False]]), documents, 4)
    dense = sight.dense()
    for b in range(2):
        for row in range(12):
            anchor = sight.anchors[b, row // 4]
            want = [j for j in range(13) if j < anchor and documents[b, j] == documents[b, anchor]] + [13 + row // 4 * 4 + i for i in range(4)]
            assert dense[b, row].nonzero()[:, 0].tolist() == (want if sight.kept[b, row // 4] else [])
    q, k, v = (torch.randn(2, heads, size, 16) for heads, size in ((4, 12), (2, 25), (2, 25)))
    by_flex = flex_attention(q, k, v, block_mask=sight.flex(), enable_gqa=True)
    torch.testing.assert_close(attention(sight)(q, k, v), by_flex)
    assert (by_flex[1, :, 8:] == 0).all(), "rows of blocks that are not kept see nothing"


@pytest.mark.parametrize("draft", ALL)
def test_a_block_sees_only_what_comes_before_it(draft):
    draft = made(draft)
    batch = text(draft, [[20]])
    sight = Sight(torch.tensor([[6, 9]]), torch.ones(1, 2, dtype=torch.bool), batch.documents, 4)
    before = draft._train_hidden(batch, HEADS, sight)
    for at, first, second in ((5, True, True), (6, False, True), (8, False, True), (9, False, False)):
        aux = batch.aux.clone()
        aux[:, at] += 1
        after = draft._train_hidden(Batch(batch.ids, batch.loss_mask, batch.documents, batch.positions, aux, batch.final), HEADS, sight)
        assert [not torch.equal(before[0, i], after[0, i]) for i in range(2)] == [first, second], at
    ids = batch.ids.clone()
    ids[0, 9] = (ids[0, 9] + 1) % V
    after = draft._train_hidden(Batch(ids, batch.loss_mask, batch.documents, batch.positions, batch.aux, batch.final), HEADS, sight)
    assert torch.equal(before[0, 0], after[0, 0]) and not torch.equal(before[0, 1], after[0, 1])
    assert (before[0, 1] != after[0, 1]).any(-1).all(), "rows of a block see each other both ways"


def feed(drafter, batch, ends, parts, k=3):
    """Observe each row up to its end, in parts of ragged length with anything for padding, proposing in between."""
    drafter.start(batch.ids, torch.tensor(ends), max(ends) + 8, Warp())
    seen = [0] * len(ends)
    for part in range(parts):
        counts = [end // parts if part < parts - 1 else end - at for end, at in zip(ends, seen)]
        width = max(counts) + 2
        tokens, aux = torch.randint(V, (len(ends), width)), torch.randn(len(ends), width, batch.aux.shape[-1])
        for row, (at, count) in enumerate(zip(seen, counts)):
            tokens[row, :count], aux[row, :count] = batch.ids[row, at + 1 : at + count + 1], batch.aux[row, at : at + count]
        drafter.observe(tokens, aux, torch.tensor(counts))
        seen = [at + count for at, count in zip(seen, counts)]
        proposal = drafter.propose(k)
    return proposal


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("vocabulary", [None, 20])
@pytest.mark.parametrize("draft", ALL)
@torch.no_grad()
def test_decoding_computes_what_training_does(draft, vocabulary, anchored):
    draft = made(draft, vocabulary=vocabulary, sample_from_anchor=anchored).double()
    heads = Heads(HEADS.embedding.double(), HEADS.head.double())
    batch = text(draft, [[20], [20], [20]])
    batch.aux = batch.aux.double()
    ends, k = [11, 4, 7], 4 if anchored else 3
    drafter = draft.drafter(heads)
    proposal = feed(drafter, batch, ends, 3, k)
    hidden = drafter._hidden()
    # blocks of others stand beside each one in training
    sight = Sight(torch.tensor([[3, end, 15] for end in ends]), torch.ones(3, 3, dtype=torch.bool), batch.documents, 4)
    trained = draft._train_hidden(batch, heads, sight)[:, 1]
    torch.testing.assert_close(hidden, trained)
    before = torch.cat((batch.ids[torch.arange(3), ends][:, None], proposal.tokens[:, :-1]), 1)
    slots = trained[:, -k:]
    if draft.corrects:
        slots = draft.corrected(slots, heads.embed(before))
    logits = slots @ draft.head(heads).T + (draft.bias(before) if draft.biases else 0)
    best = logits.argmax(-1)
    assert torch.equal(proposal.tokens, best if vocabulary is None else best + draft.d2t[best])
    if draft.confidence(slots, before) is None:
        torch.testing.assert_close(proposal.confidence, logits.float().softmax(-1).amax(-1))
    else:
        torch.testing.assert_close(proposal.confidence, draft.confidence(trained[:, -k:], before).float().sigmoid())
    assert proposal.q is None and proposal.columns is None
    assert torch.equal(drafter.propose(2).tokens, proposal.tokens[:, :2]), "a shorter proposal is the longer one's start"


@pytest.mark.parametrize("draft", ALL)
def test_samples_are_drawn_from_the_q_that_is_told(draft):
    draft = made(draft, vocabulary=12)
    batch = text(draft, [[20]] * 2)
    drafter = draft.drafter(HEADS)
    feed(drafter, batch, [9, 6], 2)
    drafter.warp = Warp(temperature=1.3, top_k=5)
    drafter.keep(torch.zeros(4000, dtype=torch.int64))
    proposal = drafter.propose(3, torch.rand(4000, 3))
    drawn = (proposal.tokens[..., None] == proposal.columns).int().argmax(-1)
    assert (proposal.columns[drawn] == proposal.tokens).all() and (proposal.q.gather(-1, drawn[..., None]) > 0).all()
    torch.testing.assert_close(proposal.q.sum(-1), torch.ones(4000, 3))
    assert ((proposal.q > 0).sum(-1) == 5).all()
    for slot in range(3):  # of DFly and DSpark, later slots' q are of what was drawn before
        expected = proposal.q[:, slot].sum(0)
        seen = torch.bincount(drawn[:, slot], minlength=12)
        assert ((seen - expected).square() / expected).nan_to_num().sum() < 40
    assert draft.corrects or draft.biases or torch.equal(proposal.q[0], proposal.q[1])


def test_memory_stays_where_it_is():
    draft = made(DSpark)
    batch = text(draft, [[20]] * 2)
    drafter = draft.drafter(HEADS)
    first = feed(drafter, batch, [9, 6], 3)
    places = [held.data_ptr() for held in (drafter.keys, drafter.values, drafter.lengths, drafter.last)]
    again = feed(drafter, batch, [9, 6], 2)
    assert places == [held.data_ptr() for held in (drafter.keys, drafter.values, drafter.lengths, drafter.last)]
    assert torch.equal(first.tokens, again.tokens)
    drafter.keep(torch.tensor([1]))
    assert torch.equal(drafter.propose(3).tokens, first.tokens[1:])
    drafter.observe(torch.zeros(1, 2, dtype=torch.int64), torch.randn(1, 2, batch.aux.shape[-1]), torch.tensor([0]))
    assert torch.equal(drafter.propose(3).tokens, first.tokens[1:]), "a row that gained nothing stays as it was"


def same_weights(into, source):
    into.load_state_dict(source.state_dict(), strict=False)
    return into


def test_dfly_begins_as_dflash_with_fusion():
    dfly = DFly.from_target(SHAPE, num_hidden_layers=2, block_size=4)
    aux = torch.randn(2, 5, 5 * H)
    mean = aux.unflatten(-1, (5, H)).mean(-2)
    for layer in range(2):
        torch.testing.assert_close(dfly.contexts(aux)[layer], dfly.hidden_norm(dfly.fc(aux) + mean))
    hidden = torch.randn(3, H)
    assert torch.equal(dfly.corrected(hidden, torch.randn(3, H)), hidden)
    torch.manual_seed(0)
    dfly.hidden_correction.down_proj.weight.data.normal_()
    assert not torch.equal(dfly.corrected(hidden, torch.randn(3, H)), hidden)


def test_dflare_with_one_hot_weights_is_dflash_of_one_layer():
    dflash = made(DFlash)
    dflare = same_weights(made(DFlare, seed=1, num_hidden_layers=2), dflash)
    n = len(dflare.config.aux_hidden_state_layer_ids)
    with torch.no_grad():
        dflare.layer_fusion_weights.copy_(torch.eye(n)[2] * 1e4)
        for layer in dflare.layers:
            layer.self_attn.k_proj_target.weight.copy_(layer.self_attn.k_proj.weight)
            layer.self_attn.v_proj_target.weight.copy_(layer.self_attn.v_proj.weight)
        dflash.fc.weight.zero_()[:, 2 * H : 3 * H] = torch.eye(H)
    batch = text(dflash, [[20]])
    sight = Sight(torch.tensor([[6, 9]]), torch.ones(1, 2, dtype=torch.bool), batch.documents, 4)
    assert n == len(dflash.config.aux_hidden_state_layer_ids) == 5
    torch.testing.assert_close(dflare._train_hidden(batch, HEADS, sight), dflash._train_hidden(batch, HEADS, sight))


@pytest.mark.parametrize("anchored", [False, True])
def test_dspark_without_bias_is_dflash(anchored):
    dspark = made(DSpark, sample_from_anchor=anchored)
    dspark.markov_head.markov_w2.weight.data.zero_()
    dflash = same_weights(made(DFlash, seed=1, sample_from_anchor=anchored), dspark)
    batch = text(dflash, [[20]] * 2)
    k = 4 if anchored else 3
    proposals = [feed(draft.drafter(HEADS), batch, [9, 6], 2, k) for draft in (dspark, dflash)]
    assert torch.equal(proposals[0].tokens, proposals[1].tokens) and proposals[0].tokens.shape == (2, k)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("vocabulary", [None, 30])
def test_the_loss_is_weighted_cross_entropy_of_the_next_tokens(vocabulary, anchored):
    draft = made(DFlash, vocabulary=vocabulary, sample_from_anchor=anchored, gamma=2.0)
    batch = text(draft, [[20]], loss=[[False] * 4 + [True] * 10 + [False] * 2 + [True] * 4])
    loss = draft.train_loss(batch, HEADS)
    k = 4 if anchored else 3
    sums, count, hits, asked = [0.0] * k, 0.0, [0] * k, [0] * k
    for anchor in range(4, 20 - k):
        if not (batch.loss_mask[0, anchor] and batch.loss_mask[0, anchor + 1]):
            continue
        hidden = draft._train_hidden(batch, HEADS, Sight(torch.tensor([[anchor]]), torch.ones(1, 1, dtype=torch.bool), batch.documents, 4))[0, 0, -k:]
        for slot in range(k):
            if not batch.loss_mask[0, anchor + 1 : anchor + slot + 2].all():
                break
            label, asked[slot] = int(batch.ids[0, anchor + slot + 1]), asked[slot] + 1
            if vocabulary and not draft.t2d[label]:
                continue
            log_q = (hidden[slot] @ draft.head(HEADS).T).log_softmax(-1)
            label = label if vocabulary is None else int((draft.d2t + torch.arange(vocabulary) == label).nonzero())
            sums[slot] += math.exp(-slot / 2) * -float(log_q[label])
            count += math.exp(-slot / 2)
            hits[slot] += int(log_q.argmax() == label)
    torch.testing.assert_close(loss.sums, torch.tensor(sums))
    torch.testing.assert_close(loss.counts, torch.tensor([count] * k))
    assert loss.hits.tolist() == hits and loss.asked.tolist() == asked


@pytest.mark.parametrize("kind", ["kl", "tv", "lk_alpha", "lk_hybrid", "ce_tv", "e2e_tv"])
@pytest.mark.parametrize("vocabulary", [None, 30])
def test_losses_that_look_at_the_target(kind, vocabulary):
    draft = made(DFlash, vocabulary=vocabulary, loss=kind, weighting="dpace")
    batch = text(draft, [[20]], loss=[[False] * 4 + [True] * 9 + [False] * 7])
    batch.final = batch.final * 0.3
    draft.train()
    loss = draft.train_loss(batch, HEADS)
    sums, count = 0.0, 0.0
    kept = torch.arange(V) if vocabulary is None else draft.d2t + torch.arange(vocabulary)
    for anchor in range(4, 12):
        hidden = draft._train_hidden(batch, HEADS, Sight(torch.tensor([[anchor]]), torch.ones(1, 1, dtype=torch.bool), batch.documents, 4))[0, 0, -3:]
        q = (hidden @ HEADS.head[kept].T).softmax(-1)
        p = (batch.final[0, anchor : anchor + 3] @ HEADS.head.T).softmax(-1)[:, kept]
        P, alpha = p / p.sum(-1, keepdim=True), torch.minimum(p, q).sum(-1)
        alive = [anchor + s + 1 < 13 for s in range(3)]
        if kind == "e2e_tv":
            reached = torch.tensor([float(a) if on else 1.0 for a, on in zip(alpha, alive)]).cumprod(0)
            sums, count = sums + float(1 - reached.mean()), count + 1
            continue
        labels = [kept.tolist().index(i) if i in kept else None for i in batch.ids[0, anchor + 1 : anchor + 4].tolist()]
        chance = torch.tensor([0.5 if i is None else 0.5 + 0.5 * float(q[s, i]) for s, i in enumerate(labels)]).cumprod(0) * torch.tensor(alive)
        kl, cross = (P * (P / q).log()).sum(-1), torch.tensor([0.0 if i is None else -math.log(q[s, i]) for s, i in enumerate(labels)])
        share = (-3 * alpha).exp()
        each = {
            "kl": kl,
            "tv": 1 - alpha,
            "lk_alpha": -alpha.log(),
            "lk_hybrid": share * kl + (1 - share) * (1 - alpha),
            "ce_tv": 0.1 * cross + 1.8 * (1 - alpha),
        }[kind]
        for slot in range(3):
            if alive[slot] and (labels[slot] is not None or kind in ("tv", "ce_tv")):
                weight = float(chance[slot:].sum())
                sums, count = sums + weight * float(each[slot]), count + weight
    torch.testing.assert_close(total(loss), torch.tensor(sums / count))
    total(loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in draft.parameters())


@pytest.mark.parametrize("draft", ALL)
def test_packed_padded_and_single_texts_give_one_loss(draft):
    draft = made(draft, vocabulary=30, loss="kl")
    packed = text(draft, [[9, 12, -3]])

    def cut(start, stop, pad):
        def of(x, value=0):
            shape = [x.shape[0], pad, *x.shape[2:]]
            return torch.cat((x[:, start:stop], torch.full(shape, value, dtype=x.dtype)), 1)

        documents = of(torch.zeros_like(packed.documents), -1)
        return Batch(of(packed.ids), of(packed.loss_mask, False), documents, of(packed.positions), of(packed.aux, 1), of(packed.final, 1))

    whole = draft.train_loss(packed, HEADS)
    parts = [draft.train_loss(cut(0, 9, 4), HEADS), draft.train_loss(cut(9, 21, 0), HEADS)]
    torch.testing.assert_close(whole.sums, parts[0].sums + parts[1].sums)
    torch.testing.assert_close(whole.counts, parts[0].counts + parts[1].counts)
    assert torch.equal(whole.asked, parts[0].asked + parts[1].asked) and whole.asked[0] > 0


@pytest.mark.parametrize("draft", ALL)
def test_pieces_change_nothing(draft, monkeypatch):
    draft = made(draft, loss="lk_hybrid")
    batch = text(draft, [[20], [12, -8]])
    found = []
    for piece in (1 << 26, 7 * V):
        monkeypatch.setattr(block_loss, "PIECE", piece)
        draft.zero_grad()
        loss = total(draft.train_loss(batch, HEADS))
        loss.backward()
        found.append([loss, *(p.grad for p in draft.parameters())])
    torch.testing.assert_close(*found)
    assert all(grad.abs().sum() > 0 for grad in found[0][1:])


def test_nothing_to_learn_is_no_nan():
    draft = made(DSpark)
    loss = draft.train_loss(text(draft, [[2, -8]]), HEADS)
    assert (loss.sums == 0).all() and (loss.counts == 0).all() and (loss.asked == 0).all()
    loss.sums.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in draft.parameters())


@pytest.mark.parametrize("draft", ALL)
def test_a_text_is_learned(draft):
    torch.manual_seed(0)
    draft = draft.from_target(SHAPE, num_hidden_layers=2, block_size=4, mask_token_id=3, draft_vocab_size=None)
    batch = text(draft, [[24]] * 4)
    batch.final = 20 * functional.normalize(functional.pad(HEADS.head[batch.ids[:, 1:]], (0, 0, 0, 1)), dim=-1)  # the target is sure of the text
    optimizer = torch.optim.AdamW(draft.parameters(), 6e-3, weight_decay=0.0)
    for _ in range(80):
        loss = draft.train_loss(batch, HEADS)
        total(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (loss.hits / loss.asked).min() > 0.9, (loss.hits, loss.asked)
    k = draft.config.num_tokens
    proposal = feed(draft.drafter(HEADS), batch, [15, 9, 12, 5], 2, k)
    assert (proposal.tokens == torch.stack([batch.ids[row, end + 1 : end + 1 + k] for row, end in enumerate([15, 9, 12, 5])])).float().mean() > 0.9
    assert proposal.confidence.mean() > 0.5


def test_layers_to_read():
    assert feature_layers(36, 5) == (1, 9, 17, 25, 33)
    assert feature_layers(80, 5) == (1, 20, 39, 58, 77)
    assert feature_layers(36, 9) == (1, 5, 9, 13, 17, 21, 25, 29, 33)
    assert feature_layers(36, 1) == (18,)
    for layers in range(1, 12):
        ids = feature_layers(layers, 5)
        assert len(set(ids)) == len(ids) and 0 <= min(ids) <= max(ids) < layers


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 16}, {"mask_token_id": V}, {"block_size": 1}, {"loss": "mse"}, {"aux_hidden_state_layer_ids": (1, L)}, {"draft_vocab_size": V + 1},
        {"aux_hidden_state_layer_ids": (1, 1)}, {"no_such_option": 1}, {"num_attention_heads": 3},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(UsageError, match="dflash"):
        DFlash.from_target(SHAPE, **options)
