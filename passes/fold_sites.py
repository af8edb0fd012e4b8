"""Finding where scales fold: the wiring of a block, read off a run of it, and every guess put to the test.

`find_sites` sees which linear layers are given the very tensor that a norm returned. Writers that are linear layers
come from a table of names. Neither is trusted: every site is folded with random powers of two, which commute with
rounding, on a float32 view of the block, and kept only if the output stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.backends.experts import Experts
from optimizer.errors import DataError, UsageError
from optimizer.passes.base import Skip, view
from optimizer.passes.folds import HEAD_SIZE_NAMES, LINKS, OUTPUTS, Site, fold, replace_parameter, weight_of

TOLERANCE = 64 * torch.finfo(torch.float32).eps
"""Largest change of the output, relative to its channel. Folded powers of two change no bit where products are summed
in the same order; another order moves a sum of K = 4096 terms by about √K ε."""

PROBE_TOKENS = 4
"""Tokens on which each expert is checked, so that those the sample does not reach are checked too."""


def find_sites(
    block: nn.Module, sample_args: Sequence[Any] = (), sample_kwargs: Mapping[str, Any] | None = None
) -> tuple[list[Site], list[Skip]]:
    """Every place of `block` where a scale folds exactly, and the candidates that were refused, with the reason.

    The block is run on the sample, as it is called in the model, in float32 and eval mode; neither it nor the sample
    is changed. A few real tokens are enough: more only cost time. What happens outside the block is not seen, so a
    block whose weights or values are used elsewhere too (shared layers, shared caches) must not be folded alone.
    `DataError` for a sample on which the block does not give finite numbers, `UsageError` for a block without data.
    """
    if any(t.is_meta for t in (*block.parameters(), *block.buffers())):
        raise UsageError(f"{type(block).__name__} has weights on the meta device. Load them before looking for sites.")
    sample = (tuple(sample_args), dict(sample_kwargs or {}))
    base = _float32(block)
    with torch.no_grad():
        trace = _trace(base, sample)
        candidates, skips = _candidates(base, trace)
        for site in (group[0] for group in candidates):
            if site.offset:
                _put_on_grid(base.get_submodule(site.writer), site.offset)
        reference = _outputs(base, sample)
        if not any(t.numel() for t in reference) or not all(bool(t.isfinite().all()) for t in reference):
            raise DataError(f"{type(block).__name__} gives no values, or not finite ones, on the sample. Give another.")
        first = [group[0] for group in candidates]
        if _change(base, sample, reference, first) <= TOLERANCE:
            return first, skips
        sites = []
        for group in candidates:
            changes = [(_change(base, sample, reference, [site]), site) for site in group]
            exact = [site for change, site in changes if change <= TOLERANCE]
            if exact:
                sites.append(exact[0])
            else:
                skips.append(Skip(group[0].name, _why(base, trace, group[0], min(change for change, _ in changes))))
    return sites, skips


@dataclass
class _Trace:
    """What a run of the block showed. A tensor is known by where its data lie and how many there are."""

    norms: dict[str, list[tuple[Tensor, Any, Any]]] = field(default_factory=dict)  # output, args, kwargs of each call
    readers: dict[str, list[str]] = field(default_factory=dict)  # norm → modules given its very output, in call order
    writers: dict[tuple[int, int], str] = field(default_factory=dict)  # the norm whose output lies there
    reached: set[str] = field(default_factory=set)  # called with something other than zeros


def _key(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.numel()


Sample = tuple[tuple[Any, ...], dict[str, Any]]


def _trace(base: nn.Module, sample: Sample) -> _Trace:
    """Run the block once. Norm outputs are kept, so no later tensor can take their place in memory; reads of what lay
    there before are not counted.
    """
    trace = _Trace()

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = list(_tensors((args, kwargs)))
            for norm in {trace.writers[_key(t)] for t in given if _key(t) in trace.writers}:
                trace.readers[norm].append(name)
            if any(t.numel() and (not t.is_floating_point() or bool(t.any())) for t in given):
                trace.reached.add(name)
            if _scales_last_dim(module, output):
                trace.norms.setdefault(name, []).append((output, args, kwargs))
                trace.readers.setdefault(name, [])
                trace.writers[_key(output)] = name

        return seen

    named = [(name, module) for name, module in base.named_modules() if name]
    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in named]
    try:
        _run(base, sample)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _scales_last_dim(module: nn.Module, output: Any) -> bool:
    """Whether a module has nothing but a weight, and maybe a bias, for each channel of its output."""
    own = {n: p for n, p in module._parameters.items() if p is not None}
    return (
        "weight" in own
        and own.keys() <= {"weight", "bias"}
        and not module._modules
        and isinstance(output, Tensor)
        and output.ndim > 0
        and all(p.shape == output.shape[-1:] and p.is_floating_point() for p in own.values())
    )


def _candidates(base: nn.Module, trace: _Trace) -> tuple[list[list[Site]], list[Skip]]:
    """For each writer, the sites it may be, likeliest first."""
    owners: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    groups: list[list[Site]] = []
    skips: list[Skip] = []
    for found in (*_norm_candidates(base, trace), *_linear_candidates(base, trace)):
        if isinstance(found, Skip):
            skips.append(found)
            continue
        paths = (found[0].writer, *found[0].readers, *found[0].others)
        shared = next(
            (o for p in paths for o in owners[id(weight_of(base.get_submodule(p)))] if o != f"{p}.weight"), None
        )
        if shared is None:
            groups.append(found)
        else:
            skips.append(Skip(found[0].name, f"a weight of this site is also {shared}, which would change with it"))
    return groups, skips


def _norm_candidates(base: nn.Module, trace: _Trace) -> Iterator[list[Site] | Skip]:
    for name, calls in trace.norms.items():
        norm = base.get_submodule(name)
        k = weight_of(norm).numel()
        readers, others = _split_readers(base, trace.readers[name], k)
        missed = _not_reached(base, trace, k)
        if not readers:
            yield Skip(name, "no linear layer reads its output as it is")
        elif missed is not None:
            yield Skip(name, f"the sample does not reach {missed}, which may read this output too")
        elif (offset := _gain_offset(norm, *calls[0][1:])) is None:
            yield Skip(name, f"{type(norm).__name__} does not multiply by its weight or by 1 + its weight")
        else:
            yield [Site("norm", name, readers, k, others, offset=offset)]


def _split_readers(base: nn.Module, names: Iterable[str], k: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Linear layers, those of experts included, and modules that hold one matrix `[E, K]` (routers)."""
    readers: dict[str, None] = {}
    others: dict[str, None] = {}
    for name in names:
        module = base.get_submodule(name)
        weight = module._parameters.get("weight")
        if isinstance(module, Experts):
            entries = [f"{name}.{e}.{layer}" for e in range(len(module)) for layer in ("gate_proj", "up_proj")]
            readers |= dict.fromkeys(path for path in entries if _is_linear(base.get_submodule(path)))
        elif _is_linear(module):
            readers[name] = None
        elif weight is not None and weight.ndim == 2 and weight.shape[1] == k:
            others[name] = None
    return tuple(readers), tuple(others)


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear) and weight is not None and weight.ndim == 2 and weight.is_floating_point()


