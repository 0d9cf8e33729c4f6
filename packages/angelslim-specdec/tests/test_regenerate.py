"""Answers of the target or of a server, appended as they come; a run that was stopped goes on."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from angelslim_core.calibration.chats import Conversation, read_conversations
from angelslim_core.calibration.spans import Renderer
from angelslim_core.errors import EngineError, OutputError, StoppedError, UsageError
from angelslim_core.loading import load_tokenizer
from angelslim_specdec.data import answers
from angelslim_specdec.data.answers import Answer, Local, Request, Server
from angelslim_specdec.data.regenerate import Mix, regenerate

USER = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
PROMPTS = [Conversation("1", USER[:1]), Conversation("2", [{"role": "system", "content": "s"}, *USER]), Conversation("3", USER)]


class Parrot:
    """Answers with what was said so far; keeps what it was asked. Backwards, since answers come in any order."""

    def __init__(self, **special):
        self.asked, self.special = [], special

    def __call__(self, requests):
        self.asked += requests
        for i in reversed(range(len(requests))):
            text = "".join(m["content"] for m in requests[i].chat)
            yield i, self.special.get(text, Answer(f"<{text}>", [1, 2], True, 3, 2))


def written(path):
    return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}


def contents(row):
    return [m["content"] for m in row["conversations"]]


def test_every_user_turn_is_answered_on_the_regenerated_history(tmp_path):
    counts = regenerate(PROMPTS, Parrot(), tmp_path / "o.jsonl", {}, mix=Mix(), differs=lambda ids, text: text == "<a>")
    rows = written(tmp_path / "o.jsonl")
    assert contents(rows["2"]) == ["s", "a", "<sa>", "b", "<sa<sa>b>"] and contents(rows["3"]) == ["a", "<a>", "b", "<a<a>b>"]
    assert rows["3"]["conversations"][1]["token_ids"] == [1, 2] and "token_ids" not in rows["3"]["conversations"][3]
    assert rows["3"]["completion_tokens"] == 4 and counts.tokens == 10 and counts.written == 3
    assert [len(c.messages) for c in read_conversations(tmp_path / "o.jsonl")] == [2, 5, 4]


@pytest.mark.parametrize("keep", [True, False])
def test_cut_and_empty_answers(tmp_path, keep):
    parrot = Parrot(**{"a": Answer("cut", [1], False, 1, 1), "sa<sa>b": Answer(" ", [1], True, 1, 1)})
    counts = regenerate(PROMPTS, parrot, tmp_path / "o.jsonl", {}, mix=Mix(), keep_cut=keep)
    rows = written(tmp_path / "o.jsonl")
    assert (counts.cut, counts.empty, counts.written) == (2, 1, 3 if keep else 1)
    assert contents(rows["2"]) == ["s", "a", "<sa>"] and rows["2"]["finished"], "what was said before an empty answer is good"
    assert contents(rows["3"]) == (["a", "cut"] if keep else []) and rows["3"]["finished"] is not keep
    assert {c.id: c.finished for c in read_conversations(tmp_path / "o.jsonl")} == ({"2": True, "1": False, "3": False} if keep else {"2": True})


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    out = tmp_path / "o.jsonl"
    with pytest.raises(StoppedError):
        regenerate(PROMPTS, Parrot(), out, {"model": "m"}, mix=Mix(), stop_requested=lambda: True)
    assert out.read_text() == "", "the last of the first turns was answered first, and its user goes on"
    stops = iter([False, False, True])
    with pytest.raises(StoppedError):
        regenerate(PROMPTS, Parrot(), out, {"model": "m"}, mix=Mix(), stop_requested=lambda: next(stops))
    assert written(out).keys() == {"1"}
    with out.open("a") as file:
        file.write('{"id": "2", "conversat')  # a crash within a line
    again = Parrot()
    counts = regenerate(PROMPTS, again, out, {"model": "m"}, mix=Mix())
    assert counts.resumed == 1 and written(out).keys() == {"1", "2", "3"} and len(again.asked) == 4
    with pytest.raises(OutputError, match="another model"):
        regenerate(PROMPTS, Parrot(), out, {"model": "n"}, mix=Mix())
    assert regenerate(PROMPTS, Parrot(), out, {"model": "n"}, mix=Mix(), replace=True).resumed == 0


def test_temperatures_and_seeds_belong_to_the_conversation(tmp_path):
    mix, one, two = Mix.parse("0:1,1:1"), Parrot(), Parrot()
    many = [Conversation(str(i), [{"role": "user", "content": str(i)}]) for i in range(60)]
    regenerate(many, one, tmp_path / "1", {}, mix=mix, samples=2, seed=3)
    regenerate(many[7:8], two, tmp_path / "2", {}, mix=mix, samples=2, seed=3)
    drawn = [r.temperature for r in one.asked]
    assert 40 < drawn.count(0) < 80 and len({r.seed for r in one.asked}) == 120
    assert [(r.temperature, r.seed) for r in two.asked] == [(r.temperature, r.seed) for r in one.asked[14:16]]
    with pytest.raises(UsageError, match="are the same"):
        regenerate(many, one, tmp_path / "3", {}, mix=Mix(), samples=2)
    for text in ("x", "", "-1", "1:0", "nan"):
        with pytest.raises(UsageError, match="--temperature"):
            Mix.parse(text)


def test_the_target_reads_its_template_and_loses_its_stop_token(tiny):
    renderer = Renderer(load_tokenizer(tiny()), "model")
    seen = []

    def complete(prompts, temperature, seed):
        seen.append((temperature, [renderer.tokenizer.decode(ids) for _, ids in prompts], seed))
        for i, _ in reversed(prompts):
            yield i, [*renderer.encode(f"t{temperature}"), *([2] if i == 0 else [])]

    asked = [Request([{"role": "user", "content": c}], t, s) for c, t, s in (("x", 1.0, 5), ("y", 0.0, 6), ("long", 1.0, 7))]
    found = dict(Local(renderer, complete, [2])(asked))
    assert seen == [(0.0, ["<|user|>y\n<|assistant|>"], 6), (1.0, ["<|user|>long\n<|assistant|>", "<|user|>x\n<|assistant|>"], 7)]
    assert {i: (a.text, a.finished) for i, a in found.items()} == {0: ("t1.0", True), 1: ("t0.0", False), 2: ("t1.0", False)}
    assert found[0].ids == renderer.encode("t1.0") and found[0].tokens == 5


@pytest.fixture
def server(monkeypatch):
    """server(reply): address of a server whose replies are reply(path, body) -> status, document."""
    monkeypatch.setattr(answers.time, "sleep", lambda seconds: None)
    running = []

    def start(reply):
        class Handler(BaseHTTPRequestHandler):
            def _reply(self, body):
                status, document = reply(self.path, body)
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                self._reply(None)

            def do_POST(self):
                self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        http = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        running.append(http)
        return f"http://127.0.0.1:{http.server_port}"

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


def test_a_server_is_asked_again_while_it_is_busy(server):
    bodies = []

    def reply(path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "served"}]}
        bodies.append(body)
        if len(bodies) % 2:
            return 503, {}
        choice = {"message": {"content": "hi"}, "finish_reason": "length" if body["seed"] == 1 else "stop"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 4, "completion_tokens": 5}}

    assistant = Server(server(reply), 7, concurrency=1)
    found = dict(assistant([Request(USER[:1], 0.5, seed) for seed in range(3)]))
    assert {i: a.finished for i, a in found.items()} == {0: True, 1: False, 2: True} and found[0] == Answer("hi", None, True, 4, 5)
    assert len(bodies) == 6 and bodies[0] == {"model": "served", "messages": USER[:1], "max_tokens": 7, "temperature": 0.5, "seed": 0}


def test_a_server_that_fails_is_an_error_of_ours(server):
    with pytest.raises(UsageError, match="no http address"):
        Server("file:///etc/passwd", 7)
    with pytest.raises(EngineError, match="gives no answer"):
        Server("http://127.0.0.1:1", 7)
    with pytest.raises(EngineError, match="has 2 models: a, b"):
        Server(server(lambda path, body: (200, {"data": [{"id": "a"}, {"id": "b"}]})), 7)
    asked = []
    refusing = Server(server(lambda path, body: (asked.append(path), (401, {"why": "no key"}))[1]), 7, model="m")
    with pytest.raises(EngineError, match=r"status 401.*no key"):
        list(refusing([Request(USER[:1], 0, 0)]))
    assert len(asked) == 1
    with pytest.raises(EngineError, match="no chat completion"):
        list(Server(server(lambda path, body: (200, {"choices": []})), 7, model="m")([Request(USER[:1], 0, 0)]))


def test_a_request_that_a_server_refuses_costs_nothing_else(server, tmp_path, caplog):
    def reply(path, body):
        said = [m["content"] for m in body["messages"]]
        if said[-1] == "long":
            return 400, {"why": "too long"}
        return 200, {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}

    assistant = Server(server(reply), 7, model="m")
    users = {"1": ["a"], "2": ["long"], "3": ["a", "long"], "4": ["b"]}
    asked = [Conversation(id, [{"role": "user", "content": c} for c in said]) for id, said in users.items()]
    counts = regenerate(asked, assistant, tmp_path / "o.jsonl", {}, mix=Mix())
    assert (counts.written, counts.refused, counts.empty, counts.cut) == (3, 2, 0, 0) and "2: the server refused it: status 400" in caplog.text
    rows = written(tmp_path / "o.jsonl")
    assert rows.keys() == {"1", "3", "4"}, "the next run asks again"
    assert contents(rows["3"]) == ["a", "hi"] and rows["3"]["finished"], "what was said before is good"
    again = regenerate(asked[:1] + asked[2:], assistant, tmp_path / "o.jsonl", {}, mix=Mix())
    assert again.resumed == 3 and again.refused == 0
    with pytest.raises(EngineError, match=r"refused 1 of 1 requests.*too long"):
        regenerate(asked, assistant, tmp_path / "o.jsonl", {}, mix=Mix())


def test_a_server_that_refuses_most_is_at_fault(tmp_path):
    class Refusing:
        def __call__(self, requests):
            for i, request in enumerate(requests):
                fails = int(request.chat[-1]["content"]) % 3
                yield i, Answer("", None, True, 0, 0, "status 400") if fails else Answer("hi", None, True, 1, 1)

    many = [Conversation(str(i), [{"role": "user", "content": str(i)}]) for i in range(90)]
    with pytest.raises(EngineError, match="refused 17 of 2"):
        regenerate(many, Refusing(), tmp_path / "o.jsonl", {}, mix=Mix())
    assert 5 < len(written(tmp_path / "o.jsonl")) < 12
    few = [c for c in many if int(c.id) % 3 == 0 or int(c.id) > 60]
    assert regenerate(few, Refusing(), tmp_path / "p.jsonl", {}, mix=Mix()).written == 30
