"""Fusions in TorchInductor: a custom pass that rewrites graphs, and the compiler that appends it to the user's own.

The pass runs as `post_grad_custom_pre_pass`: after autograd, functionalization and decomposition, so that one pattern
serves whatever module wrote the arithmetic, and before Inductor's own pattern passes and its scheduler, which fuse what
is left. Mutations are at the end of the graph there, and views are `reshape`. Nothing global is set: options are
patched around each compilation. Inductor's cache keys hold `uuid()`, so a changed fusion is never served stale code.

Only graphs for inference are rewritten: the ops have no backward.

Importing this module imports Inductor, which takes seconds: do it where it is used.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import config, list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes.post_grad import reorder_for_locality, view_to_reshape
from torch._inductor.pattern_matcher import (
    FailedMatch,
    Match,
    MatchContext,
    MultiOutputPattern,
    PatternExpr,
    PatternMatcherPass,
    fwd_only,
    register_replacement,
    stable_topological_sort,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from optimizer.backends import kernels
from optimizer.backends.fusion import LEFT, Fusion, FusionLedger, GraphRecord, Miss, Site, value, where
from optimizer.backends.kernels.gpu import triton
from optimizer.backends.kernels.library import introduce_ops
from optimizer.errors import PassError, UsageError

try:
    from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass
except ImportError:  # PyTorch 2.11 does not say what a graph is for: `FusedCompiler` notes it

    class CustomInferenceAwareGraphPass(CustomGraphPass):  # type: ignore[no-redef, misc, unused-ignore]
        """A pass that may be told what a graph is for."""


HOOK = "post_grad_custom_pre_pass"
"""The option of Inductor that holds the pass."""

REACH = 16
"""Nodes downstream of an anchor among which the output of a pattern is looked for when a miss is explained."""


class FusionPass(CustomInferenceAwareGraphPass):  # type: ignore[misc, unused-ignore]
    """Runs fusions in their order over every graph for inference, and keeps a record of each.

    A match whose op has no kernel on the device is left to Inductor and claims its nodes, so that no later fusion takes
    part of it: counts do not depend on the device. One that its guard refuses is open to later fusions, and reported
    if none takes it. `devices` overrides those of every fusion.
    """

    def __init__(
        self, fusions: Sequence[Fusion], devices: Sequence[str] = (), ledger: FusionLedger | None = None
    ) -> None:
        self.fusions, self.devices = tuple(fusions), tuple(devices)
        self.ledger = FusionLedger() if ledger is None else ledger
        self.is_inference = True
        """What the graphs are for where Inductor does not say."""

    def __call__(self, graph: Graph, is_inference: bool | None = None) -> None:
        """Rewrite `graph` in place."""
        if not (self.is_inference if is_inference is None else is_inference):
            self.ledger.graphs.append(GraphRecord(note="left alone: it trains, and the fused ops have no backward"))
            return
        run = _Run(self.devices)
        explicit_sizes(graph)
        for matcher in _matchers(self.fusions):
            merge_duplicates(graph)
            matcher.apply(graph, run)
        stable_topological_sort(graph)
        graph.lint()
        misses = tuple(_misses(graph, self.fusions, run))
        self.ledger.graphs.append(GraphRecord(tuple(run.sites), misses))

    def uuid(self) -> str:
        """A digest of all that decides the rewriting: fusions, their sources, the kernels', devices, versions."""
        return _digest(self.fusions, self.devices)


