"""The rotation of query and key, with the norms of their heads before it and the write to the cache after it.

These match our own ops: `kv_write` of a key that `rope` has rotated for it alone, after `rms_norm` of each head (behind
the heads' transposition in Gemma 3, before it in Qwen 3) or without norms. In a functional graph what is written is a
new tensor: `auto_functionalized_v2` of the op, called with what the op reads and with the tensors that it changes
(`_all_bases`), which come back changed. Attention reads those, so the order of reads and writes is in the graph,
whichever op writes; Inductor later makes it one write in place, if nothing reads the old tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Node

from optimizer.backends.fusion import Anchor, Fusion, first_reason, not_a_row, not_float, value
from optimizer.backends.kernels.kv_write import kv_write
from optimizer.backends.kernels.rms_norm import rms_norm
from optimizer.backends.kernels.rope import rope
from optimizer.backends.kernels.rope_kv_write import rope_kv_write

CHANGED = ("k_cache", "v_cache", "k_scale", "v_scale")
"""What the ops change, in the order of their schemas."""
EPS, OFFSET = ("eps", 1.2345e-4), ("offset", 0.54321)

Given = Mapping[str, Any]
"""Arguments of a pattern by name."""


def _plain(x: Tensor, _weight: None, _given: Given) -> Tensor:
    return x


def _normed(x: Tensor, weight: Tensor, given: Given) -> Tensor:
    return rms_norm(x, weight, given["eps"], given["offset"])  # type: ignore[no-any-return]


def _normed_first(x: Tensor, weight: Tensor, given: Given) -> Tensor:
    """`x [B, S, H, D]`."""
    return _normed(x, weight, given).transpose(1, 2)


def _changed(op: Any, given: Given, **read: Any) -> tuple[Any, ...]:
    """What `op` returns, and then each tensor that it changes, as functionalization presents it."""
    bases = [name for name in CHANGED if name in given]
    places = {f"_{name}_base_index": bases.index(name) if name in bases else None for name in CHANGED}
    slots = given["slots"]
    return auto_functionalized_v2(op, **read, slots=slots, **places, _all_bases=[given[name] for name in bases])


def _pattern(norm: Callable[..., Tensor], key_first: bool) -> Callable[[Given], tuple[Tensor, ...]]:
    """Where query and key have as many heads, `rope` may have them in either order."""

    def pattern(given: Given) -> tuple[Tensor, ...]:
        query, key = (norm(given[x], given.get(f"{x}_weight"), given) for x in ("q", "k"))
        tables = given["cos"], given["sin"]
        if key_first:
            key, query = rope(key, query, *tables)
        else:
            query, key = rope(query, key, *tables)
        _, *changed = _changed(kv_write, given, k=key, v=given["v"])
        return query, key, *changed  # the key too, so that the guard and not the matcher says who else reads it

    return pattern


def _replacement(norm: Callable[..., Tensor]) -> Callable[[Given], tuple[Tensor, ...]]:
    def replacement(given: Given) -> tuple[Tensor, ...]:
        read = {name: given[name] for name in ("q", "k", "v", "cos", "sin")}
        if norm is _normed_first:
            read |= {name: given[name].transpose(1, 2) for name in ("q", "k")}
        read |= {name: given.get(name) for name in ("q_weight", "k_weight")}
        read |= {name: given.get(name, 0.0) for name in ("eps", "offset")}
        query, *changed = _changed(rope_kv_write, given, **read)
        return query, given["k"], *changed  # nobody reads the key

    return replacement


def _named(names: tuple[str, ...], body: Callable[[Given], Any]) -> Callable[..., Any]:
    """`body` as a function of arguments with these names, which are what the matcher goes by."""

    def function(*arguments: Any) -> Any:
        return body(dict(zip(names, arguments, strict=True)))

    function.__signature__ = Signature([Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in names])  # type: ignore[attr-defined]
    return function


def _is_write(node: Node) -> bool:
    """`kv_write` of what `rope` returned."""
    if node.target is not auto_functionalized_v2 or node.args[0] is not kv_write:
        return False
    key = node.kwargs["k"]
    source = key.args[0] if isinstance(key, Node) and key.args else None
    return isinstance(source, Node) and source.target is rope


ANCHOR = Anchor("write of a rotated key", _is_write)


def _guard(nodes: Given) -> str:
    q = value(nodes["q"])
    (write,) = (user for user in nodes["k_cache"].users if _is_write(user))
    weights = [not_a_row(name, nodes[name], q) for name in ("q_weight", "k_weight") if name in nodes]
    old = [_read_before(name, nodes[name], write) for name in CHANGED if name in nodes]
    made = [_made_of(name, nodes[name], write) for name in ("v", "slots", *CHANGED) if name in nodes]
    return first_reason([_readers(write), not_float(q), *weights, *old, *made])


def _readers(write: Node) -> str:
    """A reason where the rotated key is not for the cache alone: nobody else would find it."""
    key: Any = write.kwargs["k"]
    others = [user.name for user in key.users if user is not write]
    return f"the rotated key is also read by {', '.join(others)}" if others else ""


def _read_before(name: str, cache: Node, write: Node) -> str:
    """A reason where something but the write uses the tensor as it was: Inductor would have to copy it whole."""
    others = [
        user.name
        for user in cache.users
        if user is not write and not (user.target is torch.ops.aten.copy_.default and user.args[0] is cache)
    ]
    return f"{name} is also used as it was before the write, by {', '.join(others)}" if others else ""


def _made_of(name: str, node: Node, write: Node) -> str:
    """A reason where an operand is computed from what the rotation returns: one op cannot take it and return that."""
    rotation = write.kwargs["k"].args[0]  # type: ignore[union-attr]
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        if current is rotation:
            return f"{name} is computed from the rotated query or key"
        new = set(current.all_input_nodes) - seen
        seen |= new
        queue.extend(new)
    return ""


def _inputs(before: bool, norms: bool, scales: bool) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        heads = [torch.empty(2, n, 3, 8, dtype=dtype) for n in (4, 2)]
        heads = [x.transpose(1, 2).contiguous() if before else x for x in heads]
        rest = [torch.empty(2, 2, 3, 8, dtype=dtype), *(torch.empty(2, 3, 8, dtype=dtype) for _ in range(2))]
        weights = [torch.empty(8, dtype=dtype) for _ in range(2 * norms)]
        caches = [torch.empty(5, 2, 4, 8, dtype=torch.int8 if scales else dtype) for _ in range(2)]
        caches += [torch.empty(5, 2, 4) for _ in range(2 * scales)]
        return *heads, *rest, *weights, *caches, torch.zeros(2, 3, dtype=torch.int64)

    return make


NORMS = (("norms", _normed), ("norms before the transposition", _normed_first), ("no norms", _plain))
CACHES = (("in its own type", CHANGED[:2]), ("in 8 bits", CHANGED))
ORDERS = (("", False), (", key first", True))


def _fusion(norm: Callable[..., Tensor], changed: tuple[str, ...], key_first: bool, variant: str) -> Fusion:
    norms = norm is not _plain
    weights, numbers = (("q_weight", "k_weight"), (EPS, OFFSET)) if norms else ((), ())
    names = ("q", "k", "v", "cos", "sin", *weights, *changed, "slots", *(name for name, _ in numbers))
    return Fusion(
        "rope_kv_write", variant, _named(names, _pattern(norm, key_first)), _named(names, _replacement(norm)),
        _inputs(norm is _normed_first, norms, changed == CHANGED), ANCHOR, _guard,
        ("optimizer.rope.default", *(["optimizer.rms_norm.default"] if norms else [])), numbers,
        dtypes=(torch.bfloat16,),  # ops look the same in every type
    )  # fmt: skip


FUSIONS = tuple(
    _fusion(norm, changed, key_first, f"{label}, {kind}{order}")
    for label, norm in NORMS
    for kind, changed in CACHES
    for order, key_first in ORDERS
)
