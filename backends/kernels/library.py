"""The op library `optimizer::*`. Each kernel file defines its ops here when it is imported.

An op is declared by its schema, given a reference implementation for every device (the specification, in plain
PyTorch), and a fake that carries shapes through `torch.compile`. Compiled kernels register themselves for one
device and take precedence there. Schemas are registered once a process, so modules may be imported twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("optimizer", "FRAGMENT")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Declare `optimizer::name` from its schema and return the op, `torch.ops.optimizer.name.default`."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"optimizer::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.optimizer, name).default
