"""What this machine really reaches: read and copy bandwidth, matrix-multiply rate, and the cost of a dispatch.

A vendor's figure is a label; utilisation is divided by what is measured here. Every ceiling is the *best* of
interleaved repetitions, over several operations where no single one saturates everywhere: noise and neighbours only
ever slow a machine down, so the fastest run is the nearest to its limit. Rates are bytes/s and FLOP/s (1 GB = 1e9 B),
int8 rates count a multiply-add as two operations. Read bandwidth is kept by working-set size, because a set that fits
a cache is read faster; the largest set is the memory's. A copy counts each byte once read and once written.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimizer.errors import DeviceError, UsageError
from optimizer.evals.roofline import Roofline
from optimizer.evals.timing import Clock, stopwatch, synchronise

MIB = 1 << 20
CPU_WORKING_SETS = (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
CUDA_WORKING_SETS = (4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB, 4096 * MIB)
ROW = 1024  # columns of the matrices that the read probes see
MATMUL_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
SAMPLE_SECONDS = {"cpu": 1e-3, "cuda": 5e-3}  # shorter operations repeat: a launch must not weigh in a sample
FALLBACK_CACHE_BYTES = 64 * MIB  # where the system does not tell


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured limits of one device.

    `cores` are the threads PyTorch uses on a CPU, or the multiprocessors of a GPU; `isa` is the vector extension
    ("AVX512") or the compute capability ("sm_90"). `read_bandwidth` maps working-set bytes to bytes/s; `matmul_flops`
    maps a dtype's name to FLOP/s and lacks those that the device cannot multiply.
    """

    device: str
    cores: int
    isa: str
    read_bandwidth: Mapping[int, float]
    copy_bandwidth: float
    matmul_flops: Mapping[str, float]
    launch_seconds: float
    measured_at: str
    torch_version: str

    def __post_init__(self) -> None:
        rates = (*self.read_bandwidth.values(), *self.matmul_flops.values(), self.copy_bandwidth, self.launch_seconds)
        if not self.read_bandwidth or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise UsageError(f"{self}: every rate must be positive and finite, with at least one read_bandwidth")

    @property
    def memory_bandwidth(self) -> float:
        """Read bandwidth, bytes/s, of the largest working set."""
        return self.read_bandwidth[max(self.read_bandwidth)]

    def bandwidth(self, working_set: float) -> float:
        """Read bandwidth, bytes/s, of a working set of so many bytes: linear in its logarithm, constant outside."""
        if not working_set > 0:
            raise UsageError(f"bandwidth: working_set={working_set!r} bytes must be positive")
        sizes = sorted(self.read_bandwidth)
        rates = [self.read_bandwidth[size] for size in sizes]
        return float(np.interp(math.log(working_set), np.log(sizes), rates))

    def peak_flops(self, dtype: str | torch.dtype) -> float:
        """Matrix-multiply FLOP/s of a dtype, "bfloat16" or `torch.bfloat16`.

        Raises:
            DeviceError: the dtype was not measured here.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in self.matmul_flops:
            measured = ", ".join(self.matmul_flops)
            raise DeviceError(f"{self.device}: no matmul rate for dtype {name!r}; measured here: {measured}")
        return self.matmul_flops[name]

    def roofline(self, dtype: str | torch.dtype, working_set: float | None = None) -> Roofline:
        """The device's roofline for a dtype, by the bandwidth of a working set (default: of memory)."""
        bandwidth = self.memory_bandwidth if working_set is None else self.bandwidth(working_set)
        return Roofline(self.peak_flops(dtype), bandwidth)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reverses it."""
        plain = asdict(self)
        plain["read_bandwidth"] = {str(size): rate for size, rate in self.read_bandwidth.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Ceilings:
        """Read `to_dict`'s data.

        Raises:
            UsageError: a key is missing or unknown, or a rate is not positive and finite.
        """
        wrong = {field.name for field in fields(cls)} ^ plain.keys()
        if wrong:
            raise UsageError(f"ceilings: keys {sorted(wrong)} are missing or unknown; measure again with this version")
        sizes = {int(size): float(rate) for size, rate in plain["read_bandwidth"].items()}
        return cls(**{**plain, "read_bandwidth": sizes, "matmul_flops": dict(plain["matmul_flops"])})


@dataclass(slots=True)
class _Probe:
    """One operation to repeat: `amount` bytes, FLOP or dispatches a call; `best` is its highest rate so far."""

    limit: tuple[str, object]
    amount: float
    run: Callable[[], object]
    calls: int = 1
    best: float = 0.0


def measure_ceilings(
    device: torch.device | str = "cpu",
    *,
    seconds: float = 3.0,
    working_sets: Sequence[int] | None = None,
    progress: Callable[[float], None] | None = None,
    clock: Clock = time.perf_counter,
) -> Ceilings:
    """Measure a device for about `seconds`, plus the time that one round of every probe takes.

    Probes run in turn, round after round, so that a burst of other work costs each of them a sample and none its
    best. `working_sets` are bytes, multiples of 8 KiB; `progress` receives the fraction of the time spent. CUDA
    float32 follows the caller's TF32 setting.

    Raises:
        DeviceError: the device is not present.
        UsageError: a budget that is not positive, or working sets that cannot be measured.
    """
    device = torch.device(device)
    if device.type not in MATMUL_SIZES or (device.type == "cuda" and not torch.cuda.is_available()):
        raise DeviceError(
            f"device {str(device)!r} cannot be measured here; use 'cpu', or 'cuda' where a GPU is present"
        )
    sizes = sorted(working_sets) if working_sets is not None else _working_sets(device)
    if not seconds > 0 or not sizes or any(size < 2 * 4 * ROW or size % (2 * 4 * ROW) for size in sizes):
        raise UsageError(
            f"ceilings: seconds={seconds!r} must be positive, working_sets={sizes} multiples of 8192 bytes"
        )

    started = clock()
    generator = torch.Generator(device).manual_seed(0)
    probes = [*_memory_probes(sizes, device, generator), _launch_probe(device)]
    with torch.inference_mode():
        probes += _matmul_probes(device, generator, seconds / 30, clock)
        while True:
            for probe in probes:
                _sample(probe, device, clock)
            spent = clock() - started
            if progress is not None:
                progress(min(1.0, spent / seconds))
            if spent >= seconds:
                break

    best: dict[tuple[str, object], float] = {}
    for probe in probes:
        best[probe.limit] = max(probe.best, best.get(probe.limit, 0.0))
    name, cores, isa = describe(device)
    return Ceilings(
        device=name,
        cores=cores,
        isa=isa,
        read_bandwidth={size: best["read", size] for size in sizes},
        copy_bandwidth=best["copy", sizes[-1]],
        matmul_flops={str(what): rate for (kind, what), rate in best.items() if kind == "matmul"},
        launch_seconds=1 / best["launch", None],
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        torch_version=torch.__version__,
    )


def describe(device: torch.device | str) -> tuple[str, int, str]:
    """A device's name, its threads or multiprocessors, and its instruction set."""
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.multi_processor_count, f"sm_{properties.major}{properties.minor}"
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return name, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()


