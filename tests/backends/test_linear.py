"""Linear modules: exact storage, bytes by hand, and merged layers that can never hand out a stale product."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from optimizer.backends.linear import (
    DenseLinear,
    MergedLinear,
    MergedSlice,
    QuantizedLinear,
    kernel_name,
    layer_kernel,
    linear_layers,
    stored_weight,
    weight_bytes,
)
from optimizer.errors import UsageError
from optimizer.quant.formats import Format
from optimizer.quant.rtn import QuantizedWeight, concatenate, quantize_rtn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merged(
    sizes: tuple[int, ...] = (16, 8, 8), k: int = 64, bias: bool = True
) -> tuple[list[MergedSlice], list[QuantizedLinear]]:
    """The slices of a merged 4-bit layer, and the separate layers it was made of."""
    weights = [quantize_rtn(random(n, k, seed=i), Format(4, False, 32)) for i, n in enumerate(sizes)]
    biases = [random(n, seed=9 + i) if bias else None for i, n in enumerate(sizes)]
    together = torch.cat([b for b in biases if b is not None]) if bias else None
    group = MergedLinear(QuantizedLinear(concatenate(weights), together), list(sizes))
    separate = [QuantizedLinear(w, b) for w, b in zip(weights, biases, strict=True)]
    return [MergedSlice(group, index) for index in range(len(sizes))], separate


def assert_same(got: QuantizedWeight | Tensor, expected: QuantizedWeight) -> None:
    assert isinstance(got, QuantizedWeight)
    assert torch.equal(got.q, expected.q)
    assert torch.equal(got.scale, expected.scale)
    assert got.scale.dtype == expected.scale.dtype
    assert got.format == expected.format
    assert (got.zero is None) == (expected.zero is None)
    if got.zero is not None and expected.zero is not None:
        assert torch.equal(got.zero, expected.zero)
        assert got.zero.dtype == expected.zero.dtype


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "k", "dtype"),
    list(product((4, 8), (True, False), (32, -1), (64, 96), (torch.bfloat16, torch.float16, torch.float32)))
    + [
        (bits, symmetric, -1, k, torch.bfloat16) for bits in (4, 8) for symmetric in (True, False) for k in (1, 33, 100)
    ],
)
def test_a_stored_weight_comes_back_exactly(bits: int, symmetric: bool, group: int, k: int, dtype: torch.dtype) -> None:
    weight = quantize_rtn(random(5, k).to(dtype), Format(bits, symmetric, group))
    layer = QuantizedLinear(weight)
    assert_same(layer.stored_weight(), weight)
    assert_same(stored_weight(copy.deepcopy(layer)), weight)


@pytest.mark.parametrize(("bits", "k"), [(4, 64), (8, 64), (4, 33), (8, 33)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_module_computes_with_its_dequantized_weight(bits: int, k: int, symmetric: bool) -> None:
    weight, bias, x = (
        quantize_rtn(random(7, k), Format(bits, symmetric, -1)),
        random(7, seed=2),
        random(2, 3, k, seed=3),
    )
    got = QuantizedLinear(weight, bias)(x)
    expected = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    # (K + 16) u of sums whose terms are at most |x| times 2^b steps (kernels/linear_cases.py has the sharp form).
    error = (k + 16) * 2.0**-24 * float((x.abs().sum(-1).max() * weight.scale.max() * 2**bits * 2) + bias.abs().max())
    assert float((got - expected).abs().max()) <= error


def test_weight_bytes_by_hand() -> None:
    weight = random(6, 128)
    counts = {
        (4, True, 32): 6 * 64 + 6 * 4 * 4,  # half a byte a weight, a float32 scale a group
        (4, False, 32): 6 * 64 + 2 * 6 * 4 * 4,  # and a float32 zero point
        (8, True, -1): 6 * 128 + 6 * 4,
        (8, False, 64): 6 * 128 + 2 * 6 * 2 * 4,
    }
    for (bits, symmetric, group), expected in counts.items():
        assert QuantizedLinear(quantize_rtn(weight, Format(bits, symmetric, group))).weight_bytes == expected
    assert QuantizedLinear(quantize_rtn(random(6, 100), Format(4))).weight_bytes == 6 * 100 + 6 * 4  # not packed


def test_the_kernel_is_named_after_what_runs() -> None:
    blocked, odd = (
        QuantizedLinear(quantize_rtn(random(4, 64), Format(4))),
        QuantizedLinear(quantize_rtn(random(4, 33), Format(4))),
    )
    assert blocked.kernel == kernel_name("w4a16_linear", torch.device("cpu"))
    assert odd.kernel == "w4a16_linear[reference]"
    assert layer_kernel(nn.Linear(2, 2)) == "aten::linear"
    assert kernel_name("op", torch.device("meta")) == "op[reference]"
    assert "int4-channel" in repr(blocked)


def test_a_trainable_bias_brings_no_graph_into_the_module() -> None:
    linear = nn.Linear(64, 4)
    layer = QuantizedLinear(quantize_rtn(linear.weight, Format()), linear.bias)
    out = layer(random(2, 64))
    assert not out.requires_grad
    assert layer.bias is not None
    assert layer.bias.data_ptr() == linear.bias.data_ptr()


def test_a_dense_layer_shares_its_weight_and_computes_the_same() -> None:
    linear = nn.Linear(64, 5, dtype=torch.bfloat16)
    layer = DenseLinear(linear)
    x = random(3, 64).bfloat16()
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    with torch.no_grad():
        got = layer(x)
    torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=1e-5)  # one rounding to bfloat16
    assert layer.stored_weight() is linear.weight
    assert layer.weight_bytes == 64 * 5 * 2
    assert sorted(name for name, _ in layer.named_parameters()) == ["bias", "weight"]


def test_which_layers_suit_the_dense_kernel() -> None:
    assert not DenseLinear.suits(nn.Linear(64, 4))  # float32
    assert not DenseLinear.suits(nn.Linear(63, 4, dtype=torch.bfloat16))
    assert not DenseLinear.suits(nn.Linear(64, 4, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("rows", [1, 3, 15])
def test_slices_equal_separate_layers_bit_for_bit(rows: int) -> None:
    slices, separate = merged()
    x = random(rows, 64)
    for part, alone in zip(slices, separate, strict=True):
        assert torch.equal(part(x), alone(x))
        assert (part.in_features, part.out_features) == (64, alone.out_features)


def test_one_input_is_multiplied_once_and_then_forgotten() -> None:
    slices, _ = merged()
    group, calls = slices[0].group, []
    group.linear.register_forward_hook(lambda *_: calls.append(1))
    x = random(2, 64)
    alive = weakref.ref(x)
    for part in slices:
        part(x)
    assert len(calls) == 1
    del x
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 0, 1), (2, 2, 0), (1, 1, 1)], ids=str)
def test_any_order_of_calls_with_any_inputs_is_right(order: tuple[int, ...]) -> None:
    slices, separate = merged()
    for inputs in product(range(2), repeat=3):
        xs = [random(2, 64, seed=50), random(2, 64, seed=51)]
        for index, which in zip(order, inputs, strict=True):
            assert torch.equal(slices[index](xs[which]), separate[index](xs[which]))


def test_a_new_input_at_an_old_address_is_not_taken_for_the_old_one() -> None:
    slices, separate = merged()
    for seed in range(20):
        # Nothing but the memo keeps the previous input alive, so without it Python would reuse id and storage.
        assert torch.equal(slices[0](random(2, 64, seed=seed)), separate[0](random(2, 64, seed=seed)))


def test_an_input_written_to_between_slices_is_seen() -> None:
    slices, separate = merged()
    x = random(2, 64)
    slices[0](x)
    x.mul_(2)
    assert torch.equal(slices[1](x), separate[1](x))
    x[0, 0] = 7
    assert torch.equal(slices[2](x), separate[2](x))


def test_slices_run_in_inference_mode_where_tensors_have_no_version() -> None:
    slices, separate = merged()
    with torch.inference_mode():
        x = random(2, 64)
        for part, alone in zip(slices, separate, strict=True):
            assert torch.equal(part(x), alone(x))


def test_slices_compile_whole_into_one_product() -> None:
    slices, separate = merged()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def attention(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in slices)

    torch._dynamo.reset()
    x = random(2, 64)
    got = torch.compile(attention, backend=keep, fullgraph=True)(x)
    for part, alone in zip(got, separate, strict=True):
        assert torch.equal(part, alone(x))
    ops = [node for node in graphs[0].graph.nodes if node.target is torch.ops.optimizer.w4a16_linear.default]
    assert len(ops) == 1
    assert slices[0].group.memo is None


@pytest.mark.parametrize("bias", [True, False])
def test_slices_store_their_own_rows_exactly(bias: bool) -> None:
    slices, separate = merged(bias=bias)
    for part, alone in zip(slices, separate, strict=True):
        assert_same(stored_weight(part), alone.stored_weight())
        assert part.kernel == alone.kernel
        if alone.bias is None:
            assert part.bias is None
        else:
            assert torch.equal(part.bias, alone.bias)  # type: ignore[arg-type]


def test_slices_of_a_dense_layer_store_views_of_it() -> None:
    linear = nn.Linear(8, 6)
    group = MergedLinear(linear, [2, 4])
    second = MergedSlice(group, 1)
    weight = second.stored_weight()
    assert isinstance(weight, Tensor)
    assert weight.data_ptr() == linear.weight[2:].data_ptr()
    assert torch.equal(weight, linear.weight[2:])


def test_layers_are_named_as_in_the_checkpoint() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (self.q, self.k, self.v), _ = merged()
            self.group = nn.ModuleList([nn.Linear(4, 4)])  # the model's own, and no part of a merge
            self.norm = nn.LayerNorm(4)
            self.again = self.group[0]

    model = nn.ModuleDict({"block": Block(), "head": nn.Linear(4, 2)})
    assert list(linear_layers(model)) == ["block.q", "block.k", "block.v", "block.group.0", "block.again", "head"]


def test_shared_weights_are_counted_once() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    assert weight_bytes(model) == 2 * 160
    model["head"].weight = model["table"].weight  # type: ignore[assignment]
    assert weight_bytes(model) == 160
    slices, separate = merged(bias=False)
    assert weight_bytes(nn.ModuleList(slices)) == sum(layer.weight_bytes for layer in separate)


def test_what_is_not_linear_has_no_stored_weight() -> None:
    with pytest.raises(UsageError, match="LayerNorm is not a linear layer"):
        stored_weight(nn.LayerNorm(4))
