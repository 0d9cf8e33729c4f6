"""A target says what transformers' own forward pass says, whatever its cache and tree are."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from angelslim_core.errors import ModelError, UsageError
from angelslim_specdec.attention import Visible
from angelslim_specdec.kernels.tree import ancestors_of
from angelslim_specdec.kernels.verify_attention import VERIFY_ATTENTION
from angelslim_specdec.target import Target

KINDS = {
    "llama": {}, "qwen3": {}, "mistral": {"sliding_window": 5}, "gemma3_text": {"sliding_window": 4}, "qwen3_moe": {}, "deepseek_v3": {}, "seed_oss": {},
    "gemma2": {"sliding_window": 4},
}  # fmt: skip


@pytest.fixture(params=KINDS)
def model(request, tiny):
    if request.param == "gemma2":  # a cap on scores, which only the model's own eager attention has
        from transformers import Gemma2Config

        torch.manual_seed(0)
        config = Gemma2Config(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=256,
            sliding_window=4, attn_implementation="eager", pad_token_id=0,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return load(tiny(request.param, dtype="float32", **KINDS[request.param]))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def ids_of(*shape, seed=0):
    return torch.randint(3, 256, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_features_are_the_hidden_states(model):
    target, ids = Target(model), ids_of(2, 11)
    before = model.config._attn_implementation
    aux, final = target.features(ids, (0, 1))
    assert model.config._attn_implementation == before
    plain = model(ids, output_hidden_states=True)
    close(aux[..., :64], plain.hidden_states[1])
    close(final, plain.hidden_states[-1])
    assert torch.equal(aux[..., 64:], target.features(ids, (1,))[0])
    close(final @ target.heads().head.T, model.get_output_embeddings()(plain.hidden_states[-1]))
    close(target.heads().embed(ids), plain.hidden_states[0])
    assert target.features(ids, ())[0].shape == (2, 11, 0)


@torch.no_grad()
def test_documents_do_not_see_each_other(model):
    target, ids = Target(model), ids_of(1, 12)
    positions = torch.cat([torch.arange(7), torch.arange(4), torch.zeros(1, dtype=torch.int64)])[None]
    documents = torch.tensor([[0] * 7 + [1] * 4 + [-1]])
    aux, final = target.features(ids, (0,), positions, documents)
    for start, end in ((0, 7), (7, 11)):
        alone = target.features(ids[:, start:end], (0,))
        close(aux[:, start:end], alone[0])
        close(final[:, start:end], alone[1])


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_ragged_rows_say_what_each_says_alone(model, static):
    target, lengths = Target(model), torch.tensor([9, 1, 6])
    ids, more = ids_of(3, 9), ids_of(3, 4, seed=1)
    cache = target.new_cache(3, 40, static=static)
    first = target.prefill(ids, lengths, cache, (0,))
    kept = torch.tensor([4, 2, 0])
    target.forward(more, cache)
    cache.commit(kept)  # the rest of those slots holds junk from here on
    again = ids_of(3, 3, seed=2)
    step = target.forward(again, cache, (0,))
    for row in range(3):
        own = ids[row : row + 1, : lengths[row]]
        close(first.logits[row, 0], model(own).logits[0, -1])
        whole = torch.cat([own, more[row : row + 1, : kept[row]], again[row : row + 1]], 1)
        plain = model(whole, output_hidden_states=True)
        close(step.logits[row], plain.logits[0, -3:])
        close(step.aux[row], plain.hidden_states[1][0, -3:])


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_a_tree_is_its_paths_and_what_is_accepted_stays(model, batch):
    target = Target(model)
    ids, lengths = ids_of(batch, 6), torch.tensor([6, 3])[:batch]
    parents = torch.tensor([[-1, -1, 0, 1, 1, 4]]).repeat(batch, 1)
    paths = {0: [0], 1: [1], 2: [0, 2], 3: [1, 3], 4: [1, 4], 5: [1, 4, 5]}
    cache = target.new_cache(batch, 40)
    target.prefill(ids, lengths, cache)
    tokens = ids_of(batch, 7, seed=3)
    step = target.forward(tokens, cache, (0,), parents)
    for row in range(batch):
        own = ids[row, : lengths[row]]
        for node, path in paths.items():
            plain = model(torch.cat([own, tokens[row, :1], tokens[row, 1:][path]])[None], output_hidden_states=True)
            close(step.logits[row, node + 1], plain.logits[0, -1])
            close(step.aux[row, node + 1], plain.hidden_states[1][0, -1])
    taken = torch.tensor([[1, 4, 5], [0, -1, -1]])[:batch]
    cache.commit(torch.tensor([4, 2])[:batch], taken)
    after = ids_of(batch, 2, seed=4)
    step = target.forward(after, cache)
    for row in range(batch):
        path = [p for p in taken[row].tolist() if p >= 0]
        whole = torch.cat([ids[row, : lengths[row]], tokens[row, :1], tokens[row, 1:][path], after[row]])
        close(step.logits[row], model(whole[None]).logits[0, -2:])


@torch.no_grad()
def test_prompts_go_into_freed_rows(tiny):
    model = load(tiny("llama", dtype="float32"))
    target, cache = Target(model), None
    cache = target.new_cache(3, 32)
    target.prefill(ids_of(3, 8), torch.tensor([8, 8, 8]), cache)
    fresh = ids_of(2, 5, seed=5)
    target.prefill(fresh, torch.tensor([5, 2]), cache, rows=torch.tensor([2, 0]))
    assert cache.lengths.tolist() == [2, 8, 5]
    step = target.forward(ids_of(3, 1, seed=6), cache)
    whole = torch.cat([fresh[1, :2], ids_of(3, 1, seed=6)[0]])
    close(step.logits[0], model(whole[None]).logits[0, -1:])


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_matches_its_reference(tree, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 19, 8), torch.randn(2, 2, 19, 12)
    ancestors, depths = ancestors_of(torch.tensor([[-1, 0, -1, 2], [-1, -1, 1, 2]])) if tree else (None, torch.arange(5))
    visible = Visible(torch.tensor([4, 14]), depths, ancestors)
    close(VERIFY_ATTENTION(q, k, v, visible, 0.3, window), VERIFY_ATTENTION(q, k, v, visible, 0.3, window, executor="reference"))
    own = Visible(None, torch.arange(5), documents=None if not tree else torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]))
    close(
        VERIFY_ATTENTION(q, k[:, :, :5], v[:, :, :5], own, 0.3, window), VERIFY_ATTENTION(q, k[:, :, :5], v[:, :, :5], own, 0.3, window, executor="reference")
    )


def test_ancestors_of_a_long_chain():
    seen, depths = ancestors_of(torch.arange(-1, 8)[None])
    assert torch.equal(seen[0], torch.ones(10, 10).tril().bool()) and depths.tolist() == [list(range(10))]
    assert ancestors_of(torch.zeros(1, 0, dtype=torch.int64))[0].tolist() == [[[True]]]


def test_states_that_cannot_go_back_are_refused(tiny):
    with pytest.raises(ModelError, match=r"layers \[0, 1, 2\] keep a state"):
        Target(load(tiny("qwen3_next", dtype="float32")))


def test_no_room_and_wrong_layers(tiny):
    target = Target(load(tiny("llama", dtype="float32")))
    cache = target.new_cache(1, 16)
    with pytest.raises(UsageError, match="do not fit"):
        target.prefill(ids_of(1, 20), torch.tensor([20]), cache)
    with pytest.raises(UsageError, match="not layers"):
        target.features(ids_of(1, 4), (2,))


def test_shape_and_fingerprint(tiny):
    plain, other = Target(load(tiny("llama", dtype="float32"))), Target(load(tiny("llama", dtype="float32", seed=1)))
    shape = plain.shape
    assert (shape.hidden_size, shape.num_layers, shape.head_dim, shape.vocab_size) == (64, 2, 16, 256)
    assert shape.rope_parameters["rope_theta"] > 0
    assert len(shape.fingerprint) == 64 and shape.fingerprint != other.shape.fingerprint
    assert shape.fingerprint == Target(AutoModelForCausalLM.from_pretrained(tiny("llama", dtype="float32"), dtype=torch.bfloat16)).shape.fingerprint
    assert Target(load(tiny("gemma3_text", dtype="float32"))).shape.rope_parameters
