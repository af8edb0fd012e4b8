import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from optimizer.errors import DataError, UsageError
from optimizer.evals.workloads import (
    PRESETS,
    Arrival,
    Burst,
    Closed,
    Gamma,
    Lengths,
    Poisson,
    Recorded,
    RequestSpec,
    Schedule,
    quadrants,
    schedule_requests,
)

SPEC = RequestSpec("test", Lengths(12, 0.5), Lengths(6, 0.5))
CORPUS = range(1000, 3000)  # ascending, so that a passage is recognised by its first token


def generator(seed=0):
    return np.random.default_rng(seed)


def test_a_constant_length_is_drawn_as_it_is():
    assert Lengths(7).draw(3, generator()) == [7, 7, 7]
    assert Lengths(7).most == 7


@pytest.mark.parametrize(("mean", "spread"), [(128, 0.5), (2048, 0.5), (500, 0.2)])
def test_lengths_follow_the_lognormal_of_their_mean_and_spread(mean, spread):
    lengths = Lengths(mean, spread)
    drawn = np.array(lengths.draw(50_000, generator()))
    assert drawn.mean() == pytest.approx(mean, rel=0.01)  # the cut takes under 1 %; the error of the mean is 0.2 %
    reference = stats.lognorm(s=lengths.sigma, scale=mean / math.sqrt(1 + spread**2))
    assert (reference.mean(), reference.std()) == pytest.approx((mean, mean * spread))
    assert lengths.most == pytest.approx(reference.ppf(0.99))
    assert drawn.max() == math.floor(lengths.most)
    assert np.mean(drawn == drawn.max()) == pytest.approx(0.01, abs=0.003)
    for q in (0.1, 0.5, 0.9):
        assert np.quantile(drawn, q) == pytest.approx(reference.ppf(q), rel=0.02)


def test_no_length_is_below_one_token():
    assert min(Lengths(1, 3.0).draw(1000, generator())) == 1


@pytest.mark.parametrize("fields", [(0.5,), (math.inf,), (math.nan,), (5, -1), (5, math.inf), (5, math.nan)])
def test_impossible_lengths_are_refused(fields):
    with pytest.raises(UsageError, match="the mean is at least 1 token"):
        Lengths(*fields)


def test_the_presets_are_the_four_quadrants():
    means = {name: (spec.prompt.mean, spec.output.mean) for name, spec in PRESETS.items()}
    assert means == {
        "chat": (128, 128),
        "generation": (128, 1024),
        "summarization": (2048, 128),
        "reasoning": (2048, 1024),
    }


@given(st.integers(200, 20_000), st.sampled_from(sorted(PRESETS)), st.integers(0, 500))
def test_a_scaled_spec_fits_its_context_and_keeps_its_ratio(max_context, name, prefix):
    base = RequestSpec(name, PRESETS[name].prompt, PRESETS[name].output, prefix=prefix)
    try:
        spec = base.scaled_to(max_context)
    except UsageError:
        assert prefix * max_context / base.longest < 1  # a prefix of a few tokens is the only thing that can vanish
        return
    arrivals = schedule_requests(spec, Burst(1, 1.0), range(30_000), 50).arrivals
    assert max(len(each.prompt) + each.max_new_tokens for each in arrivals) <= max_context
    assert spec.prompt.mean / spec.output.mean == pytest.approx(base.prompt.mean / base.output.mean)
    assert spec.scale == pytest.approx(min(1, max_context / base.longest))
    assert (spec.scale == 1) == (base.longest <= max_context)


def test_quadrants_are_scaled_by_one_factor_and_say_so():
    specs = quadrants(2048)
    assert len({spec.scale for spec in specs.values()}) == 1
    assert specs["reasoning"].longest == pytest.approx(2048)
    assert specs["generation"].output.mean / specs["chat"].output.mean == pytest.approx(8)
    assert str(PRESETS["chat"]) == "chat: prompt 128, output 128 tokens"
    assert str(specs["reasoning"]) == "reasoning: prompt 508.7, output 254.3 tokens, lengths scaled by 0.248"
    shared = RequestSpec("agent", Lengths(100), Lengths(10), prefix=64, prefix_share=0.5)
    assert str(shared) == "agent: prompt 100, 64 shared by 50%, output 10 tokens"
    assert quadrants(100_000) == PRESETS


def test_a_context_too_short_for_a_token_is_refused():
    with pytest.raises(UsageError, match=r"'summarization'.*less than a token; use a longer context"):
        PRESETS["summarization"].scaled_to(20)
    with pytest.raises(UsageError, match="less than a token"):
        quadrants(30)


@pytest.mark.parametrize("fields", [{"prefix": -1}, {"prefix_share": 1.5}, {"prefix_share": math.nan}])
def test_impossible_prefixes_are_refused(fields):
    with pytest.raises(UsageError, match="RequestSpec 'x'"):
        RequestSpec("x", Lengths(5), Lengths(5), **fields)


def test_poisson_gaps_are_exponential():
    times = Poisson(4.0).times(4001, generator(3))
    assert times[0] == 0
    gaps = np.diff(times)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 4.0)).pvalue > 0.01
    assert stats.kstest(gaps, "expon", args=(0, 1 / 4.4)).pvalue < 1e-4  # the test does see a rate that is 10 % off
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_their_rate_and_burstiness(burstiness):
    gaps = np.diff(Gamma(2.0, burstiness).times(4001, generator(5)))
    assert stats.kstest(gaps, "gamma", args=(burstiness, 0, 0.5 / burstiness)).pvalue > 0.01
    assert gaps.mean() == pytest.approx(0.5, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.1)


