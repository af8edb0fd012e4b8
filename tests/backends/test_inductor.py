"""The machinery around fusions: where it runs, what it leaves alone, what it says, and what it never touches."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.fx import Graph, GraphModule

from optimizer.backends.fusion import Anchor, Fusion, GraphRecord, Miss, Site, not_a_row, value
from optimizer.errors import PassError, UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Inductor's own imports use what PyTorch deprecates
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    from optimizer.backends import inductor
    from optimizer.backends.inductor import HOOK, Chain, FusedCompiler, FusionPass, merge_duplicates, raise_on_miss

LIBRARY = torch.library.Library("optimizer", "FRAGMENT")
LIBRARY.define("test_scaled_norm(Tensor x, Tensor weight, float eps) -> Tensor")
LIBRARY.impl(
    "test_scaled_norm",
    lambda x, weight, eps: weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)),
    "CompositeExplicitAutograd",
)
torch.library.register_fake("optimizer::test_scaled_norm", lambda x, *_: x.new_empty(x.shape), lib=LIBRARY)
OP = torch.ops.optimizer.test_scaled_norm.default


def pattern(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def replacement(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return OP(x, weight, eps)  # type: ignore[no-any-return]


NORM = Fusion(
    "scaled_norm",
    "plain",
    pattern,
    replacement,
    lambda dtype: (torch.empty(2, 3, 8, dtype=dtype), torch.empty(8, dtype=dtype)),
    Anchor("norm", lambda node: node.target is torch.ops.aten.rsqrt.default),
    lambda nodes: not_a_row("weight", nodes["weight"], value(nodes["x"])),
    ("aten.rsqrt.default",),
    (("eps", 1.2345e-4),),
    dtypes=(torch.float32,),
    devices=("cpu",),
)


class Norm(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))
        self.eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return pattern(x, self.weight, self.eps)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Norm(), Norm()])
        self.middle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.norms
        return second(self.middle(first(x)))  # type: ignore[no-any-return]


def compiler(*fusions: Fusion, **options: Any) -> FusedCompiler:
    return FusedCompiler(FusionPass(fusions or (NORM,)), trace_only=True, **options)


def run(module: Callable[..., Any], backend: Any, *inputs: Tensor, **options: Any) -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(module, backend=backend, **options)(*inputs)


class Seen(CustomGraphPass):
    """A user's own pass: notes what it saw."""

    def __init__(self, uuid: str | None = "theirs") -> None:
        self.graphs: list[list[str]] = []
        self.name = uuid

    def __call__(self, graph: Graph) -> None:
        self.graphs.append([str(node.target) for node in graph.nodes])

    def uuid(self) -> str | None:
        return self.name


def test_sites_are_rewritten_and_named_by_their_module() -> None:
    block, backend, x = Block(), compiler(), torch.randn(2, 3, 8)
    assert torch.allclose(run(block, backend, x), block(x), atol=1e-6)
    (record,) = backend.fusion.ledger.graphs
    assert {site.where for site in record.sites} == {"norms.0", "norms.1"}
    assert record.applied() == record.matched() == backend.fusion.ledger.applied() == {"scaled_norm": 2}
    assert not record.misses
    assert not record.note


def test_matches_are_counted_where_they_are_left_because_of_the_device() -> None:
    backend = compiler(dataclasses.replace(NORM, devices=("cuda",)))
    run(Block(), backend, torch.randn(2, 3, 8))
    (record,) = backend.fusion.ledger.graphs
    assert record.matched() == {"scaled_norm": 2}
    assert not record.applied()
    assert not record.misses
    assert {site.reason for site in record.sites} == {"left to Inductor: the op has no kernel of its own on cpu"}


