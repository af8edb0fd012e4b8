"""Drafts change the speed and never the tokens: greedily the same, sampled with the same distribution; and the policy.

Sampling is judged by one check, `p_value`: a chi-square test of the joint distribution of the first tokens against
products of the target's probabilities. It is also run on acceptance rules with a planted error, which it has to catch.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from optimizer.backends.drafting import Draft, PromptLookup, Proposer
from optimizer.backends.sampling import Sampling, probabilities, sample
from optimizer.backends.speculation import (
    Accepted,
    SpeculationPolicy,
    SpeculationStats,
    StepCosts,
    accept,
    expected_tokens,
)
from optimizer.errors import UsageError
from optimizer.evals.arithmetic import speculative_itl, speculative_tokens

FALSE_ALARM = 1e-6  # that a right rule fails one check, for another seed; the seeds are fixed, so none does by chance


@cache
def toy_logits(seed: int, context: tuple[int, ...], vocabulary: int) -> Tensor:
    """A model: logits `[V]` that depend on the whole context in an arbitrary way."""
    rng = random.Random(hash((seed, *context)))  # of integers, so the same in every process
    return torch.tensor([rng.gauss(0, 1.5) for _ in range(vocabulary)])


# Greedy and seeded: whole generations, token by token

VOCABULARY = 6


class Toy:
    """A model that remembers `memory` tokens: with few it falls into loops, which lookup predicts, with many never."""

    def __init__(self, seed: int, memory: int) -> None:
        self.seed, self.memory = seed, memory

    def logits(self, context: Sequence[int]) -> Tensor:
        return toy_logits(self.seed, tuple(context[-self.memory :]), VOCABULARY)

    def verify(self, history: list[int], draft: Draft) -> Tensor:
        """Logits `[n + 1, V]` of one forward, each row from what the mask lets it see."""
        new = [history[-1], *draft.tokens]
        contexts = [history[:-1] + [token for i, token in enumerate(new) if row >> i & 1] for row in draft.sees]
        assert [len(context) - len(history) for context in contexts] == list(draft.depths)
        return torch.stack([self.logits(context) for context in contexts])


class HalfRight:
    """Random trees about half of whose nodes hold what greedy decoding gives."""

    def __init__(self, model: Toy) -> None:
        self.model, self.rng = model, random.Random(0)

    def propose(self, history: Sequence[int], limit: int) -> Draft:
        nodes: dict[tuple[int, int], None] = {}
        contexts = [list(history)]
        while len(nodes) < limit:
            parent = self.rng.randrange(-1, len(nodes))
            right = self.rng.random() < 0.5
            greedy = int(self.model.logits(contexts[parent + 1]).argmax())
            token = greedy if right else self.rng.randrange(VOCABULARY)
            if (parent, token) not in nodes:
                nodes[parent, token] = None
                contexts.append([*contexts[parent + 1], token])
        return Draft(tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes))


def generate(
    model: Toy, proposer: Proposer, new: int, judge: Callable[[Draft, Tensor], Accepted]
) -> tuple[list[int], SpeculationStats]:
    policy = SpeculationPolicy(StepCosts({1: 1.0}))
    history = [0, 1, 2, 0, 1]
    while len(history) < 5 + new:
        draft = proposer.propose(history, 5)
        accepted = judge(draft, model.verify(history, draft))
        history += accepted.tokens(draft)
        policy.observe(draft, accepted)
    return history[5 : 5 + new], policy.stats


PROPOSERS: dict[str, Callable[[Toy], Proposer]] = {
    "lookup": lambda _: PromptLookup(),
    "lookup of one token": lambda _: PromptLookup(1),
    "lookup in branches": lambda _: PromptLookup(branches=3),
    "random trees": HalfRight,
}


@pytest.mark.parametrize("memory", [2, 1000])
@pytest.mark.parametrize("name", PROPOSERS)
def test_greedy_tokens_are_those_of_plain_decoding(name: str, memory: int) -> None:
    stood = 0
    for seed in range(4):
        model = Toy(seed, memory)
        got, stats = generate(
            model, PROPOSERS[name](model), 300, lambda draft, logits: accept(draft, logits.argmax(-1).tolist())
        )
        plain = [0, 1, 2, 0, 1]
        for _ in range(300):
            plain.append(int(model.logits(plain).argmax()))
        assert got == plain[5:]
        assert stats.tokens == stats.steps + stats.accepted
        stood += stats.accepted
    assert stood > 100  # drafts did stand, and not all: the paths of both kinds were walked
    assert stats.tested > stats.accepted


@pytest.mark.parametrize("name", PROPOSERS)
def test_a_seed_gives_the_tokens_of_plain_sampling(name: str) -> None:
    sampling, model = Sampling(0.7, top_k=4), Toy(1, 2)

    def draw(logits: Tensor) -> int:
        """By a random number that depends on the context alone, as the engine's on the position."""
        seed = int(logits.double().sum() * 1e9) & 0xFFFF
        return int(sample(logits[None], sampling, torch.Generator().manual_seed(seed)))

    got, stats = generate(
        model,
        PROPOSERS[name](model),
        300,
        lambda draft, logits: accept(draft, [draw(row) for row in logits]),
    )
    plain = [0, 1, 2, 0, 1]
    for _ in range(300):
        plain.append(draw(model.logits(plain)))
    assert got == plain[5:]
    assert stats.accepted > 50


