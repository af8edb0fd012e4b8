"""Fusions on the graphs of real architectures, as a pass and as a backend; `docs/fusion.md` is the tables this makes.

python -m tests.passes.test_fuse    # writes them again
"""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from optimizer.backends.compiled import CompiledRunner, _step_forward
from optimizer.backends.fusion import FusionLedger, GraphRecord
from optimizer.backends.kv_cache import StaticKeyValueCache
from optimizer.backends.paged_runner import PagedRunner
from optimizer.errors import PassError, RecipeError, UsageError
from optimizer.passes import fuse
from optimizer.passes.base import Context, view
from optimizer.passes.decode import Decode
from optimizer.passes.fuse import Fuse
from optimizer.passes.fusions import FUSIONS, expected
from optimizer.passes.registry import build_pass
from tests.passes.small_architectures import ARCHITECTURES, LAYERS, tokens

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Inductor's own imports use what PyTorch deprecates
    from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
    from torch._inductor.compile_fx import compile_fx

    from optimizer.backends.inductor import FusedCompiler, FusionPass, as_inductor_has_it

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in the experts

PAGE = Path(__file__).resolve().parents[2] / "docs" / "fusion.md"
ROWS = 2
NORMS = ("add_rms_norm", "rms_norm", "add_layer_norm", "layer_norm")
PREFILL: dict[str, dict[str, int]] = {
    # Positions without a batch are broadcast, so the sum of the embeddings is none of equal tensors.
    "gpt2": {"add_layer_norm": 2 * LAYERS, "layer_norm": 1},
}
"""Where the graph of a prompt gives other counts than that of a step."""


def expected_counts(model: Any, writes: bool = False) -> dict[str, int]:
    counts, note = expected.expected(model, writes)
    assert not note
    return counts


