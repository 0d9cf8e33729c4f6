import pytest
import torch

from angelslim_core.errors import UsageError
from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.drafts.base import Batch, Heads, TargetShape
from angelslim_specdec.drafts.eagle3 import Eagle3
from angelslim_specdec.vocabulary import Vocabulary

H, V = 32, 40
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TARGET = TargetShape(H, 48, 8, 4, 2, 8, V, 1e-6, ROPE, 128)
NORMS = [{}, {"norm_before_residual": True, "norm_before_fc": True}, {"fc_norm": True, "norm_output": True}]


def eagle(draft_vocab_size=12, seed=0, **options):
    torch.manual_seed(seed)
    draft = Eagle3.from_target(TARGET, draft_vocab_size=draft_vocab_size, **options)
    if draft_vocab_size < V:
        chosen = Vocabulary(torch.randperm(V)[:draft_vocab_size].sort().values, V)
        draft.d2t.copy_(chosen.d2t), draft.t2d.copy_(chosen.t2d)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.mul_(4) if "proj" in name else parameter.add_(0.2 * torch.randn_like(parameter))
    return draft


def case(documents=((0,) * 14 + (1,) * 8 + (-1,) * 2, (0,) * 24), seed=1):
    torch.manual_seed(seed)
    documents = torch.tensor(documents)
    shape = documents.shape
    positions = torch.zeros(shape, dtype=torch.int64)
    for t in range(1, shape[1]):
        positions[:, t] = torch.where(documents[:, t] == documents[:, t - 1], positions[:, t - 1] + 1, 0)
    mask = (torch.rand(shape) < 0.7) & (documents >= 0)
    batch = Batch(torch.randint(V, shape), mask, documents, positions, torch.randn(*shape, 3 * H), torch.randn(*shape, H))
    return batch, Heads(torch.randn(V, H), torch.randn(V, H))


def step_by_step(draft, batch, heads, row, t, steps):
    """Logits [steps, Vd] after positions 0 .. t of a document, decoded with the text's own tokens."""
    (where,) = (batch.documents[row] == batch.documents[row, t]).nonzero()[:1, 0].tolist()
    drafter = draft.drafter(heads)
    drafter.start(batch.ids[row : row + 1, where : t + 1], torch.tensor([t + 1 - where]), 64, Warp())
    drafter.observe(batch.ids[row : row + 1, where + 1 : t + 2], batch.aux[row : row + 1, where : t + 1], torch.tensor([t + 1 - where]))
    carried, read = drafter._carried, drafter._read
    found = [read]
    for k in range(1, steps):
        carried, read = drafter._step(batch.ids[row : row + 1, t + 1 + k : t + 2 + k], carried, k, k - 1, None)
        found.append(read)
    return torch.cat(found)[:, 0] @ draft.head_weight(heads).T


def by_hand(draft, batch, heads, predicted=True):
    """sums, counts, hits, asked of `train_loss` for cross-entropy, decoded row by row."""
    steps, config = draft.config.ttt_steps, draft.config
    table = torch.zeros(4, steps)
    ids = draft.t2d.nonzero()[:, 0]
    rows, columns = batch.ids.shape
    for row in range(rows):
        for t in range(columns):
            run = 0  # later tokens of the document
            while batch.documents[row, t] >= 0 and t + run + 1 < columns and batch.documents[row, t + run + 1] == batch.documents[row, t]:
                run += 1
            most = min(steps, run - 1 if predicted else run)
            if most < 1:
                continue
            logits = step_by_step(draft, batch, heads, row, t, most)
            for k in range(most):
                if not batch.loss_mask[row, t + 2 + k if predicted else t + k]:
                    continue
                wanted = heads.logits(batch.final[row, t + 1 + k])
                table[3, k] += 1
                table[2, k] += int(ids[logits[k].argmax()] == wanted.argmax())
                if draft.t2d[wanted.argmax()]:
                    table[1, k] += 1
                    table[0, k] -= (wanted[ids].softmax(-1) * logits[k].log_softmax(-1)).sum().item()
    assert config.loss == "ce"
    return table