def test_the_longest_path_is_taken_and_the_target_adds_a_token() -> None:
    tree = Draft((7, 5, 8, 6, 9), (-1, -1, 0, 0, 2))
    after = {-1: 7, 0: 8, 2: 9, 4: 3, 1: 0, 3: 0}
    chosen = [after[node] for node in range(-1, 5)]
    accepted = accept(tree, chosen)
    assert accepted == Accepted([0, 2, 4], 3)
    assert accepted.tokens(tree) == [7, 8, 9, 3]
    assert accepted.tests(tree) == 3  # nothing was guessed after the last
    chosen[1] = 2
    assert accept(tree, chosen) == Accepted([0], 2)
    assert accept(tree, chosen).tests(tree) == 2
    assert accept(Draft(), [4]) == Accepted([], 4)
    assert Accepted([], 4).tests(Draft()) == 0


# Sampled: the joint distribution

V = 4
LENGTH = 3  # tokens whose joint distribution is tested: 64 cells
TRIALS = 5000
Accept = Callable[[Draft, Tensor, torch.Generator], Accepted]


@cache
def target(context: tuple[int, ...]) -> Tensor:
    """The target's distribution `[V]`; some contexts rule out a token, as top-k does."""
    return probabilities(toy_logits(1, context, V)[None], Sampling(1.2, top_k=3 if sum(context) % 2 else None))[0]


@cache
def drafter(context: tuple[int, ...]) -> Tensor:
    """Another model's distribution `[V]`, which rules out others."""
    return probabilities(toy_logits(2, context, V)[None], Sampling(1.5, top_k=3 if sum(context) % 3 else None))[0]


def contexts(history: tuple[int, ...], draft: Draft) -> list[tuple[int, ...]]:
    """The tokens up to the root and up to each node."""
    found = [history]
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((*found[parent + 1], token))
    return found


def drawn_tree(history: tuple[int, ...], rng: random.Random, widths: Sequence[int]) -> Draft:
    """Every node of a level gets `width` children, drawn one after the other without replacement."""
    tokens: list[int] = []
    parents: list[int] = []
    level = [(-1, history)]
    for width in widths:
        following = []
        for parent, context in level:
            weights = drafter(context).tolist()
            for _ in range(min(width, sum(w > 0 for w in weights))):
                token = rng.choices(range(V), weights)[0]
                weights[token] = 0.0
                following.append((len(tokens), (*context, token)))
                tokens.append(token)
                parents.append(parent)
        level = following
    return Draft(tuple(tokens), tuple(parents))


DRAFTS: dict[str, Callable[[tuple[int, ...], random.Random], Draft]] = {
    "looked-up chain": lambda history, _: Draft.chain([1, 2]),
    "looked-up tree": lambda history, _: Draft((1, 2, 3, 0), (-1, -1, 0, 0)),
    "drawn tree": lambda history, rng: drawn_tree(history, rng, (3, 2)),
}


def p_value(judge: Accept, draw: Callable[[tuple[int, ...], random.Random], Draft], trials: int = TRIALS) -> float:
    """Of the first tokens' joint distribution when `judge` judges the drafts, against the target's."""
    rng, generator = random.Random(3), torch.Generator().manual_seed(4)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(trials):
        history: tuple[int, ...] = ()
        while len(history) < LENGTH:
            draft = draw(history, rng)
            p = torch.stack([target(context) for context in contexts(history, draft)])
            history += tuple(judge(draft, p, generator).tokens(draft))
        counts[history[:LENGTH]] += 1
    expected = {
        cell: trials * math.prod(float(target(cell[:i])[cell[i]]) for i in range(LENGTH))
        for cell in product(range(V), repeat=LENGTH)
    }
    if any(counts[cell] for cell, number in expected.items() if number == 0):
        return 0.0
    # The statistic is only chi-square distributed where several are expected; the rare ones are pooled.
    common = [cell for cell, number in expected.items() if number >= 5]
    observed = [counts[cell] for cell in common]
    ideal = [expected[cell] for cell in common]
    return float(chisquare([*observed, trials - sum(observed)], [*ideal, trials - sum(ideal)]).pvalue)


