"""Experts taken apart into linear layers: same result, same memory, each called with its own tokens only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from optimizer.backends.experts import Experts, is_fused_experts
from optimizer.errors import ModelError

E, H, WIDTH, TOKENS, TOP = 4, 32, 48, 13, 2


def fused(kind: str = "mixtral", dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mixtral":
            config = MixtralConfig(hidden_size=H, intermediate_size=WIDTH, num_local_experts=E)
            module: nn.Module = MixtralExperts(config)
        else:
            config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=WIDTH, num_experts=E)
            module = Qwen3MoeExperts(config)
        config._experts_implementation = "eager"
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module.to(dtype).eval()


def routing(only: tuple[int, ...] = tuple(range(E))) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[T, H]`, two different experts of `only` for each, and their weights."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, H, generator=g)
    index = torch.tensor(only)[torch.rand(TOKENS, len(only), generator=g).topk(TOP).indices]
    return x, index, torch.rand(TOKENS, TOP, generator=g)


def by_hand(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The definition, token by token, in float64."""
    out = torch.zeros(len(x), H, dtype=torch.float64)
    for t in range(len(x)):
        for j in range(index.shape[1]):
            e = int(index[t, j])
            if e < E:
                gate, up = (module.gate_up_proj[e].double() @ x[t].double()).chunk(2)  # type: ignore[index]
                hidden = torch.nn.functional.silu(gate) * up
                out[t] += float(weights[t, j]) * (module.down_proj[e].double() @ hidden)  # type: ignore[index]
    return out.detach()


def close(actual: Tensor, expected: Tensor) -> None:
    """Sums of at most 48 terms in float32, one after the other, twice: √48 · 4 ε of the largest value."""
    bound = 28 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= bound


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_same_result_as_the_definition_and_the_original(kind: str) -> None:
    module, given = fused(kind), routing()
    experts = Experts.from_fused(module)
    with torch.no_grad():
        close(experts(*given), by_hand(module, *given))
        close(experts(*given), module(*given))


def test_names_and_memory() -> None:
    module = fused()
    module.gate_up_proj.requires_grad_(False)  # type: ignore[union-attr]
    experts = Experts.from_fused(module.train())
    names = [n for n, m in experts.named_modules() if isinstance(m, nn.Linear)]
    assert names == [f"{e}.{layer}" for e in range(E) for layer in ("gate_proj", "up_proj", "down_proj")]
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert {p.untyped_storage().data_ptr() for p in experts.parameters()} == storages
    up, down = experts[2].up_proj, experts[2].down_proj
    assert torch.equal(up.weight, module.gate_up_proj[2, WIDTH:])  # type: ignore[index]
    assert torch.equal(down.weight, module.down_proj[2])  # type: ignore[index]
    assert (up.in_features, up.out_features, down.in_features, down.out_features) == (H, WIDTH, WIDTH, H)
    assert not up.weight.requires_grad
    assert down.weight.requires_grad
    assert experts.training
    assert all(m.training for m in experts.modules())


def test_an_expert_is_called_with_its_tokens_only() -> None:
    experts = Experts.from_fused(fused())
    x, index, weights = routing(only=(0, 1, 3))
    seen: dict[str, Tensor] = {}
    for name, module in experts.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0]))
    experts(x, index, weights)
    for e in (0, 1, 3):
        assert torch.equal(seen[f"{e}.gate_proj"], x[(index == e).any(-1)])
        assert seen[f"{e}.down_proj"].shape == (int((index == e).sum()), WIDTH)
    assert not any(name.startswith("2.") for name in seen)


def test_an_index_beyond_the_experts_adds_nothing() -> None:
    module, (x, index, weights) = fused(), routing()
    index[::2, 1] = E
    with torch.no_grad():
        close(Experts.from_fused(module)(x, index, weights), by_hand(module, x, index, weights))


def test_no_tokens() -> None:
    out = Experts.from_fused(fused())(torch.empty(0, H), torch.empty(0, TOP, dtype=torch.long), torch.empty(0, TOP))
    assert out.shape == (0, H)


def test_compiles_without_a_break_and_drops_what_was_not_routed() -> None:
    module, (x, index, weights) = fused(), routing(only=(0, 1))
    experts = Experts.from_fused(module)
    with torch.no_grad():
        experts[3].down_proj.weight = nn.Parameter(torch.full((H, WIDTH), torch.inf))  # not routed: must not show
        compiled = torch.compile(experts, fullgraph=True, backend="eager")
        close(compiled(x, index, weights), by_hand(module, x, index, weights))
        x2, index2, weights2 = routing(only=(1, 2))
        close(compiled(x2, index2, weights2), by_hand(module, x2, index2, weights2))


def test_meta_device() -> None:
    experts = Experts.from_fused(fused().to("meta"))
    assert all(p.is_meta for p in experts.parameters())
    assert experts(*(t.to("meta") for t in routing())).shape == (TOKENS, H)


def test_bfloat16_sums_in_float32() -> None:
    module = fused(dtype=torch.bfloat16)
    x, index, weights = routing()
    out = Experts.from_fused(module)(x.bfloat16(), index, weights)
    assert out.dtype == torch.bfloat16
    exact = by_hand(module, x.bfloat16(), index, weights)
    # each of three products rounds to 8 bits, as does the sum: 4 · 2⁻⁸, on sums whose terms partly cancel
    assert (out - exact).abs().max() <= 4 * 2**-8 * exact.abs().max()


def test_gradients_reach_the_fused_memory_layout() -> None:
    module, given = fused(), routing()
    experts = Experts.from_fused(module)
    experts(*given).square().sum().backward()
    module(*given).square().sum().backward()
    expected = module.down_proj.grad  # type: ignore[union-attr]
    actual = torch.stack([experts[e].down_proj.weight.grad for e in range(E)])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))  # type: ignore[union-attr]


def biased(module: nn.Module) -> None:
    module.gate_up_proj_bias = nn.Parameter(torch.zeros(E, 2 * WIDTH))


def transposed(module: nn.Module) -> None:
    module.is_transposed = True  # type: ignore[assignment]


def odd_rows(module: nn.Module) -> None:
    module.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * WIDTH + 2, H))


def no_activation(module: nn.Module) -> None:
    module.act_fn = None  # type: ignore[assignment]


@pytest.mark.parametrize("spoil", [biased, transposed, odd_rows, no_activation])
def test_an_unknown_layout_is_named(spoil) -> None:  # type: ignore[no-untyped-def]
    module = copy.deepcopy(fused())
    spoil(module)
    with pytest.raises(ModelError, match=r"layers\.7\.mlp\.experts: the fused experts of MixtralExperts"):
        Experts.from_fused(module, "layers.7.mlp.experts")


def test_gpt_oss_is_refused_with_what_is_odd_about_it() -> None:
    config = GptOssConfig(hidden_size=H, intermediate_size=H, num_local_experts=E)
    module = GptOssExperts(config)
    assert is_fused_experts(module)
    with pytest.raises(ModelError, match="has_bias = True, is_transposed = True, is_concatenated = False, a gate"):
        Experts.from_fused(module)


def test_what_counts_as_fused_experts() -> None:
    assert is_fused_experts(fused())
    assert not is_fused_experts(Experts.from_fused(fused()))
    assert not is_fused_experts(nn.Conv1d(2, 2, 3))
