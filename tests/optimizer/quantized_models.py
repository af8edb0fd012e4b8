"""Small models with quantized layers, made without any pass: every linear but the head rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from optimizer.backends.linear import QuantizedLinear
from optimizer.quant.activations import static_scale
from optimizer.quant.formats import Scheme
from optimizer.quant.rtn import quantize_rtn
from tests.optimizer.tiny_models import llama


def quantize(model: Any, choose: Callable[[str], Scheme | None], scale_dtype: torch.dtype | None = None) -> Any:
    """Replace the linears of `model` for which `choose` names a scheme; static inputs are scaled for 4 at most."""
    for name, linear in list(model.named_modules()):
        scheme = choose(name) if isinstance(linear, nn.Linear) else None
        if scheme is None:
            continue
        activation = scheme.activation
        dtype = scale_dtype or (torch.float32 if activation or scheme.weight.kind == "float" else linear.weight.dtype)
        scale = None if activation is None or activation.dynamic else static_scale(4.0, activation)
        weight = quantize_rtn(linear.weight, scheme.weight, dtype)
        model.set_submodule(name, QuantizedLinear(weight, linear.bias, activation, scale))
    return model


def fresh_llama(**options: Any) -> Any:
    """A random Llama as it is after loading: `.to(bfloat16)` has rounded its rotary frequencies, which stay float32."""
    model = llama(**options)
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    return model


def quantized_llama(
    scheme: Scheme,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
    hidden: int = 128,
    layers: int = 1,
) -> Any:
    """A random Llama, all linears but the head in one scheme."""
    model = fresh_llama(tied=tied, dtype=dtype, hidden=hidden, layers=layers)
    return quantize(model, lambda name: None if name == "lm_head" else scheme, scale_dtype)


def dense(model: Any) -> Any:
    """A plain Llama with the dequantized weights of a quantized one."""
    plain = type(model)(model.config).eval()
    state = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            state[f"{name}.weight"] = module.stored_weight().dequantize()
    plain.load_state_dict(state, strict=False)
    plain.tie_weights()
    return plain.float()
