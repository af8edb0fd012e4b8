"""Ops are declared once, with a reference on every device and a fake."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimizer.backends.kernels.library import define
from tests.backends.kernels.linear_cases import activations, bf16_case, quantized_case


def test_a_defined_op_runs_its_reference_and_traces_by_its_fake() -> None:
    def reference(x: Tensor, times: int) -> Tensor:
        return torch.cat([x] * times)

    def fake(x: Tensor, times: int) -> Tensor:
        return x.new_empty(x.shape[0] * times)

    op = define("test_library_tile(Tensor x, int times) -> Tensor", reference, fake)
    x = torch.arange(3.0)
    assert op is torch.ops.optimizer.test_library_tile.default
    assert op(x, 2).tolist() == [0, 1, 2, 0, 1, 2]
    assert op(x.to("meta"), 2).shape == (6,)
    torch.library.opcheck(op, (x, 2))


@pytest.mark.parametrize("case", [bf16_case(), quantized_case(4), quantized_case(8)], ids=lambda c: str(c.op))
def test_every_op_carries_shapes_without_a_device(case: object) -> None:
    args = case.args(activations(2, 3, 256, dtype=torch.bfloat16))  # type: ignore[attr-defined]
    meta = [None if t is None else t.to("meta") for t in args]
    out = case.op(*meta)  # type: ignore[attr-defined]
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 19), torch.bfloat16, "meta")
