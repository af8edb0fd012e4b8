import json

import pytest
import torch
import transformers
from torch import nn

from optimizer.errors import ModelError
from optimizer.evals.architecture import from_config, from_module, from_parameters
from optimizer.evals.roofline import Attention, Lookup, Precision, Weights

VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 96, 32, 80, 3, 4, 2, 8
SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "num_local_experts": 8}
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
FAMILIES = {  # model type: (overrides of its configuration, cached heads, head_dim)
    "llama": (SIZES, 2, 8),
    "mistral": (SIZES, 2, 8),
    "qwen2": (SIZES | {"head_dim": None}, 2, 8),
    "qwen3": (SIZES, 2, 8),
    "gemma": (SIZES, 2, 8),
    "gemma2": (SIZES, 2, 8),
    "gemma3_text": (SIZES, 2, 8),
    "phi3": (SIZES, 2, 8),
    "gpt2": (GPT2 | {"bos_token_id": 1, "eos_token_id": 2}, 4, 8),
    "opt": (SIZES | {"ffn_dim": MLP, "word_embed_proj_dim": HIDDEN}, 4, 8),
    "falcon": (SIZES | {"num_kv_heads": 3}, 1, 8),
    "gpt_neox": (SIZES, 4, 8),
    "mixtral": (SIZES | MOE, 2, 8),
    "qwen3_moe": (SIZES | MOE | {"moe_intermediate_size": 16}, 2, 8),
    "gpt_oss": (SIZES | MOE, 2, 8),
}


def family(name):
    overrides = {key: value for key, value in FAMILIES[name][0].items() if value is not None}
    if name in {"opt", "gpt_neox", "falcon"}:
        overrides = {key: value for key, value in overrides.items() if key not in {"num_key_value_heads", "head_dim"}}
    return {"model_type": name} | overrides


def build(config, dtype=torch.bfloat16):
    with torch.random.fork_rng():
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config), dtype=dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_and_its_live_model_agree_and_nothing_is_left_out(name):
    config = family(name)
    model = build(config)
    live, planned = from_module(model), from_config(config)
    assert live == planned
    assert live.weight_bytes == sum(p.nbytes for p in model.parameters())
    attentions = [op for op in live.ops if isinstance(op, Attention)]
    assert [(op.heads, op.kv_heads, op.head_dim) for op in attentions] == [(HEADS, *FAMILIES[name][1:])] * LAYERS
    assert sum(isinstance(op, Weights) and op.kind == "lm_head" for op in live.ops) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_cache_agrees_with_the_one_transformers_makes(name):
    model = build(family(name)).eval()
    with torch.no_grad():
        cache = model(torch.ones(2, 7, dtype=torch.long), use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert from_module(model).kv_cache_bytes(2, 7) == stored


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_by_hand(tied):
    step = from_config({"model_type": "llama", **SIZES, "tie_word_embeddings": tied}).decode(3, 10)
    attention = HIDDEN * HEADS * HEAD_DIM * 2 + HIDDEN * KV_HEADS * HEAD_DIM * 2
    linears = LAYERS * (attention + 3 * HIDDEN * MLP)
    norms = (2 * LAYERS + 1) * HIDDEN
    read = linears + norms + VOCAB * HIDDEN + 3 * HIDDEN
    kinds = step.by_kind()
    assert step.weight_bytes == 2 * read
    assert kinds["linear"].flops == 2 * 3 * linears
    assert kinds["lm_head"].flops == 2 * 3 * VOCAB * HIDDEN
    assert kinds["attention"].flops == LAYERS * 3 * 4 * HEADS * HEAD_DIM * 11
    assert kinds["attention"].kv_bytes == LAYERS * 3 * 2 * KV_HEADS * HEAD_DIM * 2 * 11
    assert kinds["embedding"].weight_bytes == 3 * HIDDEN * 2
    projections = 4 * HIDDEN + (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM + 3 * (HIDDEN + MLP)
    assert kinds["linear"].activation_bytes == 2 * 3 * LAYERS * projections


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_stored_once_but_read_by_the_head(tied):
    shape = from_module(build({"model_type": "llama", **SIZES, "tie_word_embeddings": tied}))
    (table,) = (op for op in shape.ops if isinstance(op, Lookup))
    assert table.tied is tied
    assert shape.decode(1, 0).by_kind()["lm_head"].weight_bytes == VOCAB * HIDDEN * 2


def test_quantized_plan_counts_scales_and_spares_what_stays():
    config = {"model_type": "llama", **SIZES}
    plain, int4 = from_config(config), from_config(config, weights=Precision(4, 16, 16, 4), kv=Precision(8, 8, 16))
    linear = plain.decode(1, 0).by_kind()["linear"].weight_bytes
    assert int4.decode(1, 0).by_kind()["linear"].weight_bytes == linear / 16 * (4 + 20 / 16)
    for kind in ("norm", "lm_head", "embedding"):
        assert int4.decode(1, 0).by_kind()[kind] == plain.decode(1, 0).by_kind()[kind]
    assert int4.kv_bytes_per_token == LAYERS * 2 * KV_HEADS * (HEAD_DIM + 2)


def test_a_bias_stays_as_it_is_when_its_matrix_is_quantized():
    with_bias = from_config({"model_type": "llama", **SIZES, "attention_bias": True}, weights=Precision(4))
    without = from_config({"model_type": "llama", **SIZES}, weights=Precision(4))
    biases = LAYERS * 2 * (HIDDEN + (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    assert with_bias.weight_bytes - without.weight_bytes == biases


def test_a_mixture_by_hand():
    step = from_config({"model_type": "mixtral", **SIZES, **MOE}).decode(4, 0).by_kind()
    expert = 3 * HIDDEN * MLP
    assert step["expert"].flops == LAYERS * 4 * 2 * 2 * expert
    assert step["expert"].weight_bytes == pytest.approx(LAYERS * 8 * (1 - 0.75**4) * expert * 2)
    assert step["router"].weight_bytes == LAYERS * 8 * HIDDEN * 2


class QuantizedLinear(nn.Module):
    """Bytes of its own, and children that must not be charged again."""

    def __init__(self, linear, weight_bytes):
        super().__init__()
        self.in_features, self.out_features, self.weight_bytes = linear.in_features, linear.out_features, weight_bytes
        self.inner = nn.Linear(1000, 1000)


def test_a_module_that_states_its_bytes_is_charged_them():
    model = build({"model_type": "llama", **SIZES, "tie_word_embeddings": True})
    before = from_module(model)
    model.model.layers[1].mlp.up_proj = QuantizedLinear(model.model.layers[1].mlp.up_proj, 777)
    after = from_module(model)
    assert after.weight_bytes == before.weight_bytes - HIDDEN * MLP * 2 + 777
    assert after.decode(1, 5).flops == before.decode(1, 5).flops
    model.lm_head = QuantizedLinear(model.lm_head, 99)
    step = from_module(model).decode(1, 5).by_kind()
    assert step["lm_head"].weight_bytes == 99
    assert step["lm_head"].flops == 2 * VOCAB * HIDDEN


def test_a_table_that_states_its_bytes_is_charged_its_rows():
    model = build({"model_type": "llama", **SIZES, "tie_word_embeddings": False})
    table = nn.Module()
    table.weight_bytes, table.num_embeddings, table.embedding_dim = VOCAB * 20, VOCAB, HIDDEN
    model.model.embed_tokens = table
    assert from_module(model).decode(3, 0).by_kind()["embedding"].weight_bytes == 3 * 20


def test_separate_experts_make_one_bank():
    model = nn.Module()
    model.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 4, bias=False)}) for _ in range(5))
    shape = from_module(model, config={"num_hidden_layers": 1, "hidden_size": 8, "n_head": 1, "moe_topk": 2})
    (bank,) = (op for op in shape.ops if isinstance(op, Weights))
    assert (bank.name, bank.kind, bank.experts, bank.active) == ("experts.*.up", "expert", 5, 2)
    assert shape.weight_bytes == 5 * 8 * 4 * 4
    assert shape.decode(1, 0).weight_bytes == pytest.approx(2 * 8 * 4 * 4)


