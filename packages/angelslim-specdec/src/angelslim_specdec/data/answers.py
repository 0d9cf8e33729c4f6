"""Where answers come from: the target here, or a server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from angelslim_core.calibration.rows import Chat
from angelslim_core.errors import EngineError, UsageError

if TYPE_CHECKING:
    from angelslim_core.calibration.spans import Renderer

TRIES = 6
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
# the request's own fault, such as a conversation that is longer than the server takes
_REFUSALS = frozenset((400, 413, 422))
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Request:
    """A conversation that an assistant's turn is to follow.

    Args:
        seed: of this answer.
    """

    chat: Chat
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """What the assistant says.

    Args:
        ids: its tokens without the end of turn; None: not known.
        finished: it ended by itself, not at the limit.
        refused: why a server takes no such conversation; there is no text then.
    """

    text: str
    ids: list[int] | None
    finished: bool
    prompt_tokens: int
    tokens: int
    refused: str = ""


class Assistant(Protocol):
    """Answers in any order: number of the request and its answer."""

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]: ...


Complete = Callable[[Sequence[tuple[int, list[int]]], float, int], Iterator[tuple[int, list[int]]]]
"""complete(prompts, temperature, seed) -> number of a prompt and the tokens that follow it, a stop token included where there is one."""


class Local:
    """The target itself.

    Args:
        complete: runs it.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, renderer: Renderer, complete: Complete, stop_ids: Sequence[int]) -> None:
        self._renderer, self._complete, self._stops = renderer, complete, frozenset(stop_ids)

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        prompts = self._renderer.prompts([r.chat for r in requests])
        for temperature in sorted({r.temperature for r in requests}):
            numbers = [i for i, r in enumerate(requests) if r.temperature == temperature]
            numbers.sort(key=lambda i: -len(prompts[i]))  # prompts of like length cost least side by side
            for i, ids in self._complete([(n, prompts[n]) for n in numbers], temperature, requests[numbers[0]].seed):
                finished = bool(ids) and ids[-1] in self._stops
                said = ids[:-1] if finished else ids
                text = self._renderer.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                yield i, Answer(text, said, finished, len(prompts[i]), len(ids))


class _Refused(Exception):
    """The server takes no such request; says why."""


class Server:
    """A server's chat completions.

    Args:
        url: with or without `/v1` at its end.
        model: as the server calls it; None: the only one it has.
        concurrency: requests at once.
        key: sent as a bearer token.

    Raises:
        UsageError: no http address.
        EngineError: it cannot be reached, or has several models and none is named.
    """

    def __init__(self, url: str, max_new_tokens: int, *, model: str | None = None, concurrency: int = 64, key: str | None = None, timeout: float = 600) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UsageError(734, "--server", f"{url!r:.100} is no http address")
        self._url = url.rstrip("/") if url.rstrip("/").endswith("/v1") else url.rstrip("/") + "/v1"
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._max_new_tokens, self._concurrency, self._timeout = max_new_tokens, concurrency, timeout
        self.model = model or self._only_model()

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        with ThreadPoolExecutor(self._concurrency) as pool:
            asked: dict[Future[Answer], int] = {pool.submit(self._answer, request): i for i, request in enumerate(requests)}
            try:
                for future in as_completed(asked):
                    yield asked[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, request: Request) -> Answer:
        body = {
            "model": self.model, "messages": [{"role": m["role"], "content": m["content"]} for m in request.chat], "max_tokens": self._max_new_tokens,
            "temperature": request.temperature, "seed": request.seed,
        }  # fmt: skip
        try:
            found = self._ask("/chat/completions", body)
        except _Refused as why:
            return Answer("", None, True, 0, 0, str(why))
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            text = choice["message"]["content"] or ""
            return Answer(str(text), None, choice.get("finish_reason") == "stop", int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(735, self._url, f"answers what is no chat completion: {json.dumps(found)[:200]}") from error

    def _only_model(self) -> str:
        found = self._ask("/models", None).get("data")
        names = [str(m.get("id")) for m in found if isinstance(m, dict)] if isinstance(found, list) else []
        if len(names) != 1:
            raise EngineError(736, self._url, f"has {len(names)} models: {', '.join(names)[:300]}", "name one with --server-model")
        return names[0]

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """One request, tried again where the server is busy or not there yet."""
        data = None if body is None else json.dumps(body).encode()
        why = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(min(2.0**attempt / 4, 15))
            try:
                request = urllib.request.Request(self._url + path, data, self._headers)  # noqa: S310 only http and https come here
                with urllib.request.urlopen(request, timeout=self._timeout) as reply:  # noqa: S310
                    found = json.loads(reply.read(_MOST_BYTES))
            except urllib.error.HTTPError as error:
                why = f"status {error.code}: {error.read(300).decode(errors='replace')}"
                if body is not None and error.code in _REFUSALS:
                    raise _Refused(why) from error
                if error.code not in _AGAIN:
                    break
            except (OSError, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
            else:
                if isinstance(found, dict):
                    return found
                why = "its answer is no JSON object"
        raise EngineError(737, self._url + path, f"gives no answer ({why})", "start the server, or check --server")