class Chain(CustomInferenceAwareGraphPass):  # type: ignore[misc, unused-ignore]
    """Passes one after the other. One without a `uuid` keeps the graph out of Inductor's cache, as it would alone."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: Graph, is_inference: bool | None = None) -> None:
        """Run each over `graph`."""
        for step in self.passes:
            if isinstance(step, CustomInferenceAwareGraphPass):
                step(graph, is_inference)  # type: ignore[arg-type, call-arg, unused-ignore]
            else:
                step(graph)

    def uuid(self) -> tuple[Any, ...] | None:
        """Those of all passes, in order."""
        names = tuple(step.uuid() if isinstance(step, CustomGraphPass) else None for step in self.passes)
        return None if None in names else names


@dataclass(eq=False)
class FusedCompiler:
    """A backend for `torch.compile`: Inductor with the fusions, whatever else the user has asked of it.

    `trace_only` stops before code is generated and runs the rewritten graph op by op: that counts matches in the time
    of tracing. `strict` raises `PassError` on a miss. Both do without Inductor's cache, for the pass must run.
    """

    fusion: FusionPass
    strict: bool = False
    trace_only: bool = False

    def __call__(
        self, module: GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Any = None
    ) -> Any:
        """Compile a graph of Dynamo's."""
        introduce_ops()
        before = len(self.fusion.ledger.graphs)
        fix_module_floats(module)
        patches = self.patches(mode, options)
        # A cached graph would be served without running the pass, and there would be nothing to judge.
        uncached = torch._functorch.config.patch(enable_autograd_cache=False)
        with uncached if self.trace_only or self.strict else nullcontext():
            inner = self._interpreted if self.trace_only else self._generated
            compiled: Any = compile_fx(module, inputs, config_patches=patches, inner_compile=inner)
        if self.strict:
            raise_on_miss(self.fusion.ledger.graphs[before:])
        return compiled

    def patches(self, mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Inductor's options for one compilation: the user's, with the fusions after any pass they already have."""
        known = config.get_config_copy()
        wanted = {} if mode in (None, "default") else dict(list_mode_options(mode))
        for name, setting in (options or {}).items():
            key = name.replace("-", "_")
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"Inductor has no option {name!r}.{hint} See torch._inductor.list_options().")
            wanted[key] = setting
        present = wanted.get(HOOK, getattr(config, HOOK)) or ()
        passes = [*present] if isinstance(present, list | tuple) else [present]
        ours: dict[str, Any] = {HOOK: Chain([*passes, self.fusion]) if passes else self.fusion}
        return wanted | ours | ({"fx_graph_cache": False} if self.strict else {})

    def _generated(self, module: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        """Inductor's own code."""
        self.fusion.is_inference = options.get("is_inference", False)
        return compile_fx_inner(module, inputs, **options)

    @staticmethod
    def _interpreted(module: GraphModule, _inputs: Sequence[Any], *, is_inference: bool = False, **_: Any) -> Any:
        """The rewritten graph, run without generated code."""
        as_inductor_has_it(module)
        getattr(config, HOOK)(module.graph, is_inference=is_inference)
        module.recompile()
        return make_boxed_func(module.forward)


def as_inductor_has_it(module: GraphModule) -> None:
    """Put a graph that AOTAutograd made in the form in which `post_grad_custom_pre_pass` finds it."""
    view_to_reshape(module)
    module.graph.eliminate_dead_code()
    reorder_for_locality(module.graph)


def fix_module_floats(module: GraphModule) -> None:
    """Make constants of the floats that a graph of dynamic shapes reads from modules, under a guard for each.

    Dynamo makes an input of every float then, the epsilon of a norm among them, which an op takes as a number.
    """
    for node in module.graph.nodes:
        number = node.meta.get("example_value")
        if isinstance(number, torch.SymFloat) and number.node.expr.is_Symbol:
            sources = number.node.shape_env.var_to_sources.get(number.node.expr, ())
            if any(source.guard_source.is_unspecialized_nn_module() for source in sources):
                float(number)


def raise_on_miss(graphs: Sequence[GraphRecord]) -> None:
    """`PassError` naming each place that looks like a fusion's and was matched by none."""
    misses = [miss for graph in graphs for miss in graph.misses]
    if misses:
        lines = "; ".join(f"{m.anchor} at {m.where or 'the top level'} ({m.node}): {m.reason}" for m in misses[:5])
        more = f" and {len(misses) - 5} more" if len(misses) > 5 else ""
        raise PassError(f"no fusion matched {lines}{more}. Set strict: false to go on without them.")


@dataclass
class _Matcher:
    """The compiled patterns of one fusion name, with the run that they report to while they are applied."""

    rules: PatternMatcherPass
    run: _Run | None = None

    def apply(self, graph: Graph, run: _Run) -> None:
        self.run = run
        try:
            self.rules.apply(graph)
        finally:
            self.run = None


class _Run:
    """One pass over one graph: the sites found, the nodes that are taken, and matches that a guard refused.

    Matches that overlap a taken one would be gone from the graph had that one been replaced: they are no misses.
    """

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.devices = devices
        self.sites: list[Site] = []
        self.claimed: set[Node] = set()
        self.overlapping: set[Node] = set()
        self.refused: dict[Node, Site] = {}

    def accept(self, fusion: Fusion, match: Match) -> bool:
        """Record a match and say whether to replace it."""
        outputs = [node for node in match.output_nodes() if node is not None]
        # Outputs that share inputs alone are searched for apart from each other, and may find one and the same node.
        if len(set(outputs)) < len(outputs):
            return False
        if self.claimed.intersection(match.nodes):
            self.overlapping.update(match.nodes)
            return False
        site = Site(fusion.name, fusion.variant, where(outputs[0]), outputs[0].name)
        if reason := _keywords(match) or _number(fusion, match) or fusion.guard(match.kwargs):
            self.refused.update(dict.fromkeys(match.nodes, replace(site, reason=reason)))
            return False
        reason = self._no_kernel(fusion, value(outputs[0]).device.type)
        self.sites.append(replace(site, reason=reason))
        if reason:
            self.claimed.update(match.nodes)
        return not reason

    def _no_kernel(self, fusion: Fusion, device: str) -> str:
        if device not in (self.devices or fusion.devices):
            return f"{LEFT}: the op has no kernel of its own on {device}"
        if device == "cuda" and triton is None:
            return f"{LEFT}: Triton is not installed, so the op has no kernel on cuda"
        return ""


def _keywords(match: Match) -> str:
    """A reason where a call has keyword arguments that the pattern lacks: the matcher does not look at those.

    So `addmm` with `beta=2` would pass for one without.
    """
    for pattern, node in match.ctx.pattern_to_node.items():
        if node is not None and (extra := node.kwargs.keys() - getattr(pattern, "kwargs", {}).keys()):
            return f"{node.target} is called with {', '.join(sorted(extra))}, which the pattern lacks"
    return ""


def _number(fusion: Fusion, match: Match) -> str:
    """A reason where a number stands in a tensor's place and PyTorch 2.11 has made a constant of the pattern of it."""
    names = inspect.signature(fusion.pattern).parameters.keys() - dict(fusion.scalars).keys() - match.kwargs.keys()
    return f"{min(names)} is a number, not a tensor" if names else ""


@cache
def _matchers(fusions: tuple[Fusion, ...]) -> tuple[_Matcher, ...]:
    """One matcher a fusion name, in order; patterns are traced once a process, on fake tensors."""
    matchers: dict[str, _Matcher] = {}
    for fusion in fusions:
        matcher = matchers.setdefault(fusion.name, _Matcher(PatternMatcherPass(pass_name=f"optimizer_{fusion.name}")))
        for dtype in fusion.dtypes:
            _register(fusion, dtype, matcher)
    return tuple(matchers.values())


def _register(fusion: Fusion, dtype: torch.dtype, matcher: _Matcher) -> None:
    def check(match: Match) -> bool:
        assert matcher.run is not None
        return matcher.run.accept(fusion, match)

    with FakeTensorMode():
        register_replacement(
            fusion.pattern,
            fusion.replacement,
            fusion.inputs(dtype),
            _trace,
            matcher.rules,
            extra_check=check,
            scalar_workaround=dict(fusion.scalars),
            skip_duplicates=True,
        )


def _trace(fn: Callable[..., Any], *arguments: Any, **options: Any) -> GraphModule:
    """A pattern in the form that graphs have where the pass runs."""
    module = fwd_only(fn, *arguments, **options)
    view_to_reshape(module)
    explicit_sizes(module.graph)
    return module


def explicit_sizes(graph: Graph) -> None:
    """Write out the `-1` in sizes that are known, so that one pattern serves a view that was written either way."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default):
        shape = node.meta["val"].shape if "val" in node.meta else ()
        if -1 in node.args[1] and shape and all(isinstance(size, int) for size in shape):
            node.args = (node.args[0], list(shape))


def merge_duplicates(graph: Graph) -> None:
    """Let calls of one of our ops on the same arguments share one result: siblings that quantize the same input.

    All our ops that a pattern contains are pure; Inductor sees only opaque calls and would run each.
    """
    seen: dict[tuple[Any, ...], Node] = {}
    for node in list(graph.nodes):
        if getattr(node.target, "namespace", "") != "optimizer" or node.kwargs or node.target._schema.is_mutable:
            continue
        key = (node.target, node.args)
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    _merge_items(graph, set(seen.values()))


def _merge_items(graph: Graph, calls: set[Node]) -> None:
    """The same for the items taken out of a shared result."""
    for call in calls:
        items: dict[Any, Node] = {}
        for user in [u for u in call.users if getattr(u.target, "__name__", "") == "getitem"]:
            first = items.setdefault(user.args[1], user)
            if first is not user:
                user.replace_all_uses_with(first)
                graph.erase_node(user)


def _misses(graph: Graph, fusions: Sequence[Fusion], run: _Run) -> Iterator[Miss]:
    """Every anchor that is left: why its match was refused, or else what its nearest pattern wanted."""
    anchors = {fusion.anchor: [f for f in fusions if f.anchor is fusion.anchor] for fusion in fusions}
    matchers = dict(zip(dict.fromkeys(f.name for f in fusions), _matchers(tuple(fusions)), strict=True))
    for anchor, rows in anchors.items():
        names = dict.fromkeys(f.name for f in rows)
        patterns = [e.pattern for n in names for entries in matchers[n].rules.patterns.values() for e in entries]
        for node in graph.nodes:
            taken = node in run.claimed or node in run.overlapping
            if node.op != "call_function" or taken or not anchor.found(node):
                continue
            if node in run.refused:
                run.sites.append(run.refused[node])
            else:
                yield Miss(anchor.name, where(node), node.name, _nearest(node, patterns))


def _nearest(anchor: Node, patterns: Sequence[PatternExpr]) -> str:
    """Where the pattern that gets furthest around `anchor` stops."""
    best, reason = -1, "no pattern ends downstream of it"
    for node in _downstream(anchor):
        for pattern in patterns:
            outputs: list[PatternExpr | None] = (
                pattern.outputs if isinstance(pattern, MultiOutputPattern) else [pattern]
            )
            context = MatchContext(outputs, graph=node.graph)
            result = context.match(pattern, node)
            reached = sum(found is not None for found in context.pattern_to_node.values())
            if isinstance(result, Match):
                return "the pattern matches but for the shapes or types of its inputs"
            if reached > best:
                best, reason = reached, _explain(result)
    return reason


def _downstream(node: Node) -> Iterator[Node]:
    queue, seen = deque([node]), {node}
    while queue and len(seen) <= REACH:
        current = queue.popleft()
        yield current
        for user in current.users:
            if user not in seen and user.op == "call_function":
                seen.add(user)
                queue.append(user)


def _explain(failure: FailedMatch) -> str:
    parts = [
        part if isinstance(part, Node) else getattr(part, "fns_repr", lambda p=part: str(p))() for part in failure.args
    ]
    if failure.format_string.startswith("function_mismatch") and isinstance(parts[0], Node):
        return f"{parts[0].name} is {parts[0].target}, where the pattern has {parts[1]}"
    if failure.format_string.startswith("multiple_users"):
        return f"the result of {parts[0]} is also used outside the pattern"
    return failure.format_string.format(*parts, **failure.kwargs)[:160]


@cache
def _digest(fusions: tuple[Fusion, ...], devices: tuple[str, ...]) -> str:
    digest = hashlib.sha256(f"{torch.__version__} {devices} {triton is not None}".encode())
    files = {Path(__file__), Path(inspect.getsourcefile(Fusion) or "")}
    files |= set(Path(kernels.__file__ or "").parent.glob("*.py"))  # their fakes decide layouts in the generated code
    for fusion in fusions:
        digest.update(f"{fusion} {fusion.dtypes} {fusion.devices} {fusion.scalars} ".encode())
        functions = (fusion.pattern, fusion.replacement, fusion.inputs, fusion.guard, fusion.anchor.found)
        files |= {Path(inspect.getsourcefile(function) or "") for function in functions}
    for file in sorted(files, key=lambda path: path.name):
        digest.update(file.read_bytes())
    return digest.hexdigest()
