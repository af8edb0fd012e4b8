"""A completion server on this machine: `/v1/completions` answered by a small model, or by whatever a test wants.

`faults` holds what the next requests get instead of an answer, one each, in order: a function of the handler.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from tests.evals.small_runner import SmallRunner, small_tokenizer

Fault = Callable[[BaseHTTPRequestHandler], None]


class FakeServer:
    """What the server was asked, and what it answers."""

    def __init__(self, runner: SmallRunner) -> None:
        self.runner, self.lock = runner, threading.Lock()
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.delay = 0.0
        self.tokens_a_chunk = 1
        self.text_only = False  # as `transformers serve`: prompts are text, and no stream ends with [DONE]
        self.port = 0

    @property
    def name(self) -> str:
        """The variant's name."""
        return f"http://127.0.0.1:{self.port}/v1#small"

    def score(self, payload: dict[str, Any]) -> dict[str, Any]:
        """An echo of each prompt with the log-probability of each token, and one token more, as vLLM answers."""
        choices = []
        for index, prompt in enumerate(payload["prompt"]):
            tokens = torch.tensor([prompt])
            self.runner.reset(1)
            logs = self.runner.prefill(tokens, all_logits=True)[0].double().log_softmax(-1)
            values: list[float | None] = [None]
            tops: list[dict[str, float] | None] = [None]
            for place, token in enumerate([*prompt[1:], int(logs[-1].argmax())]):
                best = int(logs[place].argmax())
                values.append(float(logs[place, token]))
                tops.append({f"t{best}": float(logs[place, best]), f"t{token}": float(logs[place, token])})
            logprobs = {"token_logprobs": values, "top_logprobs": tops}
            choices.insert(0, {"index": index, "text": "", "logprobs": logprobs})  # in no useful order
        return {"choices": choices}

    def made(self, prompt: list[int], payload: dict[str, Any]) -> list[int]:
        """Greedy tokens after `prompt`."""
        with self.lock:
            out = self.runner.generate(torch.tensor([prompt]), max_new_tokens=payload["max_tokens"])
        return [int(token) for token in out[0, len(prompt) :]]

    def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        tokenizer = small_tokenizer()
        choices = []
        prompts = payload["prompt"]
        for index, prompt in enumerate([prompts] if isinstance(prompts[0], int) else prompts):
            tokens = self.made(prompt, payload)
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            for stop in payload.get("stop", []):
                text = text.split(stop)[0]
            choices.append({"index": index, "text": text})
        return {"choices": choices}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        payload = json.loads(body)
        with self.fake.lock:
            self.fake.requests.append(payload)
            self.fake.headers.append(dict(self.headers))
            fault = self.fake.faults.pop(0) if self.fake.faults else None
        if fault is not None:
            fault(self)
        elif self.fake.text_only and not isinstance(payload["prompt"], str):
            send(self, 400, '{"detail": "prompt must be a string."}')
        elif payload.get("stream"):
            self.stream(payload)
        else:
            send(
                self, 200, json.dumps(self.fake.score(payload) if payload.get("echo") else self.fake.generate(payload))
            )

    def stream(self, payload: dict[str, Any]) -> None:
        prompt = payload["prompt"]
        tokens = self.fake.made(small_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt, payload)
        begin_stream(self)
        step = self.fake.tokens_a_chunk
        for start in range(0, len(tokens), step):
            time.sleep(self.fake.delay)
            send_chunk(self, {"choices": [{"index": 0, "text": "x" * len(tokens[start : start + step])}]})
        usage = {"completion_tokens": len(tokens)}
        if self.fake.text_only:
            send_chunk(self, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": usage})
            end_stream(self, done=b"")
        else:
            send_chunk(self, {"choices": [], "usage": usage})
            end_stream(self)

    def log_message(self, *_: Any) -> None: ...


def send(handler: BaseHTTPRequestHandler, status: int, body: str | bytes, **headers: str) -> None:
    """A whole answer."""
    raw = body.encode() if isinstance(body, str) else body
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(raw)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(raw)


def begin_stream(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()


def send_chunk(handler: BaseHTTPRequestHandler, event: Any) -> None:
    """One event of a stream, in a chunk of its own."""
    send_raw(handler, f"data: {json.dumps(event)}\n\n".encode())


def send_raw(handler: BaseHTTPRequestHandler, raw: bytes) -> None:
    handler.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
    handler.wfile.flush()


def end_stream(handler: BaseHTTPRequestHandler, done: bytes = b"data: [DONE]\n\n") -> None:
    if done:
        send_raw(handler, done)
    handler.wfile.write(b"0\r\n\r\n")


def nothing(handler: BaseHTTPRequestHandler) -> None:
    """Take the request and never answer (longer than any test waits)."""
    time.sleep(1.5)
    handler.close_connection = True


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None: ...  # a client that hung up, as the tests have it do


@contextmanager
def fake_server(runner: SmallRunner) -> Iterator[FakeServer]:
    """Serve on a free port of the loopback interface."""
    fake = FakeServer(runner)
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = _QuietServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    fake.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
