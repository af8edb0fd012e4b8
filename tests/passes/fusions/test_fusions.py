"""Every row of the table on its own pattern: it matches, once, takes out what it says, and computes the same."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from optimizer.backends.fusion import Fusion, GraphRecord
from optimizer.passes.fusions import FUSIONS, dequantize_matmul, epilogue, quantize, rope_kv_write
from optimizer.passes.fusions.gated import gelu_new

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Inductor's own imports use what PyTorch deprecates
    from torch._inductor.decomposition import select_decomp_table

    from optimizer.backends.inductor import FusionPass, as_inductor_has_it

ROWS = [(f, dtype) for f in FUSIONS for dtype in f.dtypes]
OTHERS = (
    *quantize.FUSIONS,
    *dequantize_matmul.FUSIONS,
    *(f for f in epilogue.FUSIONS if "tanh" in f.variant),
    *rope_kv_write.FUSIONS,  # in test_rope_kv_write.py
)
PLAIN = [(f, dtype) for f, dtype in ROWS if f not in OTHERS]
CALLED = {"mm_bias": "aten.addmm", "addmm_relu": "aten._addmm_activation", "addmm_gelu": "aten._addmm_activation"}
"""What a fusion calls, where that is not the op of its name."""


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
    assert targets(module).count(CALLED.get(fusion.name, f"optimizer.{fusion.name}") + ".default") == 1
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


def integers(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(2))


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def within(actual: Tensor, function: Any, inputs: list[Tensor], x: int = 0) -> None:
    """`actual` is a product by the decoded weight, accumulated in float32 and rounded once.

    Each of the K products and of the decoded weights is rounded at most thrice in float32, and each sum once, relative
    to the sum of magnitudes. That of `function` in its own type, which rounds weights (twice: zero and scale) and the
    product (thrice: itself, times its scale, plus its bias) to it, is five of its roundings from the same.
    """
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    k = inputs[x].shape[-1]
    eye = torch.eye(k, dtype=torch.float64).view(*[1] * (inputs[x].dim() - 2), k, k)
    at_zero = function(*wide[:x], eye * 0, *wide[x + 1 :]).flatten(0, -2)[0]
    weight = function(*wide[:x], eye, *wide[x + 1 :]).flatten(0, -2) - at_zero  # [K, N]
    exact, plain = function(*wide), function(*inputs)
    magnitude = wide[x].abs() @ weight.abs() + at_zero.abs()
    unit = torch.finfo(actual.dtype).eps / 2
    bound = unit * exact.abs() + (k + 4) * 2.0**-24 * magnitude
    assert actual.dtype == plain.dtype
    assert actual.shape == exact.shape
    assert bool(((actual.double() - exact).abs() <= bound).all())
    assert bool(((actual.double() - plain.double()).abs() <= bound + 5 * unit * magnitude + k * 2.0**-24).all())


@pytest.mark.parametrize("fusion", dequantize_matmul.FUSIONS, ids=str)
def test_a_decoded_weight_joins_its_product(fusion: Fusion) -> None:
    inputs = [integers(*t.shape) if t.dtype == torch.int8 else floats(*t.shape) for t in fusion.inputs(torch.float32)]
    inputs = [t if t.dtype == torch.int8 else t.bfloat16() for t in inputs]
    module, record = rewritten(lambda *tensors: fusion.pattern(*tensors), *inputs)
    assert [(site.fusion, site.variant, site.reason) for site in record.sites] == [(fusion.name, fusion.variant, "")]
    assert not record.misses
    assert targets(module).count("optimizer.w8a16_linear.default") == 1
    assert not set(fusion.removes) & set(targets(module))
    within(module(*inputs), fusion.pattern, inputs)


DECODED: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "one scale a channel": (lambda x, q, s: x @ (q.to(x.dtype) * s[:, None]).T, [(5, 64), (96, 64), (96,)]),
    "of rows": (lambda x, q, s: x @ (q.to(x.dtype) * s[:, None]).T, [(2, 3, 64), (96, 64), (96,)]),
    "a column of scales": (lambda x, q, s: F.linear(x, q.to(x.dtype) * s), [(1, 64), (96, 64), (96, 1)]),
    "groups": (
        lambda x, q, s, b: F.linear(x, (q.to(x.dtype).view(96, 3, 32) * s[:, :, None]).view(96, 96), b),
        [(2, 3, 96), (96, 96), (96, 3), (96,)],
    ),
    "groups with zeros": (
        lambda x, q, s, z: x @ ((q.view(64, 2, -1).to(x.dtype) - z.unsqueeze(-1)) * s.unsqueeze(-1)).view(64, 64).T,
        [(5, 64), (64, 64), (64, 2), (64, 2)],
    ),
    "torchao": (
        lambda x, q, s, b: (torch.mm(x.reshape(-1, 64), q.t().to(x.dtype)) * s).reshape(*x.shape[:-1], 96) + b,
        [(2, 3, 64), (96, 64), (96,), (96,)],
    ),
    "gpt-fast": (lambda x, q, s: F.linear(x, q.to(x.dtype)) * s, [(1, 2, 64), (96, 64), (96,)]),
    "a row of scales": (lambda x, q, s: (x @ q.to(x.dtype).T) * s.T, [(5, 64), (96, 64), (96, 1)]),
}
"""As models write it: x, q, scale, then zero or bias."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DECODED)
def test_decoded_weights_are_found_as_models_write_them(name: str, dtype: torch.dtype) -> None:
    function, shapes = DECODED[name]
    inputs = [integers(*s) if i == 1 else floats(*s, dtype=dtype) for i, s in enumerate(shapes)]
    inputs[2] = inputs[2] * 0.01  # float16 holds the product before its scale: 127 * 64 ** 0.5 * 4
    module, record = rewritten(function, *inputs)
    assert record.applied() == {"dequantize_matmul": 1}
    assert not record.misses
    assert not {"aten.mm.default", "aten.addmm.default", "aten.mul.Tensor"} & set(targets(module))
    within(module(*inputs), function, inputs)


