"""Linear modules that run on our ops: quantized, merged, and dense bfloat16.

Each takes the place of an `nn.Linear` under the same name. `weight_bytes` is what a forward pass must read, scales
and zero points included; `kernel` names what runs it. Passes build these; the artifact writer reads them back
through `stored_weight`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optimizer.backends.kernels.bf16_linear import bf16_linear
from optimizer.backends.kernels.build import cpu_kernels
from optimizer.backends.kernels.dynamic_int8_linear import MOST_FEATURES
from optimizer.backends.kernels.float_linear import has_nan, pack_float4, takes, unpack_float4
from optimizer.backends.kernels.gpu import triton
from optimizer.backends.kernels.w4a16_linear import BLOCK, pack_int4, unpack_int4
from optimizer.backends.linear_plans import PLANS
from optimizer.errors import UsageError
from optimizer.quant.activations import check_activation
from optimizer.quant.formats import BLOCK as SCALE_BLOCK
from optimizer.quant.formats import ActivationFormat, Scheme
from optimizer.quant.packing import pack_nibbles, unpack_nibbles
from optimizer.quant.weight import QuantizedWeight

ONEDNN_FEATURES = 1024
"""Input features from which oneDNN's bfloat16 instructions beat our kernel for 3 to 7 rows."""


def kernel_name(op: str, device: torch.device, *, compiled: bool = True) -> str:
    """`op` with what implements it on `device`: the compiled CPU kernel and its ISA, Triton, or the reference."""
    if device.type == "cpu" and compiled and cpu_kernels().loaded:
        return f"{op}[{cpu_kernels().isa.lower()}]"
    return f"{op}[{'triton' if device.type == 'cuda' and compiled and triton else 'reference'}]"


class QuantizedLinear(nn.Module):
    """`y = x Ŵᵀ + b` with a quantized weight `[N, K]`, and `x` rounded to `activation` first where that is given.

    `plan` says how it runs, `PLANS` what that is; it follows from formats, shapes and device, and `kernel` names it in
    reports. `int8_group` is how many values of a token share a scale where a CPU multiplies integers (-1: all), and
    None elsewhere. `input_scale [1]` is the scale of a static `activation`.
    Raises `UsageError` where weight, activation and scale do not go together.
    """

    data: Tensor
    scale: Tensor
    zero: Tensor | None
    global_scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    plain: bool
    blocked: bool
    floats: bool

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        activation: ActivationFormat | None = None,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.q.shape
        self.format, self.activation = weight.format, activation
        self.scale_dtype = weight.scale.dtype
        _check_input(self, input_scale)
        rows = self.format.granularity in ("channel", "group")
        self.plain = self.format.kind == "int" and rows  # the layout of the compiled kernels
        self.blocked = self.plain and self.in_features // weight.scale.shape[1] % BLOCK == 0
        by_row = None if self.format.kind == "int" else _row_scale(weight)
        self.floats = by_row is not None  # the layout of the kernel for floats
        scale = weight.scale.float() if self.plain else weight.scale if by_row is None else by_row
        self.register_buffer("data", _stored(weight, self.blocked, self.floats))
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero", None if weight.zero is None else weight.zero.float().contiguous())
        self.register_buffer("global_scale", weight.global_scale)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("input_scale", None if input_scale is None else input_scale.detach().float().reshape(1))
        token = self.activation == ActivationFormat()
        self.int8_group: int | None = -1 if token and not self._int8_obstacle() else None
        self._choose()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move the tensors, then choose again: another device has other kernels."""
        super()._apply(fn, recurse)
        if self.data.device.type != "cpu":
            self.int8_group = None
        self._choose()
        return self

    def _choose(self) -> None:
        """Set `plan` and `kernel`."""
        self.plan = next(name for name, (fits, _) in PLANS.items() if fits(self))
        self.kernel = self._kernel_name()

    def keep_inputs(self) -> None:
        """Round no inputs from now on: what is left is the error of the weights."""
        self.activation, self.int8_group = None, None
        self._choose()

    def serve_int8(self, group: int) -> str:
        """Round the inputs of a weight-only layer to int8 in groups of `group` values of a token, from now on.

        Returns why it cannot, or an empty string. It changes how the layer runs and not what is stored: `scheme` stays.
        """
        if self.activation is not None:
            return f"its inputs are {self.activation.name} already"
        if reason := self._int8_obstacle():
            return reason
        if self.in_features % group:
            return f"groups of {group} do not divide {self.in_features} input features"
        self.int8_group = group
        self._choose()
        return ""

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., K]` to `[..., N]`, rounded once to the type of `x`."""
        return PLANS[self.plan][1](self, x)

    def _int8_obstacle(self) -> str:
        """Why there is no product of integers for this weight; empty where there is."""
        if not self.blocked:
            return f"{self.format.name} weights with {self.in_features} input features have no kernel for int8 inputs"
        if self.data.device.type != "cpu":
            return f"int8 inputs are for CPUs, and the weight is on {self.data.device.type}"
        if self.in_features > MOST_FEATURES:
            return f"{self.in_features} input features are more than {MOST_FEATURES}"
        return "" if cpu_kernels().loaded else cpu_kernels().reason

    def _kernel_name(self) -> str:
        """`w4a16_linear[avx2]`, `w8a8_linear[int8 avx2]` for a product of integers.

        Inputs that are rounded and then run through a kernel for 16 bits are `w8a8_linear[w8a16 avx2]`.
        """
        kernel = kernel_name(_op_name(self.scheme), self.data.device, compiled=self.plan != "decoded")
        if self.plan == "integers":
            return kernel.replace("[", "[int8 ")
        if self.activation is None or self.plan in ("scaled", "outliers") or kernel.endswith("[reference]"):
            return kernel
        return kernel.replace("[", f"[w{self.format.bits}a16 ")

    @property
    def scheme(self) -> Scheme:
        """The formats of weight and input."""
        return Scheme(self.format, self.activation)

    @property
    def weight_bytes(self) -> int:
        """Bytes of elements, scales and zero points that one forward reads."""
        stored = (self.data, self.scale, self.zero, self.global_scale)
        return sum(t.numel() * t.element_size() for t in stored if t is not None)

    def stored_weight(self) -> QuantizedWeight:
        """The weight as the quantizer made it, exactly."""
        q = self.data
        if q.dtype == torch.uint8:
            ordered = unpack_int4 if self.format.kind == "int" else unpack_float4
            q = unpack_nibbles(q) if self.format.kind == "float" and not self.floats else ordered(q)
        zero = None if self.zero is None else self.zero.to(torch.int8)
        return QuantizedWeight(q, self.weight_scale().to(self.scale_dtype), zero, self.format, self.global_scale)

    def weight_scale(self) -> Tensor:
        """The scales in the shape that the format gives them, where a kernel has them for each row."""
        if self.floats and self.format.granularity in ("tensor", "block"):
            return self.scale[:1] if self.format.granularity == "tensor" else self.scale[::SCALE_BLOCK]
        return self.scale

    def extra_repr(self) -> str:
        """Shape, formats and kernel, as `print(model)` shows them."""
        return f"{self.in_features} -> {self.out_features}, {self.scheme.name}, {self.kernel}"