def drawn(draft: Draft, p: Tensor, generator: torch.Generator) -> Accepted:
    """A token drawn after the root and each node."""
    return accept(draft, torch.multinomial(p, 1, generator=generator)[:, 0].tolist())


@pytest.mark.parametrize("name", DRAFTS)
def test_drawn_tokens_have_the_distribution_of_the_target(name: str) -> None:
    assert p_value(drawn, DRAFTS[name]) > FALSE_ALARM


def redraw_the_fallen(draft: Draft, p: Tensor, generator: torch.Generator) -> Accepted:
    """A looked-up token that fell may be drawn again."""
    path: list[int] = []
    for node, token in enumerate(draft.tokens):
        if torch.rand((), generator=generator) >= p[node, token]:
            break
        path.append(node)
    return Accepted(path, int(torch.multinomial(p[len(path)], 1, generator=generator)))


def greedy_walk(draft: Draft, p: Tensor, generator: torch.Generator) -> Accepted:
    return accept(draft, p.argmax(-1).tolist())


@pytest.mark.parametrize(("name", "judge"), [("looked-up chain", redraw_the_fallen), ("drawn tree", greedy_walk)])
def test_the_check_catches_a_wrong_rule(name: str, judge: Accept) -> None:
    assert p_value(judge, DRAFTS[name]) < FALSE_ALARM


@pytest.mark.parametrize(("draft", "chosen"), [(Draft.chain([1]), [1]), (Draft(), [1, 1])])
def test_chosen_tokens_that_do_not_fit_the_draft_are_refused(draft: Draft, chosen: list[int]) -> None:
    with pytest.raises(UsageError, match=f"{len(chosen)} chosen tokens for a draft of {len(draft)}"):
        accept(draft, chosen)


# When to speculate

WORKED = StepCosts({1: 18e-3, 6: 32e-3}, draft_seconds=4e-3 / 5)
"""Five drafts take 4 ms, and verifying up to five 32 ms, where a plain step takes 18 ms."""
LINEAR = StepCosts({tokens: 10e-3 + 1e-3 * tokens for tokens in range(1, 17)}, draft_seconds=0.5e-3)


def test_worked_figures() -> None:
    assert expected_tokens(0.78, 5) == pytest.approx(3.52, abs=5e-3)
    assert expected_tokens(0.8, 4) == pytest.approx(3.36, abs=5e-3)
    assert WORKED.step_seconds(5) == pytest.approx(36e-3)
    assert WORKED.seconds_per_token(0.78, 5) == pytest.approx(10.2e-3, abs=5e-5)
    assert WORKED.break_even == pytest.approx(0.5, abs=0.01)


@given(st.floats(0, 1), st.integers(0, 20))
def test_expected_tokens_is_the_formula_of_the_measuring_side(acceptance: float, drafts: int) -> None:
    assert expected_tokens(acceptance, drafts) == speculative_tokens(acceptance, drafts)
    closed = (1 - acceptance ** (drafts + 1)) / (1 - acceptance) if acceptance < 0.99 else None
    assert closed is None or expected_tokens(acceptance, drafts) == pytest.approx(closed)


@pytest.mark.parametrize(("drafts", "too_much"), [(5, 1.15), (15, 1.23)])
def test_chains_that_stand_whole_or_not_at_all_are_promised_a_little_too_much(drafts: int, too_much: float) -> None:
    ratios = []
    for whole in (i / 1000 for i in range(1001)):
        tested = whole * drafts + (1 - whole)
        ratios.append(expected_tokens(whole * drafts / tested, drafts) / (1 + whole * drafts))
    assert min(ratios) == pytest.approx(1)
    assert max(ratios) == pytest.approx(too_much, abs=5e-3)


COSTS = st.builds(
    lambda plain, more, draft: StepCosts({1: plain, **more}, draft),
    st.floats(1e-3, 1),
    st.dictionaries(st.integers(2, 12), st.floats(1e-3, 2), max_size=5),
    st.floats(0, 0.1),
)


