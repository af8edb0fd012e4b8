"""The model card (README.md) of an artifact: what it is, how to load it, what was measured, and its verdict.

Names and licences come from other people's models, so nothing given here may break out of its place: front matter
goes through a YAML writer, names stand in code spans, recipes in fences longer than any run of backticks they hold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

_TAGS = ("roofline-optimizer", "quantized")
# verdict, lower case -> what it says to a reader who knows nothing about gates
_MEANING = {
    "passed": "every floor of the recipe held in the measurements below.",
    "failed": "at least one floor of the recipe was missed; see the results below before using this model.",
    "ungated": "this model was **not** judged against any floor. Nothing here says that its quality or speed is "
    "acceptable: measure it before using it.",
}
_UNKNOWN = "see the results below."
_LOADERS = {
    "transformers": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "folder = \"path/to/this/folder\"\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=\"auto\")\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "tokens = tokenizer(\"def main():\", return_tensors=\"pt\")\n"
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=32)[0]))",
        "python",
    ),
    "vLLM": ("vllm serve path/to/this/folder", "shell"),
    "SGLang": ("python -m sglang.launch_server --model-path path/to/this/folder", "shell"),
}  # fmt: skip


def model_card(
    *,
    name: str,
    base_model: str,
    recipe: str,
    results: str,
    verdict: str,
    revision: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    loaders: Sequence[str] = ("transformers", "vLLM"),
) -> str:
    """README.md of an artifact as Markdown with YAML front matter (https://huggingface.co/docs/hub/model-cards).

    `recipe` is its YAML; `results` is Markdown made by the report, taken as it is; `verdict` is "passed", "failed" or
    "ungated" in any case; `loaders` are the runtimes that can read the format, of "transformers", "vLLM", "SGLang".
    """
    front = {
        "base_model": base_model,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": license,
        "tags": list(dict.fromkeys([*_TAGS, *([verdict.lower()] if verdict.lower() == "ungated" else []), *tags])),
    }
    known = {key: value for key, value in front.items() if value is not None}
    origin = f"{code(base_model)}{f' at revision {code(revision)}' if revision else ''}"
    sections = [
        f"---\n{yaml.safe_dump(known, sort_keys=False, width=10_000)}---",
        f"# {code(name)}{' (UNGATED)' if verdict.lower() == 'ungated' else ''}",
        f"> **{_one_line(verdict).upper()}**: {_MEANING.get(verdict.lower(), _UNKNOWN)}",
        f"Made from {origin} by `roofline-optimizer`. `manifest.json` holds the sha256 of every file; "
        "`optimizer verify path/to/this/folder` checks them.",
        "## Recipe",
        fenced(recipe, "yaml"),
        "## How to load it",
        *(f"{loader}:\n\n{fenced(*_LOADERS[loader])}" for loader in loaders),
        "## Results",
        results.strip(),
    ]
    return "\n\n".join(sections) + "\n"


def code(text: str) -> str:
    """A Markdown code span that shows `text` on one line, whatever backticks it holds (CommonMark 6.1)."""
    line = _one_line(text)
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fenced(text: str, language: str) -> str:
    """A Markdown code block that `text` cannot close."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
