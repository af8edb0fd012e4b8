"""Folding of input scales: which sites each architecture has, and that folding there changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

from optimizer.errors import DataError, UsageError
from optimizer.passes.base import view
from optimizer.passes.fold_sites import find_sites
from optimizer.passes.folds import Site, fold, shared_scale
from optimizer.passes.linearize import linearize
from tests.passes.small_architectures import (
    ARCHITECTURES,
    FALCON,
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    LLAMA_LIKE,
    block_inputs,
    build,
    logits,
    tokens,
)

EPS = torch.finfo(torch.float32).eps
TOLERANCE = 12 * LAYERS * (2 * HIDDEN) ** 0.5 * EPS
"""Each layer has at most 12 products or norms whose factors are rounded once more: √K ε each, K ≤ 128, relative."""

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
EXPERTS_IN = tuple(f"mlp.experts.{e}.{n}" for e in range(4) for n in ("gate_proj", "up_proj"))
QK_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}
POST_NORMS = {"post_attention_layernorm", "post_feedforward_layernorm"}

LLAMA_SITES = {
    "input_layernorm": QKV,
    "post_attention_layernorm": GATE_UP,
    "self_attn.v_proj": ("self_attn.o_proj",),
    "mlp.up_proj": ("mlp.down_proj",),
}
GEMMA_SITES = {
    "input_layernorm": QKV,
    "pre_feedforward_layernorm": GATE_UP,
    "self_attn.v_proj": ("self_attn.o_proj",),
    "mlp.up_proj": ("mlp.down_proj",),
}
MOE_SITES = {
    "input_layernorm": QKV,
    "post_attention_layernorm": EXPERTS_IN,
    "self_attn.v_proj": ("self_attn.o_proj",),
    **{f"mlp.experts.{e}.up_proj": (f"mlp.experts.{e}.down_proj",) for e in range(4)},
}

GOLDEN: dict[str, tuple[dict[str, tuple[str, ...]], set[str]]] = {
    "llama": (LLAMA_SITES, set()),
    "mistral": (LLAMA_SITES, set()),
    "qwen2": (LLAMA_SITES, set()),
    "qwen3": (LLAMA_SITES, QK_NORMS),
    "gemma2": (GEMMA_SITES, POST_NORMS),
    "gemma3": (GEMMA_SITES, POST_NORMS | QK_NORMS),
    "phi3": (
        {
            "input_layernorm": ("self_attn.qkv_proj",),
            "post_attention_layernorm": ("mlp.gate_up_proj",),
            "self_attn.qkv_proj": ("self_attn.o_proj",),
            "mlp.gate_up_proj": ("mlp.down_proj",),
        },
        set(),
    ),
    "gpt2": (
        {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",), "attn.c_attn": ("attn.c_proj",)},
        {"mlp.c_fc"},
    ),
    "opt": (
        {
            "self_attn_layer_norm": QKV,
            "final_layer_norm": ("fc1",),
            "self_attn.v_proj": ("self_attn.out_proj",),
            "fc1": ("fc2",),
        },
        set(),
    ),
    "falcon": (
        {
            "input_layernorm": ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
            "self_attention.query_key_value": ("self_attention.dense",),
        },
        {"mlp.dense_h_to_4h"},
    ),
    "gpt_neox": (
        {
            "input_layernorm": ("attention.query_key_value",),
            "post_attention_layernorm": ("mlp.dense_h_to_4h",),
            "attention.query_key_value": ("attention.dense",),
        },
        {"mlp.dense_h_to_4h"},
    ),
    "mixtral": (MOE_SITES, set()),
    "qwen3_moe": (MOE_SITES, QK_NORMS),
}
"""What a decoder layer of each architecture has: writer → readers of every site, and the candidates refused."""


def linear_model(name: str) -> Any:
    model = ARCHITECTURES[name]()
    linearize(model)
    return model


def random_scale(site: Site, seed: int = 7) -> Tensor:
    """Log-uniform between 1/4 and 4, no two channels alike."""
    return torch.exp2(4 * torch.rand(site.channels, generator=torch.Generator().manual_seed(seed)) - 2)


def by_name(found: tuple[list[Site], Any]) -> dict[str, Site]:
    return {site.name: site for site in found[0]}


def change(after: Tensor, before: Tensor) -> float:
    return float((after - before).detach().abs().max() / before.detach().abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_and_exactness(name: str) -> None:
    model = linear_model(name)
    before = logits(model)
    snapshot = {n: (p, p.clone()) for n, p in model.named_parameters()}
    state, folded = torch.get_rng_state(), view(model)
    expected_sites, refused = GOLDEN[name]
    for path, (args, kwargs) in block_inputs(model).items():
        sites, skips = find_sites(model.get_submodule(path), args, kwargs)
        assert {s.name: s.readers for s in sites} == expected_sites
        assert {s.name for s in skips} == refused
        assert {s.others for s in sites if s.others} == (
            {("mlp.gate",)} if "mlp.gate" in dict_of(model, path) else set()
        )
        for index, site in enumerate(sites):
            fold(folded.get_submodule(path), site, random_scale(site, index))
    assert change(logits(folded), before) <= TOLERANCE
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), before)
    for n, p in model.named_parameters():
        assert p is snapshot[n][0]
        assert torch.equal(p, snapshot[n][1])


def dict_of(model: nn.Module, path: str) -> set[str]:
    return {
        n
        for n, m in model.get_submodule(path).named_modules()
        if "weight" in m._parameters and not isinstance(m, nn.Linear)
    }


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt_neox", "falcon", "mixtral"])
def test_every_site_matters(name: str) -> None:
    """Each fold alone is exact; leaving out its writer is not: the check above cannot pass by doing nothing."""
    model = linear_model(name)
    before = logits(model)
    path, (args, kwargs) = next(iter(block_inputs(model).items()))
    for site in find_sites(model.get_submodule(path), args, kwargs)[0]:
        folded = view(model)
        block = folded.get_submodule(path)
        writer = block.get_submodule(site.writer)
        kept = writer.weight
        fold(block, site, random_scale(site))
        assert change(logits(folded), before) <= TOLERANCE, site.name
        if site.rows is None:
            writer.weight = kept
            assert change(logits(folded), before) > 100 * TOLERANCE, site.name


def test_where_the_values_lie() -> None:
    def site(name: str, writer: str) -> Site:
        model = linear_model(name)
        path, (args, kwargs) = next(iter(block_inputs(model).items()))
        return by_name(find_sites(model.get_submodule(path), args, kwargs))[writer]

    d = HEAD_DIM
    phi3, llama = site("phi3", "self_attn.qkv_proj"), site("llama", "self_attn.v_proj")
    falcon, neox = site("falcon", "self_attention.query_key_value"), site("gpt_neox", "attention.query_key_value")
    assert (llama.rows, llama.repeat, llama.head_dim, llama.channels) == (None, 2, d, HIDDEN)
    assert (phi3.rows, phi3.repeat) == (((6 * d, 8 * d),), 2)
    assert (falcon.rows, falcon.repeat) == (((5 * d, 6 * d),), 4)  # one value head for all queries
    assert (neox.rows, neox.repeat) == (tuple((3 * d * h + 2 * d, 3 * d * h + 3 * d) for h in range(4)), 1)
    assert site("gpt2", "attn.c_attn").rows == ((2 * HIDDEN, 3 * HIDDEN),)
    assert site("phi3", "mlp.gate_up_proj").rows == ((2 * HIDDEN, 4 * HIDDEN),)
    assert site("gemma3", "pre_feedforward_layernorm").offset == 1
    assert site("qwen3", "post_attention_layernorm").offset == 0


def test_falcon_with_groups_and_two_norms() -> None:
    """The layout of Falcon-40B: queries, key and value of each group side by side; a norm each for both branches."""
    options = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    model = build(FalconForCausalLM, FalconConfig, options)
    before = logits(model)
    for path, (args, kwargs) in block_inputs(model).items():
        sites = by_name(find_sites(model.get_submodule(path), args, kwargs))
        assert sites.keys() == {"ln_attn", "ln_mlp", "self_attention.query_key_value"}
        values = sites["self_attention.query_key_value"]
        assert (values.rows, values.repeat) == (((48, 64), (112, 128)), 2)
        for site in sites.values():
            fold(model.get_submodule(path), site, random_scale(site))
    assert change(logits(model), before) <= TOLERANCE


def test_a_whole_model_and_its_head() -> None:
    call = {"input_ids": tokens(), "use_cache": False}
    untied = ARCHITECTURES["llama"]()
    sites = by_name(find_sites(untied, (), call))
    assert sites["model.norm"].readers == ("lm_head",)
    assert len(sites) == 4 * LAYERS + 1
    tied = build(LlamaForCausalLM, LlamaConfig, LLAMA_LIKE | {"tie_word_embeddings": True})
    sites_of_tied, skips = find_sites(tied, (), call)
    assert len(sites_of_tied) == 4 * LAYERS
    assert [(s.name, s.reason) for s in skips] == [
        ("model.norm", "a weight of this site is also model.embed_tokens.weight, which would change with it")
    ]


class Norm(nn.Module):
    """RMSNorm of four lines, with a gain of `offset + weight`."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(width) - offset)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.weight + self.offset)


