import pytest

from optimizer.errors import UsageError
from optimizer.evals.hardware import GPUS, find_gpu


@pytest.mark.parametrize(
    ("name", "teraflops", "fp8", "terabytes", "gigabytes", "ridge"),
    [
        ("V100 SXM", 125, None, 0.90, 32, 139),
        ("A100 SXM 80", 312, None, 2.04, 80, 153),
        ("H100 SXM", 989.4, 1979, 3.35, 80, 295),
        ("H200 SXM", 989.4, 1979, 4.80, 141, 206),
        ("B200", 2250, 4500, 8.00, 192, 281),
    ],
)
def test_vendor_figures(name, teraflops, fp8, terabytes, gigabytes, ridge):
    gpu = find_gpu(name)
    assert gpu.name == name
    assert gpu.fp16_flops == teraflops * 1e12
    assert gpu.fp8_flops == (fp8 and fp8 * 1e12)
    assert gpu.bandwidth == terabytes * 1e12
    assert gpu.memory_bytes == gigabytes * 1e9
    assert gpu.ridge == pytest.approx(ridge, abs=0.5)


def test_fp8_ridge():
    assert find_gpu("h100").roofline("float8").ridge == pytest.approx(591, abs=0.5)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("h100", "H100 SXM"),
        ("H100-SXM5", "H100 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("h100sxm", "H100 SXM"),
        (" nvidia h200 ", "H200 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80"),
        ("a100", "A100 SXM 80"),
        ("Tesla V100-SXM2-32GB", "V100 SXM"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_names_are_forgiven(alias, name):
    assert find_gpu(alias).name == name


@pytest.mark.parametrize(
    "name", ["H100 PCIe", "A100 40GB", "A100-SXM4-40GB", "V100-SXM2-16GB", "H100 NVL", "", "sxm", "tpu"]
)
def test_other_hardware_is_refused_with_the_valid_names(name):
    with pytest.raises(UsageError) as caught:
        find_gpu(name)
    assert all(gpu.name in str(caught.value) for gpu in GPUS)


def test_the_nearest_name_is_offered():
    with pytest.raises(UsageError, match=r"did you mean 'H200 SXM'"):
        find_gpu("h20")


def test_a_missing_rate_is_refused():
    with pytest.raises(UsageError, match="V100 SXM: no peak rate for dtype 'float8'"):
        find_gpu("v100").roofline("float8")