def step_state(model: Any, rows: int, capacity: int) -> StaticKeyValueCache:
    """A static cache with nothing in it, written to as on a GPU."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type == "falcon" and config.multi_query:
        heads = 1
    state = StaticKeyValueCache(config, rows, capacity, torch.device("cpu"))
    for layer in state.cache.layers:
        empty = torch.zeros(rows, heads, 1, size, dtype=model.dtype)
        layer.lazy_initialization(empty, empty)
        layer.by_op = True
    state.position.fill_(3)
    return state


@torch.no_grad()
def decode(model: Any, backend: Any = None) -> Tensor:
    """Logits of one step of `ROWS` rows, compiled by `backend`."""
    forward: Any = FunctionType(_step_forward.__code__.replace(), _step_forward.__globals__, "step")
    if backend is not None:
        forward = torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)
    return forward(model, step_state(model, ROWS, 32), tokens(ROWS, 1)[:, 0])


@torch.no_grad()
def prefill(model: Any, backend: Any = None, dynamic: bool = False) -> Tensor:
    torch._dynamo.reset()
    run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    return run(input_ids=tokens(ROWS, 8), use_cache=False).logits


def tracer(devices: tuple[str, ...] = ("cpu",), strict: bool = True) -> FusedCompiler:
    return FusedCompiler(FusionPass(FUSIONS, devices, FusionLedger()), strict=strict, trace_only=True)


@cache
def decoded(name: str) -> tuple[GraphRecord, float, float]:
    """The record of a fused bfloat16 step, and how far it and the plain one are from float32 arithmetic."""
    model = ARCHITECTURES[name]().bfloat16()
    backend = tracer()
    fused, plain = decode(model, backend), decode(model)
    exact = decode(model.float())
    (record,) = backend.fusion.ledger.graphs
    return record, float((fused - exact).norm()), float((plain - exact).norm())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_fusion_matches_as_often_as_the_architecture_has_sites(name: str) -> None:
    record, fused, plain = decoded(name)
    counts = expected_counts(ARCHITECTURES[name](), writes=True)
    assert {n: record.matched()[n] for n in counts} == counts  # zeros too
    assert record.applied() == record.matched()
    assert set(record.matched()) <= set(counts)
    assert not record.misses
    # The fused ops round less often than the model does, so they lie no further from what is exact. A quarter more is
    # for the luck of single roundings in a model of two layers.
    assert fused <= 1.25 * plain


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_a_prompt_has_the_same_sites_and_the_same_logits_in_float32(name: str) -> None:
    model = ARCHITECTURES[name]()
    backend = tracer()
    fused, plain = prefill(model, backend), prefill(model)
    (record,) = backend.fusion.ledger.graphs
    counts = expected_counts(model) | PREFILL.get(name, {})
    assert {n: record.applied()[n] for n in counts} == counts
    # Some thirty operations in a row whose roundings differ, each of sums of up to 256 products.
    assert float((fused - plain).abs().max()) <= 30 * 256**0.5 * 2**-24 * float(plain.abs().max())


def test_dynamic_shapes_give_the_same_matches() -> None:
    model, backend = ARCHITECTURES["llama"](), tracer()
    assert torch.allclose(prefill(model, backend, dynamic=True), prefill(model), atol=1e-4)
    (record,) = backend.fusion.ledger.graphs
    assert record.applied() == {n: count for n, count in expected_counts(model).items() if count}


def test_sites_name_the_modules_they_lie_in() -> None:
    record, *_ = decoded("llama")
    places = {(site.where, site.fusion) for site in record.sites}
    assert places >= {
        ("model.layers.0.input_layernorm", "rms_norm"),
        ("model.layers.1.input_layernorm", "add_rms_norm"),
        ("model.norm", "add_rms_norm"),
        ("model.layers.0.mlp", "silu_mul"),
        ("model.layers.1.self_attn", "rope"),
        ("model.layers.1.self_attn", "rope_kv_write"),
    }
    assert len(places) == len(record.sites)


def test_part_of_a_head_is_rotated_in_one_launch() -> None:
    record, *_ = decoded("gpt_neox")
    assert {site.variant for site in record.sites if site.fusion == "rope"} == {"part of a head"}


def served(model: Any, *passes: Any) -> tuple[Context, list[Any]]:
    context = Context(batch=ROWS)
    reports = []
    for step in (Decode(), *passes):
        step.check(model, context)
        reports.append(step.run(model, context))
    return context, reports


def test_the_pass_reports_every_count_and_the_runner_compiles_with_the_fusions() -> None:
    model = ARCHITECTURES["llama"]()
    before = dict(vars(model.config))
    context, (_, report) = served(view(model), Fuse(devices=["cpu"]))
    counts = {n: c for n, c in expected_counts(model).items() if c}
    assert report.matched == report.expected == sum(counts.values())
    assert report.notes == tuple(f"{n} matched {c} of {c}, applied {c}" for n, c in counts.items())
    assert not report.skipped
    assert dict(vars(model.config)) == before
    runner = context.make_runner(model, None)
    assert isinstance(runner, CompiledRunner)
    assert isinstance(runner.backend, FusedCompiler)
    runner.backend.trace_only = True
    out = runner.generate(tokens(ROWS, 8), max_new_tokens=3)
    assert runner.backend.fusion.ledger.applied() == counts
    assert runner.ledger.steps["compiled"] == 2
    assert torch.equal(out, CompiledRunner(model, compile=False).generate(tokens(ROWS, 8), max_new_tokens=3))


@pytest.mark.parametrize(("name", "kind"), [("llama", None), ("gemma3", "int8"), ("gpt2", None)])
def test_a_paged_step_rotates_and_writes_in_one_op(name: str, kind: str | None) -> None:
    model = ARCHITECTURES[name]()
    context = Context(batch=ROWS)
    Decode(cache="paged", kv=kind).run(copy := view(model), context)
    plain = context.make_runner(copy, None)
    report = Fuse(devices=["cpu"]).run(copy, context)
    counts = {n: c for n, c in expected_counts(model, writes=True).items() if c}
    assert counts.get("rope_kv_write", 0) == (0 if name == "gpt2" else LAYERS)
    assert report.matched == report.expected == sum(counts.values())
    assert not report.skipped
    runner: Any = context.make_runner(copy, None)
    assert isinstance(runner, PagedRunner)
    runner.backend.trace_only = True
    plain.compile = False  # type: ignore[attr-defined]
    given = tokens(ROWS, 8)
    assert torch.equal(runner.generate(given, max_new_tokens=4), plain.generate(given, max_new_tokens=4))
    assert runner.backend.fusion.ledger.applied() == counts


def test_a_layer_of_a_paged_step_is_nine_calls() -> None:
    model, context = view(ARCHITECTURES["llama"]()), Context(batch=ROWS)
    for name, options in (("merge_linears", {}), ("decode", {"cache": "paged"})):
        build_pass(name, options).run(model, context)
    found: list[str] = []

    def inner(module: Any, _inputs: Any, **_: Any) -> Any:
        as_inductor_has_it(module)
        FusionPass(FUSIONS, ("cpu",))(module.graph)
        found.extend(computing(module.graph))
        raise _StopError

    runner: Any = context.make_runner(model, None)
    runner.backend = lambda module, inputs, **_: compile_fx(module, inputs, inner_compile=inner)
    with pytest.raises(Exception, match="_StopError"):
        runner.warm_up(ROWS)
    assert found[: found.index("paged_attention", 1)] == [
        "paged_attention", "mm", "add_rms_norm", "mm", "silu_mul", "mm", "add_rms_norm", "mm", "rope_kv_write"
    ]  # fmt: skip


def test_keys_that_go_to_a_ring_as_well_are_rotated_first() -> None:
    model, context = ARCHITECTURES["llama"](), Context(batch=ROWS)
    Decode(cache="paged", kv="int8", recent=16).run(copy := view(model), context)
    report = Fuse(devices=["cpu"]).run(copy, context)
    assert report.matched == report.expected == sum(expected_counts(model).values())
    reasons = {skip.reason for skip in report.skipped}
    assert reasons
    assert all(reason.startswith("rope_kv_write: the rotated key is also read by auto_func") for reason in reasons)


def test_on_a_cpu_the_sites_are_counted_and_left_to_inductor() -> None:
    context, (_, report) = served(ARCHITECTURES["gpt_neox"](), Fuse())
    assert report.matched == report.expected
    assert all("applied 0; left to Inductor" in note for note in report.notes)
    assert context.make_runner(ARCHITECTURES["gpt_neox"](), None).backend == "inductor"  # type: ignore[attr-defined]


def test_nothing_is_traced_where_nothing_can_be_applied_and_nothing_is_required() -> None:
    step = Fuse(strict=False, required=False)
    context = Context()
    model = ARCHITECTURES["llama"]()
    Decode().run(model, context)
    make = context.make_runner
    report = step.run(model, context)
    assert context.make_runner is make
    assert report.matched == 0
    assert report.notes == ("left to Inductor: no op has a kernel of its own on cpu",)


def test_a_required_fusion_that_is_not_found_fails_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x / x.norm(dim=-1, keepdim=True))

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", other)
    with pytest.raises(PassError, match=r"add_rms_norm 0 times instead of 4, rms_norm 0 times instead of 1 in llama"):
        served(ARCHITECTURES["llama"](), Fuse())
    with pytest.raises(PassError, match="add_rms_norm 0 times instead of 4"):
        served(ARCHITECTURES["llama"](), Fuse(strict=False))
    _, (_, report) = served(ARCHITECTURES["llama"](), Fuse(devices=["cpu"], strict=False, required=False))
    assert "add_rms_norm matched 0 of 4, applied 0" in report.notes


def test_a_refused_site_is_reported_with_its_module_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * 0.5)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", half)
    weight = r"rms_norm: weight is (0\.5, not a parameter|a number, not a tensor)"  # PyTorch 2.11 knows no more
    with pytest.raises(PassError, match=r"model\.layers\.0\.input_layernorm: " + weight):
        served(ARCHITECTURES["llama"](), Fuse())
    _, (_, report) = served(ARCHITECTURES["llama"](), Fuse(devices=["cpu"], strict=False, required=False))
    assert {skip.name for skip in report.skipped} >= {"model.layers.0.input_layernorm", "model.norm"}
    assert all(re.fullmatch(weight, skip.reason) for skip in report.skipped)


def test_an_unknown_architecture_is_reported_as_found() -> None:
    model = ARCHITECTURES["llama"]()
    model.config.model_type = "new_kind"
    _, (_, report) = served(model, Fuse())
    assert report.expected is None
    assert report.matched == 9
    assert "no count is expected for new_kind: what was found is reported as it is" in report.notes
    model = ARCHITECTURES["llama"]()
    model.config.hidden_act = "gelu"
    assert expected.expected(model) == (
        {},
        "no count is expected: llama has hidden_act 'gelu', and the table is for 'silu'",
    )


def test_nothing_is_expected_of_layers_that_are_ours() -> None:
    from optimizer.backends.linear import MergedLinear, MergedSlice

    model = ARCHITECTURES["gpt_neox"]()
    assert expected.expected(model)[0]["bias_gelu"] == LAYERS
    mlp = model.gpt_neox.layers[0].mlp
    mlp.dense_h_to_4h = MergedSlice(MergedLinear(mlp.dense_h_to_4h, [mlp.dense_h_to_4h.out_features]), 0)
    counts, note = expected.expected(model)
    assert "bias_gelu" not in counts
    assert note == "bias_gelu: no count is expected around layers of our own"


class Int8Linear(torch.nn.Module):
    """Weight-only, one scale a channel on the product, as torchao compiles it."""

    data: Tensor
    scale: Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("data", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.mm(x.reshape(-1, x.shape[-1]), self.data.t().to(x.dtype)) * self.scale
        return y.reshape(*x.shape[:-1], y.shape[-1])


def test_a_model_that_another_library_quantized_has_its_products_decoded_in_the_op() -> None:
    model = ARCHITECTURES["llama"]()
    linears = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in linears:
        model.model.set_submodule(name, Int8Linear(model.model.get_submodule(name)))
    counts, note = expected.expected(model, writes=True)
    assert "dequantize_matmul" not in counts
    assert note == "dequantize_matmul: no count is expected where layers that are not ours hold integers"
    backend = tracer()
    fused, plain = decode(model, backend), decode(model)
    (record,) = backend.fusion.ledger.graphs
    assert record.applied() == {n: c for n, c in counts.items() if c} | {"dequantize_matmul": len(linears)}
    assert len(linears) == 7 * LAYERS
    # Some thirty operations in a row whose roundings differ, each of sums of up to 128 products.
    assert float((fused - plain).abs().max()) <= 30 * 128**0.5 * 2**-24 * float(plain.abs().max())


def test_fuse_comes_after_decode_and_knows_its_devices() -> None:
    model = ARCHITECTURES["llama"]()
    with pytest.raises(PassError, match=r"EagerRunner compiles none\. Put fuse after decode"):
        Fuse().run(model, Context())
    context = Context()
    Decode(compile=False).run(model, context)
    with pytest.raises(PassError, match=r"leave decode\.compile true"):
        Fuse().run(model, context)
    with pytest.raises(RecipeError, match=r"fuse\.devices: 'tpu' is unknown"):
        build_pass("fuse", {"devices": ["tpu"]}).check(model, Context())


ENTRY = """
import sys
import torch

