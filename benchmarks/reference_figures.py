"""Measure the embedded reference model in float32 and write `evals/reference/figures.json`.

python -m benchmarks.reference_figures
"""

from __future__ import annotations

import json

from optimizer.backends.runner import EagerRunner
from optimizer.evals.reference.measure import FIGURES, SAMPLE, figures
from optimizer.source import load_source


def main() -> None:
    """Measure all items and the sample."""
    source = load_source("reference")
    runner = EagerRunner(source.model.float(), source.tokenizer)
    document = {
        "sample": figures(runner, source.tokenizer, SAMPLE),
        "all": figures(runner, source.tokenizer, None),
        "training": json.loads((FIGURES.parent / "model" / "training.json").read_text(encoding="utf-8")),
    }
    FIGURES.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