def cache_bytes(device: torch.device | str) -> int:
    """Bytes of a device's last-level cache; 64 MiB where the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [FALLBACK_CACHE_BYTES]
    with contextlib.suppress(OSError, ValueError):  # absent outside Linux
        levels = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        sizes = [int(level.read_text().strip().removesuffix("K")) << 10 for level in levels] or sizes
    return max(sizes)


def _working_sets(device: torch.device) -> list[int]:
    """Sizes from inside the caches to well past the last of them, within a quarter of the free memory."""
    if device.type == "cuda":
        sizes, free = list(CUDA_WORKING_SETS), torch.cuda.mem_get_info(device)[0]
    else:
        past_cache = 1 << (4 * cache_bytes(device) - 1).bit_length()
        sizes, free = sorted({*CPU_WORKING_SETS, max(past_cache, CPU_WORKING_SETS[-1])}), _free_memory()
    return [size for size in sizes if size <= free // 4] or sizes[:1]


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # a system that does not say
        return 4 * CPU_WORKING_SETS[-1]


def _memory_probes(sizes: Sequence[int], device: torch.device, generator: torch.Generator) -> Iterator[_Probe]:
    """Reads of the start of one random buffer by four operations, and a copy of its first half over its second."""
    block = torch.rand(min(sizes[-1], MIB) // 4, device=device, generator=generator)
    buffer = block.repeat(-(-sizes[-1] // block.nbytes))[: sizes[-1] // 4]
    for size in sizes:
        for read in reads(buffer[: size // 4]):
            yield _Probe(("read", size), size, read)
    half = len(buffer) // 2
    yield _Probe(("copy", sizes[-1]), 8 * half, lambda: buffer[half : 2 * half].copy_(buffer[:half]))


def reads(values: Tensor) -> tuple[Callable[[], Tensor], ...]:
    """Ways to read `values [n]` float32 once, n a multiple of 2048. Machine and size decide which is the fastest."""
    matrix, half, integers = values.view(-1, ROW), len(values) // 2, values.view(torch.int64)
    vector = torch.ones(ROW, device=values.device)
    return (
        lambda: matrix.mv(vector),
        lambda: matrix.sum(1),
        lambda: values[:half].dot(values[half:]),
        lambda: integers.sum(),
    )


def _launch_probe(device: torch.device) -> _Probe:
    """The smallest operation there is: one element, in place. Many are queued, so a GPU's rate is what it can start."""
    scalar = torch.zeros(1, device=device)
    return _Probe(("launch", None), 1, lambda: scalar.add_(1))