@given(COSTS, st.floats(0, 1), st.integers(0, 12))
def test_the_best_number_of_drafts_has_the_most_tokens_per_second(
    costs: StepCosts, acceptance: float, limit: int
) -> None:
    def tokens_per_second(k: int) -> float:
        verify = next(costs.verify_seconds[n] for n in range(k + 1, 99) if n in costs.verify_seconds)
        return 1 / speculative_itl(k * costs.draft_seconds, verify, speculative_tokens(acceptance, k))

    allowed = range(min(limit, max(costs.verify_seconds) - 1) + 1)
    assert tokens_per_second(costs.best(acceptance, limit)) == pytest.approx(max(map(tokens_per_second, allowed)))


@given(COSTS)
def test_drafts_pay_above_the_break_even_and_not_below(costs: StepCosts) -> None:
    if costs.break_even == math.inf:
        assert costs.best(1.0, 12) == 0
    else:
        assert costs.best(min(costs.break_even + 1e-9, 1.0), 12) > 0
        assert costs.break_even < 1e-9 or costs.best(costs.break_even - 1e-9, 12) == 0


def test_more_drafts_pay_where_more_of_them_stand() -> None:
    chosen = [LINEAR.best(percent / 100, 15) for percent in range(101)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[-1] == 15
    assert len(set(chosen)) > 5


def test_a_probe_fills_the_step_that_it_pays_for() -> None:
    assert LINEAR.probe == 1
    assert StepCosts({1: 1.0, 4: 1.2, 8: 1.5}).probe == 3
    assert StepCosts({1: 1.0, 4: 1.2, 8: 1.5}, draft_seconds=0.1).probe == 1
    assert StepCosts({1: 1.0}).probe == 0


def decode(
    policy: SpeculationPolicy, acceptance: float, steps: int, *, limit: int = 15, batch: int = 1, seed: int = 0
) -> list[int]:
    """The numbers of drafts of `steps` steps in which each draft stands with this probability."""
    rng, chosen = random.Random(seed), []
    for _ in range(steps):
        chosen.append(policy.drafts(limit, batch))
        for _ in range(batch):
            stood = 0
            while stood < chosen[-1] and rng.random() < acceptance:
                stood += 1
            policy.observe(Draft.chain(range(chosen[-1])), Accepted(list(range(stood)), 0))
    return chosen


def test_low_acceptance_switches_off_with_a_reason() -> None:
    policy = SpeculationPolicy(LINEAR)
    assert decode(policy, 0.05, 100)[0] > 0  # it has to be tried
    assert policy.stats.off_reason is not None
    assert policy.stats.off_reason.startswith(f"acceptance {policy.acceptance:.2f}: below {LINEAR.break_even:.2f} ")
    off = decode(policy, 0.05, 160)
    assert sorted(off) == [0] * 150 + [LINEAR.probe] * 10


def test_a_probe_stays_due_until_the_proposer_has_a_guess() -> None:
    policy = SpeculationPolicy(LINEAR)
    decode(policy, 0.0, 100)
    asked = []
    for _ in range(40):
        asked.append(policy.drafts(15))
        policy.observe(Draft(), Accepted([], 0))
    first = asked.index(LINEAR.probe)
    assert asked == [0] * first + [LINEAR.probe] * (40 - first)
    decode(policy, 0.0, 1)
    assert policy.drafts(15) == 0


def test_drafts_that_never_stand_cost_little() -> None:
    policy = SpeculationPolicy(LINEAR)
    seconds = sum(LINEAR.step_seconds(k) for k in decode(policy, 0.0, 2000))
    # A probe every 16 steps takes (12 + 0.5) / 11 of a plain one: 0.9 %. The first steps, to find out, add a little.
    assert seconds / (2000 * LINEAR.step_seconds(0)) < 1.015
    assert policy.stats.tokens_per_step == 1


def test_it_comes_back_when_acceptance_does() -> None:
    policy = SpeculationPolicy(LINEAR)
    decode(policy, 0.9, 50)
    decode(policy, 0.05, 400)
    assert policy.stats.off_reason is not None
    chosen = decode(policy, 0.9, 400)
    assert policy.stats.off_reason is None
    assert min(chosen[-50:]) >= 4


def test_more_drafts_are_chosen_for_a_text_that_is_easier_to_guess() -> None:
    easy, hard = (decode(SpeculationPolicy(LINEAR), acceptance, 300)[-100:] for acceptance in (0.95, 0.6))
    assert min(easy) > max(hard) > 0


def test_a_large_batch_is_not_drafted_for_and_not_probed() -> None:
    policy = SpeculationPolicy(LINEAR, max_batch=8)
    assert min(decode(policy, 0.9, 50, batch=7)) > 0
    assert policy.stats.off_reason is None
    assert set(decode(policy, 0.9, 100, batch=8)) == {0}
    assert policy.stats.off_reason == "batch 8: from 8 rows on a step is near the ridge point"
    assert policy.stats.off_steps == 800
    assert policy.drafts(15, batch=7) > 0
    assert policy.stats.off_reason is None


@pytest.mark.parametrize("costs", [StepCosts({1: 1.0}), StepCosts({1: 1.0, 2: 2.0, 4: 4.0})], ids=["none", "linear"])
def test_costs_that_no_acceptance_pays_for_are_named_and_not_probed(costs: StepCosts) -> None:
    policy = SpeculationPolicy(costs)
    assert set(decode(policy, 1.0, 100)) == {0}
    assert str(policy.stats.off_reason).startswith("costs: ")


def test_room_for_few_drafts_is_not_a_reason() -> None:
    policy = SpeculationPolicy(LINEAR)
    decode(policy, 0.9, 50)
    assert policy.drafts(2) == 2
    assert policy.drafts(0) == policy.drafts(-1) == 0
    assert policy.stats.off_reason is None


def test_acceptance_is_of_tested_drafts_and_not_of_proposed_ones() -> None:
    policy = SpeculationPolicy(LINEAR, half_life=10_000)
    decode(policy, 0.7, 3000)
    stats = policy.stats
    # 3000 steps test over 6000 drafts: 5 standard deviations of a share of 0.7 are 0.03.
    assert stats.acceptance == pytest.approx(0.7, abs=0.03)
    assert policy.acceptance == pytest.approx(0.7, abs=0.03)
    assert stats.accepted / stats.proposed < 0.6
    drafts = LINEAR.best(0.7, 15)
    assert stats.tokens_per_step == pytest.approx(expected_tokens(0.7, drafts), rel=0.05)


def test_decisions_repeat_and_evidence_never_fades_to_nothing() -> None:
    first, second = SpeculationPolicy(LINEAR), SpeculationPolicy(LINEAR)
    assert decode(first, 0.5, 500) == decode(second, 0.5, 500)
    policy = SpeculationPolicy(LINEAR, half_life=1)
    for _ in range(5000):
        policy.drafts(15)
        policy.observe(Draft(), Accepted([], 0))
    assert policy.acceptance == pytest.approx(0.8)


def test_costs_may_be_measured_again() -> None:
    policy = SpeculationPolicy(LINEAR)
    assert policy.drafts(15) > 0
    policy.costs = StepCosts({1: 1.0})
    assert policy.drafts(15) == 0
    measured = {1: 1.0, 4: 1.1}
    costs = StepCosts(measured)
    measured[2] = 0.1
    assert costs.step_seconds(1) == 1.1


def test_stats_of_nothing_are_not_numbers() -> None:
    stats = SpeculationStats()
    assert math.isnan(stats.acceptance)
    assert math.isnan(stats.tokens_per_step)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StepCosts({}), r"verify_seconds \{\}"),
        (lambda: StepCosts({2: 1.0}), r"the plain step"),
        (lambda: StepCosts({0: 1.0, 1: 1.0}), r"the plain step"),
        (lambda: StepCosts({1: 0.0}), r"positive"),
        (lambda: StepCosts({1: math.nan}), r"nan"),
        (lambda: StepCosts({1: 1.0}, -1.0), r"draft_seconds -1.0"),
        (lambda: LINEAR.step_seconds(16), "16 drafts take a forward of 17 tokens"),
        (lambda: LINEAR.step_seconds(-1), "-1 drafts"),
        (lambda: expected_tokens(1.1, 2), r"acceptance 1.1"),
        (lambda: expected_tokens(math.nan, 2), r"acceptance nan"),
        (lambda: expected_tokens(0.5, -1), "-1 drafts"),
        (lambda: SpeculationPolicy(LINEAR, max_batch=0), "max_batch 0"),
        (lambda: SpeculationPolicy(LINEAR, half_life=0), "half_life 0"),
        (lambda: SpeculationPolicy(LINEAR, probe_every=0), "probe_every 0"),
        (lambda: SpeculationPolicy(LINEAR, initial_acceptance=1.5), "initial_acceptance 1.5"),
    ],
)
def test_nonsense_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
