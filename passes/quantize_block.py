"""One decoder block through quantization: observe its inputs, fold scales, quantize its layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimizer.backends.linear import QuantizedLinear
from optimizer.errors import ModelError, PassError
from optimizer.passes.base import Context, LayerChange, Skip
from optimizer.passes.blocks import BlockInputs
from optimizer.passes.fold_sites import find_sites
from optimizer.passes.folds import Site, fold, shared_scale
from optimizer.passes.merge_linears import SIBLINGS
from optimizer.quant.activations import static_scale
from optimizer.quant.awq import quantize_awq
from optimizer.quant.awq import search_scale as awq_scale
from optimizer.quant.formats import Format
from optimizer.quant.gptq import GPTQ, quantize_gptq
from optimizer.quant.gram import Gram, output_error
from optimizer.quant.rtn import chunk_rows, quantize_rtn
from optimizer.quant.smoothquant import SmoothQuant
from optimizer.quant.smoothquant import search_scale as smoothing_scale
from optimizer.quant.weight import QuantizedWeight

if TYPE_CHECKING:
    from optimizer.passes.quantize import Part, Quantize


def quantize_block(
    step: Quantize,
    model: Any,
    path: str,
    index: int,
    names: Iterable[str],
    inputs: BlockInputs,
    probe: BlockInputs,
    ctx: Context,
) -> Part:
    """Quantize the layers `names` of the block at `path`, calibrated on what reaches the block.

    `probe` holds a few tokens, on which scale folds are found and verified.
    """
    block = model.get_submodule(path)
    layers = {name: model.get_submodule(name) for name in names}
    grams = observe(block, layers, inputs, index)
    dtypes = {name: layer.weight.dtype for name, layer in _linears(block, path).items()}
    notes: list[str] = []
    unfolded: list[Skip] = []
    if step.smooth or step.method == "awq":
        sites, unfolded = find_sites(block, *probe.arguments(index, probe.hidden[0]))
        for site in sites:
            notes += _fold_site(step, block, path, site, grams, ctx)
    part = quantize_layers(step, model, layers, grams, ctx, dtypes)
    for name, linear in _linears(block, path).items():  # layers that take a scale and stay as they are
        if linear.weight.dtype != dtypes[name]:
            linear.weight = nn.Parameter(linear.weight.detach().to(dtypes[name]), requires_grad=False)
    part.notes += notes + [f"{path}.{skip.name}: no scale folded, {skip.reason}" for skip in unfolded]
    return part


def _linears(block: nn.Module, path: str) -> dict[str, nn.Linear]:
    return {f"{path}.{name}": module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def observe(block: nn.Module, layers: Mapping[str, nn.Module], inputs: BlockInputs, index: int) -> dict[str, Gram]:
    """The Gram of each layer's input over all batches; layers that read one tensor share one.

    Which layers share is seen in each run, so it holds for experts too, whose inputs depend on the routing.
    """
    grams: dict[str, Gram] = {}
    leaders: dict[str, str] = {}
    live: list[tuple[Tensor, str]] = []  # inputs of this run, kept so that no other tensor takes their place

    def see(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            leader = next((leader for x, leader in live if x is args[0]), None)
            if leader is None:
                live.append((args[0], name))
                leader = name
            if leaders.setdefault(name, leader) != leader and name != leader:
                leader = leaders[name] = name  # read another tensor than last time: it counts for itself
            if leader == name:
                try:
                    grams.setdefault(name, Gram(args[0].shape[-1], device=args[0].device)).update(args[0])
                except ModelError as error:
                    raise ModelError(f"{name}: {error}") from None

        return hook

    seen = inputs.seen_by(block)  # the hooks go on the very modules that run
    inner = {id(module): name for name, module in block.named_modules()}
    handles = [
        seen.get_submodule(inner[id(layer)]).register_forward_pre_hook(see(name)) for name, layer in layers.items()
    ]
    try:
        for hidden in inputs.hidden:
            live.clear()
            inputs.call(seen, index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return {name: grams[leaders[name]] for name in layers if name in leaders}


def _fold_site(
    step: Quantize, block: nn.Module, path: str, site: Site, grams: dict[str, Gram], ctx: Context
) -> list[str]:
    """Choose the scale of one site, fold it, and let the readers' Grams follow."""
    readers = {f"{path}.{reader}": block.get_submodule(reader) for reader in site.readers}
    known = [name for name in readers if name in grams]
    if not known:
        return []
    gram = _joint([grams[name] for name in known])
    if not gram.tokens:
        return []
    weights = [readers[name].weight.detach().float() for name in known]  # type: ignore[operator]
    reduce = partial(shared_scale, site)
    note = ""
    if step.smooth:
        found = smoothing_scale(weights, gram, step.scheme, SmoothQuant(alpha=step.alpha), reduce=reduce)
        how = "not smoothed, which loses least" if found.alpha is None else f"smoothed with alpha {found.alpha:g}"
        scale, note = found.scale, f"{path}.{site.name}: {how}"
    else:
        scale = awq_scale(weights, gram, step.format, reduce=reduce, scale_dtype=ctx.scale_dtype)
    effective = fold(block, site, scale, dtype=torch.float32)
    scaled = {id(grams[name]): grams[name].scaled(effective) for name in known}
    grams.update({name: scaled[id(grams[name])] for name in known})
    return [note] if note else []


