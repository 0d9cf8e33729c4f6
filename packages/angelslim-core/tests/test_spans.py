"""What the assistant wrote, as tokens, in any chat template; rows of any shape."""

import json

import pytest

from angelslim_core.calibration.chats import Conversation, read_conversations, read_prompts
from angelslim_core.calibration.spans import Renderer
from angelslim_core.errors import ModelError, RecipeError
from angelslim_core.loading import load_tokenizer

CHATML = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
# shows an empty thought before the last answer only, as Qwen3's does
THINKING = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
CHANGING = CHATML.replace("m['content']", "m['content'] | upper")
PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
CHAT = [
    {"role": "system", "content": "assistant"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "a"},  # occurs in headers and in the question, too
    {"role": "user", "content": "say assistant"},
    {"role": "assistant", "content": "two words, assistant\n"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny())


def renderer(tokenizer, template):
    tokenizer.chat_template = template
    return Renderer(tokenizer, "model")


def spoken(tokenizer, document):
    """Text of each run of masked tokens."""
    runs, last = [], False
    for token, mine in zip(document.ids, document.mask, strict=True):
        if mine and not last:
            runs.append([])
        if mine:
            runs[-1].append(token)
        last = mine
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "answers"),
    [(CHATML, ["a</s>", "two words, assistant\n</s>"]), (TRIMMED, ["a</s>", "two words, assistant</s>"]), (PLAIN, ["a\n", "two words, assistant\n\n"])],
    ids=["chatml", "trimmed", "plain"],
)
def test_the_mask_is_exactly_what_the_assistant_wrote_and_its_end_of_turn(tokenizer, template, answers):
    made = renderer(tokenizer, template)
    (document,) = made.documents([Conversation("0", CHAT)])
    assert spoken(tokenizer, document) == answers
    assert tokenizer.decode(document.ids) == made.render([CHAT])[0]
    prompt = made.prompts([CHAT[:-1]])[0]
    assert document.ids[: len(prompt)] == prompt and document.mask[len(prompt)], "training begins where decoding does"


def test_a_cut_answer_has_no_end_of_turn_to_learn(tokenizer):
    (document,) = renderer(tokenizer, CHATML).documents([Conversation("0", CHAT, finished=False)])
    assert spoken(tokenizer, document) == ["a</s>", "two words, assistant\n"]


def test_a_template_that_rewrites_history_is_refused_or_followed(tokenizer):
    made = renderer(tokenizer, THINKING)
    with pytest.raises(RecipeError, match="shows this turn otherwise") as caught:
        list(made.documents([Conversation("7", CHAT)]))
    assert "--turns each" in caught.value.hint
    documents = list(made.documents([Conversation("7", CHAT, finished=False)], "each"))
    assert [spoken(tokenizer, d) for d in documents] == [["a</s>"], ["two words, assistant\n"]]
    assert tokenizer.decode(documents[0].ids) == made.render([CHAT[:3]])[0]


def test_an_answer_that_is_not_shown_is_an_error(tokenizer):
    with pytest.raises(RecipeError, match="does not show the answer 'a' as it is"):
        list(renderer(tokenizer, CHANGING).documents([Conversation("0", CHAT)]))
    with pytest.raises(ModelError, match="chat template"):
        renderer(tokenizer, None)


def test_tokens_of_an_answer_stand_where_its_text_would(tokenizer):
    ids = [9, 8, 7]
    chat = [*CHAT[:2], {**CHAT[2], "token_ids": ids}, *CHAT[3:]]
    made = renderer(tokenizer, CHATML)
    (plain,), (document,) = made.documents([Conversation("0", CHAT)]), made.documents([Conversation("0", chat)])
    at = plain.mask.index(True)
    assert document.ids == [*plain.ids[:at], *ids, *plain.ids[at + 1 :]]
    assert document.mask == [*plain.mask[:at], True, True, *plain.mask[at:]]


def rows(path, *values):
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


def test_prompts_of_every_shape(tmp_path):
    path = rows(
        tmp_path / "p.jsonl",
        {"prompt": "x"},
        {"question_id": "q", "turns": ["a", "b"]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "old"}, {"from": "human", "value": "b"}]},
        {"id": 7, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    )
    found = read_prompts(path)
    assert [c.id for c in found] == ["1", "q", "3", "7"]
    assert [[m["content"] for m in c.messages] for c in found] == [["x"], ["a", "b"], ["a", "b"], ["s", "u"]]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([{"text": "plain"}], "keys: 'text'"), ([{"messages": [{"role": "assistant", "content": "x"}]}], "no user turn"),
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], "occurs twice"), ([], "is empty"),
    ],
)  # fmt: skip
def test_prompts_that_are_none(tmp_path, values, what):
    with pytest.raises(RecipeError, match=what):
        read_prompts(rows(tmp_path / "p.jsonl", *values))


def test_conversations_are_cut_where_turns_do_not_alternate(tmp_path):
    user, answer = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    path = rows(
        tmp_path / "c.jsonl",
        {"conversations": [user, answer, user, user, answer], "finished": False},
        {"conversations": [user, answer, user], "finished": False},
        {"conversations": [answer, user]},
        {"conversations": [user, answer], "finished": False},
    )
    assert [(c.id, len(c.messages), c.finished) for c in read_conversations(path)] == [("1", 2, True), ("2", 2, True), ("4", 2, False)]
    with pytest.raises(RecipeError, match="none of its 1 rows holds an assistant turn"):
        read_conversations(rows(tmp_path / "n.jsonl", {"prompt": "x"}))
