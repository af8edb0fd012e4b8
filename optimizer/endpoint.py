"""A client of OpenAI-compatible completion servers, for measuring them: `http(s)://host/v1#model`.

Small on purpose. It follows no redirect and no proxy, so that a key goes to the host that was named and a latency is
that of the server; every answer has a limit in bytes and a deadline, so that a hostile or broken server costs a typed
error and never a hang. A key comes from an environment variable only, and whatever a server sends back is shown
without it.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from optimizer.errors import EndpointError, RefusedRequestError, UsageError
from optimizer.report_units import clean

MOST_BYTES = 64 << 20  # of one answer
MOST_LINE = 4 << 20  # of one event of a stream
RETRIES = 4
LONGEST_WAIT = 30.0  # seconds waited before a retry, whatever the server asks for
STREAM_SHARE = 10  # a stream may take so many times the timeout as a whole
_BUSY, _REFUSED = (429, 503), (400, 422)


def is_endpoint(name: str) -> bool:
    """Whether a variant's name is that of an endpoint."""
    return name.lower().startswith(("http://", "https://"))


def parse_endpoint(name: str, api_key_variable: str | None = None, *, timeout_seconds: float = 60.0) -> Endpoint:
    """`http(s)://host[:port]/v1#model` as an `Endpoint`.

    Raises `UsageError` for a name without a model, with a secret in it, or for a variable that holds no usable key.
    """
    try:
        parts = urlsplit(name)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"the endpoint's address cannot be read: {error}; give http(s)://host/v1#model") from None
    if parts.username or parts.password or parts.query:
        raise UsageError(
            "an endpoint's address holds no user, password or query, which would end up in the report; name the "
            "environment variable that holds the key with --api-key-env"
        )
    model = unquote(parts.fragment)
    if not host or not model or not clean(model) == model:
        raise UsageError(f"the endpoint {name!r:.200} names no host or no model; give http(s)://host/v1#model")
    if api_key_variable is not None:
        key = os.environ.get(api_key_variable, "")
        if not key or not key.isascii() or not key.isprintable():
            raise UsageError(
                f"the environment variable {api_key_variable} holds no usable key; set it, or leave --api-key-env out"
            )
    if not timeout_seconds > 0:
        raise UsageError(f"timeout {timeout_seconds!r} must be a positive number of seconds")
    path = parts.path.rstrip("/").removesuffix("/completions")
    return Endpoint(parts.scheme.lower(), host, port, path, model, api_key_variable, timeout_seconds)


