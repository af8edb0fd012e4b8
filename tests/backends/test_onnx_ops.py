"""Quantized linears in ONNX: what the file holds, read bit by bit, and what ONNX Runtime computes of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optimizer.backends.linear import MergedLinear, MergedSlice, QuantizedLinear
from optimizer.backends.onnx_export import OPSET
from optimizer.backends.onnx_linears import MatMulNBits
from optimizer.backends.onnx_ops import RMSNorm, kernels, translate
from optimizer.backends.onnx_runner import open_session
from optimizer.errors import UsageError
from optimizer.quant.activations import quantize_activation, static_scale
from optimizer.quant.formats import ACTIVATIONS, FLOATS, ActivationFormat, Format
from optimizer.quant.rtn import quantize_rtn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

N, K = 96, 256
FORMATS = {
    "int4-g32": (Format(4, group_size=32), None),
    "int4-g128": (Format(4, group_size=128), None),
    "int4-g128-asym": (Format(4, group_size=128, symmetric=False), None),
    "int4-g64-asym": (Format(4, group_size=64, symmetric=False), None),
    "int4-channel": (Format(4), None),
    "int8-channel": (Format(8), None),
    "int8-channel-asym": (Format(8, symmetric=False), None),
    "int8-g64": (Format(8, group_size=64), None),
    "int8-g64-asym": (Format(8, group_size=64, symmetric=False), None),
    "int8-tensor": (Format(8, granularity="tensor"), None),
    "fp8": (FLOATS["fp8"], None),
    "fp8-tensor": (FLOATS["fp8-tensor"], None),
    "fp8-block": (FLOATS["fp8-block"], None),
    "w8a8": (Format(8), ACTIVATIONS["int8"]),
    "w8a8-static": (Format(8), ACTIVATIONS["int8-static"]),
    "llm-int8": (Format(8), ACTIVATIONS["llm-int8"]),
    "w4a8": (Format(4, group_size=128), ACTIVATIONS["int8"]),
    "fp8-dynamic": (FLOATS["fp8"], ACTIVATIONS["fp8"]),
    "fp8-static": (FLOATS["fp8-tensor"], ACTIVATIONS["fp8-static"]),
    "fp8-groups": (FLOATS["fp8-block"], ACTIVATIONS["fp8-group"]),
}


def layer(format: Format, activation: ActivationFormat | None, seed: int, rows: int = N) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, K, generator=generator) / K**0.5
    bias = torch.randn(rows, generator=generator) if seed % 2 else None
    scale = None if activation is None or activation.dynamic else static_scale(4.0, activation)
    return QuantizedLinear(quantize_rtn(weight, format, torch.float32), bias, activation, scale)


class Bank(nn.Module):
    """Every layer on the same input."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [module(x) for module in self.layers]


def exported_session(bank: Bank, file: Path, names: list[str]) -> tuple[Any, Tensor]:
    """The session of the bank's graph, whose outputs have those names, and an input with outliers."""
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1))
    x[..., 7] *= 9
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            bank, (x,), dynamo=True, opset_version=OPSET, dynamic_shapes=dynamic, verbose=False, optimize=False,
            output_names=names,
        )  # fmt: skip
        program.save(file)
    onnx.checker.check_model(str(file))
    return open_session(file), x


def all_formats() -> Bank:
    return Bank(layer(*pair, seed) for seed, pair in enumerate(FORMATS.values()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bank, Any, dict[str, np.ndarray], Tensor]:
    """The bank as it was, the session of its graph, the file's tensors, and an input with outliers."""
    file = tmp_path_factory.mktemp("onnx") / "bank.onnx"
    own = all_formats()
    translate(own, torch.float32)
    session, x = exported_session(own, file, list(FORMATS))
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(file)).graph.initializer}
    return all_formats(), session, tensors, x


@pytest.mark.parametrize("name", FORMATS)
def test_onnx_runtime_computes_the_quantized_product(name: str, exported: Any) -> None:
    """Float32 sums of 256 terms in another order: at most 256 units in the last place of their largest partial sum."""
    bank, session, _, x = exported
    for rows in (x, x[:1, :1]):
        found = session.run([name], {"x": rows.numpy()})[0]
        module = bank.layers[list(FORMATS).index(name)]
        given = rows if module.activation is None else quantize_activation(rows, module.activation, module.input_scale)
        weight = module.stored_weight().dequantize().double()
        expected = given.double() @ weight.T + (0 if module.bias is None else module.bias.double())
        terms = given.double().abs() @ weight.abs().T
        assert (np.abs(found - expected.numpy()) <= K * 2**-24 * terms.numpy() + 1e-6).all()


