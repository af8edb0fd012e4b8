"""Recording what a runner does: its generation under `torch.profiler`, with marks between tokens and ranges for layers.

The same run emits NVTX ranges where the device is a GPU, so that Nsight Systems shows phases and layers by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimizer.evals.runner import Runner
from optimizer.evals.timing import synchronise
from optimizer.evals.trace import CALIBRATION, FORWARD, LAYER, START, TOKEN, Event

if TYPE_CHECKING:
    from torch.profiler import profile


SMALLEST_CALLS = 64
"""Calls of the smallest operation before each profiled generation, which say what any call costs at that time."""


def record(
    runner: Runner, tokens: Tensor, output: int, model: nn.Module | None, layers: Collection[str], rounds: int
) -> list[Event]:
    """The events of `rounds` profiled generations of `output` tokens from `tokens [B, S]`.

    `layers` are the modules of `model` that get ranges of their own. Inside a compiled step modules do not run.
    """
    from torch.profiler import ProfilerActivity, profile

    device, scalar = runner.device, torch.zeros(1)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with layer_ranges(model, layers, device), profile(activities=activities, record_shapes=True) as prof:
        for _ in range(rounds):
            with ExitStack() as phase:

                def next_step(_: object, phase: ExitStack = phase) -> None:
                    phase.close()
                    mark(TOKEN, device)
                    phase.enter_context(phase_range("optimizer.decode", device))

                with torch.profiler.record_function(CALIBRATION):
                    for _ in range(SMALLEST_CALLS):
                        scalar.add_(1)
                mark(START, device)
                phase.enter_context(phase_range("optimizer.prefill", device))
                runner.generate(tokens, max_new_tokens=output, temperature=0.0, eos_token_id=None, on_token=next_step)
    return events_of(prof)


@contextmanager
def phase_range(name: str, device: torch.device) -> Iterator[None]:
    """A named range in the trace, and for external tools (Nsight Systems) an NVTX range where the device is a GPU."""
    with ExitStack() as stack:
        stack.enter_context(torch.profiler.record_function(name))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.nvtx.range(name))
        yield


def mark(name: str, device: torch.device) -> None:
    """Mark a moment in the trace, once the device has done all it was given."""
    synchronise(device)
    with phase_range(name, device):
        pass


@contextmanager
def named_kernels() -> Iterator[None]:
    """Have what Inductor compiles meanwhile for CPUs name each kernel it runs to the profiler; the code is the same."""
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


@contextmanager
def layer_ranges(model: nn.Module | None, names: Collection[str], device: torch.device) -> Iterator[None]:
    """A range around the forward of a model and of each of its modules in `names`, while they run uncompiled."""
    modules = {} if model is None else dict(model.named_modules())
    wanted = {FORWARD: modules[""]} if modules else {}
    wanted |= {f"{LAYER}{name}": modules[name] for name in names if name in modules}
    with ExitStack() as hooks:
        for name, module in wanted.items():
            for handle in _hooked(module, name, device):
                hooks.callback(handle.remove)
        yield


def _hooked(module: nn.Module, name: str, device: torch.device) -> tuple[Any, Any]:
    opened: list[ExitStack] = []

    def enter(*_: object) -> None:
        if not torch.compiler.is_compiling():
            opened.append(ExitStack())
            opened[-1].enter_context(phase_range(name, device))

    def leave(*_: object) -> None:
        if opened and not torch.compiler.is_compiling():
            opened.pop().close()

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)


def event_seconds(calls: int = 300, rounds: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """What the profiler adds for each event on this machine, measured on the smallest operation there is."""
    from torch.profiler import ProfilerActivity, profile

    scalar = torch.zeros(1)

    def seconds() -> float:
        began = clock()
        for _ in range(calls):
            scalar.add_(1)
        return (clock() - began) / calls

    seconds()
    bare, profiled = [], []
    for _ in range(rounds):
        bare.append(seconds())
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True):
            profiled.append(seconds())
    return max(0.0, min(profiled) - min(bare))


def events_of(prof: profile) -> list[Event]:
    """The profiler's events on the thread that made the tokens, and on a device, sorted by their start."""
    recorded = prof.events() or []
    threads = {event.thread for event in recorded if event.name == TOKEN}
    on_device = {id(e) for e in recorded if str(e.device_type).endswith("CUDA") and not e.is_user_annotation}
    kept = [e for e in recorded if id(e) in on_device or (e.thread in threads and str(e.device_type).endswith("CPU"))]
    kept.sort(key=lambda e: (e.time_range.start, -e.time_range.end))
    place = {id(event): index for index, event in enumerate(kept)}
    return [
        Event(
            event.name, event.time_range.start / 1e6, event.time_range.end / 1e6,
            None if event.cpu_parent is None else place.get(id(event.cpu_parent)),
            _tuples(event.structured_input_shapes or event.input_shapes or ()), tuple(event.input_dtypes or ()),
            id(event) in on_device,
        )
        for event in kept
    ]  # fmt: skip


def _tuples(value: Any) -> tuple[Any, ...]:
    return tuple(_tuples(item) if isinstance(item, list | tuple) else item for item in value)