@pytest.mark.parametrize("norms", NORMS, ids=lambda n: "+".join(n) or "plain")
def test_every_unrolled_step_is_what_decoding_gives_from_every_row(norms):
    batch, heads = case()
    draft = eagle(ttt_steps=5, **norms)
    loss = draft.train_loss(batch, heads)
    want = by_hand(draft, batch, heads)
    assert want[3].min() > 5
    torch.testing.assert_close(torch.stack([loss.sums, loss.counts, loss.hits, loss.asked]), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.weights, torch.tensor([1, 0.8, 0.64, 0.512, 0.4096]))


def test_the_original_alignment_counts_the_input_before():
    batch, heads = case()
    draft = eagle(ttt_steps=3, mask_align="input")
    loss = draft.train_loss(batch, heads)
    torch.testing.assert_close(
        torch.stack([loss.sums, loss.counts, loss.hits, loss.asked]), by_hand(draft, batch, heads, predicted=False), rtol=1e-4, atol=1e-4
    )


def test_one_step_is_a_plain_causal_layer():
    batch, heads = case(((0,) * 16,))
    draft = eagle(ttt_steps=1)
    loss = draft.train_loss(batch, heads)
    found = torch.autograd.grad(loss.sums.sum(), list(draft.parameters()))
    attention, (n,) = draft.attention, batch.ids.shape[1:]
    residual, x = draft.mix(heads.embed(batch.ids[:, 1:]), draft.features(batch.aux)[:, :-1])
    turn = draft.rope(batch.positions[:, :-1])
    q, k, v = attention.queries(x, turn), attention.keys(x, turn).repeat_interleave(2, 1), attention.values(x).repeat_interleave(2, 1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    logits = draft.finish(residual + attention.out(out))[1] @ draft.lm_head.weight.T
    wanted = heads.logits(batch.final[:, 1 : n - 1])
    counted = batch.loss_mask[:, 2:] & draft.t2d[wanted.argmax(-1)]
    ids = draft.t2d.nonzero()[:, 0]
    want = (-(wanted[..., ids].softmax(-1) * logits[:, :-1].log_softmax(-1)).sum(-1) * counted).sum()
    torch.testing.assert_close(loss.sums.sum(), want)
    torch.testing.assert_close(found, torch.autograd.grad(want, list(draft.parameters())))


def test_packed_is_apart():
    batch, heads = case()
    draft = eagle(ttt_steps=4)
    together = draft.train_loss(batch, heads)
    parts = [(0, 0, 14), (0, 14, 22), (1, 0, 24)]
    alone = [draft.train_loss(Batch(*(x[row : row + 1, a:b] for x in vars(batch).values())), heads) for row, a, b in parts]
    for name in ("sums", "counts", "hits", "asked"):
        torch.testing.assert_close(getattr(together, name), sum(getattr(one, name) for one in alone))


@pytest.mark.parametrize("kind", ["kl", "tv", "lk_alpha", "lk_hybrid"])
def test_other_losses_fall_when_the_draft_nears_the_target(kind):
    batch, heads = case()
    draft = eagle(ttt_steps=2, loss=kind)
    optimizer = torch.optim.Adam(draft.parameters(), 3e-3)
    seen = []
    for _ in range(12):
        loss = draft.train_loss(batch, heads)
        (loss.weights * loss.sums / loss.counts).sum().backward()
        optimizer.step(), optimizer.zero_grad()
        seen.append((loss.sums / loss.counts).sum().item())
    assert seen[-1] < seen[0] and (kind == "kl" or loss.counts[0] == loss.asked[0])


def test_no_answer_costs_nothing():
    batch, heads = case()
    batch.loss_mask[:] = False
    loss = eagle().train_loss(batch, heads)
    assert loss.sums.sum() == 0 and loss.counts.sum() == 0
    loss.sums.sum().backward()


def test_tensors_have_the_names_engines_know():
    names = set(eagle().state_dict())
    layer = [
        "input_layernorm",
        "hidden_norm",
        "post_attention_layernorm",
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    ]
    assert names == {"d2t", "t2d", "fc.weight", "norm.weight", "lm_head.weight", *(f"midlayer.{x}.weight" for x in layer)}
    assert set(eagle(V).state_dict()) == names - {"d2t", "t2d"}


def test_begins_from_the_targets_head_at_the_size_of_a_fresh_one():
    _, heads = case()
    draft, norm, fresh = eagle(), torch.rand(H), torch.nn.Linear(H, 12, bias=False).weight
    draft.begin(heads, norm)
    want = heads.head[draft.t2d] * norm
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(draft.lm_head.weight, want), torch.ones(12))
    assert draft.lm_head.weight.std().item() == pytest.approx(fresh.std().item(), rel=0.2)