def _check_input(layer: QuantizedLinear, scale: Tensor | None) -> None:
    """Refuse, before anything runs, an activation format or a static scale that the layer could not use."""
    if layer.activation is not None:
        check_activation(layer.activation, layer.in_features, scale)
    elif scale is not None:
        raise UsageError("an input scale without an activation format has no use. Give both or neither.")
    if scale is not None and not bool(torch.isfinite(scale).all() & (scale > 0).all()):
        raise UsageError(f"the input scale is {scale.tolist()}, and must be a positive finite number.")


def _stored(weight: QuantizedWeight, blocked: bool, floats: bool) -> Tensor:
    """Elements as a layer holds them: 4 bits in half a byte, but for integers that no kernel takes."""
    if weight.format.bits == 8 or not (weight.format.kind == "float" or blocked):
        return weight.q.contiguous()
    if weight.format.kind == "int":
        return pack_int4(weight.q)
    return pack_float4(weight.q) if floats else pack_nibbles(weight.q)


def _row_scale(weight: QuantizedWeight) -> Tensor | None:
    """Scales of a floating-point weight as `float_linear` takes them, `[N, G]`; None where it does not."""
    (n, k), scale, block = weight.q.shape, weight.scale, weight.format.granularity == "block"
    groups = k // SCALE_BLOCK if block else scale.shape[1]
    if (block and k % SCALE_BLOCK) or not groups or not takes(weight.format.bits, k, groups):
        return None
    if not weight.q.is_meta and has_nan(weight.q):
        return None
    if scale.element_size() == 1:
        return scale
    return scale.float().repeat_interleave(SCALE_BLOCK, 0)[:n] if block else scale.float().expand(n, -1)


def _op_name(scheme: Scheme) -> str:
    """`w4a16_linear`, `w8a8_linear`; `fp8_linear` where both sides are such floats, `fp8_w8a16_linear` where one is."""
    weight, activation = scheme.weight, scheme.activation
    number = "16" if activation is None else f"{'fp' if activation.kind == 'float' else ''}{activation.bits}"
    name = f"w{weight.bits}a{number}_linear"
    if weight.kind == "int":
        return name
    label = weight.name.partition("-")[0]
    return f"{label}_linear" if number == f"fp{weight.bits}" else f"{label}_{name}"


