"""A rotated key's write to the cache: each row on its own pattern, and in functionalized graphs as models write it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from optimizer.backends.fusion import Fusion, FusionLedger, GraphRecord
from optimizer.backends.kernels.kv_write import kv_write
from optimizer.passes.fusions import FUSIONS, rope_kv_write
from tests.passes.fusions.test_fusions import rewritten, targets

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Inductor's own imports use what PyTorch deprecates
    from optimizer.backends.inductor import FusedCompiler, FusionPass, as_inductor_has_it

WRITE = "optimizer.rope_kv_write.default"


def written(graph: Any) -> list[str]:
    """The ops that change caches."""
    return [str(node.args[0]) for node in graph.nodes if "auto_functionalized" in str(node.target)]


def random_inputs(fusion: Fusion) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in fusion.inputs(torch.float32)]
    return [*made[:-1], torch.tensor([[3, 7, -1], [0, 19, 40]])]


@pytest.mark.parametrize("fusion", rope_kv_write.FUSIONS, ids=str)
def test_a_row_matches_its_pattern_once_and_computes_the_same(fusion: Fusion) -> None:
    numbers, inputs = [1e-5, 1.0][: len(fusion.scalars)], random_inputs(fusion)

    def function(*tensors: Tensor) -> list[Tensor]:
        query, _, *changed = fusion.pattern(*tensors, *numbers)
        return [query, *changed]

    wanted = function(*inputs)
    module, record = rewritten(function, *inputs)
    (site,) = (site for site in record.sites if site.fusion == "rope_kv_write")
    # Of equal heads either may be the query; here the query has more, so `rope` has it first.
    assert site.applied
    assert site.variant.removesuffix(", key first") == fusion.variant.removesuffix(", key first")
    assert written(module.graph) == [WRITE]
    assert not set(fusion.removes) & set(targets(module))
    assert not record.misses
    for actual, exact in zip(module(*inputs), wanted, strict=True):
        assert actual.dtype == exact.dtype
        # 8 bits: a rotation that differs in its last place may round to the neighbouring step.
        step = 1.0 if exact.dtype == torch.int8 else 0.0
        # Norm and rotation of values up to 4 in float32, some 20 roundings.
        assert float((actual.float() - exact.float()).abs().max()) <= step + 20 * 2.0**-24 * 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_is_used_where_it_has_a_launch_of_its_own(device: str) -> None:
    fusion = rope_kv_write.FUSIONS[0]

    def read(*tensors: Tensor) -> list[Tensor]:
        query, _, *changed = fusion.pattern(*tensors, 1e-6, 0.0)
        return [query, *changed]

    with FakeTensorMode(), torch.no_grad(), enable_python_dispatcher():
        inputs = [torch.empty_like(t, device=device) for t in fusion.inputs(torch.bfloat16)]
        module = make_fx(read)(*inputs)
    as_inductor_has_it(module)
    run = FusionPass(FUSIONS)
    run(module.graph)
    (site,) = run.ledger.graphs[0].sites
    assert site.fusion == "rope_kv_write"
    assert site.applied == (device == "cuda")
    assert site.left == (device == "cpu")
    assert written(module.graph) == [WRITE if device == "cuda" else "optimizer.kv_write.default"]


class Attention(torch.nn.Module):
    """What lies between the projections and attention, as transformers writes it."""

    def __init__(self, kind: str = "", heads: tuple[int, int] = (4, 2)) -> None:
        super().__init__()
        element = torch.int8 if kind else torch.float32
        shape = (3, heads[1], 4, 8)
        self.heads = heads
        self.k_cache, self.v_cache = (torch.zeros(shape, dtype=element) for _ in range(2))
        self.k_scale, self.v_scale = (torch.zeros(shape[:3]) if kind else None for _ in range(2))

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, n, 1, 8, generator=generator) for n in (self.heads[0], self.heads[1], self.heads[1]))
        cos, sin = torch.randn(2, 2, 1, 8, generator=generator)
        return q, k, v, cos, sin, torch.tensor([[5], [8]])

    def rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return [x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin for x in (q, k)]

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        kv_write(k, v, self.k_cache, self.v_cache, self.k_scale, self.v_scale, slots)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Any:
        q, k = self.rotated(q, k, cos, sin)
        self.write(k, v, slots)
        return q.sum(1), self.k_cache.sum(-1)

    @property
    def caches(self) -> list[Tensor]:
        every = (self.k_cache, self.v_cache, self.k_scale, self.v_scale)
        return [t for t in every if t is not None]


def compiled(make: Callable[[], Attention]) -> GraphRecord:
    """The record of a module's graph, whose results and caches are those of the module itself."""
    fused, plain = make(), make()
    backend = FusedCompiler(FusionPass(FUSIONS, ("cpu",), FusionLedger()), trace_only=True)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(fused, backend=backend, fullgraph=True, dynamic=False)(*fused.inputs())
        wanted = plain(*plain.inputs())
    # float32: products and a sum, each rounded; in 8 bits the neighbouring step.
    for actual, exact in zip((*found, *fused.caches), (*wanted, *plain.caches), strict=True):
        torch.testing.assert_close(actual, exact, atol=1.0 if exact.dtype == torch.int8 else 1e-5, rtol=1e-5)
    (record,) = backend.fusion.ledger.graphs
    return record