@dataclass(frozen=True)
class Endpoint:
    """A server and the model to ask of it. It knows the name of the variable with the key, and never keeps the key.

    `timeout_seconds` bounds a whole answer, and in a stream each wait for more.
    """

    scheme: str
    hostname: str
    port: int | None
    path: str
    model: str
    api_key_variable: str | None = None
    timeout_seconds: float = 60.0

    @property
    def host(self) -> str:
        """`host` or `host:port`."""
        name = f"[{self.hostname}]" if ":" in self.hostname else self.hostname
        return name if self.port is None else f"{name}:{self.port}"

    @property
    def url(self) -> str:
        """Where completions are asked for."""
        return f"{self.scheme}://{self.host}{self.path}/completions"

    def post(self, payload: Mapping[str, Any], *, sleep: Callable[[float], object] = time.sleep) -> dict[str, Any]:
        """The answer to one request. A busy server (429, 503) is asked again, as late as it says.

        Raises `EndpointError` for anything but a JSON object with status 200.
        """
        body = b"".join(self._exchange(payload, self.timeout_seconds, sleep))
        return self._object(body)

    def stream(
        self, payload: Mapping[str, Any], *, sleep: Callable[[float], object] = time.sleep
    ) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer, each as it comes. Raises `EndpointError` where it breaks off.

        It ends with `[DONE]`; some servers leave that out, and end after the event that says why they finished.
        """
        buffer, finished = b"", False
        for piece in self._exchange({**payload, "stream": True}, STREAM_SHARE * self.timeout_seconds, sleep):
            *lines, buffer = (buffer + piece).split(b"\n")
            if len(buffer) > MOST_LINE:
                raise self._error(f"sent a line of more than {MOST_LINE} bytes")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue  # comments and blank lines between events
                if (data := line.removeprefix(b"data:").strip()) == b"[DONE]":
                    return
                event = self._object(data)
                finished = finished or _finish_reason(event) is not None
                yield event
        if not finished:
            raise self._error("ended a stream without [DONE] and without a finish_reason")

    def _exchange(
        self, payload: Mapping[str, Any], seconds: float, sleep: Callable[[float], object]
    ) -> Iterator[bytes]:
        """The pieces of a successful answer's body."""
        for attempt in range(RETRIES + 1):
            deadline = time.monotonic() + seconds
            connection = self._connect()
            try:
                response = self._send(connection, payload)
                if response.status in _BUSY and attempt < RETRIES:
                    wait = _wait(response.getheader("Retry-After"), attempt)
                elif response.status != 200:
                    body = b"".join(self._pieces(response, deadline, 4096))
                    problem = f"answered {response.status} {response.reason}: {self._shown(body)}"
                    raise self._error(problem, RefusedRequestError if response.status in _REFUSED else EndpointError)
                else:
                    yield from self._pieces(response, deadline, MOST_BYTES)
                    return
            finally:
                connection.close()
            sleep(wait)

    def _connect(self) -> http.client.HTTPConnection:
        if self.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.hostname, self.port, timeout=self.timeout_seconds, context=context)
        return http.client.HTTPConnection(self.hostname, self.port, timeout=self.timeout_seconds)

    def _send(self, connection: http.client.HTTPConnection, payload: Mapping[str, Any]) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request(
                "POST", f"{self.path}/completions", json.dumps({"model": self.model, **payload}), headers
            )
            return connection.getresponse()
        except TimeoutError:
            raise self._error(f"gave no answer within {self.timeout_seconds:g} s") from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise self._error(f"cannot be asked: {type(error).__name__} {error}") from None

    def _pieces(self, response: http.client.HTTPResponse, deadline: float, most: int) -> Iterator[bytes]:
        """The body as it comes. A body that is only quoted in an error may be cut at `most`; any other may not."""
        size = 0
        while True:
            try:
                piece = response.read1(1 << 16)
            except TimeoutError:
                raise self._error(f"sent nothing for {self.timeout_seconds:g} s") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self._error(f"broke off its answer: {type(error).__name__}") from None
            if not piece:
                if response.length:  # of a body whose length was promised, this much is missing
                    raise self._error(f"broke off its answer {response.length} bytes early")
                return
            size += len(piece)
            if time.monotonic() > deadline:
                raise self._error("took longer over one answer than it may")
            yield piece
            if size > most:
                if most < MOST_BYTES:
                    return
                raise self._error(f"sent more than {most} bytes in one answer")

    def _object(self, body: bytes) -> dict[str, Any]:
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise self._error(f"sent something that is not JSON: {self._shown(body)}") from None
        if isinstance(document, dict) and "error" in document:
            raise self._error(f"sent an error: {self._shown(json.dumps(document['error']).encode())}")
        if not isinstance(document, dict):
            raise self._error(f"sent JSON that is no object: {self._shown(body)}")
        return document

    def _key(self) -> str:
        return os.environ.get(self.api_key_variable, "") if self.api_key_variable else ""

    def _shown(self, body: bytes) -> str:
        """The start of what a server sent, safe to show: one line, no control characters, no key."""
        return self._without_key(clean(body[:4096].decode("utf-8", "replace")))[:200]

    def _without_key(self, text: str) -> str:
        key = self._key()
        return text.replace(key, "***") if key else text

    def _error(self, problem: str, kind: type[EndpointError] = EndpointError) -> EndpointError:
        return kind(f"{self.url} ({self.model}) {self._without_key(clean(problem))}")


def _finish_reason(event: Mapping[str, Any]) -> Any:
    """Why the only choice of a stream ended; None while it goes on."""
    choices = event.get("choices")
    return (
        choices[0].get("finish_reason")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict)
        else None
    )


def _wait(asked: str | None, attempt: int) -> float:
    """Seconds before the next attempt: what the server asks for in seconds, else 1, 2, 4, ...; never long."""
    try:
        seconds = float(asked) if asked is not None else 2.0**attempt
    except ValueError:  # a date, or nonsense
        seconds = 2.0**attempt
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else 2.0**attempt