@pytest.mark.parametrize(
    ("options", "number"), [({"ttt_steps": 0}, 715), ({"no_such": 1}, 715), ({"num_hidden_layers": 2}, 715), ({"aux_hidden_state_layer_ids": (9,)}, 716)]
)
def test_options_that_make_no_draft(options, number):
    with pytest.raises(UsageError) as caught:
        eagle(**options)
    assert caught.value.number == number


def test_layers_that_are_read_by_default():
    assert [Eagle3.tapped(n) for n in (36, 30, 2)] == [(1, 17, 32), (1, 14, 26), (0, 0, 1)]


def test_it_learns_eight_answers_by_heart(tiny):
    from angelslim_core.loading import load_model
    from angelslim_specdec.target import Target

    target = Target(load_model(tiny("llama", dtype="float32", num_hidden_layers=4), "cpu").model)
    shape, heads, prompt, length = target.shape, target.heads(), 6, 30
    torch.manual_seed(0)
    ids = torch.randint(shape.vocab_size, (8, prompt))
    with torch.no_grad():
        while ids.shape[1] < length:  # drawn, for the greedy text of a random model only repeats itself
            ids = torch.cat([ids, target.model(input_ids=ids).logits[:, -1].softmax(-1).multinomial(1)], 1)
        draft = Eagle3.from_target(shape, draft_vocab_size=shape.vocab_size, ttt_steps=4)
        draft.begin(heads, target.model.model.norm.weight)
        aux, _ = target.features(ids, draft.config.aux_hidden_state_layer_ids)
        # the text itself is to be learnt, from a target that is sure of it
        final, heads = torch.nn.functional.one_hot(ids.roll(-1, 1), shape.vocab_size).float(), Heads(heads.embedding, 20 * torch.eye(shape.vocab_size))
    places = torch.arange(length).expand(8, -1)
    batch = Batch(ids, places >= prompt, torch.zeros_like(ids), places, aux, final)
    optimizer = torch.optim.AdamW(draft.parameters(), 5e-3, weight_decay=0)
    for _ in range(30):
        loss = draft.train_loss(batch, heads)
        (loss.weights * loss.sums / loss.counts).sum().backward()
        optimizer.step(), optimizer.zero_grad()
    assert loss.hits[0] / loss.asked[0] > 0.95
    drafter, emitted, rounds = draft.drafter(heads), 0, 0
    for row in range(8):
        drafter.start(ids[row : row + 1], torch.tensor([prompt]), 64, Warp())
        seen, known = 0, prompt + 1
        while known + 4 < length:
            drafter.observe(ids[row : row + 1, seen + 1 : known], aux[row : row + 1, seen : known - 1], torch.tensor([known - 1 - seen]))
            same = (drafter.propose(4).tokens[0] == ids[row, known : known + 4]).cumprod(0).sum().item()
            seen, known, emitted, rounds = known - 1, known + same + 1, emitted + same + 1, rounds + 1
    assert emitted / rounds > 3
