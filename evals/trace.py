"""Where the time of a step goes: a profiled step, split into terms that sum to the step as it runs unprofiled.

`torch.profiler` says what ran when. A step's window is filled completely: work counts to its term by the table
`TERMS`; views, allocations, wrappers around another operation and the fixed cost of each call count as `launch`; so
do the gaps between operations of a forward pass, up to `HOST_GAP_SECONDS` each. What is left, and every gap outside a
forward pass, is the `host`'s. On a GPU work is the kernels' own time, and gaps are those in which none runs.

The profiler costs time itself, which lands between events and not in them: `profiling.event_seconds` measures it, and
each event's share is taken out of the gap where it lies. `scaled` then stretches the split to the unprofiled step.
A name that no pattern matches is kept by its name under `unclassified`.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal, get_args

Term = Literal["matmul", "attention", "elementwise", "kv", "communication", "launch", "host", "unclassified"]
TERM_NAMES: tuple[Term, ...] = get_args(Term)
WORK: frozenset[Term] = frozenset({"matmul", "attention", "elementwise", "kv", "communication"})

HOST_GAP_SECONDS = 5e-4
"""Python takes 5 to 200 µs from one operation of a forward pass to the next; what takes longer is other work."""

LAYER, FORWARD = "optimizer.layer:", "optimizer.forward"
START, TOKEN, CALIBRATION = "optimizer.start", "optimizer.token", "optimizer.calibration"
FORWARDS = re.compile(rf"^({FORWARD}|Torch-Compiled Region|## Call CompiledFxGraph)")
COMPILED = re.compile(r"^(## Call CompiledFxGraph|cudaGraphLaunch)")
RANGES = re.compile(
    r"^(optimizer\.|Torch-Compiled Region|## Call CompiledFxGraph|Pregraph bytecode"
    r"|AOTDispatcher|TorchDynamo|cudaGraphLaunch|ProfilerStep)"
)

TERMS: tuple[tuple[str, Term], ...] = (  # the first pattern found in a lower-case name decides
    (r"nccl|c10d|gloo|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|symm_mem", "communication"),
    (r"(cpp_fused|triton_(poi|red|per|for)).*(index_copy|index_put)", "kv"),  # Inductor names all that it fused
    (r"cpp_fused|triton_(poi|red|per|for)", "elementwise"),
    (r"kv_write|index_copy|cache_kernel|reshape_and_cache|append_kv|cache_update", "kv"),
    (r"attention|flash|fmha|sdpa|attn", "attention"),
    (r"gemm|gemv|matmul|mv_kernel|cublas|cutlass|nvjet|xmma|wgmma|conv1d|convolution|linear(?!ize)", "matmul"),
    (r"(^|::|_)(add|int_|scaled_|b|weight_int\dpack_)?mm(_|$|out)|(::|_)(mv|dot|addmv|baddbmm|einsum)_?$", "matmul"),
    (r"vectorized|elementwise|reduce_kernel|softmax|layer_?norm|rms_?norm", "elementwise"),
    (r"catarray|memcpy|memset|index_?select|gather|scatter|distribution|rope|gated|quantize_rows", "elementwise"),
    (
        r"(^|::)(_?view|_unsafe_view|reshape|t|transpose|permute|as_strided|expand|slice|select|narrow|(un)?squeeze|unbind"
        r"|split(_with_sizes)?|chunk|unflatten|flatten|alias|detach_?|empty\w*|new_empty\w*|result_type|resolve_\w+|to"
        r"|_to_copy|contiguous|item|_local_scalar_dense|is_nonzero|broadcast_\w+|_reshape_alias|lift_fresh|set_|movedim"
        r"|resize_|data_ptr|stride|size|view_as|expand_as|numpy_T|mT|mH|real|unfold|diagonal|type_as)$",
        "launch",
    ),
    (
        r"(^|::)(\w*(add|sub|mul|div|divide|neg|pow|sqrt|exp|log|abs|sin|cos|tanh|sigmoid|erf|silu|gelu|relu|reciprocal|clamp|round"
        r"|floor|ceil|trunc|sign|maximum|minimum|lerp|fma|hypot|remainder|fmod)_?|sum|mean|var|std|var_mean|prod|amax"
        r"|amin|max|min|any|all|argmax|argmin|topk|sort|cumsum|cumprod|norm|linalg_vector_norm|copy_|clone|cat|stack"
        r"|concat|repeat|repeat_interleave|roll|flip|where|masked_fill_?|fill_|zero_|zeros\w*|ones\w*|full\w*|new_zeros"
        r"|new_ones|new_full|arange|linspace|embedding|index|index_put_?|_index_put_impl_|take|tri[ul]_?|eq|ne|lt|le|gt"
        r"|ge|isin|isneginf|isposinf|isnan|isinf|isfinite|logical_\w+|bitwise_\w+|__\w+__|multinomial|uniform_|normal_|random_"
        r"|exponential_|bernoulli_|diff|outer|rsub|_softmax|_log_softmax|dropout|native_\w+|equal|nonzero|unique\w*"
        r"|bincount|scalar_tensor|constant_pad_nd|pad|_assert\w*|searchsorted|histc|polar|complex)$",
        "elementwise",
    ),
)  # fmt: skip
_PATTERNS = tuple((re.compile(pattern), term) for pattern, term in TERMS)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that ran from `start` to `end` seconds; `parent` is the index of the event around it.

    `shapes` and `dtypes` describe its inputs, a list of tensors being a nested tuple of shapes.
    """

    name: str
    start: float
    end: float
    parent: int | None = None
    shapes: tuple[Any, ...] = ()
    dtypes: tuple[str, ...] = ()
    on_device: bool = False

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Overheads:
    """What profiling adds for each event, and what one call of an operation costs however little it does; seconds."""

    per_event: float = 0.0
    per_call: float = 0.0


