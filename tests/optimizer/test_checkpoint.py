"""Checkpoints against three readers that share no code with the writer: transformers, compressed-tensors' own
configuration model, and a decoder of the bits in plain integer arithmetic."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from optimizer import checkpoint
from optimizer.backends.linear import linear_layers, stored_weight
from optimizer.checkpoint import checkpoint_tensors, load_checkpoint, quantization_config, save_checkpoint
from optimizer.errors import ModelError
from optimizer.passes.base import Context
from optimizer.passes.merge_linears import MergeLinears
from optimizer.passes.quantize import Quantize
from optimizer.quant.weight import QuantizedWeight
from tests.optimizer.tiny_models import byte_tokenizer, tiny_llama

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """transformers' bars and reports would bury the tests' own output."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def qwen2(path: Path, dtype: torch.dtype) -> Path:
    """A random Qwen2, whose attention projections have biases, none of them zero."""
    config = Qwen2Config(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, dtype=dtype,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Qwen2ForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(path)
    return path


@dataclass(frozen=True)
class Case:
    """One way to make a checkpoint."""

    passes: tuple[Quantize, ...]
    tied: bool = True
    dtype: torch.dtype = torch.float32
    merged: bool = False
    shards: int | None = None
    biases: bool = False

    @property
    def asymmetric(self) -> bool:
        return any(not step.symmetric for step in self.passes)


def int4(group_size: int, **options: Any) -> tuple[Quantize, ...]:
    return (Quantize(bits=4, group_size=group_size, **options),)


INT8 = (Quantize(),)
CASES = {
    "plain": Case(()),
    "plain-untied-merged": Case((), tied=False, merged=True),
    "plain-biases-merged": Case((), biases=True, merged=True),
    "int8": Case(INT8),
    "int8-untied-merged": Case(INT8, tied=False, merged=True),
    "int8-bf16-merged": Case(INT8, dtype=torch.bfloat16, merged=True),
    "int8-asym": Case((Quantize(symmetric=False),)),
    "int8-biases-merged": Case(INT8, biases=True, merged=True),
    "int8-sharded": Case(INT8, shards=100_000),
    "int4-g32": Case(int4(32), tied=False),
    "int4-g64-bf16": Case(int4(64), dtype=torch.bfloat16),
    "int4-g128-merged": Case(int4(128), merged=True),
    "int4-channel": Case(int4(-1)),
    "int4-g32-asym-merged": Case(int4(32, symmetric=False), merged=True),
    "int4-g64-asym": Case(int4(64, symmetric=False), tied=False),
    "int4-g128-asym-bf16": Case(int4(128, symmetric=False), dtype=torch.bfloat16),
    "int4-channel-asym-sharded": Case(int4(-1, symmetric=False), merged=True, shards=50_000),
    "int4-head-tied": Case(int4(32, ignore=())),
    "two-formats": Case((*int4(32, targets=("re:.*mlp.*",)), Quantize()), merged=True),
}


@dataclass(frozen=True)
class Written:
    """A model in memory and the folder it was saved to."""

    case: Case
    model: Any
    folder: Path

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in self.folder.glob("*.safetensors"):
            found |= load_file(file)
        return found

    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))


