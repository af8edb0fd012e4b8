"""The quality gates on a sample: what `python -m benchmarks.quality` measures whole, and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import (
    CALIBRATION,
    LENGTH,
    RESULTS,
    SCHEMES,
    held_out,
    log_likelihoods,
    markdown,
    perplexity,
    quantized,
)
from optimizer.calibration import load_calibration
from optimizer.evals.outliers import plant_outliers
from optimizer.source import load_source

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = CALIBRATION.model_copy(update={"samples": 16})


class Measured:
    """Perplexity ratios of schemes of one model on a few windows, each measured once."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.windows = held_out(tokenizer, 8 * LENGTH)
        self.calibration = load_calibration(None, tokenizer, model.config, SAMPLE)
        self.base = perplexity(log_likelihoods(model, self.windows))
        self.found: dict[str, float] = {}

    def ratio(self, scheme: str) -> float:
        if scheme not in self.found:
            copy, _ = quantized(self.model, scheme, self.calibration, self.tokenizer)
            self.found[scheme] = perplexity(log_likelihoods(copy, self.windows)) / self.base
        return self.found[scheme]


@pytest.fixture(scope="module")
def plain() -> Measured:
    source = load_source("reference")
    return Measured(source.model.float(), source.tokenizer)


@pytest.fixture(scope="module")
def outliers(plain: Measured) -> Measured:
    return Measured(plant_outliers(plain.model)[0], plain.tokenizer)


def test_planting_changes_nothing(plain: Measured, outliers: Measured) -> None:
    assert outliers.base == plain.base


@pytest.mark.parametrize(("scheme", "limit"), [("int8-rtn", 1.005), ("fp8-dynamic", 1.015), ("kv-int8", 1.005)])
def test_eight_bits_cost_next_to_nothing(scheme: str, limit: float, plain: Measured) -> None:
    assert plain.ratio(scheme) <= limit


def test_gptq_recovers_what_rounding_loses(plain: Measured) -> None:
    assert plain.ratio("int4-gptq-mse") - 1 <= 0.6 * (plain.ratio("int4-rtn") - 1)


def test_awq_recovers_what_rounding_loses_to_outliers(outliers: Measured) -> None:
    assert outliers.ratio("int4-awq") - 1 <= 0.7 * (outliers.ratio("int4-rtn") - 1)


def test_outliers_ruin_naive_int8_and_smoothquant_saves_it(outliers: Measured) -> None:
    assert outliers.ratio("w8a8-naive") > 1.1
    assert outliers.ratio("w8a8-smoothquant") <= 1.02


def test_llm_int8_keeps_outliers_out(outliers: Measured) -> None:
    assert outliers.ratio("llm-int8") <= 1.02


def test_the_page_shows_the_committed_result() -> None:
    document = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "quality.md").read_text(encoding="utf-8") == markdown(document)
    assert set(document["models"]["plain"]["schemes"]) == {"unquantized", *SCHEMES}
