from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from optimizer.cli import app
from optimizer.evals.power import items_needed, power_of


def call(*arguments: str):
    return CliRunner().invoke(app, ["power", *arguments])


def test_it_says_how_many_items_a_margin_needs():
    done = call("--margin", "0.01", "--flips", "0.05")
    assert done.exit_code == 0
    assert "3,162 items" in done.stdout


def test_json_holds_what_the_items_at_hand_can_show():
    done = call("--margin", "0.01", "--flips", "0.05", "--items", "700", "--power", "0.9", "--alpha", "0.1", "--json")
    found = json.loads(done.stdout)
    assert found["items_needed"] == items_needed(0.01, flips=0.05, alpha=0.1, power=0.9)
    assert found["power_of_items"] == pytest.approx(power_of(700, 0.01, flips=0.05, alpha=0.1))
    shown = found["margin_of_items"]
    assert items_needed(shown, flips=0.05, alpha=0.1, power=0.9) <= 700
    assert items_needed(shown * 0.99, flips=0.05, alpha=0.1, power=0.9) > 700


def test_a_deviation_serves_where_answers_are_no_flips():
    found = json.loads(call("--margin", "0.005", "--deviation", "0.02", "--items", "5", "--json").stdout)
    assert found["items_needed"] == items_needed(0.005, deviation=0.02)
    assert found["margin_of_items"] > 0.005


@pytest.mark.parametrize(
    "arguments",
    [
        ("--margin", "0.01"),
        ("--margin", "0.01", "--flips", "0.1", "--deviation", "0.1"),
        ("--margin", "0", "--flips", "0.1"),
        ("--margin", "nan", "--flips", "0.1"),
        ("--margin", "1e-300", "--flips", "0.1"),
        ("--margin", "0.1", "--flips", "2"),
        ("--margin", "0.1", "--flips", "0.1", "--power", "1"),
        ("--margin", "0.1", "--flips", "0.1", "--alpha", "0"),
    ],
)
def test_a_question_without_an_answer_is_a_usage_error(arguments):
    done = call(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