def test_a_miss_names_the_module_the_node_and_what_was_wanted() -> None:
    class Added(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    class Shared(Norm):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
            return self.weight * (x * scale) + scale

    for module, words in ((Added(), "where the pattern has"), (Shared(), "is also used outside the pattern")):
        backend = compiler()
        run(module, backend, torch.randn(2, 3, 8))
        (miss,) = backend.fusion.ledger.graphs[0].misses
        assert miss.anchor == "norm"
        assert words in miss.reason


def test_a_guard_s_refusal_is_reported_and_not_a_miss() -> None:
    class Doubled(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return pattern(x, self.weight * 2, self.eps)

    backend = compiler(strict=True)
    run(Doubled(), backend, torch.randn(2, 3, 8))
    (record,) = backend.fusion.ledger.graphs
    assert [site.reason for site in record.sites] == ["weight is computed in the graph, not a parameter"]
    assert not record.matched()
    assert not record.misses


def test_strict_raises_where_a_site_is_missed() -> None:
    class Added(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    with pytest.raises(Exception, match=r"no fusion matched norm at the top level|no fusion matched norm at "):
        run(Added(), compiler(strict=True), torch.randn(2, 3, 8))
    many = GraphRecord(misses=tuple(Miss("norm", f"layers.{i}", "rsqrt", "it is green") for i in range(7)))
    with pytest.raises(PassError, match=r"norm at layers\.0 \(rsqrt\): it is green.* and 2 more\. Set strict: false"):
        raise_on_miss([GraphRecord(), many])
    raise_on_miss([GraphRecord(sites=(Site("norm", "plain", "", "n", "a reason"),))])


def test_a_graph_that_trains_is_left_alone() -> None:
    backend, x = compiler(), torch.randn(2, 3, 8, requires_grad=True)
    torch._dynamo.reset()
    block = Block()
    torch.compile(block, backend=backend)(x).sum().backward()
    expected = torch.autograd.grad(block(x).sum(), x)[0]
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, atol=1e-5)
    assert backend.fusion.ledger.graphs
    assert not backend.fusion.ledger.matched()
    assert all("no backward" in record.note for record in backend.fusion.ledger.graphs)


def test_a_graph_that_trains_is_left_alone_where_inductor_does_not_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch 2.11 calls the pass with the graph alone.
    def compile_inner(module: GraphModule, _inputs: Any, **_: Any) -> Any:
        getattr(config, HOOK)(module.graph)
        return make_boxed_func(module.forward)

    monkeypatch.setattr(inductor, "compile_fx_inner", compile_inner)
    block, x = Block(), torch.randn(2, 3, 8)
    for trains in (True, False, True):
        backend = FusedCompiler(FusionPass([NORM]))
        torch._dynamo.reset()
        found = torch.compile(block, backend=backend)(x) if trains else run(block, backend, x)
        assert torch.allclose(found, block(x), atol=1e-6)
        assert ["no backward" in record.note for record in backend.fusion.ledger.graphs] == [trains]


def test_inductor_knows_our_ops_before_it_comes_upon_one() -> None:
    # Else PyTorch 2.11 writes calls within calls into a message: for an op that first comes behind 40 others, 2^40.
    from torch._inductor.lowering import lowerings

    from optimizer.backends.kernels.rms_norm import add_rms_norm, rms_norm

    def deep(x: Tensor, weight: Tensor) -> Tensor:
        total = x
        for _ in range(40):
            x, total = add_rms_norm(x, total, weight, 1e-6, 0.0)
        return rms_norm(x, weight, 1e-6, 0.0)  # type: ignore[no-any-return]

    for op in (add_rms_norm, rms_norm):
        lowerings.pop(op, None)
    x, weight = torch.randn(2, 8), torch.ones(8)
    assert torch.equal(run(deep, FusedCompiler(FusionPass([])), x, weight), deep(x, weight))
    assert {add_rms_norm, rms_norm} <= lowerings.keys()


def test_dynamic_shapes_serve_every_shape_with_one_graph() -> None:
    # Dynamo then makes the epsilon, a float of the module, an input; the op takes a number.
    block, backend = Block(), compiler()
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (3, 5, 17):
            x = torch.randn(2, rows, 8)
            assert torch.allclose(compiled(x), block(x), atol=1e-6)
    assert [record.applied() for record in backend.fusion.ledger.graphs] == [{"scaled_norm": 2}]


def test_floats_that_a_caller_passes_stay_dynamic() -> None:
    class Scaled(Norm):
        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return pattern(x, self.weight, self.eps) * factor

    module, backend = Scaled(), compiler()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, dynamic=True)
    with torch.no_grad():
        x = torch.randn(2, 3, 8)
        for factor in (2.0, 3.5, 4.25):
            assert torch.allclose(compiled(x, factor), module(x, factor), atol=1e-6)
    assert len(backend.fusion.ledger.graphs) == 1


def test_a_recompiled_graph_has_a_record_of_its_own() -> None:
    module, backend = Norm(), compiler()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, dynamic=False)
    with torch.no_grad():
        compiled(torch.randn(2, 3, 8))
        compiled(torch.randn(4, 3, 8))
    assert [record.applied()["scaled_norm"] for record in backend.fusion.ledger.graphs] == [1, 1]