def _floats(dtype: torch.dtype) -> Callable[[int, torch.device, torch.Generator], Callable[[], Tensor]]:
    def operands(n: int, device: torch.device, generator: torch.Generator) -> Callable[[], Tensor]:
        a = torch.randn(n, n, dtype=dtype, device=device, generator=generator)
        return lambda: a @ a

    return operands


def _int8(n: int, device: torch.device, generator: torch.Generator) -> Callable[[], Tensor]:
    a = torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device, generator=generator)
    return lambda: torch._int_mm(a, a.T)  # tensor cores want the second operand column-major


def _float8(n: int, device: torch.device, generator: torch.Generator) -> Callable[[], Tensor]:
    if device.type != "cuda":
        raise NotImplementedError("float8 has no fast multiply on a CPU")
    a = torch.randn(n, n, device=device, generator=generator).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, a.T, one, one, out_dtype=torch.bfloat16)


MATMULS: dict[str, Callable[[int, torch.device, torch.Generator], Callable[[], Tensor]]] = {
    "float32": _floats(torch.float32),
    "bfloat16": _floats(torch.bfloat16),
    "float16": _floats(torch.float16),
    "int8": _int8,
    "float8_e4m3fn": _float8,
}


def _matmul_probes(
    device: torch.device, generator: torch.Generator, most_seconds: float, clock: Clock
) -> Iterator[_Probe]:
    """A square product for each dtype the device can multiply, as large as `most_seconds` a call allow."""
    for dtype, operands in MATMULS.items():
        with contextlib.suppress(RuntimeError, NotImplementedError):  # not on this device
            for n in MATMUL_SIZES[device.type]:
                probe = _Probe(("matmul", dtype), 2 * n**3, operands(n, device, generator))
                probe.run()
                _sample(probe, device, clock)
                if 8 * probe.amount / probe.best > most_seconds:  # the next size takes eight times as long
                    break
            yield probe


def _sample(probe: _Probe, device: torch.device, clock: Clock) -> None:
    """Time one sample, keep the best rate, and settle how many calls the next sample takes."""
    if probe.calls > 1:
        probe.run()  # a set that fits a cache is in it again
    synchronise(device)
    watch = stopwatch(device, clock)
    watch.mark()
    for _ in range(probe.calls):
        probe.run()
    watch.mark()
    (elapsed,) = watch.gaps()
    each = max(elapsed, 1e-9) / probe.calls
    probe.best = max(probe.best, probe.amount / each)
    probe.calls = max(1, min(1000, math.ceil(SAMPLE_SECONDS[device.type] * probe.best / probe.amount)))
