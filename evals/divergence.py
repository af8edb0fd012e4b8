"""How far the optimized model's next-token distribution is from the baseline's, on held-out text.

Scores of items see a change only where it crosses a decision, and gains hide losses: two models of equal accuracy can
differ on many answers. The Kullback-Leibler divergence from the baseline's distribution P to the optimized model's Q,

    KL = Σ_v P(v) · (log P(v) - log Q(v))        nats a token, 0 only if they agree,

sees every change, at every position of a text (https://arxiv.org/abs/2407.09141 relates it to flipped answers).
Reported are its mean over tokens, its 99th percentile (a few wrecked positions hide in a mean), and top-1 agreement,
the share of positions at which both would choose the same token. Intervals are over documents: the tokens of one are
not independent.

Both models run on the same rows before the next are begun, and probabilities are taken of `CHUNK_BYTES` of logits at a
time in float32, so memory holds the logits of one batch of rows, whatever the amount of text. Where vocabularies are
padded to different sizes, both distributions are over the tokens that both have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.errors import DataError, UsageError
from optimizer.evals.gate import Measurement
from optimizer.evals.runner import Runner
from optimizer.evals.statistics import Interval, bootstrap

ROWS_BYTES = 128 << 20  # logits of one model that are held at once
CHUNK_BYTES = 16 << 20  # of them, what is turned into probabilities at once
PERCENTILE = 0.99


@dataclass(frozen=True)
class Divergence:
    """KL of the optimized model from the baseline in nats a token, and how often both choose the same token."""

    mean: Interval
    p99: Interval
    top1_agreement: Interval
    tokens: int
    documents: int


def held_out_rows(tokenizer: Any, documents: int, length: int) -> list[list[int]]:
    """Token rows of held-out text, at most `length` tokens of each of the first `documents` documents.

    The text is Python's standard library, of modules that the embedded reference model was not trained on. Raises
    `DataError` where the tokenizer leaves no document of two tokens.
    """
    from optimizer.evals.tasks.processing import load

    texts = load("perplexity.jsonl")["test"]["text"][:documents]
    rows = [list(tokenizer.encode(text, add_special_tokens=True, verbose=False))[:length] for text in texts]
    if not (rows := [row for row in rows if len(row) > 1]):
        raise DataError("no held-out document has two tokens with this tokenizer; there is no divergence to measure")
    return rows


@torch.no_grad()
def token_divergence(baseline: Tensor, optimized: Tensor) -> tuple[Tensor, Tensor]:
    """KL in nats and agreement of the likeliest token, each `[T]`, of logits `[T, V]`.

    Logits beyond the smaller vocabulary are left out. NaN where a distribution is undefined, infinity where the
    optimized model rules out what the baseline does not.
    """
    shared = min(baseline.shape[-1], optimized.shape[-1])
    rows = max(1, CHUNK_BYTES // (4 * shared))
    kl, same = [], []
    for first, second in zip(baseline.split(rows), optimized.split(rows), strict=True):
        p, q = first[..., :shared].float(), second[..., :shared].to(first.device).float()
        logs = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
        # Where P is 0 the term is 0, also where both logarithms are minus infinity.
        terms = torch.where(logs[0] == -math.inf, 0.0, logs[0].exp() * (logs[0] - logs[1]))
        found = terms.sum(-1).clamp(min=0)  # rounding; a NaN stays
        kl.append(torch.where(q.isnan().any(-1) | p.isnan().any(-1), math.nan, found))
        same.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(kl).cpu(), torch.cat(same).cpu()


def measure_divergence(
    baseline: Runner,
    optimized: Runner,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Divergence:
    """Run both models on `rows`, token ids of one document each, and compare the distribution after every token.

    At most `batch_size` rows run at a time, fewer where their logits would exceed `ROWS_BYTES`. Raises `UsageError`
    without rows or for a row that does not fit a model's context.
    """
    longest = max(map(len, rows), default=0)
    limit = min(baseline.max_context, optimized.max_context)
    if not 1 <= longest <= limit or any(len(row) == 0 for row in rows):
        raise UsageError(f"rows have up to {longest} tokens; give at least one each and no more than {limit}")
    shared = min(baseline.vocab_size, optimized.vocab_size)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    kl: dict[int, NDArray[np.float64]] = {}
    same: dict[int, NDArray[np.float64]] = {}
    while order:
        row_bytes = 4 * len(rows[order[-1]]) * max(baseline.vocab_size, optimized.vocab_size)
        fit = max(1, min(batch_size, ROWS_BYTES // row_bytes))
        batch, order = order[-fit:], order[:-fit]
        tokens, mask = _padded([rows[index] for index in batch], shared)
        logits = [_logits(runner, tokens, mask) for runner in (baseline, optimized)]
        for place, index in enumerate(batch):
            own = [each[place, -len(rows[index]) :] for each in logits]
            found, agreed = token_divergence(*own)
            kl[index], same[index] = found.double().numpy(), agreed.double().numpy()
        if progress is not None:
            progress("divergence", len(kl), len(rows))
    indices = range(len(rows))
    return summarise([kl[index] for index in indices], [same[index] for index in indices], confidence, seed)


def summarise(
    kl: Sequence[NDArray[np.float64]], same: Sequence[NDArray[np.float64]], confidence: float = 0.95, seed: int = 0
) -> Divergence:
    """The three figures with intervals over documents, from KL and agreement by token of each document."""
    counts = [len(each) for each in kl]

    def of(values: Sequence[NDArray[np.float64]]) -> Interval:
        columns = np.stack([[each.sum() for each in values], counts], axis=1)
        return bootstrap(columns, lambda sums: sums[..., 0] / sums[..., 1], confidence=confidence, seed=seed)

    return Divergence(of(kl), _percentile(kl, confidence, seed), of(same), sum(counts), len(kl))


def _percentile(
    documents: Sequence[NDArray[np.float64]], confidence: float, seed: int, resamples: int = 1000
) -> Interval:
    """The 99th percentile over tokens, with the percentile interval of documents drawn with replacement."""
    values = np.concatenate(documents)
    if np.isnan(values).any():
        return Interval(math.nan, math.nan, math.nan)
    order = np.argsort(values, kind="stable")
    owner = np.repeat(np.arange(len(documents)), [len(each) for each in documents])[order]
    ranked = values[order]

    def at(drawn: NDArray[np.int64]) -> float:
        below = np.cumsum(drawn[owner])
        return float(ranked[np.searchsorted(below, PERCENTILE * below[-1])])

    value = at(np.ones(len(documents), dtype=np.int64))
    if len(documents) < 2:
        return Interval(value, -math.inf, math.inf)
    generator = np.random.default_rng(seed)
    even = np.full(len(documents), 1 / len(documents))
    found = [at(generator.multinomial(len(documents), even)) for _ in range(resamples)]
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")
    return Interval(value, float(low), float(high))


def _padded(rows: Sequence[Sequence[int]], vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """Left-padded `[B, S]` and their mask, None where nothing was padded."""
    longest = max(map(len, rows))
    if (largest := max(max(row) for row in rows)) >= vocabulary:
        raise DataError(f"token {largest} is not in the vocabulary of {vocabulary} that both models share")
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, None if bool(mask.all()) else mask


def _logits(runner: Runner, tokens: Tensor, mask: Tensor | None) -> Tensor:
    runner.reset(len(tokens))
    there = None if mask is None else mask.to(runner.device)
    return runner.prefill(tokens.to(runner.device), there, all_logits=True)


def divergence_evidence(found: Divergence) -> dict[str, Measurement]:
    """What the gate may judge: `quality.kl.mean`, `quality.kl.p99` and `quality.kl.top1_agreement`."""
    figures = {"mean": found.mean, "p99": found.p99, "top1_agreement": found.top1_agreement}
    return {
        f"quality.kl.{name}": Measurement(at.value, at.low, at.high, found.documents, "" if name[0] == "t" else "nats")
        for name, at in figures.items()
    }