@pytest.mark.parametrize("how", ["options", "config"])
def test_the_user_s_own_pass_runs_first_and_the_configuration_stays(how: str) -> None:
    theirs, backend, x = Seen(), compiler(), torch.randn(2, 3, 8)
    before = config.get_config_copy()
    if how == "options":
        run(Norm(), backend, x, options={HOOK: theirs, "epilogue-fusion": False})
    else:
        with config.patch({HOOK: theirs}):
            run(Norm(), backend, x)
    assert len(theirs.graphs) == 1
    assert "aten.rsqrt.default" in theirs.graphs[0]
    assert backend.fusion.ledger.applied() == {"scaled_norm": 1}
    assert config.get_config_copy() == before


def test_options_and_modes_reach_inductor() -> None:
    backend = compiler()
    patches = backend.patches(None, {"max-autotune": True, "triton.cudagraphs": False})
    assert patches == {"max_autotune": True, "triton.cudagraphs": False, HOOK: backend.fusion}
    assert backend.patches("reduce-overhead", None)["triton.cudagraphs"] is True
    assert backend.patches("default", None) == {HOOK: backend.fusion}
    assert compiler(strict=True).patches(None, None)["fx_graph_cache"] is False
    theirs = [Seen("a"), Seen("b")]
    assert backend.patches(None, {HOOK: theirs})[HOOK].passes == (*theirs, backend.fusion)
    with pytest.raises(UsageError, match=r"no option 'max_autotun'\. Did you mean 'max_autotune'\?"):
        backend.patches(None, {"max_autotun": True})


def test_the_uuid_follows_all_that_decides_the_rewriting(monkeypatch: pytest.MonkeyPatch) -> None:
    base = FusionPass([NORM]).uuid()
    assert base == FusionPass((NORM,)).uuid()
    others = [
        FusionPass([NORM], devices=("cuda",)),
        FusionPass([dataclasses.replace(NORM, variant="other")]),
        FusionPass([dataclasses.replace(NORM, scalars=(("eps", 0.5),))]),
        FusionPass([dataclasses.replace(NORM, devices=())]),
        FusionPass([]),
    ]
    assert len({base, *(other.uuid() for other in others)}) == 6
    monkeypatch.setattr(torch, "__version__", "99")
    assert FusionPass([dataclasses.replace(NORM)], devices=("cpu", "cuda")).uuid() != base
    names = Chain([Seen(), FusionPass([NORM])]).uuid()
    assert names == ("theirs", base)
    assert Chain([lambda graph: None, FusionPass([NORM])]).uuid() is None
    assert Chain([Seen(None), FusionPass([NORM])]).uuid() is None


def test_the_uuid_follows_the_source(tmp_path: Any) -> None:
    def digest(source: str) -> str:
        file = tmp_path / f"{len(source)}" / "patterns.py"
        file.parent.mkdir()
        file.write_text(source)
        scope: dict[str, Any] = {}
        exec(compile(source, str(file), "exec"), scope)
        function: Callable[..., Any] = scope["pattern"]
        return FusionPass([dataclasses.replace(NORM, pattern=function)]).uuid()

    assert digest("def pattern(x, weight, eps):\n    return x\n") != digest(
        "def pattern(x, weight, eps):\n    return weight\n"
    )


def test_equal_calls_are_merged_and_writing_ones_are_not() -> None:
    graph = Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    one, two = (graph.call_function(OP, (x, weight, 1e-6)) for _ in range(2))
    other = graph.call_function(OP, (x, weight, 1e-5))
    graph.output((one, two, other))
    merge_duplicates(graph)
    assert [node.args[2] for node in graph.nodes if node.target is OP] == [1e-6, 1e-5]
    assert graph.output_node().args[0] == (one, one, other)

    LIBRARY.define("test_writes(Tensor(a!) x) -> Tensor")
    graph = Graph()
    x = graph.placeholder("x")
    op = torch.ops.optimizer.test_writes.default
    graph.output(tuple(graph.call_function(op, (x,)) for _ in range(2)))
    merge_duplicates(graph)
    assert len(graph.find_nodes(op="call_function", target=op)) == 2