class DenseLinear(nn.Module):
    """An `nn.Linear` in bfloat16 run by `optimizer::bf16_linear`, where that is best; shares the weight it is given.

    oneDNN has the processor's bfloat16 instructions, at the price of a long call: two Zen 4 cores take 125 instead of
    379 µs for `[1, 384] x [384, 4096]`, and 1.7 to 3.0 times less for one row of any shape measured
    (`benchmarks/dense_cpu.py`). For 3 to 7 rows of 1,024 features and more oneDNN is up to 1.3 times faster, and runs
    those.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.kernel = kernel_name("bf16_linear", self.weight.device)
        native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self._few_by_onednn = native and self.in_features >= ONEDNN_FEATURES

    @staticmethod
    def suits(linear: nn.Linear) -> bool:
        """Whether this kernel takes the layer."""
        weight = linear.weight
        fits = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.shape[1] % BLOCK == 0
        return bool(fits and weight.is_contiguous() and cpu_kernels().loaded)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., K]` to `[..., N]`."""
        if self._few_by_onednn and x.dtype == self.weight.dtype and 2 < x.numel() // self.in_features < 8:
            return nn.functional.linear(x, self.weight, self.bias)
        return bf16_linear(x, self.weight, self.bias)  # type: ignore[no-any-return]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights one forward reads."""
        return self.weight.numel() * self.weight.element_size()

    def stored_weight(self) -> Tensor:
        """The weight `[N, K]`."""
        return self.weight


class MergedLinear(nn.Module):
    """One linear whose output rows belong to several layers that read the same input (Q, K, V; gate, up).

    The layers' places in the model are taken by `MergedSlice` modules. The first to see an input runs the whole
    product, the others take their rows of it, so the model's own forward stays as it is. A slice called with some
    other input simply runs again: sharing is an optimization and never an assumption. So is one whose input was
    written to in between; only a compiled graph and inference tensors, which count no versions, cannot tell. The
    last slice drops the activation, so nothing outlives the layer.
    """

    def __init__(self, linear: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.linear = linear
        self.bounds = [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        self.memo: tuple[Tensor, int, Tensor] | None = None  # input, its version, output

    def part(self, x: Tensor, index: int) -> Tensor:
        """Rows `bounds[index]` of the product with `x [..., K]`."""
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        memo = self.memo
        if memo is None or memo[0] is not x or memo[1] != version:
            memo = (x, version, self.linear(x))
        self.memo = None if index == len(self.bounds) - 1 else memo
        start, stop = self.bounds[index]
        return memo[2][..., start:stop]


class MergedSlice(nn.Module):
    """The place of one layer whose rows live in a `MergedLinear`."""

    def __init__(self, group: MergedLinear, index: int) -> None:
        super().__init__()
        self.group, self.index = group, index
        start, stop = group.bounds[index]
        self.in_features, self.out_features = int(group.linear.in_features), stop - start  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., K]` to this layer's `[..., N]`."""
        return self.group.part(x, self.index)

    @property
    def bounds(self) -> tuple[int, int]:
        """First and last output row in the merged weight."""
        return self.group.bounds[self.index]

    @property
    def kernel(self) -> str:
        """What runs the merged product."""
        return layer_kernel(self.group.linear)

    def stored_weight(self) -> QuantizedWeight | Tensor:
        """This layer's own rows."""
        start, stop = self.bounds
        weight = stored_weight(self.group.linear)
        return weight.rows(start, stop) if isinstance(weight, QuantizedWeight) else weight[start:stop]

    @property
    def activation(self) -> ActivationFormat | None:
        """The format that the common input is rounded to."""
        return getattr(self.group.linear, "activation", None)

    @property
    def input_scale(self) -> Tensor | None:
        """The static scale of the common input."""
        return getattr(self.group.linear, "input_scale", None)

    @property
    def bias(self) -> Tensor | None:
        """This layer's own bias."""
        start, stop = self.bounds
        bias = self.group.linear.bias
        return None if bias is None else bias[start:stop]  # type: ignore[index]


LINEARS = (nn.Linear, QuantizedLinear, DenseLinear, MergedSlice)
"""Modules that stand where the model's author put a linear layer."""


def stored_weight(module: nn.Module) -> QuantizedWeight | Tensor:
    """The weight of a linear layer as it belongs in a checkpoint."""
    if isinstance(module, nn.Linear):
        return module.weight
    if isinstance(module, QuantizedLinear | DenseLinear | MergedSlice):
        return module.stored_weight()
    raise UsageError(f"{type(module).__name__} is not a linear layer.")


def stored_scheme(module: nn.Module) -> Scheme | None:
    """The formats a linear layer is stored and run in; None for a plain one."""
    if isinstance(module, MergedSlice):
        module = module.group.linear
    if not isinstance(module, LINEARS):
        raise UsageError(f"{type(module).__name__} is not a linear layer.")
    return module.scheme if isinstance(module, QuantizedLinear) else None


def layer_kernel(module: nn.Module) -> str:
    """The kernel that runs a linear layer: ours by name, or ATen's."""
    return str(getattr(module, "kernel", "aten::linear"))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by the name it has in the checkpoint, in the model's order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    merged = tuple(f"{name}.group." for name, module in modules.items() if isinstance(module, MergedSlice))
    return {
        name: module for name, module in modules.items() if isinstance(module, LINEARS) and not name.startswith(merged)
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights a model holds, each shared tensor counted once (a tied head is its embedding)."""
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(seen.values())
