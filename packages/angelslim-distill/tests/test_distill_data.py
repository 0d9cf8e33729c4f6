"""What counts of a file, how documents share rows, and under which keys a cache knows them."""

import hashlib
import json
from array import array

import pytest
import torch

from angelslim_core.calibration.packing import Row
from angelslim_core.errors import RecipeError, UsageError
from angelslim_core.loading import load_model, load_tokenizer
from angelslim_core.parallel import Group
from angelslim_core.testing.training import chats
from angelslim_distill.data.rows import Supervised, collate, key_of, prepare
from angelslim_distill.heads import Reader


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny())


def rows_of(path, tokenizer, **given):
    return prepare(path, tokenizer, "model", **{"length": 64, **given})


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_only_what_the_assistant_says_counts(tmp_path, tokenizer):
    path = write(
        tmp_path / "a.jsonl", {"prompt": "why", "answer": "because"}, {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "yes"}]}
    )
    found = rows_of(path, tokenizer, packed=False)
    batch = collate(found.train)
    said = sorted(tokenizer.decode(batch.labels[i][batch.counted[i]]) for i in range(2))
    assert said == ["because\n", "yes\n"] and not batch.counted[~batch.attention_mask].any()


def test_everything_counts_if_asked_but_the_first_token_which_nothing_predicts(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"text": "some text"}, {"prompt": "why", "answer": "because"})
    batch = collate(rows_of(path, tokenizer, count="all", packed=False).train)
    assert torch.equal(batch.counted[:, :-1], batch.attention_mask[:, 1:]) and not batch.counted[:, -1].any()
    text = tmp_path / "b.txt"
    text.write_text("x" * 150)
    found = rows_of(text, tokenizer, count="all", packed=False)
    assert sorted(map(len, found.train)) == [22, 64, 64]


def test_text_and_conversations_may_be_mixed_in_one_file(tmp_path, tokenizer):
    chat = {"id": "0", "conversations": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}], "finished": True}
    path = write(tmp_path / "a.jsonl", {"id": "0", "text": "a text that goes on"}, chat, {"id": "1", "text": "another one"})
    found = rows_of(path, tokenizer, packed=False, count="all")
    texts = {tokenizer.decode(row.ids) for row in found.train}
    assert found.documents == 3 and {"a text that goes on", "another one"} < texts and any("because" in text and text != "because" for text in texts)
    with pytest.raises(RecipeError, match="holds no prompt"):
        rows_of(path, tokenizer)


def test_a_selection_of_nothing_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "a long question", "answer": "yes"})
    with pytest.raises(RecipeError, match="has a token that counts within 8 tokens"):
        rows_of(path, tokenizer, length=8)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(RecipeError, match="nothing is an answer"):
        rows_of(tmp_path / "b.txt", tokenizer)
    with pytest.raises(RecipeError, match="leaves none to train on"):
        rows_of(path, tokenizer, held_out=0.5)
    with pytest.raises(RecipeError, match="neither a conversation nor text"):
        rows_of(write(tmp_path / "c.jsonl", {"x": 1}), tokenizer, count="all")
    with pytest.raises(RecipeError, match="does not exist"):
        rows_of(tmp_path / "none.txt", tokenizer, count="all")


def test_held_out_documents_are_not_trained_on(tmp_path, tokenizer):
    found = rows_of(chats(tmp_path / "a.jsonl"), tokenizer, held_out=0.25, packed=False)
    assert len(found.held_out) == 10 and len(found.train) == 30 and found.documents == 40


def test_a_key_is_the_sha_of_a_rows_tokens(tmp_path, tokenizer):
    path = chats(tmp_path / "a.jsonl")
    alone, together = rows_of(path, tokenizer, packed=False).train, rows_of(path, tokenizer, length=200).train
    assert key_of(alone[0]) == hashlib.sha256(array("q", alone[0].ids.tolist()).tobytes()).hexdigest()
    assert any(int(row.documents[-1]) for row in together)
    assert all(key_of(row) != hashlib.sha256(array("q", row.ids.tolist()).tobytes()).hexdigest() for row in together if int(row.documents[-1]))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "qwen3_moe"])
def test_documents_of_one_row_do_not_see_each_other(tiny, tmp_path, tokenizer, architecture):
    model = load_model(tiny(architecture, dtype="float32"), "cpu").model
    reader, rows = Reader(model), rows_of(chats(tmp_path / "a.jsonl", 12), tokenizer, length=150).train
    together = collate(rows)
    assert reader.can_pack and together.positions is not None
    with torch.no_grad():
        found = reader(together).states
        for i, row in enumerate(rows):
            for number in range(int(row.documents[-1]) + 1):
                at = row.documents == number
                alone = collate([Row(row.ids[at], row.loss_mask[at], row.documents[at] * 0, row.positions[at])])
                assert alone.positions is None
                torch.testing.assert_close(found[i, : len(row)][at], reader(alone).states[0], rtol=1e-4, atol=1e-5)


def test_models_whose_layers_carry_a_state_cannot_pack(tiny):
    assert not Reader(load_model(tiny("qwen3_next"), "cpu").model).can_pack


def test_processes_share_each_batch(tmp_path, tokenizer):
    rows = rows_of(chats(tmp_path / "a.jsonl"), tokenizer, packed=False).train

    def process(rank, size=2):
        group = Group()
        group.rank, group.size = rank, size
        return Supervised(rows, 4, accumulate=2, group=group)

    for step in range(8):
        for part in range(2):
            whole = Supervised(rows, 4, accumulate=2).batch(step, part).samples
            shares = [process(rank).batch(step, part).samples for rank in (0, 1)]
            assert sorted(whole) == sorted(shares[0] + shares[1]) and len(shares[0]) == 2
    with pytest.raises(UsageError, match="cannot be shared by 3"):
        process(0, 3)


def test_which_positions_count_stays_with_the_host():
    from angelslim_distill.data.rows import moved
    from angelslim_distill.targets import Batch

    ids = torch.arange(6).view(2, 3)
    batch = moved(Batch(ids, ids > 0, ids, ids > 1, ["a", "b"], ids), torch.device("meta"))
    assert all(getattr(batch, name).is_meta for name in ("input_ids", "attention_mask", "labels", "positions"))
    assert batch.counted.device.type == "cpu" and batch.counted.tolist() == (ids > 1).tolist()