@pytest.mark.parametrize("name", [name for name, (format, _) in FORMATS.items() if format.bits == 4])
def test_nibbles_and_zero_points_decode_to_the_weight(name: str, exported: Any) -> None:
    """An independent decoder of MatMulNBits, in plain integers: byte i of a block holds weights 2i (low) and 2i + 1."""
    bank, _, tensors, _ = exported
    index = list(FORMATS).index(name)
    data, scales = tensors[f"layers.{index}.data"], tensors[f"layers.{index}.scales"]
    zeros = tensors.get(f"layers.{index}.zeros")
    rows, blocks, width = data.shape
    size = 2 * width
    expected = bank.layers[index].stored_weight().dequantize().numpy()
    for row in (0, 1, rows - 1):
        for block in range(blocks):
            zero = 8 if zeros is None else (int(zeros[row, block // 2]) >> (4 * (block % 2))) & 15
            for i in range(size):
                code = (int(data[row, block, i // 2]) >> (4 * (i % 2))) & 15
                value = np.float32(code - zero) * scales[row, block]
                assert value == expected[row, block * size + i]


@pytest.mark.parametrize("name", [name for name, (format, _) in FORMATS.items() if format.bits == 8])
def test_eight_bit_elements_are_those_of_the_quantizer(name: str, exported: Any) -> None:
    bank, _, tensors, _ = exported
    index = list(FORMATS).index(name)
    stored = bank.layers[index].stored_weight()
    data = tensors[f"layers.{index}.data"]
    assert data.shape == (K, N)
    bits = data.view(np.uint8)
    assert (bits == stored.q.view(torch.uint8).numpy().T).all()


def test_merged_layers_become_what_they_were_merged_from() -> None:
    parts = [layer(Format(4, group_size=32), None, seed, rows) for seed, rows in ((1, 64), (3, 32))]
    from optimizer.passes.merge_linears import _stack

    group = MergedLinear(_stack(parts), [part.out_features for part in parts])
    model = nn.ModuleDict({"q": MergedSlice(group, 0), "k": MergedSlice(group, 1)})
    translate(model, torch.float32)
    assert kernels(model) == {"q": "MatMulNBits", "k": "MatMulNBits"}
    assert torch.equal(model["k"].scales, parts[1].stored_weight().scale)


@pytest.mark.parametrize(
    ("format", "words"),
    [(FLOATS["nvfp4"], "nvfp4 weights have no ONNX operator"), (FLOATS["mxfp4"], "mxfp4 weights have no ONNX")],
)
def test_formats_without_an_operator_are_named_with_their_layer(format: Format, words: str) -> None:
    model = nn.Sequential(layer(format, None, 0))
    with pytest.raises(UsageError, match=f"^0: {words}"):
        translate(model, torch.float32)


def test_rows_that_hold_no_block_are_named() -> None:
    odd = QuantizedLinear(quantize_rtn(torch.randn(8, 40), Format(4), torch.float32))
    with pytest.raises(UsageError, match="0: groups of 40 weights hold no whole block of 16"):
        translate(nn.Sequential(odd), torch.float32)


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown ONNX dialect 'cuda'"):
        translate(nn.Sequential(), torch.float32, dialect="cuda")


ROUNDED = ["int4-g32", "int4-g128-asym", "int4-channel", "int8-channel", "int8-channel-asym", "int8-g64", "int8-tensor"]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[QuantizedLinear], nn.Sequential, Any]:
    """Layers, what stands for them where inputs may be rounded to int8, and the session of their graph."""
    layers = [layer(*FORMATS[name], seed) for seed, name in enumerate(ROUNDED)]
    own = nn.Sequential(*(layer(*FORMATS[name], seed) for seed, name in enumerate(ROUNDED)))
    translate(own, torch.float32, int8_inputs=True)
    bank = Bank(own)
    return layers, own, exported_session(bank, tmp_path_factory.mktemp("onnx") / "rounded.onnx", ROUNDED)[0]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_inputs_multiply_the_elements_of_the_quantizer(name: str, rounded: Any) -> None:
    """What is stored decodes to the weight, in plain integers, and the product is off by no more than the rounding.

    Inputs are rounded to int8 in blocks of the weight's, with a scale of their largest over 127: each is off by half of
    that at most.
    """
    layers, own, session = rounded
    index = ROUNDED.index(name)
    module, weight = own[index], layers[index].stored_weight().dequantize()
    assert (type(module), module.accuracy_level) == (MatMulNBits, 4)
    bits, half = FORMATS[name][0].bits, 1 << (FORMATS[name][0].bits - 1)
    rows, blocks, _ = module.data.shape
    for row in (0, rows - 1):
        for block in range(blocks):
            stored = module.data[row, block].tolist()
            codes = stored if bits == 8 else [nibble for byte in stored for nibble in (byte & 15, byte >> 4)]
            zero = half
            if module.zeros is not None and bits == 8:
                zero = int(module.zeros[row, block])
            elif module.zeros is not None:
                zero = (int(module.zeros[row, block // 2]) >> (4 * (block % 2))) & 15
            values = torch.tensor([code - zero for code in codes]) * module.scales[row, block]
            assert torch.equal(values, weight[row, block * module.block : (block + 1) * module.block])
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2))
    expected = x @ weight.T + (0 if module.bias is None else module.bias)
    largest = x.reshape(3, -1, module.block).abs().amax(-1)
    summed = weight.reshape(N, -1, module.block).abs().sum(-1)
    bound = 0.5 * (largest / 127) @ summed.T * 1.01 + 1e-5
    found = torch.from_numpy(session.run([name], {"x": x[None].numpy()})[0])[0]
    assert ((found - expected).abs() <= bound).all()


STATIC = ["w8a8-static", "fp8-static"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[QuantizedLinear], Any, Any, Tensor]:
    """Layers with static inputs; their graph in TensorRT's dialect, its session and an input with outliers."""
    file = tmp_path_factory.mktemp("onnx") / "pairs.onnx"
    own = nn.Sequential(*(layer(*FORMATS[name], seed) for seed, name in enumerate(STATIC)))
    translate(own, torch.float32, dialect="tensorrt")
    session, x = exported_session(Bank(own), file, STATIC)
    layers = [layer(*FORMATS[name], seed) for seed, name in enumerate(STATIC)]
    return layers, onnx.load(str(file)).graph, session, x


@pytest.mark.parametrize("name", STATIC)
def test_tensorrt_gets_elements_on_both_sides_of_a_product(name: str, pairs: Any) -> None:
    layers, graph, session, x = pairs
    made = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert [[made[i].op_type for i in node.input] for node in products] == [["DequantizeLinear"] * 2] * len(STATIC)
    module = layers[STATIC.index(name)]
    given = quantize_activation(x, module.activation, module.input_scale).double()  # x is beyond the scale: saturates
    weight = module.stored_weight().dequantize().double()
    expected = given @ weight.T + (0 if module.bias is None else module.bias.double())
    terms = given.abs() @ weight.T.abs()
    found = session.run([name], {"x": x.numpy()})[0]
    assert (np.abs(found - expected.numpy()) <= K * 2**-24 * terms.numpy() + 1e-6).all()


@pytest.mark.parametrize("largest", [1e-12, 1e9])
def test_a_scale_that_float16_cannot_hold_is_refused(largest: float) -> None:
    format, activation = FORMATS["w8a8-static"]
    assert activation is not None
    weight = quantize_rtn(torch.randn(N, K), format, torch.float32)
    model = nn.ModuleDict({"a": QuantizedLinear(weight, None, activation, static_scale(largest, activation))})
    with pytest.raises(UsageError, match=r"a: the scale .* of its inputs is none in float16. Leave this layer"):
        translate(model, torch.float16, dialect="tensorrt")


def test_norms_become_the_form_that_the_runtime_joins() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    llama, gemma = LlamaRMSNorm(8, eps=1e-5), GemmaRMSNorm(8)  # the latter multiplies by 1 + w
    for norm in (llama, gemma):
        nn.init.uniform_(norm.weight)
    model = nn.ModuleDict({"llama": llama, "gemma": gemma, "linear": nn.Linear(8, 8)})
    translate(model, torch.float32)
    assert type(model["llama"]) is RMSNorm
    assert model["gemma"] is gemma
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 100
    torch.testing.assert_close(model["llama"](x), llama(x))