class Block(nn.Module):
    """A norm before two layers of which each test makes something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = Norm(16, 0.5 if kind == "half offset" else 0.0)
        self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(32, 16)
        self.spare = nn.Linear(16, 16)
        self.act = nn.ReLU() if kind != "gelu" else nn.GELU()
        if kind == "tied":
            self.spare.weight = nn.Parameter(self.spare.weight.detach())
            self.twin = nn.Linear(16, 32)
            self.twin.weight = self.up_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        early = self.spare(2 * x) if self.kind == "freed" else 0  # its input's memory is free when the norm runs
        h = self.norm(x)
        out = early + x + self.down_proj(self.act(self.up_proj(h)))
        if self.kind not in ("unused", "copied", "freed"):
            out = out + self.spare(h)
        if self.kind == "residual":
            out = out + h
        if self.kind == "part":
            out = out + self.spare(h[..., :1].expand_as(h))
        if self.kind == "copied":
            out = out + self.spare(2 * h)
        if self.kind == "two inputs":
            out = out + self.spare(x)
        if self.kind == "writer read twice":
            out = out + self.up_proj(h)[..., :16]
        if self.kind == "tied":
            out = out + self.twin(x)[..., :16]
        return out


def made(kind: str) -> tuple[Block, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Block(kind), torch.randn(2, 5, 16)


def test_the_small_block_has_its_two_sites() -> None:
    block, x = made("plain")
    sites, skips = find_sites(block, (x,))
    assert {s.name: s.readers for s in sites} == {"norm": ("up_proj", "spare"), "up_proj": ("down_proj",)}
    assert skips == []


def test_what_was_read_from_the_same_memory_before_is_no_reader() -> None:
    block, x = made("freed")
    assert by_name(find_sites(block, (x,)))["norm"].readers == ("up_proj",)


NEAR_MISSES = {
    "residual": ("norm", "something else reads its output"),
    "part": ("norm", "something else reads its output"),
    "copied": ("norm", "something else reads its output"),
    "two inputs": ("norm", "changes the output"),
    "unused": ("norm", "the sample does not reach spare"),
    "half offset": ("norm", "does not multiply by its weight or by 1"),
    "gelu": ("up_proj", r"does not scale with it \(GELU\)"),
    "writer read twice": ("up_proj", "changes the output"),
    "tied": ("norm", r"also twin\.weight"),
}


@pytest.mark.parametrize("kind", NEAR_MISSES)
def test_near_misses_are_refused_with_the_reason(kind: str) -> None:
    block, x = made(kind)
    sites, skips = find_sites(block, (x,))
    name, reason = NEAR_MISSES[kind]
    assert name not in {s.name for s in sites}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(next(s.reason for s in skips if s.name == name))
    if kind != "tied":
        assert len(sites) == 1  # the other of the two stays


def test_a_gate_is_no_writer() -> None:
    """Only the linear half of a gated pair writes in proportion; with the halves swapped the other rows are found."""
    model = ARCHITECTURES["phi3"]()
    path, (args, kwargs) = next(iter(block_inputs(model).items()))
    block = model.get_submodule(path)

    class Swapped(type(block.mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(up * self.activation_fn(gate))  # type: ignore[no-any-return]

    block.mlp.__class__ = Swapped
    assert by_name(find_sites(block, args, kwargs))["mlp.gate_up_proj"].rows == ((0, 2 * HIDDEN),)


def test_values_shared_with_other_layers_are_left_alone() -> None:
    model = ARCHITECTURES["llama"]()
    path, (args, kwargs) = next(iter(block_inputs(model).items()))
    model.config.num_kv_shared_layers = 1
    sites, skips = find_sites(model.get_submodule(path), args, kwargs)
    assert [s.name for s in skips] == ["self_attn.v_proj"]
    assert len(sites) == 3


def test_experts_without_tokens_are_sites_too() -> None:
    """One token reaches two of four experts; the norm still lists all, and folding holds for the others' tokens."""
    model = linear_model("mixtral")
    before = logits(model)
    for path, (args, kwargs) in block_inputs(model, tokens(1, 1)).items():
        sites, skips = find_sites(model.get_submodule(path), args, kwargs)
        assert skips == []
        for site in sites:
            fold(model.get_submodule(path), site, random_scale(site))
    assert change(logits(model), before) <= TOLERANCE