@dataclass(slots=True)
class Use:
    """What one kernel (by name), or one event of it, took of a step."""

    name: str
    term: Term
    calls: float = 0.0
    seconds: float = 0.0


@dataclass(slots=True)
class Split:
    """One step: seconds by term, which sum to `seconds`; uses by kernel; single events that did work, in order.

    `layers` holds the seconds of each module that ran under a range of its own, `compiled` whether a compiled graph
    ran.
    """

    seconds: float
    terms: dict[Term, float] = field(default_factory=lambda: defaultdict(float))
    kernels: dict[str, Use] = field(default_factory=dict)
    work: list[tuple[Event, Term, float, str | None]] = field(default_factory=list)
    layers: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    compiled: bool = False

    def add(self, event: Event, term: Term, seconds: float, layer: str | None = None) -> None:
        """Count `seconds` of an event to its term and its kernel."""
        self.terms[term] += seconds
        if term in WORK or term == "unclassified":
            use = self.kernels.setdefault(event.name, Use(event.name, term))
            use.calls += 1
            use.seconds += seconds
            self.work.append((event, term, seconds, layer))


def classify(event: Event) -> Term:
    """The term of an operation or kernel by `TERMS`; `unclassified` if no pattern matches.

    A concatenation along another dimension than the last, of tensors of unequal length, appends to a cache.
    """
    if event.name == "aten::cat" and _appends(event.shapes):
        return "kv"
    name = event.name.lower()
    return next((term for pattern, term in _PATTERNS if pattern.search(name)), "unclassified")


def _appends(shapes: tuple[Any, ...]) -> bool:
    parts: tuple[Any, ...] = shapes[0] if shapes else ()
    if len(parts) != 2 or not all(isinstance(part, tuple) and len(part) == 4 for part in parts):
        return False
    return bool(parts[0][-2] != parts[1][-2] and parts[0][-1] == parts[1][-1])


def split(events: Sequence[Event], start: float, end: float, overheads: Overheads = Overheads()) -> Split:
    """Split the window from `start` to `end` of one thread's `events` (and a device's, where there is one)."""
    device = [event for event in events if event.on_device and event.end > start and event.start < end]
    found = _split_host(events, start, end, overheads)
    return _split_device(device, found, start, end) if device else found


def _split_host(events: Sequence[Event], start: float, end: float, overheads: Overheads) -> Split:
    """Walk the tree of events: every moment of the window is counted once."""
    children: dict[int | None, list[int]] = defaultdict(list)
    for index, event in enumerate(events):
        if not event.on_device and start <= event.start < end:
            parent = event.parent  # one that began before the window is outside it
            children[None if parent is None or events[parent].start < start else parent].append(index)
    forwards = any(FORWARDS.match(events[index].name) for group in children.values() for index in group)
    out = Split(0.0)
    out.compiled = any(COMPILED.match(events[index].name) for group in children.values() for index in group)

    def gap(seconds: float, inside: bool) -> None:
        """Time in no event: between operations of a forward pass it is launch, unless it is long."""
        launch = min(seconds, HOST_GAP_SECONDS) if inside or not forwards else 0.0
        out.terms["launch"] += launch
        out.terms["host"] += seconds - launch

    def idle(index: int | None, begin: float, finish: float) -> Iterator[float]:
        """The gaps between the children of an event, without the profiler's own time, and inside none of them."""
        for child in children[index]:
            yield max(0.0, events[child].start - begin - overheads.per_event)
            begin = events[child].end
        yield max(0.0, finish - begin)

    def visit(index: int, inside: bool, compiled: bool, layer: str | None) -> Term:
        """Count an event and all below it; returns the term it works for."""
        event = events[index]
        is_range = bool(RANGES.match(event.name))
        inside |= bool(FORWARDS.match(event.name))
        compiled |= bool(COMPILED.match(event.name))
        if event.name.startswith(LAYER):
            layer = event.name.removeprefix(LAYER)
            below = _descendants(children, index)
            out.layers[layer] += max(0.0, event.seconds - overheads.per_event * below)
        below_terms = {visit(child, inside, compiled, layer) for child in children[index]}
        if is_range:
            for seconds in idle(index, event.start, event.end):
                gap(seconds, inside)
            return "launch"
        own, term = sum(idle(index, event.start, event.end)), classify(event)
        if term in below_terms or term == "launch" or (term == "unclassified" and below_terms & WORK):
            out.terms["launch"] += own  # a wrapper: what it wraps has been counted
        else:
            fixed = 0.0 if compiled or term == "unclassified" else min(own, overheads.per_call)
            out.terms["launch"] += fixed
            out.add(event, term, own - fixed, layer)
        return term

    roots = children[None] = [i for i in children[None] if events[i].name not in (START, TOKEN)]
    for index in roots:
        visit(index, False, False, None)
    for seconds in idle(None, start, end):
        gap(seconds, False)
    out.seconds = sum(out.terms.values())
    return out


