"""Opening models: what is good is described exactly, what is bad is refused by name and before any long work."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from optimizer.errors import ModelError
from optimizer.inspection import inspect_checkpoint, is_inside, read_header
from optimizer.source import check_finite, check_tokenizer, load_source, model_digest
from tests.optimizer.tiny_models import byte_tokenizer, llama, tiny_gpt2, tiny_llama

PROMPT = torch.tensor([[3, 50, 7, 90]])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "single")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "sharded", tied=False, dtype=torch.float32, shard="120KB")


@pytest.fixture
def copy(single: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(single, tmp_path / "copy"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


def edit(file: Path, **values: Any) -> None:
    parsed = json.loads(file.read_text())
    parsed.update(values)
    file.write_text(json.dumps({key: value for key, value in parsed.items() if value is not ...}))


def pack(header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file made by hand."""
    raw = (
        json.dumps(header).encode()
        if isinstance(header, dict)
        else header
        if isinstance(header, bytes)
        else header.encode()
    )
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


# ------------------------------------------------------------------------------------------------- inspection


def test_a_checkpoint_is_described_as_the_libraries_read_it(single: Path) -> None:
    info = inspect_checkpoint(single)
    stored = load_file(single / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        n: t.shape for n, t in info.tensors.items()
    }
    assert {f"torch.{tensor.dtype}" for tensor in info.tensors.values()} == {str(t.dtype) for t in stored.values()}
    assert info.total_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert (info.architecture, info.model_type, info.dtype) == ("LlamaForCausalLM", "llama", "bfloat16")
    assert (info.tied, info.has_tokenizer, info.quantization_config) == (True, True, None)
    assert info.files == ("model.safetensors",)


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    info = inspect_checkpoint(sharded)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert {name: tensor.file for name, tensor in info.tensors.items()} == index["weight_map"]
    assert info.total_bytes == index["metadata"]["total_size"]
    assert len(info.files) > 1
    assert not info.tied
    assert info.dtype == "float32"


def test_tying_by_the_default_of_the_architecture_is_seen(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path / "gpt2")
    edit(folder / "config.json", tie_word_embeddings=...)
    assert inspect_checkpoint(folder).tied


