"""Small ONNX graphs in the dialect that TensorRT takes: explicit Q/DQ, weights `[K, N]`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

K, N, GROUP = 512, 1024, 128


def linear(folder: Path, kind: str, *, zero_point: int = 0, rounded: bool = False) -> Path:
    """`y = x @ dequantize(w)`, x `[batch, sequence, K]` fp16, as an ONNX file; kind fp16, int8, fp8 or int4.

    With `rounded` x is quantized to the type of the weight and back, by one scale.
    """
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper as nh

    k, n = K, N
    rng = np.random.default_rng(0)
    scale = np.full((n,), 0.01, np.float16)
    nodes, constants = [], []
    if kind == "fp16":
        constants = [nh.from_array(rng.standard_normal((k, n)).astype(np.float16), "w")]
    elif kind == "int8":
        constants = [nh.from_array(rng.integers(-127, 128, (k, n)).astype(np.int8), "q"), nh.from_array(scale, "s")]
        nodes = [h.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1, name="dq")]
    elif kind == "fp8":
        codes = rng.integers(0, 120, k * n).astype(np.uint8).tobytes()
        constants = [h.make_tensor("q", T.FLOAT8E4M3FN, (k, n), codes, raw=True), nh.from_array(scale, "s")]
        nodes = [h.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1, name="dq")]
    else:
        codes = rng.integers(-8, 8, k * n).astype(np.int8)
        packed = ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).astype(np.uint8).tobytes()
        constants = [
            h.make_tensor("q", T.INT4, (k, n), packed, raw=True),
            nh.from_array(np.full((k // GROUP, n), 0.01, np.float16), "s"),
        ]
        names = ["q", "s"]
        if zero_point:
            count = k // GROUP * n
            both = (zero_point & 15) | ((zero_point & 15) << 4)
            constants.append(h.make_tensor("z", T.INT4, (k // GROUP, n), bytes([both]) * (count // 2), raw=True))
            names.append("z")
        nodes = [h.make_node("DequantizeLinear", names, ["w"], axis=0, block_size=GROUP, name="dq")]
    given = "x"
    if rounded:
        given, elements = "rounded", {"int8": T.INT8, "fp8": T.FLOAT8E4M3FN}[kind]
        constants.append(nh.from_array(np.array(0.05, np.float16), "t"))
        nodes.append(h.make_node("QuantizeLinear", ["x", "t"], ["elements"], output_dtype=elements, name="q_x"))
        nodes.append(h.make_node("DequantizeLinear", ["elements", "t"], ["rounded"], name="dq_x"))
    nodes.append(h.make_node("MatMul", [given, "w"], ["y"], name="product"))
    x = h.make_tensor_value_info("x", T.FLOAT16, ["batch", "sequence", k])
    y = h.make_tensor_value_info("y", T.FLOAT16, ["batch", "sequence", n])
    return save(folder, h.make_graph(nodes, "g", [x], [y], constants))


def unsupported(folder: Path) -> Path:
    """A graph with an operator that TensorRT has no counterpart of, with the metadata that torch's exporter writes."""
    from onnx import TensorProto as T
    from onnx import helper as h

    node = h.make_node("Det", ["x"], ["y"], name="node_det")
    trace = 'File "/somewhere/modeling.py", line 41, in forward\n'
    for key, value in (("pkg.torch.onnx.name_scopes", "model.layers.3"), ("pkg.torch.onnx.stack_trace", trace)):
        entry = node.metadata_props.add()
        entry.key, entry.value = key, value
    x = h.make_tensor_value_info("x", T.FLOAT, ["batch", 4, 4])
    return save(folder, h.make_graph([node], "g", [x], [h.make_tensor_value_info("y", T.FLOAT, ["batch"])]))


def save(folder: Path, graph: object) -> Path:
    """Check the graph and write it as `model.onnx`."""
    from onnx import helper as h

    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / "model.onnx"))
    return folder / "model.onnx"