def _descendants(children: Mapping[int | None, list[int]], index: int) -> int:
    return sum(1 + _descendants(children, child) for child in children[index])


def _split_device(kernels: Sequence[Event], host: Split, start: float, end: float) -> Split:
    """Work is what the device did; the time in which it did nothing is divided as the host's own gaps are."""
    out, busy, reached = Split(end - start, layers=host.layers, compiled=host.compiled), 0.0, start
    for kernel in sorted(kernels, key=lambda event: event.start):
        fresh = max(0.0, min(kernel.end, end) - max(kernel.start, reached))
        busy, reached = busy + fresh, max(reached, min(kernel.end, end))
        out.add(kernel, classify(kernel), fresh)
    idle = out.seconds - busy
    waiting = host.terms["host"] / host.seconds if host.seconds else 0.0
    out.terms["host"] += min(idle, waiting * out.seconds)
    out.terms["launch"] += idle - min(idle, waiting * out.seconds)
    return out


def merged(splits: Sequence[Split]) -> Split:
    """The mean of several steps; single events are averaged where all steps did the same, else those of the last."""
    last, share = splits[-1], 1 / len(splits)
    out = Split(0.0, work=last.work, compiled=last.compiled)
    if len({tuple(event.name for event, *_ in one.work) for one in splits}) == 1:
        means = [
            share * sum(seconds) for seconds in zip(*((part for _, _, part, _ in s.work) for s in splits), strict=True)
        ]
        out.work = [(event, term, part, layer) for (event, term, _, layer), part in zip(last.work, means, strict=True)]
    for one in splits:
        out.seconds += share * one.seconds
        for term, seconds in one.terms.items():
            out.terms[term] += share * seconds
        for layer, seconds in one.layers.items():
            out.layers[layer] += share * seconds
        for use in one.kernels.values():
            total = out.kernels.setdefault(use.name, Use(use.name, use.term))
            total.calls += share * use.calls
            total.seconds += share * use.seconds
    return out


def scaled(found: Split, seconds: float) -> Split:
    """The split stretched so that it sums to `seconds`, the step measured without a profiler."""
    factor = seconds / found.seconds if found.seconds else 0.0
    layers = {layer: factor * part for layer, part in found.layers.items()}
    out = Split(seconds, layers=layers, compiled=found.compiled)
    out.terms = {term: factor * part for term, part in found.terms.items()}
    out.kernels = {name: replace(use, seconds=factor * use.seconds) for name, use in found.kernels.items()}
    out.work = [(event, term, factor * part, layer) for event, term, part, layer in found.work]
    return out


def windows(events: Sequence[Event], first: bool) -> list[tuple[float, float]]:
    """The spans that end with a token: the `first` one of each generation, or those from its third on.

    The second token's step still sets up what later ones use.
    """
    found, since = [], 0
    marks = [event for event in events if event.name in (START, TOKEN)]
    for before, after in itertools.pairwise(marks):
        since = 0 if before.name == START else since + 1
        if after.name == TOKEN and (since == 0 if first else since > 1):
            found.append((before.end, after.start))
    return found


def call_seconds(events: Sequence[Event]) -> float | None:
    """The fixed cost of a call: the median of the smallest operations, which ran in the same trace for this purpose."""
    within = {index for index, event in enumerate(events) if event.name == CALIBRATION}
    costs = [event.seconds for event in events if event.parent in within]
    return median(costs) if costs else None
