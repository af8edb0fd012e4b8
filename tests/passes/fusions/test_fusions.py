"""Every row of the table on its own pattern: it matches, once, takes out what it says, and computes the same."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from optimizer.backends.fusion import Fusion, GraphRecord
from optimizer.passes.fusions import FUSIONS, quantize
from optimizer.passes.fusions.gated import gelu_new

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Inductor's own imports use what PyTorch deprecates
    from torch._inductor.decomposition import select_decomp_table

    from optimizer.backends.inductor import FusionPass, as_inductor_has_it

ROWS = [(f, dtype) for f in FUSIONS for dtype in f.dtypes]
PLAIN = [(f, dtype) for f, dtype in ROWS if f not in quantize.FUSIONS]


def rewritten(function: Any, *inputs: Tensor, devices: tuple[str, ...] = ("cpu",)) -> tuple[GraphModule, GraphRecord]:
    """`function` as Inductor sees it, after all fusions."""
    with torch.no_grad(), enable_python_dispatcher():
        module = make_fx(function, select_decomp_table(), tracing_mode="fake")(*inputs)
    as_inductor_has_it(module)
    fusion = FusionPass(FUSIONS, devices)
    fusion(module.graph)
    module.recompile()
    return module, fusion.ledger.graphs[0]


def targets(module: GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def random_inputs(fusion: Fusion, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(t.shape, generator=generator).to(dtype) for t in fusion.inputs(dtype)]


def numbers(fusion: Fusion) -> list[float]:
    return [1e-5 if name == "eps" else 1.0 for name, _ in fusion.scalars]


def close(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    """Within four roundings to `dtype`, of the largest value.

    16 bits: a rounded sum moves an element by u and the norm of its row by at most as much, the output is rounded
    once more, and a GELU has a slope of 1.13 at most. float32: sums of 16 products, each rounded.
    """
    unit = torch.finfo(dtype).eps / 2
    return float((actual.double() - exact.double()).abs().max()) <= (
        32 if dtype == torch.float32 else 4
    ) * unit * float(exact.double().abs().max())


@pytest.mark.parametrize(("fusion", "dtype"), PLAIN, ids=lambda v: str(v))
def test_a_row_matches_its_pattern_once_and_computes_the_same(fusion: Fusion, dtype: torch.dtype) -> None:
    inputs = random_inputs(fusion, dtype)
    scalars = numbers(fusion)[:1]
    module, record = rewritten(lambda *tensors: fusion.pattern(*tensors, *scalars), *inputs)
    assert [(site.fusion, site.applied) for site in record.sites] == [(fusion.name, True)]
    assert not record.misses
    assert targets(module).count(f"optimizer.{fusion.name}.default") == 1
    assert not set(fusion.removes) & set(targets(module))
    wide = fusion.pattern(*(t.float() for t in inputs), *scalars)  # the same values, in arithmetic without rounding
    for actual, exact in zip(_tuple(module(*inputs)), _tuple(wide), strict=True):
        assert actual.dtype == dtype
        assert actual.shape == exact.shape
        assert close(actual, exact, dtype)


@pytest.mark.parametrize("fusion", quantize.FUSIONS, ids=str)
def test_a_rounding_joins_what_made_its_rows(fusion: Fusion) -> None:
    inputs = random_inputs(fusion, torch.bfloat16)
    scalars = numbers(fusion)
    module, record = rewritten(lambda *tensors: fusion.pattern(*tensors, *scalars), *inputs)
    assert [(site.fusion, site.variant) for site in record.sites] == [(fusion.name, fusion.variant)]
    assert targets(module).count(f"optimizer.{fusion.name}.default") == 1
    assert not set(fusion.removes) & set(targets(module))
    for actual, exact in zip(module(*inputs), fusion.pattern(*inputs, *scalars), strict=True):
        assert torch.equal(actual.float(), exact.float())  # both round the same value


def test_siblings_that_round_one_input_share_it() -> None:
    op = torch.ops.optimizer.quantize_rows.default
    norm = torch.ops.optimizer.rms_norm.default

    def three(x: Tensor, weight: Tensor) -> list[Tensor]:
        y = norm(x, weight, 1e-6, 0.0)
        return [part for _ in range(3) for part in op(y, -1, torch.int8)]

    module, record = rewritten(three, torch.randn(2, 3, 16), torch.randn(16))
    assert record.matched() == {"rms_norm_quantize": 1}
    assert [t for t in targets(module) if t.startswith("optimizer.")] == ["optimizer.rms_norm_quantize.default"]


def test_rows_that_something_else_reads_are_not_only_rounded() -> None:
    def also_read(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.ops.optimizer.rms_norm.default(x, weight, 1e-6, 0.0)
        return *torch.ops.optimizer.quantize_rows.default(y, -1, torch.int8), y

    module, record = rewritten(also_read, torch.randn(2, 3, 16), torch.randn(16))
    assert not record.sites
    assert not record.misses
    assert "optimizer.quantize_rows.default" in targets(module)


def test_epsilon_and_the_spelled_out_constants_must_be_the_pattern_s() -> None:
    def other_constant(gate: Tensor, up: Tensor) -> Tensor:
        return 0.5 * gate * (1.0 + torch.tanh(0.75 * (gate + 0.044715 * gate.pow(3)))) * up

    module, record = rewritten(other_constant, torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    assert not record.sites
    (miss,) = record.misses
    assert miss.anchor == "gated gelu"
    assert "optimizer.gelu_mul.default" not in targets(module)
    eps = 0.125

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    module, record = rewritten(norm, x := torch.randn(2, 3, 8), weight := torch.randn(8))
    assert record.applied() == {"rms_norm": 1}
    assert close(module(x, weight), norm(x, weight), torch.float32)


NEAR: dict[str, tuple[Any, list[tuple[int, ...]], torch.dtype, str]] = {
    "norm over another dimension": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)), [(2, 8, 8), (8,)], torch.float32, ""
    ),
    "mean of cubes": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)), [(2, 3, 8), (8,)], torch.float32, ""
    ),
    "a weight that the graph computes": (
        lambda x, w: (w + w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), [(2, 3, 8), (8,)],
        torch.float32, "weight is computed in the graph",
    ),
    "float64": (
        lambda x, w: F.layer_norm(x, (8,), w, w, 1e-6), [(2, 3, 8), (8,)], torch.float64, "no kernel for torch.float64"
    ),
    "weights for a matrix": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), [(2, 3, 8), (3, 8)],
        torch.float32, "weight is [3, 8]",
    ),
    "a broadcast gate": (
        lambda gate, up: F.silu(gate) * up, [(2, 1, 8), (2, 3, 8)], torch.float32, "one is broadcast"
    ),
    "rope by tables for each head": (
        lambda q, k, c, s: tuple(t * c + torch.cat((-t[..., 4:], t[..., :4]), -1) * s for t in (q, k)),
        [(2, 4, 3, 8), (2, 4, 3, 8), (2, 4, 3, 8), (2, 4, 3, 8)], torch.float32, "tables [B, 1, S, D]",
    ),
    "rope of one tensor": (
        lambda q, c, s: q * c + torch.cat((-q[..., 4:], q[..., :4]), -1) * s,
        [(2, 4, 3, 8), (2, 1, 3, 8), (2, 1, 3, 8)], torch.float32, "",
    ),
    "rope in the other order": (
        lambda q, k, c, s: tuple(t * c + torch.cat((t[..., 4:], -t[..., :4]), -1) * s for t in (q, k)),
        [(2, 4, 3, 8), (2, 2, 3, 8), (2, 1, 3, 8), (2, 1, 3, 8)], torch.float32, "",
    ),
    "one gelu for two products": (
        lambda gate, up: ((act := gelu_new(gate)) * up, act + up), [(2, 3, 8), (2, 3, 8)], torch.float32, ""
    ),
}  # fmt: skip
"""Computations that look like a fusion's and are not: shapes, and what a guard must say where the pattern matches."""


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_is_left_as_it_is(name: str) -> None:
    function, shapes, dtype, reason = NEAR[name]
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in shapes]
    module, record = rewritten(function, *inputs)
    assert not record.applied()
    assert not [target for target in targets(module) if target.startswith("optimizer.")]
    if reason:
        assert any(reason in site.reason for site in record.sites)
    for actual, exact in zip(_tuple(module(*inputs)), _tuple(function(*inputs)), strict=True):
        assert torch.allclose(actual, exact, atol=1e-5, equal_nan=True)