def test_a_seed_gives_one_pattern_at_every_rate():
    slow, fast = Poisson(1.0).times(50, generator(1)), Poisson(8.0).times(50, generator(1))
    assert slow == pytest.approx([8 * moment for moment in fast])
    assert slow == Gamma(1.0, 1.0).times(50, generator(1))


def test_bursts_closed_loops_and_recordings():
    assert Burst(2, 1.5).times(5, generator()) == [0, 0, 1.5, 1.5, 3]
    assert Closed(3).times(4, generator()) == [0] * 4
    assert Recorded((0.5, 0.75, 9.0)).times(2, generator()) == [0.5, 0.75]
    with pytest.raises(DataError, match="4 arrivals asked of 3 recorded"):
        Recorded((0.5, 0.75, 9.0)).times(4, generator())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Poisson(0),
        lambda: Poisson(math.nan),
        lambda: Gamma(math.inf),
        lambda: Gamma(1, 0),
        lambda: Burst(0, 1.0),
        lambda: Burst(1, 0.0),
    ],
)
def test_impossible_processes_are_refused(make):
    with pytest.raises(UsageError, match="positive"):
        make()


def test_a_schedule_is_the_same_for_a_seed_and_leaves_random_states_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, again, other = (schedule_requests(SPEC, Poisson(2.0), CORPUS, 40, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert first != other
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_rate_and_the_prefix_leave_the_rest_of_the_requests_as_they_are():
    slow = schedule_requests(SPEC, Poisson(1.0), CORPUS, 40)
    fast = schedule_requests(SPEC, Poisson(9.0), CORPUS, 40)
    assert [(a.prompt, a.max_new_tokens) for a in slow.arrivals] == [
        (a.prompt, a.max_new_tokens) for a in fast.arrivals
    ]
    shared = schedule_requests(RequestSpec("t", SPEC.prompt, SPEC.output, prefix=5), Poisson(1.0), CORPUS, 40)
    assert [len(a.prompt) - 5 for a in shared.arrivals] == [len(a.prompt) for a in slow.arrivals]
    assert [a.seconds for a in shared.arrivals] == [a.seconds for a in slow.arrivals]


def test_prompts_are_passages_no_two_of_which_begin_alike():
    arrivals = schedule_requests(SPEC, Poisson(2.0), CORPUS, 200).arrivals
    assert all(a.prompt == tuple(range(a.prompt[0], a.prompt[0] + len(a.prompt))) for a in arrivals)
    assert len({a.prompt[0] for a in arrivals}) == 200
    assert all(type(token) is int for token in arrivals[0].prompt)
    assert len({len(a.prompt) for a in arrivals}) > 5
    tensor = schedule_requests(SPEC, Poisson(2.0), torch.tensor(CORPUS), 200)
    assert tensor.arrivals == arrivals


@pytest.mark.parametrize(("share", "sharers"), [(0.0, 0), (0.25, 10), (1.0, 40)])
def test_a_share_of_the_requests_begins_with_the_prefix_and_no_other_touches_it(share, sharers):
    spec = RequestSpec("t", SPEC.prompt, SPEC.output, prefix=16, prefix_share=share)
    prompts = [a.prompt for a in schedule_requests(spec, Poisson(2.0), CORPUS, 40).arrivals]
    prefix = tuple(range(1000, 1016))
    shared = [prompt for prompt in prompts if prompt[:16] == prefix]
    assert len(shared) == sharers
    passages = [prompt[16:] if prompt[:16] == prefix else prompt for prompt in prompts]
    assert all(passage and not set(passage) & set(prefix) for passage in passages)


def test_a_corpus_shorter_than_the_prompts_need_is_refused_with_the_length_that_serves():
    spec = RequestSpec("t", Lengths(10), Lengths(4), prefix=3)
    prompts = [a.prompt for a in schedule_requests(spec, Burst(5, 1.0), range(17), 5).arrivals]  # 3 + 10 + 5 − 1
    assert sorted(prompt[3] for prompt in prompts) == [3, 4, 5, 6, 7]
    for length in (16, 4, 0):
        with pytest.raises(DataError, match=f"a corpus of {length} tokens is too short.*give at least 17 tokens"):
            schedule_requests(spec, Burst(5, 1.0), range(length), 5)


def test_a_closed_loop_is_scheduled_with_its_concurrency():
    assert schedule_requests(SPEC, Closed(3), CORPUS, 7).concurrency == 3
    assert schedule_requests(SPEC, Poisson(3), CORPUS, 7).concurrency is None
    with pytest.raises(UsageError, match="concurrency=0"):
        schedule_requests(SPEC, Closed(0), CORPUS, 7)


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_impossible_counts_and_seeds_are_refused(count, seed):
    with pytest.raises(UsageError, match="schedule_requests"):
        schedule_requests(SPEC, Poisson(1), CORPUS, count, seed=seed)


@pytest.mark.parametrize("fields", [(-1, (1,), 1), (math.inf, (1,), 1), (math.nan, (1,), 1), (0, (), 1), (0, (1,), 0)])
def test_impossible_arrivals_are_refused(fields):
    with pytest.raises(UsageError, match="at least one token of prompt"):
        Arrival(*fields)


def test_a_schedule_is_in_order_and_a_closed_one_has_no_times():
    early, late = Arrival(0, (1,), 1), Arrival(2, (1,), 1)
    assert Schedule((early, late)).arrivals == (early, late)
    for arrivals in ((), (late, early)):
        with pytest.raises(UsageError, match="sort them"):
            Schedule(arrivals)
    with pytest.raises(UsageError, match="a last arrival at 2 s"):
        Schedule((early, late), concurrency=1)