def _not_reached(base: nn.Module, trace: _Trace, k: int) -> str | None:
    """A module with a matrix of `k` columns that the run did not use; experts are known to read what all read."""
    known = _inside_experts(base)
    for name, module in base.named_modules():
        wide = any(p is not None and p.ndim > 1 and p.shape[-1] == k for p in module._parameters.values())
        if wide and name not in trace.reached and not name.startswith(known):
            return str(name)
    return None


def _inside_experts(base: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, Experts))


def _gain_offset(norm: nn.Module, args: Any, kwargs: Any) -> float | None:
    """The `c` of a norm that multiplies by `c + weight`, found by setting its weight to 0 and to 1."""
    weight = weight_of(norm)
    zero = {name: torch.zeros_like(p) for name, p in norm.named_parameters()}
    at_zero = torch.func.functional_call(norm, zero, args, kwargs)
    at_one = torch.func.functional_call(norm, zero | {"weight": torch.ones_like(weight)}, args, kwargs)
    if not at_zero.any() and at_one.any():
        return 0.0
    return 1.0 if at_zero.any() and torch.equal(at_one, 2 * at_zero) else None


def _linear_candidates(base: nn.Module, trace: _Trace) -> Iterator[list[Site] | Skip]:
    known = _inside_experts(base)
    for parent_name, parent in base.named_modules():
        layers = {name: module for name, module in parent.named_children() if _is_linear(module)}
        config = getattr(parent, "config", None)
        for writers, readers, layout in LINKS:
            first = next((n for n in writers if n in layers), None)
            second = next((n for n in readers if n in layers), None)
            if first is None or second is None:
                continue
            writer, reader = (f"{parent_name}.{n}".removeprefix(".") for n in (first, second))
            n, k = weight_of(layers[first]).shape[0], weight_of(layers[second]).shape[1]
            d = next((d for a in HEAD_SIZE_NAMES if isinstance(d := getattr(parent, a, None), int)), None)
            sites = [Site("linear", writer, (reader,), k, **how) for how in layout(n, k, d)]
            if not sites:
                yield Skip(writer, f"its {n} rows do not map onto the {k} columns of {reader} in a known way")
            elif not {writer, reader} <= trace.reached and not writer.startswith(known):
                yield Skip(writer, f"the sample does not reach both it and {reader}")
            elif readers is OUTPUTS and getattr(config, "num_kv_shared_layers", False):
                yield Skip(writer, "its values may be read by other layers (num_kv_shared_layers)")
            else:
                yield sites


