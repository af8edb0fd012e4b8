"""A stand-in of TensorRT's runtime: the same calls and addresses, carried out by ONNX Runtime on the same graph.

It refuses what TensorRT refuses: a shape outside of the active profile, an input without a shape, a tensor without an
address. Addresses are those of CPU memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from optimizer.backends.tensorrt.engine import Profile

NAMES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


class Severity:
    ERROR = 1


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, engine.profiles[0]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, _: int) -> bool:
        self.profile = self.engine.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address, f"{name} has no address"
        self.addresses[name] = address
        return True

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, dimensions in self.engine.inputs.items():
            for dimension, size in zip(dimensions, self.shapes[name], strict=True):
                assert found.setdefault(dimension, size) == size, (
                    f"{name}: {dimension} is {found[dimension]} and {size}"
                )
        return found

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        sizes = self.sizes()
        if name == "logits":
            return sizes["batch_size"], sizes["sequence_length"], self.engine.vocabulary
        batch, heads, past, width = self.shapes["past_key_values.0.key"]
        return batch, heads, past + sizes["sequence_length"], width

    def execute_async_v3(self, _: int) -> bool:
        sizes = self.sizes()
        for dimension, (least, _best, most) in self.profile.dimensions.items():
            if not least <= sizes[dimension] <= most:
                return False
        given = {}
        for name in self.engine.inputs:
            kind = NUMPY[self.engine.kinds[name]]
            count = int(np.prod(self.shapes[name]))
            size = count * np.dtype(kind).itemsize
            raw = ctypes.string_at(self.addresses[name], size)
            given[name] = np.frombuffer(raw, kind).reshape(self.shapes[name])
        outputs = [output.name for output in self.engine.session.get_outputs()]
        for name, value in zip(outputs, self.engine.session.run(outputs, given), strict=True):
            content = np.ascontiguousarray(value)
            assert content.shape == tuple(self.get_tensor_shape(name))
            ctypes.memmove(self.addresses[name], content.ctypes.data, content.nbytes)
        return True


class Engine:
    def __init__(self, graph: Path, profiles: Sequence[Profile], inputs: Mapping[str, Sequence[str]], vocabulary: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.profiles, self.inputs, self.vocabulary = profiles, inputs, vocabulary
        both = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.kinds = {tensor.name: NAMES[tensor.type] for tensor in both}

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.kinds[name])

    def create_execution_context(self) -> Context:
        return Context(self)


def module(engine: Engine | None) -> Any:
    """What takes the place of the Python API; without an engine, deserializing fails."""

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, _: bytes) -> Engine | None:
            if engine is None:
                self.log.log(Severity.ERROR, "the magic tag does not match")
            return engine

    return SimpleNamespace(ILogger=ILogger, Runtime=Runtime)