def _joint(grams: list[Gram]) -> Gram:
    """The statistics of all inputs together: one Gram shared by all, or those of experts added up."""
    distinct = list({id(gram): gram for gram in grams}.values())
    if len(distinct) == 1:
        return distinct[0]
    joint = Gram(distinct[0].k, distinct[0].H.device)
    for gram in distinct:
        joint.merge(gram)
    return joint


def quantize_layers(
    step: Quantize,
    model: Any,
    names: Iterable[str],
    grams: Mapping[str, Gram],
    ctx: Context,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Part:
    """Replace each layer by its quantized form, with the Gram of its input where there is one.

    `dtypes` are the types in which the layers are stored, where folding has widened their weights.
    """
    from optimizer.passes.quantize import Part

    part = Part()
    layers = {name: model.get_submodule(name) for name in names}
    largest = _shared_maxima(step.format, layers)
    for name, linear in layers.items():
        stored = (dtypes or {}).get(name, linear.weight.dtype)
        gram = grams.get(name)
        try:
            weight, method, notes = _quantized(step, linear.weight, stored, gram, largest.get(name), name, ctx)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
        activation, input_scale = step.scheme.activation, None
        if activation is not None and not activation.dynamic:
            if gram is None or not gram.tokens:
                raise _unrouted(name)
            input_scale = static_scale(gram.absmax.amax(), activation)
        bias = None if linear.bias is None else linear.bias.detach()
        module = QuantizedLinear(weight, bias, activation, input_scale)
        model.set_submodule(name, module)
        part.notes += [f"{name}: {note}" for note in notes]
        part.changes.append(
            LayerChange(
                name,
                "linear",
                (linear.out_features, linear.in_features),
                step.scheme.name,
                bytes_before=linear.weight.numel() * stored.itemsize,
                bytes_after=module.weight_bytes,
                weight_error=relative_error(linear.weight, weight),
                method=method,
                output_error=_output_error(linear.weight, weight, gram),
                tokens=None if gram is None else gram.tokens,
            )
        )
    return part


def _quantized(
    step: Quantize,
    weight: Tensor,
    stored: torch.dtype,
    gram: Gram | None,
    largest: float | None,
    name: str,
    ctx: Context,
) -> tuple[QuantizedWeight, str, tuple[str, ...]]:
    """The weight on its grid, what put it there, and every fallback on the way."""
    weight_only = step.format.kind == "int" and step.scheme.activation is None
    dtype = ctx.scale_dtype or (stored if weight_only else torch.float32)
    seen = gram if gram is not None and gram.tokens else None
    if step.method != "rtn" and seen is None and step.unrouted == "error":
        raise _unrouted(name)
    if step.method == "rtn" or seen is None:
        importance = None if seen is None else seen.H.diagonal()
        rounded = quantize_rtn(weight, step.format, dtype, clip=step.clip, importance=importance, tensor_max=largest)
        notes = ("no calibration token reached it, so it is rounded",) if step.method != "rtn" else ()
        return rounded, "rtn", notes
    if step.method == "awq":
        return quantize_awq(weight, seen, step.format, None, dtype, tensor_max=largest), "awq", ()
    config = GPTQ(damp=step.damp, act_order=step.act_order, clip=step.clip)
    found = quantize_gptq(weight, seen, step.format, config, dtype, tensor_max=largest)
    return found.weight, found.method, found.notes


def _output_error(weight: Tensor, quantized: QuantizedWeight, gram: Gram | None) -> float | None:
    """`‖X ΔWᵀ‖ / ‖X Wᵀ‖` over the calibration tokens, where there are any."""
    return None if gram is None or not gram.tokens else math.sqrt(output_error(weight, quantized, gram))


def _unrouted(name: str) -> PassError:
    return PassError(
        f"{name} saw no token of the calibration data (an expert that nothing was routed to). Use more or other "
        "calibration data, or unrouted: rtn to round it."
    )


def _shared_maxima(format: Format, layers: Mapping[str, Any]) -> dict[str, float]:
    """For formats with one scale a tensor: the largest weight among siblings, which consumers serve merged."""
    if format.granularity != "tensor" and format.scale != "e4m3":
        return {}
    own = {name: float(layer.weight.detach().abs().amax()) for name, layer in layers.items()}
    for siblings in SIBLINGS:
        for name in layers:
            parent, _, last = name.rpartition(".")
            group = [f"{parent}.{sibling}".removeprefix(".") for sibling in siblings]
            if last == siblings[0] and all(member in own for member in group):
                own.update(dict.fromkeys(group, max(own[member] for member in group)))
    return own


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """`‖W - Ŵ‖ / ‖W‖` in the Frobenius norm; 0 for a weight that is all zeros and stays so."""
    rows, lost, total = chunk_rows(weight.shape[1]), 0.0, 0.0
    for start in range(0, len(weight), rows):
        stop = min(start + rows, len(weight))
        exact = weight[start:stop].detach().float()
        lost = math.hypot(lost, float((exact - quantized.rows(start, stop).dequantize()).norm()))
        total = math.hypot(total, float(exact.norm()))
    return (lost / total if total else math.inf) if lost else 0.0
