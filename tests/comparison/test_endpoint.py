"""An OpenAI-compatible server on this machine: what it is sent, what is tried again, and what no error tells."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlxtune.comparison import endpoint
from mlxtune.comparison.endpoint import Endpoint
from mlxtune.errors import InputError, StorageError
from tests.chat_server import Reply, Server, said

SECRET = "sk-very-secret"
ASKED = [{"role": "user", "content": "ä?"}]

Serve = Callable[[Callable[[int, dict[str, Any]], Reply]], Server]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    started: list[Server] = []

    def start(script: Callable[[int, dict[str, Any]], Reply]) -> Server:
        started.append(Server(script))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_what_is_sent_and_read(serve: Serve) -> None:
    server = serve(lambda number, body: (200, said("so", prompt_tokens=7, completion_tokens=2), {}))
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"city": "Köln"}}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "assistant", "content": "", "weight": 0, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    reply = endpoint.ask(Endpoint(url=server.url, model="m"), messages, max_tokens=9)
    assert (reply.text, reply.prompt_tokens, reply.answer_tokens) == ("so", 7, 2)
    path, headers, body = server.seen[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {SECRET}")
    written = {**call, "function": {"name": "look", "arguments": '{"city": "Köln"}'}}
    assert body == {
        "model": "m",
        "max_tokens": 9,
        "temperature": 0,
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "assistant", "content": "", "tool_calls": [written]},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ],
    }


def test_the_whole_address_is_taken_as_it_is(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(lambda number, body: (200, said(None), {}))
    reply = endpoint.ask(Endpoint(url=f"{server.url}/chat/completions/", model="m"), ASKED, max_tokens=9)
    assert (reply.text, reply.prompt_tokens, reply.answer_tokens) == ("", None, None)
    assert server.seen[0][0] == "/v1/chat/completions"
    assert "Authorization" not in server.seen[0][1]


def test_answers_stand_in_the_order_of_the_questions(serve: Serve) -> None:
    server = serve(lambda number, body: (200, said(body["messages"][0]["content"].upper()), {}))
    asked = [[{"role": "user", "content": f"q{number}"}] for number in range(20)]
    told: list[tuple[int, int]] = []
    replies = endpoint.ask_all(
        Endpoint(url=server.url, model="m"),
        asked,
        max_tokens=1,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert [reply.text for reply in replies] == [f"Q{number}" for number in range(20)]
    assert told == [(number, 20) for number in range(1, 21)]


def test_a_busy_server_is_asked_again_later_and_later(serve: Serve) -> None:
    replies: list[Reply] = [
        (429, {}, {"Retry-After": "3"}),
        (503, {}, {"Retry-After": "Fri, 31 Dec 2027 23:59:59 GMT"}),
        (500, {}, {"Retry-After": "100000"}),
        (200, said("at last"), {}),
    ]
    server = serve(lambda number, body: replies[number])
    waits: list[float] = []
    reply = endpoint.ask(Endpoint(url=server.url, model="m"), ASKED, max_tokens=1, sleep=waits.append)
    assert (reply.text, waits) == ("at last", [3.0, 1.0, 60.0])


def test_it_is_given_up_after_the_last_try(serve: Serve) -> None:
    server = serve(lambda number, body: (500, {"error": {"message": f"broken by {SECRET}\n\x1b[31m" + "x" * 500}}, {}))
    waits: list[float] = []
    with pytest.raises(StorageError, match="answers 500: broken by …") as caught:
        endpoint.ask(Endpoint(url=server.url, model="m", tries=3), ASKED, max_tokens=1, sleep=waits.append)
    assert (len(server.seen), waits) == (3, [0.5, 1.0])
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("code", "value", "line"),
    [
        (401, {"error": {"message": "no key"}}, "answers 401: no key; set OPENAI_API_KEY to the server's key"),
        (404, {"error": "no model m"}, "answers 404: no model m; check compare.endpoint and compare.endpoint_model"),
        (422, b"<html>no</html>", "answers 422: <html>no</html>"),
    ],
)
def test_a_refusal_is_final(serve: Serve, code: int, value: Any, line: str) -> None:
    server = serve(lambda number, body: (code, value, {}))
    with pytest.raises(StorageError) as caught:
        endpoint.ask(Endpoint(url=server.url, model="m"), ASKED, max_tokens=1)
    assert str(caught.value) == f"{server.url}: {line}"
    assert len(server.seen) == 1


def test_nobody_waits_for_a_slow_answer_after_a_refusal(serve: Serve) -> None:
    refused, done = threading.Event(), threading.Event()

    def script(number: int, body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "slow":
            refused.set()
            done.wait(30)
            return 200, said("late"), {}
        refused.wait(30)  # the slow one is under way
        return 403, {"error": "no"}, {}

    server = serve(script)
    asked = [[{"role": "user", "content": each}] for each in ("refused", "slow")]
    with pytest.raises(StorageError, match="answers 403"):
        endpoint.ask_all(Endpoint(url=server.url, model="m"), asked, max_tokens=1)
    waited = done.is_set()
    done.set()
    assert not waited
    assert len(server.seen) == 2


def test_the_key_follows_no_redirect(serve: Serve) -> None:
    other = serve(lambda number, body: (200, said("stolen"), {}))
    server = serve(lambda number, body: (307, {}, {"Location": f"{other.url}/chat/completions"}))
    with pytest.raises(StorageError, match="answers 307"):
        endpoint.ask(Endpoint(url=server.url, model="m"), ASKED, max_tokens=1)
    assert other.seen == []


def test_the_newer_name_of_the_limit(serve: Serve) -> None:
    refusal = {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}}
    server = serve(lambda number, body: (400, refusal, {}) if "max_tokens" in body else (200, said("ok"), {}))
    assert endpoint.ask(Endpoint(url=server.url, model="m"), ASKED, max_tokens=4).text == "ok"
    assert server.seen[1][2]["max_completion_tokens"] == 4


@pytest.mark.parametrize(
    "value", [b"", b"{", [], {}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}, b"[" * 100_000]
)
def test_what_is_no_completion(serve: Serve, value: Any) -> None:
    server = serve(lambda number, body: (200, value, {}))
    with pytest.raises(StorageError, match="answers with"):
        endpoint.ask(Endpoint(url=server.url, model="m"), ASKED, max_tokens=1)


def test_half_a_character_can_be_written(serve: Serve) -> None:
    server = serve(lambda number, body: (200, said("a\ud83db"), {}))
    assert endpoint.ask(Endpoint(url=server.url, model="m"), ASKED, max_tokens=1).text == "a?b"


def test_nobody_is_there() -> None:
    nobody = Endpoint(url="http://user:pass@127.0.0.1:9/v1?key=1", model="m", tries=2)
    waits: list[float] = []
    with pytest.raises(StorageError) as caught:
        endpoint.ask(nobody, ASKED, max_tokens=1, sleep=waits.append)
    assert str(caught.value).startswith("http://127.0.0.1:9/v1: cannot be reached: ")
    assert waits == [0.5]


@pytest.mark.parametrize(
    "url", ["", "localhost:8080", "file:///etc/passwd", "http://", "http://a b/v1", "http://[", "http://a:x/"]
)
def test_no_url(url: str) -> None:
    with pytest.raises(InputError, match="no http or https URL"):
        endpoint.check(url, "m")


def test_no_model() -> None:
    with pytest.raises(InputError, match="is not set"):
        endpoint.check("http://localhost/v1", None)