def write(case: Case, folder: Path) -> Written:
    source = folder / "source"
    if case.biases:
        qwen2(source, case.dtype)
    else:
        tiny_llama(source, tied=case.tied, dtype=case.dtype, hidden=128)
    model = AutoModelForCausalLM.from_pretrained(source)
    for step in (*case.passes, *([MergeLinears()] if case.merged else [])):
        step.run(model, Context())
    out = folder / "out"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", case.shards or checkpoint.SHARD_BYTES)
        save_checkpoint(model, byte_tokenizer(), out)
    return Written(case, model, out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Each case by name, made once."""
    kept: dict[str, Written] = {}

    def make(name: str) -> Written:
        if name not in kept:
            kept[name] = write(CASES[name], tmp_path_factory.mktemp(name))
        return kept[name]

    return make


@pytest.fixture(params=CASES)
def written(request: pytest.FixtureRequest, made: Callable[[str], Written]) -> Written:
    return made(request.param)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()  # type: ignore[no-any-return]


def plain_transformers(written: Written) -> Any:
    """The checkpoint as transformers reads it. Asymmetric ones need `dequantize`: see the test of that below."""
    if written.case.asymmetric:
        return dequantized(written, torch.float32)
    return AutoModelForCausalLM.from_pretrained(written.folder, dtype=torch.float32)


def dequantized(written: Written, dtype: torch.dtype) -> Any:
    """The same, weights turned back into `dtype` while they are read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")  # it says that the rest stays as stored
        config = CompressedTensorsConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(written.folder, dtype=dtype, quantization_config=config)


def quantized(written: Written) -> dict[str, QuantizedWeight]:
    weights = {name: stored_weight(module) for name, module in linear_layers(written.model).items()}
    return {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}


def test_our_reader_gives_the_same_logits_bit_for_bit(written: Written) -> None:
    loaded = load_checkpoint(written.folder, CPU)
    MergeLinears(required=False).run(loaded, Context()) if written.case.merged else None
    assert torch.equal(logits(loaded), logits(written.model))
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {written.case.dtype}


# Of asymmetric bfloat16 they only have the rounded weight, which the test below looks at.
@pytest.mark.parametrize("name", [name for name in CASES if name != "int4-g128-asym-bf16"])
def test_transformers_gives_the_same_logits_in_float32(name: str, made: Callable[[str], Written]) -> None:
    written = made(name)
    # Both hold the same weights exactly: (q - z) * s is one rounding to float32 of the same two factors. What may
    # differ is the order of sums over K <= 256 terms, so a few times sqrt(K) * 2^-24, about 1e-6, through two layers.
    ours = logits(load_checkpoint(written.folder, CPU).float())
    theirs = logits(plain_transformers(written))
    assert ours.abs().max() > 0.1
    assert (theirs - ours).norm() <= 1e-5 * ours.norm()


@pytest.mark.parametrize("name", ["int8-bf16-merged", "int4-g64-bf16", "int4-g128-asym-bf16"])
def test_transformers_in_bfloat16_is_off_by_one_rounding_of_the_weight(
    name: str, made: Callable[[str], Written]
) -> None:
    # Their reader rounds (q - z) * s to bfloat16, whose significand has 8 bits: a relative 2^-8 at most. Ours does not.
    theirs = dequantized(made(name), torch.bfloat16).state_dict()
    for layer, weight in quantized(made(name)).items():
        exact = weight.dequantize()
        assert bool(((theirs[f"{layer}.weight"].float() - exact).abs() <= 2**-8 * exact.abs()).all()), layer


@pytest.mark.xfail(
    raises=RuntimeError,
    strict=True,
    reason="compressed-tensors up to 0.20 expects an unpacked zero point while it loads, and a packed one afterwards",
)
def test_transformers_reads_an_asymmetric_checkpoint_with_no_options(made: Callable[[str], Written]) -> None:
    AutoModelForCausalLM.from_pretrained(made("int4-g64-asym").folder, dtype=torch.float32)


def words(tensor: Tensor) -> list[list[int]]:
    """The rows of an int32 tensor as unsigned integers."""
    return [[word % 2**32 for word in row] for row in tensor.tolist()]


def fields(row: list[int], bits: int, count: int) -> list[int]:
    """`count` signed integers from 32-bit words, low bits first, stored with an offset of half their range."""
    stream = sum(word << (32 * index) for index, word in enumerate(row))
    return [((stream >> (bits * i)) & (2**bits - 1)) - 2 ** (bits - 1) for i in range(count)]


def test_the_bits_decode_to_the_dequantized_weight_exactly(written: Written) -> None:
    tensors = written.tensors()
    weights = quantized(written)
    assert bool(weights) == bool(written.case.passes)
    for name, weight in weights.items():
        bits = weight.format.bits
        n, k = tensors[f"{name}.weight_shape"].tolist()
        q = [fields(row, bits, k) for row in words(tensors[f"{name}.weight_packed"])]
        scale = tensors[f"{name}.weight_scale"]
        groups = scale.shape[1]
        zero = [[0] * groups for _ in range(n)]
        if f"{name}.weight_zero_point" in tensors:
            columns = [fields(column, bits, n) for column in words(tensors[f"{name}.weight_zero_point"].T)]
            zero = [list(row) for row in zip(*columns, strict=True)]
        assert (weight.zero is None) == (f"{name}.weight_zero_point" not in tensors)
        steps = [[q[i][j] - zero[i][j * groups // k] for j in range(k)] for i in range(n)]
        expanded = scale.float().repeat_interleave(k // groups, dim=1)
        assert scale.dtype == written.case.dtype
        assert torch.equal(torch.tensor(steps, dtype=torch.float32) * expanded, weight.dequantize()), name


def test_the_decoder_above_reads_a_worked_example() -> None:
    # Bytes 0x1F 0xE0 low first, as nibbles F 1 0 E, are 15 1 0 14 with an offset of 8: 7 -7 -8 6.
    word = struct.unpack("<I", bytes([0x1F, 0xE0, 0, 0]))[0]
    assert fields([word], 4, 4) == [7, -7, -8, 6]


def test_each_file_has_exactly_the_tensors_and_metadata_it_must(written: Written) -> None:
    for file in written.folder.glob("*.safetensors"):
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert header["__metadata__"] == {"format": "pt"}
    stored = set(written.tensors())
    assert ("lm_head.weight" in stored) == (not (written.case.tied or written.case.biases))
    assert "model.embed_tokens.weight" in stored
    assert not any(".group." in name for name in stored)
    for name in quantized(written):
        assert f"{name}.weight" not in stored
        assert {f"{name}.weight_packed", f"{name}.weight_scale", f"{name}.weight_shape"} <= stored
    if written.case.biases:
        assert "model.layers.0.self_attn.q_proj.bias" in stored


@pytest.mark.parametrize("name", ["int8-sharded", "int4-channel-asym-sharded"])
def test_shards_are_listed_in_the_index_and_stay_below_the_limit(name: str, made: Callable[[str], Written]) -> None:
    folder = made(name).folder
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(files) > 1
    assert {key: file.name for file in files for key in load_file(file)} == index["weight_map"]
    sizes = {file.name: {key: t.nbytes for key, t in load_file(file).items()} for file in files}
    limit = made(name).case.shards
    assert limit is not None
    assert all(sum(held.values()) <= limit or len(held) == 1 for held in sizes.values())
    assert index["metadata"]["total_size"] == sum(sum(held.values()) for held in sizes.values())


def test_the_configuration_is_what_compressed_tensors_accepts(written: Written) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    config = written.config()
    assert config["dtype"] == str(written.case.dtype).removeprefix("torch.")
    if not written.case.passes:
        assert "quantization_config" not in config
        assert quantization_config(written.model) is None
        return
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    assert parsed.format == "pack-quantized"
    weights = quantized(written)
    assert set(parsed.ignore) == set(linear_layers(written.model)) - set(weights)
    schemes = {
        (scheme.weights.num_bits, scheme.weights.symmetric, scheme.weights.group_size or -1)
        for scheme in parsed.config_groups.values()
    }
    assert schemes == {(w.format.bits, w.format.symmetric, w.format.group_size) for w in weights.values()}


def test_a_quantized_head_is_no_longer_tied_and_the_embedding_stays(made: Callable[[str], Written]) -> None:
    written = made("int4-head-tied")
    assert written.model.config.tie_word_embeddings is True
    assert written.config()["tie_word_embeddings"] is False
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= set(written.tensors())


def test_two_formats_name_their_layers(made: Callable[[str], Written]) -> None:
    groups = made("two-formats").config()["quantization_config"]["config_groups"].values()
    by_bits = {group["weights"]["num_bits"]: group["targets"] for group in groups}
    assert set(by_bits) == {4, 8}
    assert all(".mlp." in name for name in by_bits[4])
    assert all(".self_attn." in name for name in by_bits[8])


@pytest.mark.parametrize("name", ["plain", "int8-bf16-merged", "int4-channel-asym-sharded"])
def test_saving_again_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    once, again = (write(CASES[name], tmp_path / part) for part in ("first place", "second"))
    files = {path.name: path.read_bytes() for path in once.folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in again.folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < set(files)


def test_saving_changes_nothing_of_the_model(made: Callable[[str], Written], tmp_path: Path) -> None:
    written = made("int4-g128-merged")
    before = {name: tensor.clone() for name, tensor in written.model.state_dict().items()}
    config = written.model.config.to_dict()
    save_checkpoint(written.model, None, tmp_path)
    after = written.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert written.model.config.to_dict() == config
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_model_that_was_cast_is_stored_and_declared_in_its_new_type(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "m", dtype=torch.float32)).to(torch.float16)
    model.config.dtype = torch.float32
    (tmp_path / "out").mkdir()
    save_checkpoint(model, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"
    assert load_checkpoint(tmp_path / "out", CPU).dtype == torch.float16


def test_generation_settings_that_transformers_would_not_save_do_not_lose_the_job(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "m", dtype=torch.float32))
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.6, eos_token_id=1)
    (tmp_path / "out").mkdir()
    save_checkpoint(model, None, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out", CPU).generation_config
    assert (loaded.temperature, loaded.eos_token_id) == (0.6, 1)


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("plain", "model.norm.weight", None, r"missing: model\.norm\.weight"),
        ("plain", "model.embed_tokens.weight", None, r"missing: model\.embed_tokens\.weight"),
        ("plain-untied-merged", "lm_head.weight", None, r"missing: lm_head\.weight"),
        ("plain", "model.more", torch.zeros(3), r"unexpected: model\.more"),
        ("plain", "model.norm.weight", torch.ones(64), r"of another shape: model\.norm\.weight"),
        ("int8", "model.layers.0.mlp.up_proj.weight_packed", None, r"missing: model\.layers\.0\.mlp\.up_proj\.weight"),
        ("int8", "model.layers.0.mlp.up_proj.weight_scale", None, "its weight_scale is missing"),
        ("int8", "model.layers.0.mlp.up_proj.weight_shape", None, "its weight_shape is missing"),
        ("int4-g64-asym", "model.layers.0.mlp.up_proj.weight_zero_point", None, "its weight_zero_point is missing"),
        ("int8", "model.layers.9.mlp.up_proj.weight", torch.zeros(3), r"unexpected: model\.layers\.9"),
        ("int8-biases-merged", "model.layers.0.self_attn.q_proj.bias", None, r"missing: .*q_proj\.bias"),
        ("int8", "model.layers.0.mlp.up_proj.bias", torch.zeros(256), r"unexpected: .*up_proj\.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    name: str, key: str, change: Tensor | None, message: str, made: Callable[[str], Written], tmp_path: Path
) -> None:
    tensors = made(name).tensors()
    assert (key in tensors) or change is not None
    tensors.pop(key, None)
    if change is not None:
        tensors[key] = change
    (tmp_path / "config.json").write_bytes((made(name).folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_checkpoint(tmp_path, CPU)


def test_a_checkpoint_without_weights_is_refused(made: Callable[[str], Written], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((made("int8").folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        load_checkpoint(tmp_path, CPU)


def test_packed_weights_without_a_group_that_targets_them_are_refused(
    made: Callable[[str], Written], tmp_path: Path
) -> None:
    config = made("int8").config()
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(made("int8").tensors(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no config group of the checkpoint targets it"):
        load_checkpoint(tmp_path, CPU)


def test_tensors_come_back_in_one_order_on_the_cpu(made: Callable[[str], Written]) -> None:
    tensors = checkpoint_tensors(made("int8-untied-merged").model)
    assert list(tensors) == sorted(tensors)
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize("options", [{"weights": "nvfp4", "activations": "nvfp4"}, {"weights": "fp8-tensor"}])
def test_merged_layers_that_share_a_tensor_scale_are_each_stored_with_it(
    options: dict[str, str], tmp_path: Path
) -> None:
    from optimizer.passes.calibration import Calibration

    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model", dtype=torch.float32))
    rows = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    context = Context(calibration=Calibration(tuple(rows)))
    Quantize(**options).run(model, context)  # type: ignore[arg-type]
    MergeLinears().run(model, context)
    (tmp_path / "saved").mkdir()
    save_checkpoint(model, None, tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved", CPU)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
