"""The model card: readable front matter, an unmistakable verdict, and nothing that names can break."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from optimizer.card import code, fenced, model_card

CARD: dict[str, Any] = {
    "name": "tiny-w4a16",
    "base_model": "org/tiny",
    "recipe": "passes:\n  - quantize: int4",
    "results": "| metric | value |\n|---|---|\n| perplexity | 5.5 |",
    "verdict": "passed",
}


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    parsed = yaml.safe_load(front)
    assert isinstance(parsed, dict)
    return parsed


def test_the_front_matter_is_what_the_hub_expects() -> None:
    card = model_card(**CARD, license="apache-2.0", tags=["w4a16", "quantized"])
    assert card.startswith("---\n")
    assert front_matter(card) == {
        "base_model": "org/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["roofline-optimizer", "quantized", "w4a16"],
    }
    assert "license" not in front_matter(model_card(**CARD))


def test_the_body_tells_recipe_results_loading_and_origin() -> None:
    card = model_card(**CARD, revision="abc123")
    assert "```yaml\npasses:\n  - quantize: int4\n```" in card
    assert CARD["results"] in card
    assert "`org/tiny` at revision `abc123`" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "vllm serve" in card
    assert card.endswith("|\n")
    assert "vllm" not in model_card(**CARD, loaders=["transformers"])


def test_the_loading_example_is_python() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)\n```", model_card(**CARD), flags=re.DOTALL)
    compile(snippet, "card", "exec")


@pytest.mark.parametrize("verdict", ["ungated", "UNGATED"])
def test_ungated_cannot_be_missed(verdict: str) -> None:
    card = model_card(**{**CARD, "verdict": verdict})
    assert "# `tiny-w4a16` (UNGATED)" in card
    assert "> **UNGATED**: this model was **not** judged" in card
    assert "ungated" in front_matter(card)["tags"]
    assert "passed" not in card.lower()


@pytest.mark.parametrize(
    ("verdict", "words"), [("passed", "every floor"), ("failed", "was missed"), ("odd", "results")]
)
def test_other_verdicts_are_not_ungated(verdict: str, words: str) -> None:
    card = model_card(**{**CARD, "verdict": verdict})
    assert re.search(rf"> \*\*{verdict.upper()}\*\*: .*{words}", card)
    assert "ungated" not in card.lower()


HOSTILE = [
    "a: b\n---\nlicense: mit", "- x", "!!python/object:os.system", "'\"", "#c", "*a", "null", "1e3", "`</code>", "``a`",
    "\u2028---", "a\rb", "\x00\x07", "名前/模型", "",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_in_its_place(name: str) -> None:
    card = model_card(**{**CARD, "name": name, "base_model": name}, license=name, tags=[name])
    front = front_matter(card)
    assert front["base_model"] == front["license"] == name
    assert front["tags"][-1] == name
    assert list(front) == ["base_model", "base_model_relation", "library_name", "license", "tags"]
    titles = [line for line in card.splitlines() if line.startswith("# ")]
    assert len(titles) == 1


@given(st.text())
def test_any_name_survives_the_front_matter(name: str) -> None:
    assert front_matter(model_card(**{**CARD, "base_model": name}))["base_model"] == name


@given(st.text(alphabet="`a \n"))
def test_code_spans_and_blocks_cannot_be_closed_from_inside(text: str) -> None:
    span = re.fullmatch(r"(`+)([^\n]*?)(`+)", code(text))
    assert span
    ticks = len(re.match("`+", code(text)).group())  # type: ignore[union-attr]
    inner = code(text)[ticks:-ticks]
    assert not re.search(rf"(?<!`)`{{{ticks}}}(?!`)", inner)
    fence, *lines, last = fenced(text, "yaml").split("\n")
    assert fence == f"{last}yaml"
    assert not any(line.strip().startswith(last) for line in lines)
