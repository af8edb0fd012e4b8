"""How a pass of a recipe can be taken back: dropped, set to something gentler, or kept away from some layers. As data.

A `Revert` says what becomes of one pass of a recipe's list, in the words of that list, so what it makes is a recipe
again. `SETTINGS` holds the options that change what a model computes and the value at which they do not; `GENTLER` the
less aggressive settings of a pass, the smallest checkpoint first. A pass that is in neither table can be dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from optimizer.passes.registry import PASSES

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """An option that can be taken back alone: `plain` is what else the pass then is set to, `word` what that is."""

    option: str
    plain: Options
    word: str


SETTINGS: dict[str, tuple[Setting, ...]] = {
    "quantize": (Setting("activations", {"activations": "none", "smooth": False, "alpha": None}, "inputs in 16 bits"),),
    "decode": (
        Setting("int8_inputs", {"int8_inputs": False}, "inputs in 16 bits"),
        Setting("kv", {"kv": None}, "keys and values in the model's type"),
        Setting("window", {"window": 0, "sinks": 0}, "every token seen"),
    ),
}

GENTLER: dict[str, tuple[tuple[Mapping[str, tuple[Any, ...]], Options], ...]] = {
    "quantize": (
        ({"weights": ("int",), "bits": (4,), "group_size": (-1,)}, {"group_size": 128}),
        ({"weights": ("int",), "bits": (4,), "group_size": (-1, 128)}, {"group_size": 64}),
        ({"weights": ("int",), "bits": (4,), "group_size": (-1, 128, 64)}, {"group_size": 32}),
        ({"weights": ("int",), "bits": (4,)}, {"bits": 8, "group_size": -1, "symmetric": True}),
        ({"weights": ("nvfp4", "mxfp4")}, {"weights": "fp8"}),
    ),
    "mixed": (({}, {"choices": ("int8",)}),),
}
"""Pass → pairs of what its options must be, each one of these values, and what they become."""

SERVING = ("decode", "speculate")
"""Passes that say how a model is served. Without them it computes the same, so quality never needs them dropped."""

LAYERED = ("quantize", "mixed")
"""Passes that work on layers, which their option `ignore` can keep away from them."""


@dataclass(frozen=True)
class Revert:
    """What to do to the pass at `place` of a recipe: drop it, set `options`, or add `ignore` to its ignored layers.

    `name` is what a table calls it, such as `decode.kv`; `what` says in words what it does.
    """

    place: int
    name: str
    what: str
    drop: bool = False
    options: Options = field(default_factory=dict, hash=False)
    ignore: tuple[str, ...] = ()


def option(spec: Mapping[str, Any], name: str) -> Any:
    """The value of an option of a pass in a recipe, its default where the recipe is silent; lists as tuples."""
    value = spec.get(name, getattr(PASSES[spec["name"]], name, None))
    return tuple(value) if isinstance(value, list) else value


def titles(passes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each pass of a recipe; the second of a kind is `name.2`."""
    names = [spec["name"] for spec in passes]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}.{count}" for name, count in zip(names, counts, strict=True)]


def suspects(passes: Sequence[Mapping[str, Any]]) -> list[Revert]:
    """Every pass and setting that may change what the model computes, each with how it is taken back."""
    found = []
    for place, (spec, title) in enumerate(zip(passes, titles(passes), strict=True)):
        if spec["name"] not in SERVING:
            found.append(Revert(place, title, f"without {title}", drop=True))
        found += _settings(place, spec, title)
    return found


def time_suspects(passes: Sequence[Mapping[str, Any]], *, serving: bool) -> list[Revert]:
    """Every pass and setting that may cost time. With `serving` or speculation the paged cache cannot go."""
    found = []
    bound = serving or any(spec["name"] == "speculate" for spec in passes)
    for place, (spec, title) in enumerate(zip(passes, titles(passes), strict=True)):
        if spec["name"] != "decode":
            found.append(Revert(place, title, f"without {title}", drop=True))
            continue
        found += _settings(place, spec, title)
        if option(spec, "cache") == "paged" and not bound:
            kept = ("max_context", "compile", "int8_inputs", "required")
            paged = {f.name: f.default for f in fields(PASSES["decode"]) if f.name not in kept}
            found.append(Revert(place, f"{title}.cache", f"{title}.cache paged → static", options=paged))
    return found


def _settings(place: int, spec: Mapping[str, Any], title: str) -> list[Revert]:
    return [
        Revert(place, f"{title}.{s.option}", f"{title}.{s.option} {_said(option(spec, s.option))} → {s.word}",
               options=s.plain)
        for s in SETTINGS.get(spec["name"], ())
        if option(spec, s.option) != s.plain[s.option]
    ]  # fmt: skip


def gentler(passes: Sequence[Mapping[str, Any]], place: int) -> list[Revert]:
    """Less aggressive settings of the pass at `place`, the smallest checkpoint first."""
    spec, title = passes[place], titles(passes)[place]
    found = []
    for now, then in GENTLER.get(spec["name"], ()):
        alike = all(option(spec, name) in values for name, values in now.items())
        changed = {name: value for name, value in then.items() if option(spec, name) != value}
        if alike and changed:
            words = ", ".join(f"{title}.{n} {_said(option(spec, n))} → {_said(v)}" for n, v in changed.items())
            found.append(Revert(place, title, words, options=then))
    return found


def without_layers(passes: Sequence[Mapping[str, Any]], place: int, layers: Sequence[str]) -> Revert:
    """Keep these layers away from the pass at `place`: they stay as they are."""
    shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    title = titles(passes)[place]
    so = "it is" if len(layers) == 1 else "they are"
    return Revert(place, title, f"{title} leaves {shown} as {so}", ignore=tuple(layers))


def reverted(passes: Sequence[Mapping[str, Any]], reverts: Iterable[Revert]) -> list[dict[str, Any]]:
    """The passes of a recipe with these reverts carried out."""
    chosen = list(reverts)
    made = []
    for place, spec in enumerate(passes):
        mine = [revert for revert in chosen if revert.place == place]
        if any(revert.drop for revert in mine):
            continue
        new = dict(spec)
        for revert in mine:
            new |= revert.options
            if revert.ignore:
                new["ignore"] = [*dict.fromkeys([*option(new, "ignore"), *revert.ignore])]
        made.append({name: list(value) if isinstance(value, tuple) else value for name, value in new.items()})
    return made


def _said(value: Any) -> str:
    """A value as YAML says it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else ", ".join(value) if isinstance(value, list | tuple) else str(value)
