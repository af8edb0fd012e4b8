"""Real engines from small ONNX graphs, for GPUs that are not here; and every check before one is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx_bindings")

from optimizer.backends.tensorrt.build import BuildOptions, build_engines
from optimizer.backends.tensorrt.engine import Profile, checked_engine, read_engines
from optimizer.backends.tensorrt.plan import (
    Plan,
    PlanConstant,
    PlanOperation,
    Weight,
    fell_back,
    multiplied_otherwise,
    read_plan,
)
from optimizer.backends.tensorrt.provider import KNOWN, Provider, find_provider
from optimizer.errors import ArtifactError, DeviceError, ModelError, UsageError
from tests.backends.tensorrt.onnx_graphs import K, N, linear, unsupported

PREFILL = Profile("prefill", {"batch": (1, 1, 4), "sequence": (1, 128, 512)})
DECODE = Profile("decode", {"batch": (1, 1, 4), "sequence": (1, 1, 1)})
BOTH = BuildOptions((PREFILL, DECODE), ("sm89",))


@pytest.fixture(scope="module")
def rtx() -> Provider:
    return find_provider("tensorrt_rtx")


@pytest.mark.parametrize(("kind", "type"), [("int8", "int8"), ("fp8", "fp8_e4m3")])
def test_rounded_inputs_meet_weights_of_their_type(tmp_path: Path, rtx: Provider, kind: str, type: str) -> None:
    made = build_engines(linear(tmp_path, kind, rounded=True), tmp_path / "out", BOTH, rtx)
    (engine,) = made.engines
    assert (made.weights, made.rounded) == (1, 1)
    assert not engine.fell_back
    assert not engine.multiplied_otherwise
    assert engine.products == {f"{type} × {type}": 2}  # one a profile
    assert engine.constant_bytes[type] == K * N
    assert read_engines(tmp_path / "out") == made


def test_a_weight_alone_is_decoded_for_its_product(tmp_path: Path, rtx: Provider) -> None:
    made = build_engines(linear(tmp_path, "int8"), tmp_path / "out", BOTH, rtx)
    assert (made.weights, made.rounded) == (1, 0)
    assert "int8 × int8" not in made.engines[0].products


@pytest.mark.parametrize("rounded", [False, True])
def test_fp8_before_ada_is_refused(tmp_path: Path, rtx: Provider, rounded: bool) -> None:
    options = BuildOptions((DECODE,), ("sm89", "sm86"))
    with pytest.raises(UsageError, match=r"sm86 has no kernels for fp8_e4m3 weights\. Target sm89 or later"):
        build_engines(linear(tmp_path, "fp8", rounded=rounded), tmp_path / "out", options, rtx)


def test_a_product_of_other_types_is_named() -> None:
    def product(*operands: str) -> PlanOperation:
        return PlanOperation("fully_connected", "p", ("p", "dq"), operands)

    weight = Weight("dq", (4, 8), "int8", rounded=True)
    right = product("int8", "int8")
    assert multiplied_otherwise([weight], Plan((), (right, right)), profiles=2) == {}
    assert multiplied_otherwise([Weight("dq", (4, 8), "int8")], Plan((), ())) == {}
    found = multiplied_otherwise([weight], Plan((), (right, product("half", "half"))), profiles=2)
    assert found == {"dq": "1 of 2 products are int8 × int8; there is half × half"}
    assert multiplied_otherwise([weight], Plan((), ())) == {"dq": "0 of 1 products are int8 × int8"}


@pytest.mark.parametrize(("kind", "held", "bits"), [("fp16", "half", 16), ("int8", "int8", 8), ("int4", "int4", 4)])
def test_weights_stay_in_their_type(tmp_path: Path, rtx: Provider, kind: str, held: str, bits: int) -> None:
    targets = ("sm80", "sm86", "sm89", "sm120")
    options = BuildOptions((PREFILL, DECODE), targets)
    made = build_engines(linear(tmp_path, kind), tmp_path / "out", options, rtx)
    assert [engine.target for engine in made.engines] == list(targets)
    assert made.inputs == {"x": ("batch", "sequence", str(K))}
    assert made.weights == (kind != "fp16")
    for engine in made.engines:
        assert not engine.fell_back
        assert not engine.note
        assert engine.constant_bytes[held] == K * N * bits // 8
        assert (tmp_path / "out" / engine.file).stat().st_size == engine.bytes
        # Independent of the plan's text: an engine that held the weights any wider would be larger.
        assert engine.bytes < K * N * bits / 8 + 400_000
    assert read_engines(tmp_path / "out") == made


def test_two_builds_are_the_same_bytes(tmp_path: Path, rtx: Provider) -> None:
    graph = linear(tmp_path, "int4")
    first, second = (build_engines(graph, tmp_path / name, BOTH, rtx).engines[0].sha256 for name in ("a", "b"))
    assert first == second


def test_weight_streaming_is_an_option(tmp_path: Path, rtx: Provider) -> None:
    made = build_engines(
        linear(tmp_path, "fp16"), tmp_path / "out", BuildOptions((DECODE,), ("sm89",), weight_streaming=True), rtx
    )
    assert made.engines[0].bytes > 0


def test_operator_without_counterpart_is_named_with_its_source(tmp_path: Path, rtx: Provider) -> None:
    with pytest.raises(ModelError, match=r"Det 'node_det'.*module model\.layers\.3, modeling\.py:41"):
        build_engines(unsupported(tmp_path), tmp_path / "out", BOTH, rtx)
    assert not (tmp_path / "out").exists()


def test_asymmetric_int4_is_refused_with_the_remedy(tmp_path: Path, rtx: Provider) -> None:
    with pytest.raises(ModelError, match=r"zero point.*symmetric: true"):
        build_engines(linear(tmp_path, "int4", zero_point=3), tmp_path / "out", BOTH, rtx)


def test_int4_before_ampere_is_refused(tmp_path: Path, rtx: Provider) -> None:
    with pytest.raises(UsageError, match="sm75 has no kernels for int4 weights"):
        build_engines(linear(tmp_path, "int4"), tmp_path / "out", BuildOptions((DECODE,), ("sm75",)), rtx)


def test_unknown_target_names_those_that_exist(tmp_path: Path, rtx: Provider) -> None:
    with pytest.raises(UsageError, match=r"cannot build for sm90; it builds for .*sm89"):
        build_engines(linear(tmp_path, "fp16"), tmp_path / "out", BuildOptions((DECODE,), ("sm90",)), rtx)


def test_missing_file_and_missing_profile(tmp_path: Path, rtx: Provider) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        build_engines(tmp_path / "none.onnx", tmp_path / "out", BOTH, rtx)
    with pytest.raises(UsageError, match="no profiles"):
        build_engines(linear(tmp_path, "fp16"), tmp_path / "out", BuildOptions((), ("sm89",)), rtx)
    incomplete = Profile("p", {"batch": (1, 1, 1)})
    with pytest.raises(UsageError, match="says nothing of the dimension 'sequence'"):
        build_engines(linear(tmp_path, "fp16"), tmp_path / "out", BuildOptions((incomplete,), ("sm89",)), rtx)


def test_profile_beyond_the_model_is_refused(tmp_path: Path, rtx: Provider) -> None:
    with pytest.raises(UsageError, match="up to 512, and the model was made for 256"):
        build_engines(
            linear(tmp_path, "fp16"), tmp_path / "out", BuildOptions((PREFILL,), ("sm89",), max_context=256), rtx
        )


def test_an_older_folder_survives_a_failed_build_and_is_replaced_by_a_good_one(tmp_path: Path, rtx: Provider) -> None:
    out = tmp_path / "out"
    before = build_engines(linear(tmp_path, "fp16"), out, BOTH, rtx)
    with pytest.raises(ModelError):
        build_engines(linear(tmp_path, "int4", zero_point=1), out, BOTH, rtx)
    assert read_engines(out) == before
    after = build_engines(linear(tmp_path, "int8"), out, BOTH, rtx)
    assert read_engines(out) == after != before
    assert sorted(path.name for path in out.iterdir()) == ["engine.json", "sm89.engine"]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path, rtx: Provider) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="no engine folder"):
        build_engines(linear(tmp_path, "fp16"), tmp_path / "out", BOTH, rtx)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


class TestBeforeLoading:
    @pytest.fixture
    def folder(self, tmp_path: Path, rtx: Provider) -> Path:
        build_engines(linear(tmp_path, "int8"), tmp_path / "out", BOTH, rtx)
        return tmp_path / "out"

    def test_the_bytes_as_written(self, folder: Path, rtx: Provider) -> None:
        assert checked_engine(folder, "sm89", rtx) == (folder / "sm89.engine").read_bytes()

    def test_flipped_byte(self, folder: Path, rtx: Provider) -> None:
        content = bytearray((folder / "sm89.engine").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "sm89.engine").write_bytes(content)
        with pytest.raises(ArtifactError, match="sha256 differs"):
            checked_engine(folder, "sm89", rtx)

    def test_another_gpu(self, folder: Path, rtx: Provider) -> None:
        with pytest.raises(DeviceError, match="engines for sm89, and this GPU is sm90"):
            checked_engine(folder, "sm90", rtx)

    @pytest.mark.parametrize(("name", "version"), [("tensorrt", "1.7.1.116"), ("tensorrt_rtx", "2.0")])
    def test_another_provider_or_version(self, folder: Path, rtx: Provider, name: str, version: str) -> None:
        with pytest.raises(DeviceError, match="runs on the version that built it"):
            checked_engine(folder, "sm89", Provider(name, rtx.module, version))  # type: ignore[arg-type]

    def test_missing_and_linked_engines(self, folder: Path, rtx: Provider) -> None:
        (folder / "sm89.engine").rename(folder / "elsewhere")
        with pytest.raises(ArtifactError, match="missing or no plain file"):
            checked_engine(folder, "sm89", rtx)
        (folder / "sm89.engine").symlink_to(folder / "elsewhere")
        with pytest.raises(ArtifactError, match="missing or no plain file"):
            checked_engine(folder, "sm89", rtx)

    @pytest.mark.parametrize("file", ["../../secret", "/etc/passwd"])
    def test_a_path_out_of_the_folder(self, folder: Path, rtx: Provider, file: str) -> None:
        record = json.loads((folder / "engine.json").read_text())
        record["engines"][0]["file"] = file
        (folder / "engine.json").write_text(json.dumps(record))
        with pytest.raises(ArtifactError, match="outside its folder"):
            checked_engine(folder, "sm89", rtx)

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 2}', "null", '{"schema": 1, "engines": 3}'])
    def test_a_record_that_is_none(self, folder: Path, rtx: Provider, text: str) -> None:
        (folder / "engine.json").write_text(text)
        with pytest.raises(ArtifactError, match="not a record of engines"):
            checked_engine(folder, "sm89", rtx)


def test_profiles_bound_sums_and_refuse_disorder() -> None:
    profile = Profile("p", {"past": (0, 10, 20), "sequence": (1, 2, 3)})
    assert profile.bounds("past + sequence") == (1, 12, 23)
    assert profile.bounds("64") == (64, 64, 64)
    with pytest.raises(UsageError, match="not 0 ≤ least"):
        Profile("p", {"past": (3, 2, 1)})


def test_a_weight_that_fell_back_is_named() -> None:
    plan = Plan((PlanConstant("c0", (4, 8), "int4", 16), PlanConstant("c1", (4, 8), "half", 64)), ())
    weights = [Weight("a", (4, 8), "int4"), Weight("b", (4, 8), "int4")]
    assert set(fell_back(weights, plan)) == {"a", "b"}
    assert "it holds half" in fell_back(weights, plan)["a"]
    merged = Plan((PlanConstant("ab", (4, 16), "int4", 32),), ())
    assert fell_back(weights, merged) == {}
    assert fell_back(weights[:1], Plan(plan.constants[:1], ()), profiles=2)


def test_bytes_without_a_plan_are_unknown_rather_than_empty() -> None:
    with pytest.raises(ArtifactError, match="states no constants"):
        read_plan(b"\x00" * 64)


def test_no_provider_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("optimizer.backends.tensorrt.provider.importlib.import_module", missing)
    with pytest.raises(DeviceError) as error:
        find_provider()
    for known in KNOWN:
        assert known.install in str(error.value)
    with pytest.raises(UsageError, match="unknown TensorRT provider"):
        find_provider("tensorflow")  # type: ignore[arg-type]
