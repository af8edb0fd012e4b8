"""The passes a recipe may name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from optimizer.errors import RecipeError
from optimizer.passes.base import Pass
from optimizer.passes.decode import Decode
from optimizer.passes.fuse import Fuse
from optimizer.passes.merge_linears import MergeLinears
from optimizer.passes.mixed import Mixed
from optimizer.passes.quantize import Quantize
from optimizer.passes.rotate import Rotate
from optimizer.passes.speculate import Speculate

PASSES: dict[str, type[Any]] = {
    kind.name: kind for kind in (Rotate, Quantize, Mixed, MergeLinears, Decode, Fuse, Speculate)
}


def build_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """The pass called `name` with its options; an unknown name or option is refused with the nearest valid one."""
    if name not in PASSES:
        raise RecipeError(f"unknown pass {name!r}.{nearest(name, PASSES)} Passes: {', '.join(PASSES)}.")
    kind = PASSES[name]
    valid = [f.name for f in dataclasses.fields(kind) if f.init]
    for option in options:
        if option not in valid:
            raise RecipeError(
                f"{name}: unknown option {option!r}.{nearest(option, valid)} Options: {', '.join(valid)}."
            )
    for f in dataclasses.fields(kind):
        if f.init and f.name in options:
            _check_type(f"{name}.{f.name}", options[f.name], str(f.type))
    return kind(**options)  # type: ignore[no-any-return]


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "bool": (bool,), "int | None": (int, type(None)), "Sequence[str]": (list, tuple), "str": (str,),
    "str | None": (str, type(None)),
    "Clip": (str,), "float": (float, int), "float | None": (float, int, type(None)),
}  # fmt: skip


def _check_type(option: str, value: Any, expected: str) -> None:
    ok = isinstance(value, _TYPES[expected]) and (expected == "bool" or not isinstance(value, bool))
    if expected == "Sequence[str]":
        ok = ok and all(isinstance(item, str) for item in value)
    if not ok:
        raise RecipeError(f"{option}: {value!r} is not of type {expected}.")


def nearest(name: str, valid: Any) -> str:
    """` Did you mean 'x'?`, or nothing when no valid name is close."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
