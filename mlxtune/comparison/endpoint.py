"""Asks an OpenAI-compatible server for chat completions. Knows its JSON and how it fails, not what is asked.

The key is taken from OPENAI_API_KEY, goes into one header and nowhere else: redirects, which would take it to another
place, are refused. Only the standard library is used.
"""

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from typing import IO, Any

from mlxtune.errors import InputError, StorageError

KEY = "OPENAI_API_KEY"
PATH = "/chat/completions"
LARGEST_REPLY = 16 << 20  # bytes
LONGEST_WAIT = 60.0  # seconds between two tries, also where the server asks for more
SHOWN = 200  # characters of what a server says about a failure
KEPT = ("role", "content", "name", "tool_call_id")

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server and how to ask it: `tries` in all, `at_once` requests side by side, times in seconds."""

    url: str
    model: str
    timeout: float = 120.0
    tries: int = 5
    at_once: int = 4
    first_wait: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer, the tokens that the server counted (None where it does not say), and the seconds it took."""

    text: str
    prompt_tokens: int | None
    answer_tokens: int | None
    seconds: float


def is_url(name: str) -> bool:
    """Whether a name is that of a server rather than of a model."""
    return name.lower().startswith(("http://", "https://"))


def check(url: str | None, model: str | None) -> Endpoint:
    """The endpoint that a recipe names. Raises InputError for what is no URL, and without a model."""
    if not _is_address(url or ""):
        hint = "e.g. http://localhost:8080/v1"
        raise InputError(f"is {url!r}, no http or https URL", where="compare.endpoint", hint=hint)
    if not model:
        raise InputError("is not set", where="compare.endpoint_model", hint="name the model that the endpoint serves")
    return Endpoint(url=url or "", model=model)


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not any(map(str.isspace, url))


def shown(endpoint: Endpoint) -> str:
    """The endpoint's address without a user, a password or a query in it."""
    parts = urllib.parse.urlsplit(endpoint.url)
    port = f":{parts.port}" if parts.port is not None else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


def ask_all(
    endpoint: Endpoint,
    conversations: Sequence[Messages],
    *,
    max_tokens: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Reply]:
    """The answers to all conversations, in their order, some at a time, at temperature 0.

    Raises StorageError as `ask` does, as soon as one conversation fails; those that wait are then not asked. Nobody
    waits for those under way then, nor after Ctrl-C: a server may take minutes.
    """
    found: list[Reply] = []
    with ThreadPool(endpoint.at_once) as pool:
        for reply in pool.imap(lambda each: ask(endpoint, each, max_tokens=max_tokens), conversations):
            found.append(reply)
            on_progress(len(found), len(conversations))
    return found


def ask(
    endpoint: Endpoint, messages: Messages, *, max_tokens: int, sleep: Callable[[float], None] = time.sleep
) -> Reply:
    """One answer. Tried again, each time after twice the wait, where the server is busy, broken or out of reach.

    Raises StorageError with the server's address and its own words, never with the key or the question.
    """
    body = {
        "model": endpoint.model,
        "messages": [_plain(message) for message in messages],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    started = time.monotonic()
    for attempt in range(1, endpoint.tries + 1):
        try:
            return _read(endpoint, _sent(endpoint, body), time.monotonic() - started)
        except urllib.error.HTTPError as error:
            said = _said(error)
            if error.code == 400 and "max_completion_tokens" in said and "max_tokens" in body:
                body["max_completion_tokens"] = body.pop("max_tokens")  # what newer servers call it
                continue
            if attempt == endpoint.tries or not (error.code in (408, 429) or error.code >= 500):
                raise _refused(endpoint, error.code, said) from None
            sleep(_wait(endpoint, attempt, error.headers))
        except (OSError, HTTPException) as error:  # no such host, refused, timed out, cut off
            if attempt == endpoint.tries:
                reason = getattr(error, "reason", None) or error or type(error).__name__
                hint = "check the address, or start the server"
                raise StorageError(f"cannot be reached: {reason}", where=shown(endpoint), hint=hint) from None
            sleep(_wait(endpoint, attempt, None))
    raise StorageError("takes neither max_tokens nor max_completion_tokens", where=shown(endpoint))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None  # which makes the redirect an HTTPError


def _sent(endpoint: Endpoint, body: dict[str, Any]) -> bytes:
    address = endpoint.url.rstrip("/")
    address = address if urllib.parse.urlsplit(address).path.endswith(PATH) else address + PATH
    headers = {"Content-Type": "application/json", "User-Agent": "mlxtune"}
    key = os.environ.get(KEY, "").strip()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(request, timeout=endpoint.timeout) as reply:
        return _limited(reply)


def _limited(reply: IO[bytes]) -> bytes:
    found = reply.read(LARGEST_REPLY + 1)
    return found if len(found) <= LARGEST_REPLY else b""


def _read(endpoint: Endpoint, raw: bytes, seconds: float) -> Reply:
    try:
        value = json.loads(raw)
        text = value["choices"][0]["message"]["content"]
        usage = value.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        what = "answers with something else than a chat completion"
        raise StorageError(
            what, where=shown(endpoint), hint="give the URL that ends before /chat/completions"
        ) from None
    if text is not None and not isinstance(text, str):
        raise StorageError("answers with a content that is no text", where=shown(endpoint))
    prompt, answer = (count if type(count) is int and count >= 0 else None for count in counts)
    text = (text or "").encode("utf-8", "replace").decode()  # half a character cannot be written to a file
    return Reply(text=text, prompt_tokens=prompt, answer_tokens=answer, seconds=seconds)


def _said(error: urllib.error.HTTPError) -> str:
    """What a server says about its refusal, in a line."""
    try:
        raw = error.read(10_000)
    except (OSError, HTTPException):
        return ""
    try:
        found = json.loads(raw)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, LookupError, TypeError, RecursionError):
        text = raw.decode("utf-8", "replace")
    key = os.environ.get(KEY, "").strip()
    text = text.replace(key, "…") if key else text  # some servers repeat it
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def _refused(endpoint: Endpoint, code: int, said: str) -> StorageError:
    hints = {
        401: f"set {KEY} to the server's key",
        403: f"set {KEY} to a key that may ask this",
        404: "check compare.endpoint and compare.endpoint_model",
        429: "try again later",
    }
    moved = 300 <= code < 400
    hint = "give the address that it moved to" if moved else hints.get(code)
    return StorageError(f"answers {code}{f': {said}' if said else ''}", where=shown(endpoint), hint=hint)


def _wait(endpoint: Endpoint, attempt: int, headers: Message | None) -> float:
    """Seconds before the next try: twice as long each time, or as the server asks, within bounds."""
    asked = headers.get("Retry-After", "") if headers is not None else ""
    own = float(asked) if asked.replace(".", "", 1).isdigit() else 0.0
    return min(LONGEST_WAIT, max(own, endpoint.first_wait * 2.0 ** (attempt - 1)))


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the API takes it: the arguments of a tool call are a text there."""
    found = {name: message[name] for name in KEPT if name in message}
    if message.get("tool_calls"):
        found["tool_calls"] = [
            {
                **call,
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"].get("arguments", {}), ensure_ascii=False),
                },
            }
            for call in message["tool_calls"]
        ]
    return found
