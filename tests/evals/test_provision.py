"""Replicas for a load: both ways of serving against a request-by-request count, and the objectives they keep."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import UsageError
from optimizer.evals.architecture import from_parameters
from optimizer.evals.fleet import Layout, Replica
from optimizer.evals.hardware import find_gpu
from optimizer.evals.provision import Demand, best, colocated, disaggregated

SIZES = {"d_model": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "head_dim": 128}
REPLICA = Replica(from_parameters(70e9, **SIZES), find_gpu("H100"), Layout(8))
CHAT = Demand(1024, 256, requests_per_second=20, ttft=1.0, tpot=0.03)


def test_colocated_batches_end_as_many_requests_as_they_start():
    """In the time of one request's decode steps, a full batch turns over once: B prefills and the steps themselves."""
    service = colocated(REPLICA, CHAT)
    prefill = REPLICA.prefill(1, 1024).seconds
    turn = 255 * REPLICA.decode(service.batch, CHAT.mean_context).seconds + service.batch * prefill
    replicas = math.ceil(20 / (service.batch / turn))
    assert (service.prefill_replicas, service.decode_replicas, service.gpus) == (0, replicas, 8 * replicas)
    assert service.goodput == pytest.approx(replicas * service.batch / turn)
    assert service.ttft == prefill


def test_the_batch_is_the_largest_within_the_objective():
    service = colocated(REPLICA, CHAT)
    stall = REPLICA.prefill(1, 1024).seconds / 255
    at = [REPLICA.decode(b, CHAT.mean_context).seconds + b * stall for b in (service.batch, service.batch + 1)]
    assert at[0] <= 0.03 < at[1]
    assert colocated(REPLICA, replace(CHAT, tpot=math.inf)).batch == REPLICA.capacity(CHAT.context)


def test_disaggregated_pools_each_carry_the_load():
    service = disaggregated(REPLICA, CHAT)
    prefill, step = REPLICA.prefill(1, 1024).seconds, REPLICA.decode(service.batch, CHAT.mean_context).seconds
    assert service.kv_transfer_seconds == REPLICA.kv_transfer_seconds(1024)
    assert service.ttft == pytest.approx(prefill + service.kv_transfer_seconds)
    assert service.prefill_replicas == math.ceil(20 * prefill)
    assert service.decode_replicas == math.ceil(20 * 255 * step / service.batch)
    assert service.tpot == step <= 0.03
    assert service.goodput >= 20


def test_disaggregation_keeps_larger_batches_within_the_same_objective():
    assert disaggregated(REPLICA, CHAT).batch > colocated(REPLICA, CHAT).batch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ttft": 0.001}, "the first token of 1024 takes at least"),
        ({"tpot": 0.001}, "a later token takes at least"),
        ({"prompt": 4_000_000}, "no request of"),
    ],
)
@pytest.mark.parametrize("serve", [colocated, disaggregated])
def test_objectives_that_no_number_of_replicas_keeps(serve, changes, words):
    with pytest.raises(UsageError, match=words):
        serve(REPLICA, replace(CHAT, **({"ttft": math.inf} | changes)))


@pytest.mark.parametrize(
    "bad", [{"prompt": 0}, {"output": 1}, {"requests_per_second": 0}, {"ttft": 0}, {"tpot": float("nan")}]
)
def test_demands_that_cannot_be(bad):
    with pytest.raises(UsageError, match="at least 2"):
        replace(CHAT, **bad)


@settings(max_examples=40, deadline=None)
@given(load=st.floats(0.01, 1000), tpot=st.floats(0.02, 1), prompt=st.integers(1, 8000), output=st.integers(2, 2000))
def test_replicas_carry_the_load_and_a_spare_one_would_be_too_many(load, tpot, prompt, output):
    demand = Demand(prompt, output, load, tpot=tpot)
    for serve in (colocated, disaggregated):
        try:
            service = serve(REPLICA, demand)
        except UsageError:
            assert serve is colocated  # prefills of others are in the way
            continue
        assert service.goodput >= load * (1 - 1e-12)
        assert service.tpot <= tpot
        assert service.batch <= REPLICA.capacity(demand.context)
        twice = serve(REPLICA, replace(demand, requests_per_second=2 * load))
        assert service.gpus <= twice.gpus <= 2 * service.gpus


def test_the_best_division_of_more_gpus_serves_no_less():
    served = []
    for gpus in (2, 4, 8, 16, 32):
        found = best(replace(REPLICA, layout=Layout()), gpus, CHAT)
        service = colocated(found, replace(CHAT, requests_per_second=1e-9))
        served.append(service.goodput * gpus / found.layout.gpus)
    assert served == sorted(served)


def test_what_does_not_fit_says_how_many_would():
    with pytest.raises(
        UsageError, match="does not fit on 1 × H100 SXM of 80 GB; the smallest number that holds it is 2"
    ):
        best(replace(REPLICA, layout=Layout()), 1, CHAT)


def test_objectives_that_no_division_keeps_are_named():
    with pytest.raises(UsageError, match="a later token takes at least"):
        best(replace(REPLICA, layout=Layout()), 2, replace(CHAT, tpot=0.001))
