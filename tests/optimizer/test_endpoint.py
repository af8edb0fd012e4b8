"""The client of completion servers, against a server on this machine that also misbehaves."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from optimizer import endpoint as module
from optimizer.endpoint import Endpoint, parse_endpoint
from optimizer.endpoint_lm import EndpointLM, takes_tokens, time_endpoint
from optimizer.endpoint_serving import RemoteEngine, serve_remote
from optimizer.errors import EndpointError, RefusedRequestError, UsageError
from optimizer.evals.quality import compare, evaluate, evaluate_model
from optimizer.evals.runner_lm import RunnerLM
from optimizer.evals.serving import replay
from optimizer.evals.timing import Workload
from optimizer.evals.workloads import Arrival, Schedule
from optimizer.recipe import ServingSpec
from tests.evals.small_runner import SmallRunner, small_model, small_tokenizer
from tests.optimizer.fake_endpoint import (
    FakeServer,
    begin_stream,
    end_stream,
    fake_server,
    nothing,
    send,
    send_chunk,
    send_raw,
)

TASKS = ["reference_perplexity", "reference_next_line", "reference_cloze"]
KEY = "sk-very-secret-4711"
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with fake_server(SmallRunner(small_model())) as fake:
        fake.score({"prompt": [[3, 4]]})  # the first forward is slow, and the tests' timeouts are short
        yield fake


@pytest.fixture(autouse=True)
def fresh(server: FakeServer) -> None:
    server.faults.clear()
    server.requests.clear()
    server.headers.clear()
    server.delay, server.tokens_a_chunk, server.text_only = 0.0, 1, False


@pytest.fixture
def endpoint(server: FakeServer) -> Endpoint:
    return parse_endpoint(server.name, timeout_seconds=0.5)


def no_sleep(waited: list[float]) -> Callable[[float], None]:
    return waited.append


# Names


@pytest.mark.parametrize(
    ("name", "url", "model"),
    [
        ("http://h/v1#m", "http://h/v1/completions", "m"),
        ("https://h:8443/v1/#org/model", "https://h:8443/v1/completions", "org/model"),
        ("HTTP://[::1]:80/v1/completions#a%20b", "http://[::1]:80/v1/completions", "a b"),
        ("http://h#m", "http://h/completions", "m"),
    ],
)
def test_a_name_is_an_address_and_a_model(name: str, url: str, model: str) -> None:
    found = parse_endpoint(name)
    assert (found.url, found.model) == (url, model)


@pytest.mark.parametrize(
    "name",
    ["http://h/v1", "http:///v1#m", "http://h:99999/v1#m", "http://[::1/v1#m", "http://h/v1#a%00b", "http://h/v1#%0am"],
)
def test_a_name_without_host_or_model_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="http\\(s\\)://host/v1#model"):
        parse_endpoint(name)


@pytest.mark.parametrize("name", [f"http://user:{KEY}@h/v1#m", f"http://h/v1?key={KEY}#m", f"http://{KEY}@h/v1#m"])
def test_a_secret_in_the_name_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(UsageError, match="--api-key-env") as caught:
        parse_endpoint(name)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "a\nb", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(UsageError, match="SOME_KEY holds no usable key"):
        parse_endpoint("http://h/v1#m", "SOME_KEY")


def test_the_key_is_sent_and_shown_nowhere(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    endpoint = parse_endpoint(server.name, "SOME_KEY")
    server.faults.append(lambda h: send(h, 401, f"no such key {KEY}"))
    with pytest.raises(EndpointError, match="401 Unauthorized: no such key \\*\\*\\*") as caught:
        endpoint.post({"prompt": "x"})
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value) + repr(endpoint)


def test_without_a_variable_no_key_is_sent(server: FakeServer, endpoint: Endpoint, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint.post({"prompt": [[3, 4]], "echo": True})
    assert "Authorization" not in server.headers[0]


# Failures


def test_nobody_listens() -> None:
    with pytest.raises(EndpointError, match="cannot be asked: ConnectionRefusedError"):
        parse_endpoint("http://127.0.0.1:9/v1#m").post({})


def test_no_answer_within_the_timeout(server: FakeServer, endpoint: Endpoint) -> None:
    server.faults.append(nothing)
    with pytest.raises(EndpointError, match=r"gave no answer within 0\.5 s"):
        endpoint.post({})


def test_an_answer_that_drips_for_ever_meets_its_deadline(server: FakeServer, endpoint: Endpoint) -> None:
    def drip(handler: Any) -> None:
        begin_stream(handler)
        for _ in range(12):
            send_raw(handler, b" ")
            time.sleep(0.1)

    server.faults.append(drip)
    with pytest.raises(EndpointError, match="took longer over one answer"):
        endpoint.post({})


def test_a_busy_server_is_asked_again_as_late_as_it_says(server: FakeServer, endpoint: Endpoint) -> None:
    waited: list[float] = []
    for asked in ("0.25", "9999", "Wed, 21 Oct 2037 07:28:00 GMT", "nan"):
        server.faults.append(lambda h, asked=asked: send(h, 429, "slow down", Retry_After=asked))
    answer = endpoint.post({"prompt": [[3, 4]], "echo": True}, sleep=no_sleep(waited))
    assert answer["choices"]
    assert waited == [0.25, module.LONGEST_WAIT, 4.0, 8.0]


def test_a_server_that_stays_busy_is_given_up(server: FakeServer, endpoint: Endpoint) -> None:
    server.faults += [lambda h: send(h, 503, "full")] * (module.RETRIES + 1)
    waited: list[float] = []
    with pytest.raises(EndpointError, match="answered 503 Service Unavailable: full"):
        endpoint.post({}, sleep=no_sleep(waited))
    assert waited == [1, 2, 4, 8]


def test_no_redirect_is_followed(server: FakeServer, endpoint: Endpoint) -> None:
    server.faults.append(lambda h: send(h, 307, "", Location="http://127.0.0.1:9/elsewhere"))
    with pytest.raises(EndpointError, match="answered 307"):
        endpoint.post({})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"<html>\x1b[31m</html>", "is not JSON: <html>\N{REPLACEMENT CHARACTER}"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "no object"),
        (b'{"error": {"message": "no"}}', "sent an error"),
        (b"\xff\xfe", "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_a_body_that_is_no_answer(server: FakeServer, endpoint: Endpoint, body: bytes, problem: str) -> None:
    server.faults.append(lambda h: send(h, 200, body))
    with pytest.raises(EndpointError) as caught:
        endpoint.post({})
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_body_that_breaks_off(server: FakeServer, endpoint: Endpoint) -> None:
    def short(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices"')
        handler.close_connection = True

    server.faults.append(short)
    with pytest.raises(EndpointError, match="broke off its answer"):
        endpoint.post({})


def test_a_body_without_end(server: FakeServer, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 10_000)
    server.faults.append(lambda h: send(h, 200, b" " * 50_000))
    with pytest.raises(EndpointError, match="more than 10000 bytes"):
        endpoint.post({})


# Quality


def test_a_served_model_scores_what_it_scores_here(server: FakeServer) -> None:
    here = evaluate(SmallRunner(small_model()), small_tokenizer(), TASKS, limit=4, batch_size=3, max_length=256)
    endpoint = parse_endpoint(server.name)
    there = evaluate_model(
        lambda: EndpointLM(endpoint, small_tokenizer(), batch_size=3, max_length=256), TASKS, limit=4
    )
    for item in compare(here, there):
        assert item.optimized == pytest.approx(item.baseline, rel=1e-4), item.task
    assert [item.answer for item in here.items if item.likelihood is None] == [
        item.answer for item in there.items if item.likelihood is None
    ]
    assert len(here.items) == 12


def test_scoring_asks_what_local_completions_of_lm_eval_asks(server: FakeServer, endpoint: Endpoint) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = EndpointLM(endpoint, small_tokenizer(), max_length=64, seed=1234)
    rows = [[0, 5, 6, 7], [0, 8]]
    scored = lm._score_batch(rows, [2, 1])
    theirs = LocalCompletionsAPI._create_payload(SimpleNamespace(model="small"), rows)
    assert server.requests[0] == theirs
    outputs = server.score(theirs)
    expected = LocalCompletionsAPI.parse_logprobs(outputs, ctxlens=[2, 1])
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]
    assert [value for value, _ in scored] == pytest.approx([value for value, _ in expected])


def logprobs(values: Any, tops: Any = None, **choice: Any) -> str:
    given = [{}] * len(values) if tops is None and isinstance(values, list) else tops
    content = {"token_logprobs": values, "top_logprobs": given}
    return json.dumps({"choices": [{"index": 0, "logprobs": content} | choice]})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("{}", "answered 1 prompts with the choices"),
        ('{"choices": [{"index": 1}]}', "with the choices"),
        ('{"choices": [{"index": [0]}]}', "with the choices"),
        ('{"choices": [{"index": 0, "logprobs": null}]}', "cannot be read"),
        (logprobs([-1.0]), "echoed 1 log-probabilities of a prompt of 3 tokens"),
        (logprobs([None, None, "x"], [{"a": 1}] * 3), "cannot be read"),
        (logprobs([None, -1.0, -1.0], [None, None, None]), "cannot be read"),
        (logprobs([None, -1.0, -1.0], [{}, {}, {}]), "cannot be read"),
    ],
)
def test_hostile_log_probabilities(server: FakeServer, endpoint: Endpoint, body: str, problem: str) -> None:
    server.faults.append(lambda h: send(h, 200, body))
    with pytest.raises(EndpointError, match=problem):
        EndpointLM(endpoint, small_tokenizer(), max_length=64)._score_batch([[0, 5, 6]], [2])


def test_a_nan_is_counted_and_not_hidden(server: FakeServer, endpoint: Endpoint) -> None:
    lm = EndpointLM(endpoint, small_tokenizer(), max_length=64)
    server.faults.append(lambda h: send(h, 200, logprobs([None, math.nan], [None, {"a": math.nan}])))
    ((value, _),) = lm._score([([0], [5])], "loglikelihood")
    assert math.isnan(value)
    assert lm.non_finite == 1


def test_generation_cuts_at_the_stop_string_as_a_local_runner_does(server: FakeServer, endpoint: Endpoint) -> None:
    options = {"until": ["e", "\n"], "max_gen_toks": 12}
    prompts = [[0, 40, 41, 42], [0, 60, 61]]
    remote = EndpointLM(endpoint, small_tokenizer(), max_length=64)._generate(prompts, options)
    local = [RunnerLM(SmallRunner(small_model()), small_tokenizer())._generate([p], options)[0] for p in prompts]
    assert remote == local
    server.faults.append(lambda h: send(h, 200, '{"choices": [{"index": 0, "text": 7}]}'))
    with pytest.raises(EndpointError, match="a choice without text"):
        EndpointLM(endpoint, small_tokenizer(), max_length=64)._generate(prompts[:1], options)


# Latency


def test_times_are_those_of_the_stream(server: FakeServer, endpoint: Endpoint) -> None:
    server.delay = 0.02
    timing = time_endpoint(endpoint, PROMPTS, Workload(1, 4, 6), repeats=3)
    assert timing.exact
    assert len(timing.ttft_rounds) == 3
    assert min(timing.tpot_rounds) >= 0.018  # a sleep is never short; 10 % for the clock
    assert timing.ttft.p50 >= 0.018
    assert timing.tokens_per_second <= 1 / 0.018
    assert {r["max_tokens"] for r in server.requests} == {6}
    assert all(r["stream"] is True and r["temperature"] == 0 for r in server.requests)


def test_chunks_of_several_tokens_are_noticed(server: FakeServer, endpoint: Endpoint) -> None:
    server.delay, server.tokens_a_chunk = 0.02, 3
    timing = time_endpoint(endpoint, PROMPTS, Workload(2, 4, 9), repeats=2)
    assert not timing.exact
    assert timing.tpot.n == 4  # one mean a request
    assert timing.tpot.p50 < 0.02  # two gaps of 20 ms over eight tokens


def test_a_server_that_takes_text_alone_and_ends_streams_without_done(server: FakeServer) -> None:
    endpoint = parse_endpoint(server.name, timeout_seconds=20)
    assert takes_tokens(endpoint, PROMPTS[0])
    server.text_only = True
    assert not takes_tokens(endpoint, PROMPTS[0])
    with pytest.raises(RefusedRequestError, match="prompt must be a string"):
        time_endpoint(endpoint, PROMPTS, Workload(1, 4, 6), repeats=1)
    with pytest.raises(RefusedRequestError, match="--tasks ''"):
        evaluate_model(lambda: EndpointLM(endpoint, small_tokenizer(), max_length=64), TASKS[:1], limit=1)
    server.requests.clear()
    found = time_endpoint(endpoint, ["def f():", "x = 1"], Workload(1, 4, 6), repeats=2, warmup=0)
    assert found.exact
    assert [request["prompt"] for request in server.requests] == ["def f():", "x = 1"]
    engine = RemoteEngine(endpoint, small_tokenizer().decode)
    request = engine.submit(PROMPTS[0], max_new_tokens=3)
    while engine.busy:
        engine.step()
    assert request.done
    assert server.requests[-1]["prompt"] == small_tokenizer().decode(PROMPTS[0])


def test_a_stream_that_breaks_off_or_says_nothing(server: FakeServer, endpoint: Endpoint) -> None:
    def cut(handler: Any) -> None:
        begin_stream(handler)
        send_chunk(handler, {"choices": [{"index": 0, "text": "a"}]})
        end_stream(handler, b"")

    def one(handler: Any) -> None:
        begin_stream(handler)
        send_chunk(handler, {"choices": [{"index": 0, "text": "a"}]})
        end_stream(handler)

    def many(handler: Any) -> None:
        begin_stream(handler)
        for _ in range(9):
            send_chunk(handler, {"choices": [{"index": 0, "text": "a"}]})
        end_stream(handler)

    def hung(handler: Any) -> None:
        begin_stream(handler)
        send_chunk(handler, {"choices": [{"index": 0, "text": "a"}]})
        nothing(handler)

    def error(handler: Any) -> None:
        begin_stream(handler)
        send_chunk(handler, {"error": "out of memory"})
        end_stream(handler)

    faults = {
        "without \\[DONE\\]": cut, "streamed 1 chunks": one, "streamed 9 chunks": many, "sent nothing for": hung,
        "out of memory": error,
    }  # fmt: skip
    for problem, fault in faults.items():
        server.faults.append(fault)
        with pytest.raises(EndpointError, match=problem):
            time_endpoint(endpoint, PROMPTS, Workload(1, 4, 6), repeats=1, warmup=0)


def test_a_line_without_end_is_cut_off(server: FakeServer, endpoint: Endpoint, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MOST_LINE", 1000)

    def long(handler: Any) -> None:
        begin_stream(handler)
        send_raw(handler, b"data: " + b"x" * 5000)

    server.faults.append(long)
    with pytest.raises(EndpointError, match="a line of more than 1000 bytes"):
        list(endpoint.stream({}))


# Serving


def arrivals(*seconds: float, most: int = 4) -> Schedule:
    return Schedule(tuple(Arrival(at, (5, 6, 7, 8), most) for at in seconds))


def test_requests_are_sent_when_they_are_due_and_run_at_once(server: FakeServer, endpoint: Endpoint) -> None:
    server.delay = 0.05
    records = replay(RemoteEngine(endpoint), arrivals(0.0, 0.0, 0.02))
    assert [record.outcome for record in records] == ["finished"] * 3
    assert [len(record.token_times) for record in records] == [4, 4, 4]
    for record in records:
        assert record.ttft is not None
        assert record.ttft >= 0.05
        assert all(gap >= 0.04 for gap in record.gaps)
    assert max(record.token_times[0] for record in records) < min(record.ended for record in records)
    assert records[2].submitted is not None
    assert records[2].submitted >= 0.02


def test_a_request_that_fails_misses_the_objective_and_stops_no_other(server: FakeServer, endpoint: Endpoint) -> None:
    server.faults.append(lambda h: send(h, 500, "out of memory"))
    spec = ServingSpec(preset="chat", requests=6, concurrency=2, ttft_ms=5000, tpot_ms=1000)
    corpus = [5 + i % 300 for i in range(5000)]
    report, shape, errors = serve_remote(endpoint, spec, corpus, 64)
    assert (report.finished, report.cancelled) == (5, 1)
    assert report.met_share.value == pytest.approx(5 / 6)
    assert "out of memory" in str(errors[0])
    assert shape.longest <= 64
    assert max(len(request["prompt"]) for request in server.requests) <= 64


def test_a_server_that_sends_more_than_was_asked_is_cut_off(server: FakeServer, endpoint: Endpoint) -> None:
    def many(handler: Any) -> None:
        begin_stream(handler)
        for _ in range(20):
            send_chunk(handler, {"choices": [{"index": 0, "text": "a"}]})
        end_stream(handler)

    server.faults.append(many)
    (record,) = replay(RemoteEngine(endpoint), arrivals(0.0))
    assert len(record.token_times) == 4


def test_a_server_that_hangs_ends_as_a_failure(server: FakeServer, endpoint: Endpoint) -> None:
    server.faults.append(nothing)
    engine = RemoteEngine(endpoint)
    (record,) = replay(engine, arrivals(0.0))
    assert record.outcome == "cancelled"
    assert "gave no answer" in str(engine.errors[0])