def test_the_digest_follows_weights_and_config_only(single: Path, copy: Path) -> None:
    listing = "".join(
        f"{hashlib.sha256((single / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    )
    digest = hashlib.sha256(listing.encode()).hexdigest()
    assert inspect_checkpoint(single).digest == inspect_checkpoint(copy).digest == digest
    (copy / "README.md").write_text("hello")
    assert inspect_checkpoint(copy).digest == digest
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert inspect_checkpoint(copy).digest != digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (f / "config.json").unlink(), r"Cannot read .*config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "no valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "must be an object"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "no valid JSON"),
        (lambda f: edit(f / "config.json", architectures=...), "architectures must name"),
        (lambda f: edit(f / "config.json", architectures=[]), "architectures must name"),
        (lambda f: edit(f / "config.json", architectures=["LlamaForSequenceClassification"]), "no causal language"),
        (lambda f: edit(f / "config.json", architectures=["BertModel"], model_type="bert"), "no causal language"),
        (lambda f: edit(f / "config.json", model_type="martian"), "martian.*upgrade transformers"),
        (lambda f: edit(f / "config.json", model_type=7), "model_type must be a string"),
        (lambda f: edit(f / "config.json", hidden_size="wide"), "hidden_size"),
        (lambda f: edit(f / "config.json", num_attention_heads=0), "does not describe a model"),
        (lambda f: edit(f / "config.json", auto_map={"AutoConfig": "x.Y"}), "trust_remote_code=True"),
        (lambda f: edit(f / "config.json", quantization_config="int4"), "quantization_config must be an object"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle.*save_pretrained"),
        (lambda f: ((f / "model.safetensors").unlink(), (f / "adapter_config.json").touch()), "merge_and_unload"),
        (lambda f: (f / "model.safetensors").write_bytes(pack({})), "holds no tensor"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(damage: Callable[[Path], Any], message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=message):
        inspect_checkpoint(copy)


def test_a_file_is_no_folder(single: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        inspect_checkpoint(single / "model.safetensors")
    with pytest.raises(ModelError, match="does not exist"):
        check_finite(single / "absent")


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(keep: float, copy: Path) -> None:
    file = copy / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        inspect_checkpoint(copy)


HOSTILE = {
    "a length beyond the file": (pack({}, length=1 << 62), "claims"),
    "a length beyond the limit": (pack({}, length=200_000_000), "claims"),
    "no JSON": (pack("{nope"), "no valid JSON"),
    "no object": (pack("[1]"), "must be an object"),
    "deep JSON": (pack("[" * 100_000), "no valid JSON"),
    "a number too long": (pack('{"a": ' + "9" * 10_000 + "}"), "no valid JSON"),
    "no UTF-8": (pack(b"\xff\xff"), "no valid JSON"),
    "a tensor twice": (pack('{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)),) * 2), b"1234"), "'a' occurs twice"),
    "an inner key twice": (pack('{"a": {"dtype": "U8", "dtype": "U8"}}'), "'dtype' occurs twice"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "an entry that is none": (pack({"a": 5}), "the entry of 'a'"),
    "an extra key": (pack({"a": {**entry(0, 4), "x": 1}}, b"1234"), "the entry of 'a'"),
    "an unknown dtype": (pack({"a": entry(0, 4, dtype="Q3")}, b"1234"), "unknown dtype 'Q3'"),
    "a dtype that cannot be hashed": (pack({"a": {**entry(0, 4), "dtype": ["U8"]}}, b"1234"), "unknown dtype"),
    "a negative offset": (pack({"a": entry(-4, 0)}, b""), "impossible offsets"),
    "a fractional offset": (pack({"a": {**entry(0, 4), "data_offsets": [0, 4.0]}}, b"1234"), "impossible offsets"),
    "a boolean offset": (pack({"a": {**entry(0, 1), "data_offsets": [False, True]}}, b"1"), "impossible offsets"),
    "three offsets": (pack({"a": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, b"1234"), "impossible offsets"),
    "reversed offsets": (pack({"a": {**entry(0, 0), "data_offsets": [4, 0]}}, b"1234"), "does not fit"),
    "a negative shape": (pack({"a": entry(0, 4, [-2, -2])}, b"1234"), "impossible shape"),
    "NaN as a shape": (
        pack('{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 1]}}', b"1"),
        "impossible shape",
    ),
    "a shape of many dimensions": (pack({"a": entry(0, 1, [1] * 65)}, b"1"), "impossible shape"),
    "a shape that overflows": (pack({"a": entry(0, 4, [1 << 62, 4])}, b"1234"), "does not fit"),
    "a shape of another size": (pack({"a": entry(0, 4, [5])}, b"1234"), "does not fit"),
    "an end beyond the file": (pack({"a": entry(0, 40)}, b"1234"), "take 40 bytes, the file has 4"),
    "overlap": (pack({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "overlap"),
    "the same bytes twice": (pack({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "overlap"),
    "a gap": (pack({"a": entry(0, 2), "b": entry(4, 6)}, b"123456"), "gaps"),
    "a gap at the start": (pack({"a": entry(2, 4)}, b"1234"), "gaps"),
    "bytes left over": (pack({"a": entry(0, 4)}, b"12345"), "take 4 bytes, the file has 5"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused(case: str, copy: Path) -> None:
    raw, message = HOSTILE[case]
    (copy / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelError, match=message):
        inspect_checkpoint(copy)


def test_unusual_but_valid_headers_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    header = {"empty": entry(3, 3, [0, 5]), "four bits": entry(0, 3, [2, 3], "F4"), "scalar": entry(3, 5, [], "BF16")}
    file.write_bytes(pack(header, b"12345"))
    read = read_header(file)
    assert {name: (t.shape, t.dtype, t.bytes) for name, t in read.items()} == {
        "empty": ((0, 5), "uint8", 0),
        "four bits": ((2, 3), "float4_e2m1fn", 3),
        "scalar": ((), "bfloat16", 2),
    }


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_raise_only_typed_errors(data: st.DataObject, tmp_path: Path) -> None:
    good = pack({"__metadata__": {"format": "pt"}, "a": entry(0, 8, [2], "F32"), "b": entry(8, 10)}, b"0123456789")
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, len(good)))
    middle = data.draw(
        st.one_of(st.binary(max_size=30), st.sampled_from([b"-1", b"1e3", b"null", b"{}", b"[]", b'"a"']))
    )
    file = tmp_path / "x.safetensors"
    file.write_bytes(good[:start] + middle + good[stop:])
    try:
        read = read_header(file)
    except ModelError:
        return
    assert sum(tensor.bytes for tensor in read.values()) <= file.stat().st_size
    load_file(file)  # what we accept, the library opens


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3),
        json_values
        | st.fixed_dictionaries(
            {
                "dtype": json_values | st.sampled_from(["U8", "F32", "F4"]),
                "shape": json_values,
                "data_offsets": json_values,
            }
        ),
        max_size=3,
    ),
    payload=st.binary(max_size=16),
)
def test_invented_headers_raise_only_typed_errors(header: dict[str, Any], payload: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(pack(header, payload))
    try:
        read = read_header(file)
    except ModelError as error:
        str(error).encode("utf-8")  # printable even when the names hold lone surrogates
        return
    assert sum(tensor.bytes for tensor in read.values()) == len(payload)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../copy/model.safetensors", "inside the folder"),
        ("/etc/passwd", "inside the folder"),
        ("C:\\model.safetensors", "inside the folder"),
        ("..\\model.safetensors", "inside the folder"),
        ("pytorch_model.bin", r"must be a \*\.safetensors"),
        ("absent.safetensors", "is missing"),
        ("nul\0.safetensors", "inside the folder"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(shard: str, message: str, shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    edit(index, weight_map={**json.loads(index.read_text())["weight_map"], "model.norm.weight": shard})
    with pytest.raises(ModelError, match=message):
        inspect_checkpoint(shards)


def test_an_index_that_contradicts_its_shards_is_refused(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = sorted(set(weight_map.values()))[0]
    edit(index, weight_map={**weight_map, "invented.weight": first})
    with pytest.raises(ModelError, match=r"invented\.weight.*lacks it"):
        inspect_checkpoint(shards)
    edit(index, weight_map={})
    with pytest.raises(ModelError, match="weight_map must map"):
        inspect_checkpoint(shards)
    edit(index, weight_map={**weight_map, "x": "again.safetensors"})
    shutil.copy(shards / first, shards / "again.safetensors")
    with pytest.raises(ModelError, match="is in both"):
        inspect_checkpoint(shards)


def test_paths_inside_a_folder() -> None:
    assert all(map(is_inside, ["a", "a/b", "a..b/c", "...", "a b"]))
    assert not any(map(is_inside, ["", "..", "../a", "a/../b", "/a", "\\a", "a\\..\\b", "C:a", "\\\\host\\x", "a\0b"]))


def test_remote_code_is_allowed_when_asked(copy: Path) -> None:
    edit(copy / "config.json", auto_map={})
    assert inspect_checkpoint(copy, trust_remote_code=True).architecture == "LlamaForCausalLM"


# ------------------------------------------------------------------------------------------------- finite values


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_values_that_are_not_finite_are_counted_and_named(dtype: torch.dtype, copy: Path) -> None:
    bad = torch.ones(6, 7)
    bad[1, 2] = bad[3, 3] = float("nan")
    save_file({"fine": torch.ones(3).to(dtype), "bad": bad.to(dtype)}, copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"in 1 tensors: bad \(2\)\."):
        check_finite(copy)


def test_a_double_beyond_float32_is_finite(copy: Path) -> None:
    save_file(
        {"large": torch.tensor([1e300], dtype=torch.float64), "n": torch.tensor([1, 2])}, copy / "model.safetensors"
    )
    check_finite(copy)


def test_exponent_scales_know_their_nan(copy: Path) -> None:
    scales = torch.tensor([0, 127, 254, 255], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file({"scale": scales}, copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"scale \(1\)"):
        check_finite(copy)


def test_a_model_with_infinity_is_refused_and_a_long_list_is_cut() -> None:
    model = llama(layers=3)
    check_finite(model)
    with torch.no_grad():
        model.model.norm.weight[5] = -torch.inf
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .* in 1 tensors: model\.norm\.weight \(1\)"):
        load_source(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight \(20480\).*, and 9 more"):
        check_finite(model)


def test_the_folder_is_checked_before_it_is_loaded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] = torch.inf
    save_file(weights, copy / "model.safetensors")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=r"model\.norm\.weight \(1\)"):
        load_source(copy)


def test_weights_that_are_not_there_are_refused() -> None:
    with pytest.raises(ModelError, match="meta device"):
        load_source(llama().to("meta"))


# ------------------------------------------------------------------------------------------------- tokenizer


def test_a_tokenizer_must_fit_the_embedding() -> None:
    tokenizer = byte_tokenizer()
    check_tokenizer(tokenizer, llama(vocab=320))
    check_tokenizer(tokenizer, llama(vocab=259).config)
    with pytest.raises(ModelError, match=r"has id 258, the model's embedding has 258 rows"):
        check_tokenizer(tokenizer, llama(vocab=258))
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ModelError, match=r"'<extra>' has id 259.*resize_token_embeddings\(260\)"):
        check_tokenizer(tokenizer, llama(vocab=259).config)


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("eos_token_id", 320, False),
        ("eos_token_id", [1, 5000], False),
        ("eos_token_id", [1, 319], True),
        ("bos_token_id", -1, False),
        ("pad_token_id", -1, True),
        ("pad_token_id", 999, False),
        ("bos_token_id", None, True),
    ],
)
def test_special_ids_must_have_a_row(key: str, value: Any, fits: bool) -> None:
    model = llama()
    for holder in (model.config, model.generation_config):
        before = getattr(holder, key)
        setattr(holder, key, value)
        if fits:
            check_tokenizer(byte_tokenizer(), model)
        else:
            with pytest.raises(ModelError, match=f"{key} of the .*config is .*outside the 320 rows"):
                check_tokenizer(byte_tokenizer(), model)
        setattr(holder, key, before)


def test_a_folder_whose_tokenizer_is_broken_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"The tokenizer in .* cannot be loaded"):
        load_source(copy)
    with pytest.raises(ModelError, match=r"Tokenizer folder .* does not exist"):
        load_source(copy, tokenizer=copy / "absent")


# ------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_loaded_model_computes_what_was_saved(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    source = load_source(str(folder))
    tied = kind == "single"
    expected = llama(tied=tied, dtype=torch.bfloat16 if tied else torch.float32)
    assert torch.equal(source.model(PROMPT).logits, expected(PROMPT).logits)
    assert source.model.dtype == expected.dtype
    assert not source.model.training
    assert (source.model.lm_head.weight is source.model.model.embed_tokens.weight) == tied
    assert source.tokenizer is not None
    assert source.tokenizer.decode(source.tokenizer("a = 1\n").input_ids) == "a = 1\n"
    assert (source.name, source.revision) == (kind, None)
    assert source.info == inspect_checkpoint(folder)
    assert source.digest == inspect_checkpoint(folder).digest


def test_a_folder_without_a_tokenizer_gives_none_or_the_one_passed(copy: Path, single: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert load_source(copy).tokenizer is None
    own = byte_tokenizer()
    assert load_source(copy, tokenizer=own).tokenizer is own
    assert len(load_source(copy, tokenizer=single).tokenizer or []) == 259


def test_a_model_in_memory_is_taken_as_it_is() -> None:
    model = llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = load_source(model, tokenizer=byte_tokenizer())
    assert source.model is model
    assert model.training
    assert source.info is source.revision is None
    assert source.name == "LlamaForCausalLM"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert source.digest == model_digest(llama()) != model_digest(llama(seed=1))


def test_the_digest_of_a_model_sees_every_bit_and_the_config() -> None:
    digests = set()
    for change in range(5):
        model = llama(tied=change != 4)
        with torch.no_grad():
            if change == 1:
                model.model.norm.weight[0] = 1 + 2**-7
            if change == 2:
                model.model.layers[1].mlp.up_proj.weight.view(torch.int16)[-1, -1] ^= 1
        if change == 3:
            model.config.rms_norm_eps = 1e-5
        digests.add(model_digest(model))
    assert len(digests) == 5
    renamed = llama()
    renamed.config._name_or_path = "elsewhere"
    assert model_digest(renamed) in digests


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no linear layer"):
        load_source(tiny_llama(tmp_path / "bare", layers=0))
    with pytest.raises(ModelError, match="no linear layer"):
        load_source(llama(layers=0))
    assert load_source(tiny_gpt2(tmp_path / "conv1d")).model.config.model_type == "gpt2"


def test_weights_that_do_not_belong_to_the_config_are_refused(copy: Path) -> None:
    edit(copy / "config.json", num_hidden_layers=10**6)  # building them would take hours
    with pytest.raises(ModelError, match=r"num_hidden_layers is 1000000, the files hold \d+ tensors"):
        load_source(copy)
    edit(copy / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks 9 tensors .* first model\.layers\.2\."):
        load_source(copy)
    edit(copy / "config.json", num_hidden_layers=2, intermediate_size=96)
    with pytest.raises(ModelError, match="transformers cannot load"):
        load_source(copy)


@pytest.mark.parametrize("value", ["", " ", "no-such-folder", "./no/such", "/no/such", "a/b/c", "x" * 5000, "a\0b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(value: str) -> None:
    with pytest.raises(ModelError, match="it is no hub id"):
        load_source(value)
    if value.strip() and "\0" not in value and len(value) < 100:
        with pytest.raises(ModelError, match="does not exist"):
            load_source(Path(value))


def test_other_objects_are_refused() -> None:
    with pytest.raises(ModelError, match="LlamaModel is no causal language model"):
        load_source(llama().model)
    for thing in (torch.nn.Linear(2, 2), None, 5, b"folder"):
        with pytest.raises(ModelError, match=f"Cannot optimize a {type(thing).__name__}"):
            load_source(thing)  # type: ignore[arg-type]


def test_a_hub_id_is_downloaded_without_pickle_and_code(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    calls: list[tuple[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = load_source("some-org/tiny.model_1")
    assert (source.name, source.revision) == ("some-org/tiny.model_1", single.name)
    name, options = calls[0]
    assert name == "some-org/tiny.model_1"

    def wanted(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in options["allow_patterns"]) and not any(
            fnmatch(file, pattern) for pattern in options["ignore_patterns"]
        )

    assert all(map(wanted, ["model.safetensors", "model.safetensors.index.json", "config.json", "merges.txt"]))
    assert all(map(wanted, ["tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]))
    assert not any(map(wanted, ["pytorch_model.bin", "modeling.py", "consolidated.safetensors", "onnx/a.json"]))
    load_source("some-org/tiny.model_1", trust_remote_code=True)
    assert "*.py" in calls[1][1]["allow_patterns"]


def test_a_hub_that_cannot_be_reached_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"'org/name'.*Name or service not known\..*pass the folder") as caught:
        load_source("org/name")
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_the_embedded_model_is_found_by_its_name(single: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import optimizer.evals.reference as reference

    monkeypatch.setattr(reference, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelError, match="embedded model is missing"):
        load_source("reference")
    shutil.copytree(single, tmp_path / "model")
    assert load_source("reference").name == "reference"


def test_nothing_of_the_caller_is_changed(single: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            logging.get_verbosity(),
            logging.is_progress_bar_enabled(),
            huggingface_hub.utils.are_progress_bars_disabled(),
            list(warnings.filters),
        )

    verbosity = logging.get_verbosity()
    try:
        for bars in (True, False):
            (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
            logging.set_verbosity_info()
            before = state()
            load_source(single)
            assert state() == before
            assert capfd.readouterr() == ("", "")
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