def test_half_precision_hooks_and_caches_of_the_caller() -> None:
    model = ARCHITECTURES["llama"]().to(torch.bfloat16).train()
    path, (args, kwargs) = next(iter(block_inputs(model.eval()).items()))
    block = model.train().get_submodule(path)
    cache, calls = DynamicCache(config=model.config), []
    block.mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    sites, _ = find_sites(block, args, kwargs | {"past_key_values": cache})
    assert {s.name for s in sites} == LLAMA_SITES.keys()
    assert calls == []
    assert cache.get_seq_length() == 0
    assert block.training
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in block.parameters())


def test_what_cannot_be_searched() -> None:
    block, x = made("plain")
    with pytest.raises(DataError, match="not finite"):
        find_sites(block, (x.masked_fill(x > 1, torch.nan),))
    with pytest.raises(DataError, match="no values"):
        find_sites(block, (x[:0],))
    with pytest.raises(UsageError, match="meta device"):
        find_sites(block.to("meta"), (x,))


def test_a_sample_of_zeros_proves_nothing() -> None:
    block, x = made("plain")
    assert find_sites(block, (torch.zeros_like(x).requires_grad_(),))[0] == []


def test_fold_replaces_and_never_writes() -> None:
    block, x = made("plain")
    before = {n: (p, p.clone()) for n, p in block.named_parameters()}
    block.up_proj.weight.requires_grad_(False)
    sites = by_name(find_sites(block, (x,)))
    out = block(x)
    fold(block, sites["norm"], random_scale(sites["norm"]))
    for name in ("norm.weight", "up_proj.weight", "spare.weight"):
        assert torch.equal(before[name][0], before[name][1])
        assert block.get_parameter(name) is not before[name][0]
        assert block.get_parameter(name).requires_grad == (name != "up_proj.weight")
    for name in ("up_proj.bias", "down_proj.weight"):
        assert block.get_parameter(name) is before[name][0]
    assert change(block(x), out) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_rounding_of_the_norm_costs_nothing(name: str) -> None:
    """bfloat16 norms, all else float32: dividing by the requested scale and rounding moves the output by 2⁻⁹; the
    returned scale is the one that the rounded norm stands for.
    """
    model = ARCHITECTURES[name]()
    path, (args, kwargs) = next(iter(block_inputs(model).items()))
    block = model.get_submodule(path)
    site = find_sites(block, args, kwargs)[0][0]
    assert site.kind == "norm"
    norm = block.get_submodule(site.writer)
    norm.weight = nn.Parameter(norm.weight.detach().bfloat16())
    if getattr(norm, "bias", None) is not None:
        norm.bias = nn.Parameter(torch.zeros_like(norm.bias).bfloat16())
    old, wanted = norm.weight.detach().double() + site.offset, random_scale(site)
    readers = {r: block.get_submodule(r).weight.detach().clone() for r in site.readers}
    effective = fold(block, site, wanted)
    new = norm.weight.detach()
    assert new.dtype == torch.bfloat16
    assert effective.dtype == torch.float32
    torch.testing.assert_close((new.double() + site.offset) * effective, old, rtol=EPS, atol=0)
    assert float((effective / wanted - 1).abs().max()) > 2**-12  # so rounding did happen
    for reader, weight in readers.items():
        assert torch.equal(block.get_submodule(reader).weight, weight * effective)