class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16))
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

model, x = Norm(), torch.randn(4, 16)
assert not [name for name in sys.modules if name.partition(".")[0] == "optimizer"]
options = {"optimizer.devices": ["cpu"], "optimizer.strict": True, "epilogue_fusion": False}
with torch.no_grad():
    out = torch.compile(model, backend="optimizer", options=options)(x)
    assert torch.allclose(out, model(x), atol=1e-6)
    plain = torch.compile(model, backend="optimizer", mode="max-autotune-no-cudagraphs")(x)
    assert torch.allclose(plain, model(x), atol=1e-6)
print([dict(graph.applied()) for graph in sys.modules["optimizer.passes.fuse"].ledger().graphs])
"""


def test_torch_compile_finds_the_backend_without_an_import(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENTRY], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=600,
        env=os_environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Forced onto the CPU once, and left to Inductor there by default.
    assert done.stdout.strip() == "[{'rms_norm': 1}, {}]"


def test_importing_the_pass_does_not_import_inductor() -> None:
    code = "import sys, optimizer.passes.registry, optimizer.passes.fusions; print('torch._inductor.ir' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def os_environment(cache: Path) -> dict[str, str]:
    import os

    return os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}


def test_the_backend_refuses_options_that_nobody_has() -> None:
    for options in ({"optimizer.devics": ["cpu"]}, {"optimizer.devices": ["tpu"]}):
        with pytest.raises(UsageError, match=r"optimizer\.strict and optimizer\.devices"):
            fuse.backend(None, (), options=options)


# docs/fusion.md


@dataclass(frozen=True)
class Size:
    """One layer of a published model."""

    label: str
    model: Any
    config: Any


SIZES = (
    Size("Llama 3.1 8B", hf.LlamaForCausalLM, hf.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=1, vocab_size=320, pad_token_id=0,
    )),
    Size("Qwen3 8B", hf.Qwen3ForCausalLM, hf.Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        num_hidden_layers=1, vocab_size=320, pad_token_id=0,
    )),
    Size("Gemma 3 4B", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(
        hidden_size=2560, intermediate_size=10240, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        num_hidden_layers=1, vocab_size=320, pad_token_id=0,
    )),
    Size("GPT-2", hf.GPT2LMHeadModel, hf.GPT2Config(n_layer=1, vocab_size=320, bos_token_id=0, eos_token_id=0)),
)  # fmt: skip
STEP, PROMPT = 8, 512
VIEWS = {"reshape", "view", "permute", "unsqueeze", "squeeze", "expand", "slice", "split", "getitem", "transpose", "t"}


class _StopError(Exception):
    """Tracing is over."""


def computing(graph: torch.fx.Graph) -> list[str]:
    """What computes in a graph, from its first attention on and of its result: no views, no copies back to caches."""
    names: list[str] = []
    after: set[torch.fx.Node] = set()
    for node in graph.nodes:
        target = node.args[0] if node.target is auto_functionalized_v2 else node.target
        name = getattr(target, "__name__", "").partition(".")[0]
        if not (after.intersection(node.all_input_nodes) or (name == "paged_attention" and not after)):
            continue
        after.add(node)
        if node.op == "call_function" and name not in VIEWS and name != "copy_":
            names.append(name)
    return names


def measured(graph: torch.fx.Graph) -> tuple[int, int]:
    """Operators that compute, and the bytes of their results. Views move nothing; what is written to a cache stays."""
    operators = written = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if node.op != "call_function" or name in VIEWS or name == "copy_":
            continue
        results = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
        if node.target is auto_functionalized_v2:  # what it returns, and then the caches that it changes
            results = results[:1]
        operators += 1
        written += sum(t.numel() * t.element_size() for t in results if isinstance(t, Tensor))
    return operators, written


def before_and_after(size: Size, phase: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """`measured` without and with the fusions, from fake tensors: weights are never touched."""
    with torch.device("meta"):
        model = size.model(size.config).to(torch.bfloat16).eval()
    model.to_empty(device="cpu")
    found: list[tuple[int, int]] = []

    def inner(module: Any, _inputs: Any, **_: Any) -> Any:
        as_inductor_has_it(module)
        found.append(measured(module.graph))
        FusionPass(FUSIONS, ("cpu",))(module.graph)
        found.append(measured(module.graph))
        raise _StopError

    def backend(module: Any, inputs: Any) -> Any:
        return compile_fx(module, inputs, inner_compile=inner)

    torch._dynamo.reset()
    run: Any = torch.compile(_step_forward if phase == "decode" else model, backend=backend, dynamic=False)
    given: dict[str, Any] = {"input_ids": torch.zeros(1, PROMPT, dtype=torch.long), "use_cache": False}
    if phase == "decode":
        state = step_state(model, STEP, 1024)
        given = {"model": model, "state": state, "tokens": torch.zeros(STEP, dtype=torch.long)}
    with torch.no_grad(), pytest.raises(Exception, match="_StopError"):
        run(**given)
    return found[0], found[1]


def table() -> str:
    """Matches by architecture."""
    names = list(expected.COUNTED)
    lines = [f"| architecture | {' | '.join(f'`{n}`' for n in names)} |", f"|---|{'---|' * len(names)}"]
    for name, make in ARCHITECTURES.items():
        sites = expected.ARCHITECTURES[make().config.get_text_config().model_type].sites
        matched: Counter[str] = decoded(name)[0].matched()
        cells = []
        for fusion in names:
            layer, once, _ = sites.get(fusion, expected.Sites(0))
            assert matched[fusion] == layer * LAYERS + once
            cells.append(_per_layer(layer, once))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _per_layer(layer: int, once: int) -> str:
    parts = [f"{layer if layer > 1 else ''}L"] * bool(layer) + [str(once)] * bool(once)
    return " + ".join(parts) or "–"


def traffic() -> str:
    """Operators and bytes before and after."""
    lines = [
        "| one layer of | phase | operators | with the fusions | MB of results | with the fusions |",
        "|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        for phase in ("decode", "prefill"):
            (count, written), (fused, rest) = before_and_after(size, phase)
            assert fused < count
            assert rest < written
            lines.append(f"| {size.label} | {phase} | {count} | {fused} | {written / 1e6:.3f} | {rest / 1e6:.3f} |")
    return "\n".join(lines) + "\n"


def between(page: str, name: str) -> tuple[str, str, str]:
    """The page before, inside and after the table called `name`."""
    head, mark, rest = page.partition(f"<!-- {name} -->\n")
    inside, end, tail = rest.partition("<!-- end -->")
    assert mark
    assert end
    return head + mark, inside, end + tail


def test_the_counts_on_the_page_are_what_was_found() -> None:
    assert between(PAGE.read_text(encoding="utf-8"), "counts")[1] == table()


@pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < (2, 13), reason="the page is of PyTorch 2.13")
def test_the_bytes_on_the_page_are_those_of_the_graphs() -> None:
    assert between(PAGE.read_text(encoding="utf-8"), "traffic")[1] == traffic()


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for name, make in (("counts", table), ("traffic", traffic)):
        head, _, tail = between(text, name)
        text = head + make() + tail
    PAGE.write_text(text, encoding="utf-8")