def test_what_is_known_of_a_weight_does_not_depend_on_its_scale_s_type() -> None:
    def wide(x: Tensor, q: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return x @ ((q.float() - z) * s).to(x.dtype).T

    inputs = [floats(5, 64, dtype=torch.bfloat16), integers(96, 64), floats(96, 1), integers(96, 1)]
    module, record = rewritten(wide, *inputs)
    assert record.applied() == {"dequantize_matmul": 1}
    (op,) = [node for node in module.graph.nodes if str(node.target) == "optimizer.w8a16_linear.default"]
    assert [op.args[i].meta["val"].dtype for i in (2, 3)] == [torch.float32, torch.float32]
    assert op.args[1].op == "placeholder"
    within(module(*inputs), wide, inputs)


Q = integers(64, 64)
NOT_DECODED: dict[str, tuple[Any, list[Tensor], str]] = {
    "a scale for each row of x": (
        lambda x, q, s: (x @ q.to(x.dtype).T) * s, [floats(64, 64), Q, floats(64, 1)], "scale is [64, 1], not one value"
    ),
    "a scale for each input channel": (
        lambda x, q, s: x @ (q.to(x.dtype) * s).T, [floats(5, 64), Q, floats(64)], "scale is [64], not one value"
    ),
    "a scale for each weight": (
        lambda x, q, s: x @ (q.to(x.dtype) * s).T, [floats(5, 64), Q, floats(64, 64)], "scale is [64, 64], not one"
    ),
    "rounded activations": (
        lambda x, y, s: x @ (y.to(torch.int8).to(x.dtype) * s).T, [floats(5, 64), floats(64, 64), floats(64, 1)], ""
    ),
    "integers that were added": (
        lambda x, q, s: x @ ((q + q).to(x.dtype) * s).T, [floats(5, 64), Q, floats(64, 1)], ""
    ),
    "unsigned weights": (
        lambda x, q, s: x @ (q.to(x.dtype) * s).T, [floats(5, 64), Q.view(torch.uint8), floats(64, 1)], ""
    ),
    "integers without a scale": (lambda x, q: x @ q.to(x.dtype).T, [floats(5, 64), Q], ""),
    "K of 48": (
        lambda x, q, s: x @ (q.to(x.dtype) * s).T, [floats(5, 48), integers(64, 48), floats(64, 1)],
        "K is 48 and the group 48: no multiples of 32",
    ),
    "groups of 16": (
        lambda x, q, s: x @ (q.to(x.dtype).view(64, 4, 16) * s[..., None]).view(64, 64).T,
        [floats(5, 64), Q, floats(64, 4)], "K is 64 and the group 16: no multiples of 32",
    ),
    "a number for a zero": (
        lambda x, q, s: x @ ((q.to(x.dtype) - 8) * s).T, [floats(5, 64), Q, floats(64, 1)], ", not a tensor"
    ),
    "float64": (
        lambda x, q, s: x @ (q.to(x.dtype) * s).T, [floats(5, 64).double(), Q, floats(64, 1).double()],
        "scale is s_1, not a tensor that float32 holds",
    ),
    "a bias that is scaled too": (
        lambda x, q, s: F.linear(x, q.to(x.dtype), s) * s, [floats(5, 64), Q, floats(64)],
        "where the pattern has aten.mul.Tensor",
    ),
    "weights stored the other way": (
        lambda x, q, s: x @ (q.to(x.dtype) * s), [floats(5, 64), Q, floats(64, 1)], "where the pattern has aten.permute"
    ),
    "a decoded weight that is read again": (
        lambda x, q, s: (x @ (w := q.to(x.dtype) * s).T, w), [floats(5, 64), Q, floats(64, 1)],
        "also used outside the pattern",
    ),
    "converted integers that are read again": (
        lambda x, q, s: ((x @ (w := q.to(x.dtype)).T) * s, w.sum(0)), [floats(5, 64), Q, floats(64)],
        "where the pattern has aten.mul.Tensor",
    ),
}  # fmt: skip
"""Products by integers that are no `w8a16_linear`: what is said of them, nothing of what is no stored weight."""


@pytest.mark.parametrize("name", NOT_DECODED)
def test_other_products_by_integers_are_left_as_they_are(name: str) -> None:
    function, inputs, reason = NOT_DECODED[name]
    module, record = rewritten(function, *inputs)
    assert not record.applied()
    assert "optimizer.w8a16_linear.default" not in targets(module)
    said = [site.reason for site in record.sites] + [miss.reason for miss in record.misses]
    assert [reason in words for words in said] == [True] * bool(reason)
    for actual, expected in zip(_tuple(module(*inputs)), _tuple(function(*inputs)), strict=True):
        assert torch.equal(actual, expected)


def test_the_integers_may_have_other_readers() -> None:
    def tied(token: Tensor, x: Tensor, q: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        embedded = q[token].to(x.dtype) * s[token]
        return x @ (q.to(x.dtype) * s).T, embedded

    inputs = [torch.tensor([3, 5]), floats(5, 64), Q, floats(64, 1)]
    module, record = rewritten(tied, *inputs)
    assert record.applied() == {"dequantize_matmul": 1}
    assert not record.misses
    within(module(*inputs)[0], lambda *t: tied(inputs[0], *t)[0], inputs[1:])
    assert torch.equal(module(*inputs)[1], tied(*inputs)[1])


def test_a_decoded_weight_comes_before_what_reads_its_product() -> None:
    def layer(x: Tensor, q: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return F.relu(F.linear(x, q.to(x.dtype) * s, b))

    inputs = [floats(5, 64), Q, floats(64, 1), floats(64)]
    for devices in ((), ("cpu",)):
        module, record = rewritten(layer, *inputs, devices=devices)
        assert record.matched() == {"dequantize_matmul": 1}
        assert not record.misses
    assert "aten.relu.default" in targets(module)
    exact = layer(*(t if t.dtype == torch.int8 else t.double() for t in inputs))
    # float32 sums of 64 products of at most 4 by 127 by 4, and their bias.
    assert float((module(*inputs).double() - exact).abs().max()) <= 64 * 2.0**-24 * 64 * 4 * 127 * 4


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_epilogue_s_gelu_is_the_one_that_the_device_computes(device: str, approximate: str) -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate=approximate)

    with FakeTensorMode(), torch.no_grad(), enable_python_dispatcher():
        inputs = [torch.empty(shape, device=device) for shape in ((6, 16), (8, 16), (8,))]
        module = make_fx(layer, select_decomp_table())(*inputs)
    as_inductor_has_it(module)
    fusion = FusionPass(FUSIONS, (device,))
    fusion(module.graph)
    (site,) = fusion.ledger.graphs[0].sites
    assert site.fusion == "addmm_gelu"
    if (device, approximate) in (("cpu", "none"), ("cuda", "tanh")):
        assert site.applied
        (node,) = [node for node in module.graph.nodes if node.op == "call_function" and "addmm" in str(node.target)]
        assert (str(node.target), node.kwargs) == ("aten._addmm_activation.default", {"use_gelu": True})
    else:
        assert site.reason.startswith(f"the epilogue on {device} is GELU with approximate=")
        assert "aten._addmm_activation.default" not in targets(module)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_epilogue_s_gelu_is_the_tanh_form(dtype: torch.dtype) -> None:
    bias, x, weight = (floats(*shape, dtype=dtype) for shape in ((64,), (32, 64), (64, 64)))
    for gelu, act in ((True, lambda y: F.gelu(y, approximate="tanh")), (False, F.relu)):
        actual = torch.ops.aten._addmm_activation.default(bias.cuda(), x.cuda(), weight.cuda(), use_gelu=gelu).cpu()
        exact = act(torch.addmm(bias.double(), x.double(), weight.double()))
        # The float32 sums may be of TF32 products, 2^-11 each; the result is rounded, and the product where it is kept.
        magnitude = x.double().abs() @ weight.double().abs() + bias.double().abs()
        assert bool(((actual.double() - exact).abs() <= (2.0**-10 + torch.finfo(dtype).eps) * magnitude).all())


NO_EPILOGUE: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    # Inductor makes `addmm` of these itself.
    "a bias with no view between": (lambda x, w, b: x @ w + b, [(6, 8), (8, 8), (8,)]),
    # `addmm` would first copy the matrix into its result.
    "a sum with a whole matrix": (lambda x, w, y: x @ w + y, [(2, 3, 8), (8, 8), (2, 3, 8)]),
    "relu of a sum with a matrix": (lambda x, w, y: F.relu(torch.addmm(y, x, w)), [(6, 8), (8, 8), (6, 8)]),
    "a product that is read again": (lambda x, w, b: (F.relu(y := F.linear(x, w, b)), y), [(6, 8), (8, 8), (8,)]),
    "rows that are read again": (lambda x, w, b: ((y := x @ w) + b, y), [(2, 3, 8), (8, 8), (8,)]),
    "relu of a scaled sum": (lambda x, w, b: F.relu(torch.addmm(b, x, w, beta=2)), [(6, 8), (8, 8), (8,)]),
    "relu of a scaled product": (lambda x, w, b: F.relu(torch.addmm(b, x, w, alpha=2)), [(6, 8), (8, 8), (8,)]),
    "gelu of a scaled sum": (
        lambda x, w, b: F.gelu(torch.addmm(b, x.view(-1, 8), w, beta=2).view(2, 3, 8)), [(2, 3, 8), (8, 8), (8,)]
    ),
    "leaky relu": (lambda x, w, b: F.leaky_relu(F.linear(x, w, b)), [(6, 8), (8, 8), (8,)]),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_EPILOGUE)
def test_what_is_no_epilogue_is_left_as_it_is(name: str) -> None:
    function, shapes = NO_EPILOGUE[name]
    inputs = [floats(*shape) for shape in shapes]
    module, record = rewritten(function, *inputs)
    assert not record.applied()
    assert not record.misses
    assert all("which the pattern lacks" in site.reason for site in record.sites)
    assert bool(record.sites) == ("scaled" in name)
    for actual, expected in zip(_tuple(module(*inputs)), _tuple(function(*inputs)), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
