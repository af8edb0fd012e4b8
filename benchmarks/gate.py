"""How often the gate is right: A/A runs and planted losses, simulated with the items that its power function asks for.

    python -m benchmarks.gate [--out benchmarks/results/gate.json]

Each run draws which of n answers are lost and gained, at a share of flips and a true loss, and is judged as the gate
judges: at once, and in five looks that stop when the answer is clear. The last column is the rule that many checks use
instead, "pass unless the loss is significant" (McNemar's test at 5 %), with the same items.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import binom

from optimizer.evals.noninferiority import score_statistic
from optimizer.evals.power import items_needed
from optimizer.evals.sequential import plan

RUNS, ALPHA, LOOKS, SEED = 100_000, 0.05, 5, 0
RESULT = Path(__file__).parent / "results" / "gate.json"
SETTINGS = [
    (0.05, 0.01, 0.8), (0.05, 0.01, 0.96), (0.02, 0.01, 0.96), (0.10, 0.01, 0.96), (0.05, 0.02, 0.96),
    (0.05, 0.03, 0.96), (0.20, 0.03, 0.96),
]  # fmt: skip
"""Share of answers that flip, margin, power."""


def simulate(items: int, margin: float, flips: float, loss: float) -> dict[str, float]:
    """Shares of runs that pass, at once, in looks, and unless significant; and the share of the items looked at."""
    generator, own = np.random.default_rng(SEED), plan(items, LOOKS, ALPHA)
    shares = [(flips + loss) / 2, (flips - loss) / 2, 1 - flips]
    lost, gained = np.zeros(RUNS), np.zeros(RUNS)
    passed, taken, seen = np.zeros(RUNS, dtype=bool), np.zeros(RUNS), 0
    for look in own:
        now = round(look.fraction * items)
        drawn = generator.multinomial(now - seen, shares, RUNS)
        lost, gained, seen = lost + drawn[:, 0], gained + drawn[:, 1], now
        z, critical = score_statistic(lost, gained, now, margin), -ndtri(look.alpha)
        stops = (taken == 0) & ((np.abs(z) >= critical) | (look.fraction == 1))
        passed[stops], taken[stops] = z[stops] <= -critical, look.fraction
    at_once = score_statistic(lost, gained, items, margin) <= ndtri(ALPHA)
    return {
        "passes": float(at_once.mean()),
        "passes_in_looks": float(passed.mean()),
        "items_in_looks": float(taken.mean()),
        "passes_unless_significant": float((~_significant(lost, gained)).mean()),
    }


def _significant(lost: NDArray[np.float64], gained: NDArray[np.float64]) -> NDArray[np.bool_]:
    """McNemar's exact one-sided test of a loss, at `ALPHA`."""
    found: NDArray[np.bool_] = binom.sf(lost - 1, lost + gained, 0.5) <= ALPHA
    return found


def measure() -> list[dict[str, Any]]:
    """A row for each setting, with the model that loses nothing, the margin, and twice the margin."""
    rows = []
    for flips, margin, power in SETTINGS:
        items = items_needed(margin, flips=flips, alpha=ALPHA, power=power)
        row: dict[str, Any] = {"flips": flips, "margin": margin, "power": power, "items": items, "models": {}}
        for name, loss in (("none", 0.0), ("margin", margin), ("twice", 2 * margin)):
            if loss <= flips:
                row["models"][name] = simulate(items, margin, flips, loss)
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of `docs/gate.md`."""
    names = (
        "flips", "margin", "power asked", "items", "a copy passes", "loses the margin, passes",
        "in looks: a copy passes", "share of items used", "loses the margin, passes",
        "loses twice the margin: share of items used", "loses the margin, passes unless significant",
    )  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "--:|" * len(names)]
    for row in rows:
        none, margin, twice = (row["models"].get(name) for name in ("none", "margin", "twice"))
        cells = (
            _percent(row["flips"], 0), _percent(row["margin"], 0), _percent(row["power"], 0), f"{row['items']:,}",
            _percent(none["passes"]), _percent(margin["passes"]), _percent(none["passes_in_looks"]),
            _percent(none["items_in_looks"], 0), _percent(margin["passes_in_looks"]),
            "–" if twice is None else _percent(twice["items_in_looks"], 0),
            _percent(margin["passes_unless_significant"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def main() -> None:
    """Simulate, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    rows = measure()
    out.write_text(json.dumps({"runs": RUNS, "alpha": ALPHA, "looks": LOOKS, "rows": rows}, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
