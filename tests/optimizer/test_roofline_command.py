"""`optimizer roofline` against the worked figures of a 70-billion-parameter model on an H100."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer.errors import UsageError
from optimizer.evals import ceilings
from optimizer.roofline_command import analyse, describe
from tests.optimizer.small_jobs import CEILINGS
from tests.optimizer.tiny_models import tiny_llama

LLAMA_70B = {"layers": 80, "d_model": 8192, "heads": 64, "kv_heads": 8, "head_dim": 128}


def figures(params: float | None = 70e9, model: str | None = None, **changes: Any) -> dict[str, Any]:
    sizes = changes.pop("sizes", {})
    options = {"gpu": "H100", "bits": 16, "group_size": None, "kv_bits": 16, "prompt": 4096, "batch": 1, "context": 0}
    return analyse(model, params, sizes, **{**options, **changes})


def test_prefill_of_4096_tokens() -> None:
    prefill = figures()["prefill"]
    assert prefill["flops"] == pytest.approx(573.4e12, rel=1e-3)
    assert prefill["intensity"] == pytest.approx(4096, rel=1e-3)
    assert prefill["seconds"] == pytest.approx(0.580, rel=1e-2)
    assert prefill["bound"] == "compute"


def test_a_short_prompt_is_still_bound_by_memory() -> None:
    prefill = figures(prompt=256)["prefill"]
    assert prefill["intensity"] == pytest.approx(256, rel=1e-3)
    assert prefill["bound"] == "memory"


@pytest.mark.parametrize(
    ("options", "seconds", "tokens_per_second"),
    [
        ({}, 41.8e-3, 23.9),
        ({"batch": 32}, 41.8e-3, 766),
        ({"batch": 128}, 41.8e-3, 3063),
        ({"bits": 4}, 10.4e-3, 95.7),
        ({"bits": 8}, 20.9e-3, 47.9),
    ],
)
def test_the_floor_of_a_decode_step(options: dict[str, Any], seconds: float, tokens_per_second: float) -> None:
    decode = figures(**options)["decode"]
    assert decode["seconds"] == pytest.approx(seconds, rel=1e-2)
    assert decode["tokens_per_second"] == pytest.approx(tokens_per_second, rel=1e-2)
    assert decode["bound"] == "memory"


def test_decode_at_batch_one_has_an_intensity_of_one() -> None:
    decode = figures()["decode"]
    assert decode["flops"] == pytest.approx(140e9)
    assert decode["intensity"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("batch", "context", "gigabytes"),
    [(1, 4096, 1.342), (1, 4608, 1.510), (1, 8192, 2.684), (8, 128_000, 335.5)],
)
def test_the_key_value_cache(batch: int, context: int, gigabytes: float) -> None:
    found = figures(sizes=LLAMA_70B, batch=batch, context=context)
    assert found["kv_bytes_per_token"] == 327_680
    assert found["kv_cache_bytes"] / 1e9 == pytest.approx(gigabytes, rel=1e-3)
    assert found["by_kind"]["attention"]["bytes"] >= found["kv_cache_bytes"]


def test_half_the_bits_of_the_cache_are_half_its_bytes() -> None:
    assert figures(sizes=LLAMA_70B, kv_bits=8)["kv_bytes_per_token"] == 163_840


@pytest.mark.parametrize(("group", "effective_bits"), [(64, 4.25), (16, 5.0), (128, 4.125), (1, 20.0)])
def test_scales_are_counted(group: int, effective_bits: float) -> None:
    assert figures(bits=4, group_size=group)["weights_bytes"] == pytest.approx(70e9 * effective_bits / 8, rel=1e-6)


def test_weights_and_the_device() -> None:
    found = figures()
    assert found["weights_bytes"] == 140e9
    assert found["device"]["name"] == "H100 SXM (vendor figures)"
    assert found["device"]["ridge_flop_per_byte"] == pytest.approx(295, rel=1e-2)


def test_a_model_folder_and_its_config_give_the_same_figures(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    by_folder, by_file = (figures(None, str(path)) for path in (folder, folder / "config.json"))
    assert by_folder.pop("model") != by_file.pop("model")
    assert by_folder == by_file
    # 2 layers: q, o 64×64; k, v 32×64; gate, up, down 64×128; a tied embedding 320×64; 5 norms of 64; bfloat16.
    elements = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 320 * 64 + 5 * 64
    assert by_folder["weights_bytes"] == 2 * elements
    assert by_folder["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"--bits is 5; use one of 4, 8, 16"),
        ({"kv_bits": 0}, r"--kv-bits is 0; use one of 4, 8, 16"),
        ({"group_size": 0}, r"--group-size is 0; give at least 1"),
        ({"group_size": -1}, r"--group-size is -1"),
        ({"gpu": "H10"}, "did you mean 'H100"),
        ({"gpu": ""}, "is not known"),
        ({"params": None}, "give either a model folder .* and not both"),
        ({"model": "x"}, "and not both"),
        ({"params": 0.0}, r"--params is 0\.0"),
        ({"params": -7e9}, "--params is"),
        ({"params": float("nan")}, "--params is nan"),
        ({"params": float("inf")}, "--params is inf"),
        ({"sizes": {"layers": 80}}, "heads"),
        ({"params": None, "model": "no/such/folder"}, "cannot be read as a model configuration"),
    ],
)
def test_a_question_that_has_no_answer_is_a_usage_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        figures(**options)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"hidden_size": 1}', '{"hidden_size": "x"}'])
def test_a_configuration_that_is_none_is_a_usage_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError):
        figures(None, str(tmp_path))


def test_this_machine_is_measured_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda _device: CEILINGS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = figures(1e9, gpu="measured")["device"]
    assert device["bytes_per_second"] == CEILINGS.memory_bandwidth
    assert device["flops_per_second"] == 1e11
    assert device["name"].startswith("a machine made up (measured, ")


def test_the_text_says_what_the_data_says() -> None:
    found = figures(sizes=LLAMA_70B, context=4096)
    text = describe(found)
    for part in ("140 GB", "KV 327,680 bytes a token", "cache 1.342 GB", "ridge 295", "compute-bound", "memory-bound"):
        assert part in text
    assert f"{found['decode']['tokens_per_second']:,.1f} tok/s" in text
    assert json.loads(json.dumps(found)) == found


def test_the_embedded_model_by_its_name() -> None:
    found = analyse(
        "reference", None, {}, gpu="H100", bits=16, group_size=None, kv_bits=16, prompt=128, batch=1, context=128
    )
    # 2 (keys and values) x 6 layers x 2 KV heads x 64 x 2 bytes; every parameter but the tied table's second use.
    assert found["kv_bytes_per_token"] == 2 * 6 * 2 * 64 * 2
    assert found["weights_bytes"] == pytest.approx(2 * 11_015_040)