def test_channels_that_the_type_cannot_hold() -> None:
    """A gain of 0 takes any scale; one that would become 0 or infinite stays, whatever was asked."""
    block, x = made("plain")
    block.norm.weight = nn.Parameter(torch.tensor([0.0, 1e-7, 6e4] + [1.0] * 13, dtype=torch.float16))
    out = block(x)
    effective = fold(
        block, Site("norm", "norm", ("up_proj", "spare"), 16), torch.tensor([2.0, 64, 1 / 64] + [4.0] * 13)
    )
    assert effective.tolist() == [2.0, 1.0, 1.0] + [4.0] * 13
    assert block.norm.weight.tolist()[3] == 0.25
    assert change(block(x), out) <= TOLERANCE


def test_types_of_the_new_weights() -> None:
    def folded(dtype: torch.dtype | None) -> nn.Module:
        model = linear_model("mixtral").to(torch.bfloat16)
        path, (args, kwargs) = next(iter(block_inputs(model).items()))
        block = model.get_submodule(path)
        for site in find_sites(block, args, kwargs)[0]:
            fold(block, site, random_scale(site), dtype=dtype)
        return block  # type: ignore[no-any-return]

    own, wide = folded(None), folded(torch.float32)
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}
    linears = {n for n, m in wide.named_modules() if isinstance(m, nn.Linear)}
    assert {n.removesuffix(".weight") for n, p in wide.named_parameters() if p.dtype == torch.float32} == linears
    for name in linears:  # the same numbers, rounded later
        reader, writer = wide.get_submodule(name).weight, own.get_submodule(name).weight
        torch.testing.assert_close(writer.float(), reader, rtol=2**-7, atol=0)