def _why(base: nn.Module, trace: _Trace, site: Site, change: float) -> str:
    """The reason for refusing a site, with what most likely stands in the way."""
    moved = f"folding it changes the output by {change:.1e} of its size (at most {TOLERANCE:.1e} is rounding)"
    if site.kind == "norm":
        known = {*site.readers, *site.others}
        leaves = [n for n in trace.readers[site.writer] if n not in known and not base.get_submodule(n)._modules]
        return f"{moved}: something else reads its output" + (f" ({', '.join(leaves)})" if leaves else "")
    parent = base.get_submodule(site.writer.rpartition(".")[0])
    between = [type(m).__name__ for m in parent.children() if not any(True for _ in m.parameters())]
    return f"{moved}: what lies between it and {site.readers[0]} does not scale with it" + (
        f" ({', '.join(between)})" if between else ""
    )


def _change(base: nn.Module, sample: Sample, reference: list[Tensor], sites: Iterable[Site]) -> float:
    """The largest change of any output value, relative to the largest in its channel, when all `sites` are folded."""
    generator = torch.Generator().manual_seed(0)
    trial = view(base)
    for site in sites:
        exponents = torch.randint(
            -2, 3, (site.channels // site.repeat // site.head_dim, 1, site.head_dim), generator=generator
        )
        s = torch.exp2(exponents.float()).expand(-1, site.repeat, -1).reshape(-1)
        fold(trial, site, s)
    worst = 0.0
    for before, after in zip(reference, _outputs(trial, sample), strict=True):
        if before.numel():
            size = before.abs().reshape(-1, before.shape[-1]).amax(0).clamp_min(torch.finfo(torch.float32).tiny)
            worst = max(worst, float(((after - before).abs() / size).nan_to_num(nan=torch.inf).max()))
    return worst


def _outputs(block: nn.Module, sample: Sample) -> list[Tensor]:
    """What the block returns, and what each expert returns for the first tokens that reach its layer."""
    given: dict[Experts, Tensor] = {}

    def keep(module: Experts, args: tuple[Tensor, ...]) -> None:
        given[module] = args[0][:PROBE_TOKENS]

    layers = [module for module in block.modules() if isinstance(module, Experts)]
    handles = [module.register_forward_pre_hook(keep) for module in layers]
    try:
        outputs = list(_tensors(_run(block, sample)))
    finally:
        for handle in handles:
            handle.remove()
    outputs += [expert(given[module]) for module in layers if module in given for expert in module]
    return [t for t in outputs if t.is_floating_point()]


def _run(block: nn.Module, sample: Sample) -> Any:
    """Call the block with copies of the sample: a cache among the arguments grows, and not the caller's."""
    args, kwargs = _own(sample)
    return block(*args, **kwargs)


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        own = value.detach().clone()
        return own.float() if own.is_floating_point() else own
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_own(v) for v in value)
    if type(value) is dict:
        return {k: _own(v) for k, v in value.items()}
    return copy.deepcopy(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _tensors(v)


def _float32(block: nn.Module) -> nn.Module:
    """A view of the block in eval mode and float32, without hooks; weights that are float32 already are shared."""
    base: nn.Module = view(block).eval()
    made: dict[int, nn.Parameter] = {}
    for module in base.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                wide = nn.Parameter(parameter.detach().float(), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), wide)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()
    return base


def _put_on_grid(norm: nn.Module, offset: float) -> None:
    """Round a norm's gain `c + weight` to multiples of 2⁻⁸ (never 0), so that dividing it by 1/4 … 4 is exact."""
    gain = (weight_of(norm) + offset).clamp(-(2.0**12), 2.0**12)
    gain = (gain * 256).round() / 256
    replace_parameter(norm, "weight", torch.where(gain == 0, 1 / 256, gain) - offset)
