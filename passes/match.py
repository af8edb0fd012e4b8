"""One matcher for the layers a pass works on: a name, a class, or `re:` with a pattern for the start of the name.

The same three forms as compressed-tensors' `targets` and `ignore`, so what a recipe says is what the checkpoint says.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from torch import nn

from optimizer.errors import RecipeError


def matches(name: str, module: nn.Module, patterns: Iterable[str]) -> bool:
    """Whether any pattern is the layer's name (or its last part), its class, or a `re:` that its name matches."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif pattern in (name, name.rpartition(".")[2]) or pattern in kinds:
            return True
    return False


def check_patterns(layers: Mapping[str, nn.Module], patterns: Iterable[str], option: str) -> None:
    """`RecipeError` for a pattern that matches no layer: a typing slip must not quietly change what is quantized."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise RecipeError(f"{option}: {pattern!r} is not a regular expression: {error}.") from None
        if not any(matches(name, module, [pattern]) for name, module in layers.items()):
            parts = {part for name in layers for part in (name, name.rpartition(".")[2])}
            near = difflib.get_close_matches(pattern.removeprefix("re:"), sorted(parts), n=3, cutoff=0.3)
            raise RecipeError(f"{option}: {pattern!r} matches no layer. Nearest names: {', '.join(near) or 'none'}.")