def test_shared_scale_is_the_geometric_mean_of_the_repeats() -> None:
    site = Site("linear", "v_proj", ("o_proj",), 8, repeat=2, head_dim=2)
    s = torch.tensor([1.0, 3, 4, 27, 5, 7, 5, 7])
    torch.testing.assert_close(shared_scale(site, s), torch.tensor([2.0, 9, 2, 9, 5, 7, 5, 7]))
    twice = shared_scale(site, shared_scale(site, random_scale(site)))
    assert torch.equal(twice, shared_scale(site, random_scale(site)))
    assert torch.equal(shared_scale(Site("norm", "n", ("q",), 8), s), s)


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(15),
        torch.ones(16, 1),
        torch.ones(16, dtype=torch.long),
        torch.ones(16).index_fill(0, torch.tensor(3), 0.0),
        torch.ones(16).index_fill(0, torch.tensor(3), -1.0),
        torch.ones(16).index_fill(0, torch.tensor(3), torch.nan),
        torch.ones(16).index_fill(0, torch.tensor(3), torch.inf),
        torch.full((16,), 1e-300, dtype=torch.float64),
    ],
)
def test_bad_scales_change_nothing(bad: Tensor) -> None:
    block, _ = made("plain")
    before = list(block.parameters())
    with pytest.raises(UsageError, match="norm"):
        fold(block, Site("norm", "norm", ("up_proj", "spare"), 16), bad)
    assert all(a is b for a, b in zip(block.parameters(), before, strict=True))


def test_finding_twice_gives_the_same() -> None:
    model = linear_model("qwen3_moe")
    path, (args, kwargs) = next(iter(block_inputs(model).items()))
    first = find_sites(model.get_submodule(path), args, kwargs)
    assert all(find_sites(model.get_submodule(path), args, kwargs) == first for _ in range(3))
