"""The analysis behind `optimizer power`: the items that a margin needs, and what a number of items can show."""

from __future__ import annotations

from typing import Any

from optimizer.errors import UsageError
from optimizer.evals.power import items_needed, power_of


def analyse(
    margin: float, *, flips: float | None, deviation: float | None, items: int | None, alpha: float, power: float
) -> dict[str, Any]:
    """Items needed for `margin`; with `items`, also the power they have and the smallest margin they can show."""
    if (flips is None) == (deviation is None):
        raise UsageError("give either --flips, the share of 0/1 answers that change, or --deviation.")
    spread = {"flips": flips} if deviation is None else {"deviation": deviation}
    found: dict[str, Any] = {"margin": margin, **spread, "alpha": alpha, "power": power}
    found["items_needed"] = items_needed(margin, alpha=alpha, power=power, **spread)
    if items is not None:
        found["items"] = items
        found["power_of_items"] = power_of(items, margin, alpha=alpha, **spread)
        found["margin_of_items"] = _smallest_margin(items, alpha, power, spread)
    return found


def _smallest_margin(items: int, alpha: float, power: float, spread: dict[str, Any]) -> float | None:
    """The margin that needs so many items, by halving; None where even the largest needs more."""
    small, large = 1e-9, 1.0 if "flips" in spread else max(100 * float(spread["deviation"]), 1e-12)
    if items_needed(large, alpha=alpha, power=power, **spread) > items:
        return None
    for _ in range(50):
        middle = (small + large) / 2
        enough = items_needed(middle, alpha=alpha, power=power, **spread) <= items
        small, large = (small, middle) if enough else (middle, large)
    return large


def describe(found: dict[str, Any]) -> str:
    """The analysis as text."""
    what = (
        f"{found['flips']:g} of the answers flipped" if "flips" in found else f"a deviation of {found['deviation']:g}"
    )
    lines = [
        f"margin {found['margin']:g}, {what}: {found['items_needed']:,} items for a model without loss to pass with "
        f"probability {found['power']:g}, and one that loses the margin with at most {found['alpha']:g}"
    ]
    if "items" in found:
        margin = found["margin_of_items"]
        shows = "no margin" if margin is None else f"a margin of {margin:.3g}"
        lines.append(
            f"{found['items']:,} items: such a model passes with probability {found['power_of_items']:.3f}; "
            f"with probability {found['power']:g} they show {shows}"
        )
    return "\n".join(lines)