@pytest.mark.parametrize("kind", ["", "int8"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_a_write_in_a_functional_graph_is_found(kind: str, heads: tuple[int, int]) -> None:
    record = compiled(lambda: Attention(kind, heads))
    assert record.applied() == {"rope": 1, "rope_kv_write": 1}
    assert not record.misses


class KeyIsKept(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Any:
        q, k = self.rotated(q, k, cos, sin)
        self.write(k, v, slots)
        return q, k * 2


class OldCacheIsRead(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Any:
        q, k = self.rotated(q, k, cos, sin)
        before = self.v_cache * 2
        self.write(k, v, slots)
        return q, before


class ValueOfTheQuery(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Any:
        q, k = self.rotated(q, k, cos, sin)
        self.write(k, v + q[:, :2], slots)
        return (q * 2,)


class SlotsOfTheKey(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Any:
        q, k = self.rotated(q, k, cos, sin)
        self.write(k, v, slots + (q.sum() > 1e9))
        return (q * 2,)


REFUSED = {
    KeyIsKept: "the rotated key is also read by mul_4",
    OldCacheIsRead: "v_cache is also used as it was before the write, by mul_4",
    ValueOfTheQuery: "v is computed from the rotated query or key",
    SlotsOfTheKey: "slots is computed from the rotated query or key",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda m: m.__name__)
def test_what_one_op_cannot_do_is_refused_with_its_reason(make: type[Attention]) -> None:
    record = compiled(make)
    assert record.applied() == {"rope": 1}
    assert [site.reason.partition("mul")[0] for site in record.refused()] == [REFUSED[make].partition("mul")[0]]
    assert not record.misses


class NotRotated(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Any:
        self.write(k, v, slots)
        return q * 2, cos + sin


class ValueIsRotated(Attention):
    """The rotated tensor goes to the values' cache, and another one to the keys'."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Any:
        q, k = self.rotated(q, k, cos, sin)
        self.write(v, k, slots)
        return (q * 2,)


@pytest.mark.parametrize("make", [NotRotated, ValueIsRotated], ids=lambda m: m.__name__)
def test_a_near_miss_is_left_as_it_is(make: type[Attention]) -> None:
    record = compiled(make)
    assert not record.applied()["rope_kv_write"]
    assert not record.refused()
    assert not record.misses


@pytest.mark.slow
def test_inductor_writes_in_place_and_copies_no_cache() -> None:
    from torch._inductor.utils import run_and_get_code

    fused, plain = Attention(), Attention()
    backend = FusedCompiler(FusionPass(FUSIONS, ("cpu",), FusionLedger()))
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(fused, backend=backend, fullgraph=True, dynamic=False)
        _, (code,) = run_and_get_code(run, *fused.inputs())
        plain(*plain.inputs())
    for cache, wanted in zip(fused.caches, plain.caches, strict=True):
        torch.testing.assert_close(cache, wanted)
    assert "optimizer.rope_kv_write" in code
    assert "empty_strided_cpu((2, " in code  # how memory is taken: the query's, for one
    assert "empty_strided_cpu((3, 2, 4, 8)" not in code