@pytest.mark.parametrize(
    ("extra", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, [16, 16, 16]),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 3),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16}, [None] * 3),
        ({"model_type": "gemma2", "sliding_window": 16}, [16, None, 16]),
    ],
)
def test_windows_follow_the_configuration(extra, windows):
    shape = from_config(SIZES | extra)
    assert [op.window for op in shape.ops if isinstance(op, Attention)] == windows


def test_layers_without_a_cache_have_no_attention():
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    shape = from_module(nn.Linear(2, 2), config=SIZES | {"layer_types": kinds})
    assert [op.name for op in shape.ops if isinstance(op, Attention)] == ["layers.1.attention"]


def test_activations_follow_the_dtype_of_the_weights():
    model = build({"model_type": "llama", **SIZES}, dtype=torch.float32)
    shape = from_module(model)
    assert shape.element_bytes == 4
    assert shape.kv_bytes_per_token == LAYERS * 2 * KV_HEADS * HEAD_DIM * 4


def test_a_plan_allocates_nothing_and_leaves_the_random_state():
    before = torch.get_rng_state()
    huge = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
    shape = from_config(json.loads(json.dumps(huge)))
    assert torch.equal(before, torch.get_rng_state())
    assert shape.weight_bytes == pytest.approx(141.1e9, rel=1e-3)  # Llama-3-70B: 70.55e9 parameters
    assert shape.kv_bytes_per_token == 327_680


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({}, "model_type=None"),
        ({"model_type": "llama"} | SIZES | {"num_attention_heads": 0}, "llama"),
        ({"model_type": "llama"} | SIZES | {"hidden_size": -4}, "llama"),
        ({"model_type": "llama"} | SIZES | {"hidden_size": "wide"}, "llama"),
        ({"model_type": "t5"}, "t5"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(config, message):
    with pytest.raises(ModelError, match=message):
        from_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "pass config="),
        ({}, "num_hidden_layers"),
        ({"num_hidden_layers": 2}, "num_attention_heads"),
        ({"num_hidden_layers": 2, "n_head": 4}, "hidden_size"),
        ({"num_hidden_layers": -1}, "layers=-1"),
        ({"num_hidden_layers": 2, "kv_lora_rank": 512}, "latent attention"),
    ],
)
def test_what_attention_needs_is_asked_for(config, message):
    with pytest.raises(ModelError, match=message):
        from_module(nn.Linear(2, 2), config=config)


@pytest.mark.parametrize("sizes", [{"layers": 2}, {"layers": 2, "heads": 4, "kv_heads": 2}, {"head_dim": 64}])
def test_half_an_attention_is_refused(sizes):
    with pytest.raises(ModelError, match="give all or none"):
        from_parameters(1e9, **sizes)


@pytest.mark.parametrize("count", [0, -5, 0.3])
def test_a_model_has_parameters(count):
    with pytest.raises(ModelError, match="must be at least 1"):
        from_parameters(count)


def test_a_sized_model_counts_group_scales():
    assert from_parameters(1 << 20, weights=Precision(4, 64, 16)).weight_bytes == (1 << 20) * 4.25 / 8
