"""The analysis behind `optimizer roofline`: the floors under prefill and decode of a model on a device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from optimizer.errors import UsageError
from optimizer.evals.architecture import from_config, from_parameters
from optimizer.evals.hardware import find_gpu
from optimizer.evals.roofline import ModelShape, Precision, Roofline, StepCost
from optimizer.fleet_command import FleetOptions, analyse_fleet, describe_fleet


def analyse(
    model: str | None, params: float | None, sizes: dict[str, int], *, gpu: str, bits: int, group_size: int | None,
    kv_bits: int, prompt: int, batch: int, context: int, fleet: FleetOptions = FleetOptions(),  # noqa: B008 (frozen)
) -> dict[str, Any]:  # fmt: skip
    """FLOPs, bytes, intensity, bound and floor of prefill and of one decode step, as plain data in base units.

    A `fleet` adds what its GPUs do together.
    """
    for name, value, valid in (("bits", bits, (4, 8, 16)), ("kv-bits", kv_bits, (4, 8, 16))):
        if value not in valid:
            raise UsageError(f"--{name} is {value}; use one of {', '.join(map(str, valid))}.")
    if (model is None) == (params is None):
        raise UsageError("give either a model folder (or config.json) or --params, and not both.")
    if params is not None and not 1 <= params < math.inf:
        raise UsageError(f"--params is {params}; give the number of weights, such as 70e9.")
    if group_size is not None and group_size < 1:
        raise UsageError(f"--group-size is {group_size}; give at least 1, or leave it out for one group a row.")
    weights = Precision(bits) if group_size is None else Precision(bits, group_size, 16)
    kv = Precision(kv_bits)
    if params is not None:
        shape = from_parameters(params, weights=weights, kv=kv, **sizes)
        label = f"{params:.3g} parameters"
    else:
        shape, label = from_config(_config(str(model)), weights=weights, kv=kv), str(model)
    together = (
        {}
        if fleet.gpus is None
        else {"fleet": analyse_fleet(shape, gpu, fleet, prompt=prompt, batch=batch, context=context)}
    )
    device, ceiling = _device(gpu)
    prefill, decode = shape.prefill(batch, prompt), shape.decode(batch, context)
    return {
        "model": label,
        "device": {"name": device, "flops_per_second": ceiling.peak_flops, "bytes_per_second": ceiling.bandwidth,
                   "ridge_flop_per_byte": ceiling.ridge},
        "weights_bytes": shape.weight_bytes,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "kv_cache_bytes": shape.kv_cache_bytes(batch, context),
        "prefill": {"batch": batch, "prompt": prompt, **_phase(prefill, ceiling)},
        "decode": {"batch": batch, "context": context, **_phase(decode, ceiling),
                   "tokens_per_second": decode.tokens_per_second(ceiling)},
        "by_kind": _by_kind(shape, batch, context),
        **together,
    }  # fmt: skip


def describe(found: dict[str, Any]) -> str:
    """The analysis as text."""
    device, prefill, decode = found["device"], found["prefill"], found["decode"]
    lines = [
        f"{found['model']} on {device['name']}: {device['flops_per_second'] / 1e12:.4g} TFLOP/s, "
        f"{device['bytes_per_second'] / 1e9:.4g} GB/s, ridge {device['ridge_flop_per_byte']:.0f} FLOP/byte",
        f"weights {found['weights_bytes'] / 1e9:.4g} GB, KV {found['kv_bytes_per_token']:,.0f} bytes a token, "
        f"cache {found['kv_cache_bytes'] / 1e9:.4g} GB",
        f"prefill, batch {prefill['batch']} × {prefill['prompt']}: {_line(prefill)}",
        f"decode, batch {decode['batch']}, context {decode['context']}: {_line(decode)}, "
        f"at most {decode['tokens_per_second']:,.1f} tok/s",
        "one decode step: "
        + ", ".join(f"{kind} {part['bytes'] / 1e9:.3g} GB" for kind, part in found["by_kind"].items() if part["bytes"]),
    ]
    return "\n".join(lines + (describe_fleet(found["fleet"]) if "fleet" in found else []))


def _line(phase: dict[str, Any]) -> str:
    return (
        f"{phase['flops'] / 1e12:.4g} TFLOP, {phase['bytes'] / 1e9:.4g} GB, {phase['intensity']:.4g} FLOP/byte, "
        f"{phase['bound']}-bound, at least {phase['seconds'] * 1e3:.4g} ms"
    )


def _phase(cost: StepCost, ceiling: Roofline) -> dict[str, Any]:
    """A phase against the roofline; bytes are those that must be read: weights and cache."""
    intensity = cost.flops / cost.required_bytes
    return {
        "flops": cost.flops,
        "bytes": cost.required_bytes,
        "intensity": intensity,
        "bound": ceiling.bound(intensity),
        "seconds": ceiling.seconds(cost.flops, cost.required_bytes),
    }


def _by_kind(shape: ModelShape, batch: int, context: int) -> dict[str, dict[str, float]]:
    return {
        kind: {"flops": op.flops, "bytes": op.weight_bytes + op.kv_bytes}
        for kind, op in shape.decode(batch, context).by_kind().items()
    }


def _device(name: str) -> tuple[str, Roofline]:
    """A device of the table by its vendor's figures, or this machine by measurement."""
    if name.lower() == "measured":
        import torch

        from optimizer.evals.ceilings import measure_ceilings

        ceilings = measure_ceilings("cuda" if torch.cuda.is_available() else "cpu")
        dtype = max(ceilings.matmul_flops, key=lambda key: ceilings.matmul_flops[key] * key.startswith(("bf", "fl")))
        return f"{ceilings.device} (measured, {dtype})", ceilings.roofline(dtype)
    gpu = find_gpu(name)
    return f"{gpu.name} (vendor figures)", gpu.roofline("bfloat16")


def _config(model: str) -> dict[str, Any]:
    path = Path(model)
    if model == "reference":
        from optimizer.source import reference_folder

        path = reference_folder()
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} cannot be read as a model configuration: {error}. Give a folder with config.json."
        ) from None
    if not isinstance(config, dict):
        raise UsageError(f"{file} is not a model configuration: it holds {type(config).__name__}, not an object.")
    return config
