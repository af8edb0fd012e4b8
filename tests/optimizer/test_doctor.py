"""`optimizer doctor`: each check says the truth about this machine, and what is missing names its remedy."""

from __future__ import annotations

import platform
from importlib.metadata import version

import pytest
import torch

from optimizer import doctor
from optimizer.backends.kernels import build
from optimizer.doctor import OPTIONAL, Check, checks


@pytest.fixture(scope="module")
def found() -> dict[str, Check]:
    return {check.name: check for check in checks()}


def test_required_libraries_are_there_with_their_versions(found: dict[str, Check]) -> None:
    assert found["python"] == Check("python", True, platform.python_version())
    for name in ("torch", "transformers", "compressed-tensors", "lm-eval"):
        assert found[name] == Check(name, True, version(name))


def test_every_optional_library_is_reported_with_a_version_or_a_remedy(found: dict[str, Check]) -> None:
    for name, remedy in OPTIONAL.items():
        check = found[name]
        assert check.detail.endswith(remedy) != check.ok


def test_the_processor_and_its_kernels_are_what_runs(found: dict[str, Check]) -> None:
    assert str(torch.get_num_threads()) in found["cpu"].detail
    assert found["cpu kernels"].ok == build.cpu_kernels().loaded
    assert found["cuda"].ok == torch.cuda.is_available()


def test_a_missing_library_is_no_with_its_remedy() -> None:
    check = doctor._package("surely-not-installed", "pip install it", "it")
    assert check == Check("it", False, "not installed. pip install it")


def test_kernels_that_could_not_be_compiled_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_kernels", lambda: build.CpuKernels(False, "AVX2", "no C++ compiler: install g++"))
    (check,) = [check for check in checks() if check.name == "cpu kernels"]
    assert check == Check("cpu kernels", False, "no C++ compiler: install g++")


def test_a_gpu_is_named_with_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor = "NVIDIA H100", 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert doctor._cuda() == Check("cuda", True, "NVIDIA H100, sm_90")
