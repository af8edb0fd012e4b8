"""The op library `optimizer::*`. Each kernel file defines its ops here when it is imported.

An op is declared by its schema, given a reference implementation for every device (the specification, in plain
PyTorch), and a fake that carries shapes through `torch.compile`. Compiled kernels register themselves for one
device and take precedence there. Schemas are registered once a process, so modules may be imported twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from optimizer.backends.kernels.gpu import triton

_LIBRARY = torch.library.Library("optimizer", "FRAGMENT")
_TAG = torch.Tag.needs_fixed_stride_order
_OPS: list[Any] = []


def define(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any] | None = None
) -> Any:
    """Declare `optimizer::name` from its schema and return the op, `torch.ops.optimizer.name.default`.

    `cuda` launches its Triton kernels; where Triton is missing the reference serves CUDA tensors too.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, _TAG))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if cuda is not None and triton is not None:
        _LIBRARY.impl(name, _on_its_device(cuda), "CUDA")
    torch.library.register_fake(f"optimizer::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.optimizer, name).default
    _OPS.append(op)
    return op


def introduce_ops() -> None:
    """Tell Inductor, before it compiles, that it is to call our ops as they are.

    It would find that out where an op comes first. But PyTorch 2.11 then writes the op's arguments into its log, calls
    within calls, whether it is read or not: that doubles with every layer before, and a deep model is never done.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint

    for op in _OPS:
        if op not in lowerings:
            make_fallback(op, layout_constraint=tag_to_layout_constraint(_TAG), warn=False)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first argument: Triton launches on the current one."""

    @wraps(launch)
    def guarded(x: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return launch(x, *args)

    return guarded