def test_a_broadcast_residual_leaves_the_norm_to_be_fused_alone() -> None:
    def step(x: Tensor, position: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + position, (8,), weight, bias)

    module, record = rewritten(step, torch.randn(2, 3, 8), torch.randn(1, 3, 8), torch.randn(8), torch.randn(8))
    assert record.applied() == {"layer_norm": 1}
    assert len(record.sites) == 1
    assert "aten.add.Tensor" in targets(module)


def test_query_and_key_are_told_apart_by_their_heads() -> None:
    def step(k: Tensor, q: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        key, query = (t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin for t in (k, q))
        return key, query

    inputs = [torch.randn(2, n, 3, 8) for n in (2, 6)] + [torch.randn(1, 1, 3, 8) for _ in range(2)]
    module, record = rewritten(step, *inputs)
    assert record.applied() == {"rope": 1}
    (op,) = [node for node in module.graph.nodes if str(node.target) == "optimizer.rope.default"]
    assert op.args[0].meta["val"].shape[1] == 6
    for actual, exact in zip(module(*inputs), step(*inputs), strict=True):
        assert close(actual, exact, torch.float32)


def test_two_pairs_on_one_table_are_not_guessed_at() -> None:
    def step(*t: Tensor) -> tuple[Tensor, ...]:
        cos, sin = t[4:]
        return tuple(x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin for x in t[:4])

    inputs = [torch.randn(2, 2, 3, 8) for _ in range(4)] + [torch.randn(2, 1, 3, 8) for _ in range(2)]
    _, record = rewritten(step, *inputs)
    assert not record.applied()
    assert {site.reason.partition(",")[0] for site in record.sites} == {"more than one pair shares the tables"}


@pytest.mark.parametrize("devices", [(), ("cpu",)])
def test_counts_do_not_depend_on_the_device(devices: tuple[str, ...]) -> None:
    def block(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        total = x + y
        normed = weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6))
        return total + F.silu(normed) * y

    module, record = rewritten(block, *(torch.randn(2, 3, 8) for _ in range(2)), torch.randn(8), devices=devices)
    assert record.matched() == {"add_rms_norm": 1, "silu_mul": 1}
    assert not record.misses
    ours = [target for target in targets(module) if target.startswith("optimizer.")]
    assert len(ours) == (2 if devices else 0)
    if not devices:
        assert all("no kernel of its own on cpu" in site.reason for site in record.sites)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
