"""The analysis behind `optimizer roofline --gpus`: one model on many GPUs, and what serves a load."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from optimizer.errors import UsageError
from optimizer.evals.arithmetic import all_reduce_bytes, cost_per_million_tokens
from optimizer.evals.fleet import Layout, Replica, hidden_size
from optimizer.evals.hardware import find_gpu
from optimizer.evals.provision import Demand, Service, best, colocated, disaggregated, too_small
from optimizer.evals.roofline import ModelShape


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What the command line says of a fleet, in its units: GB/s, GB, microseconds, milliseconds, price per hour."""

    gpus: int | None = None
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    microbatches: int | None = None
    interconnect: float | None = None
    network: float | None = None
    latency_us: float | None = None
    imbalance: float | None = None
    reserve: float | None = None
    output: int | None = None
    load: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if given and self.gpus is None:
            raise UsageError(f"--{next(iter(given)).replace('_', '-')} describes a fleet; add --gpus.")
        for name, value in given.items():
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in ("latency_us", "reserve")):
                raise UsageError(f"--{name.replace('_', '-')} is {value}; give a finite number above 0.")


def analyse_fleet(
    shape: ModelShape, gpu: str, options: FleetOptions, *, prompt: int, batch: int, context: int
) -> dict[str, Any]:
    """Layout, memory, capacity, times of one replica, and the service of a load, as plain data in base units."""
    gpus = options.gpus or 1
    if gpu.lower() == "measured":
        raise UsageError("--gpus needs the vendor's figures of links and memory; name the GPU, such as --gpu H100.")
    demand = Demand(
        prompt, 512 if options.output is None else options.output, options.load or 1.0,
        (options.ttft_ms or math.inf) / 1e3, (options.tpot_ms or math.inf) / 1e3,
    )  # fmt: skip
    replica = _replica(shape, gpu, options, gpus, demand)
    fits = replica.capacity(demand.context)
    if not fits:
        raise too_small(replica, gpus, demand.context)
    if batch > replica.capacity(context + 1):
        raise UsageError(
            f"--batch is {batch} with {context} tokens cached; {replica.capacity(context + 1)} such requests fit. "
            "Use fewer, more GPUs, or fewer bits."
        )
    layout, copies = replica.layout, gpus // replica.layout.gpus
    prefill, decode = replica.prefill(batch, prompt), replica.decode(batch, context)
    found = {
        "gpus": gpus,
        "replicas": copies,
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline, "expert": layout.expert,
                   "microbatches": layout.in_flight, "gpus": layout.gpus},
        "assumed": {"link_bytes_per_second": replica.gpu.link_bandwidth,
                    "network_bytes_per_second": replica.gpu.network_bandwidth, "gpus_per_machine": replica.gpu.node,
                    "latency_seconds": replica.latency, "expert_imbalance": replica.imbalance,
                    "reserve_bytes_per_gpu": replica.reserve_bytes},
        "per_gpu": {"memory_bytes": replica.gpu.memory_bytes, "weights_bytes": replica.weight_bytes,
                    "free_bytes": replica.free_bytes},
        "capacity": {"tokens": demand.context, "requests_per_replica": fits, "requests": fits * copies},
        "all_reduce_bytes_per_layer": all_reduce_bytes(hidden_size(shape), batch, shape.element_bytes),
        "prefill": {"batch": batch, "prompt": prompt, **asdict(prefill)},
        "decode": {"batch": batch, "context": context, **asdict(decode),
                   "tokens_per_second": batch / decode.seconds},
        "kv_transfer_seconds": replica.kv_transfer_seconds(prompt),
    }  # fmt: skip
    return found | ({} if options.load is None else {"service": _services(replica, demand, options)})


def _replica(shape: ModelShape, gpu: str, options: FleetOptions, gpus: int, demand: Demand) -> Replica:
    """The replica that was asked for, or the best for the demand."""
    device = find_gpu(gpu)
    device = replace(
        device,
        link_bandwidth=device.link_bandwidth if options.interconnect is None else options.interconnect * 1e9,
        network_bandwidth=device.network_bandwidth if options.network is None else options.network * 1e9,
    )
    layout = Layout(options.tp or 1, options.pp or 1, options.ep or 1, options.microbatches)
    replica = Replica(
        shape, device, Layout(microbatches=options.microbatches),
        latency=5e-6 if options.latency_us is None else options.latency_us * 1e-6,
        imbalance=options.imbalance or 1.0, reserve_bytes=(options.reserve or 0) * 1e9,
    )  # fmt: skip
    if options.tp is None and options.pp is None and options.ep is None:
        return best(replica, gpus, demand)
    if gpus % layout.gpus:
        raise UsageError(f"{layout} takes {layout.gpus} GPUs, which does not divide --gpus {gpus}; change one of them.")
    return replace(replica, layout=layout)


def _services(replica: Replica, demand: Demand, options: FleetOptions) -> dict[str, Any]:
    """What serves the load, either way, and what that costs."""

    def data(service: Service) -> dict[str, Any]:
        rate = demand.requests_per_second * demand.output
        hourly = None if options.price is None else service.gpus * options.price
        return asdict(service) | {
            "price_per_hour": hourly,
            "price_per_million_output_tokens": None if hourly is None else cost_per_million_tokens(hourly, rate),
        }

    return {
        "requests_per_second": demand.requests_per_second, "prompt": demand.prompt, "output": demand.output,
        "ttft_objective_seconds": demand.ttft, "tpot_objective_seconds": demand.tpot,
        "colocated": data(colocated(replica, demand)), "disaggregated": data(disaggregated(replica, demand)),
    }  # fmt: skip


def describe_fleet(found: dict[str, Any]) -> list[str]:
    """The analysis as lines of text."""
    layout, assumed, gpu, capacity = (found[key] for key in ("layout", "assumed", "per_gpu", "capacity"))
    lines = [
        f"{found['gpus']} GPUs: {found['replicas']} × (tensor {layout['tensor']} × pipeline {layout['pipeline']} × "
        f"expert {layout['expert']}, {layout['microbatches']} microbatches)",
        f"assumed: {assumed['link_bytes_per_second'] / 1e9:.4g} GB/s a GPU in a machine of "
        f"{assumed['gpus_per_machine']}, {assumed['network_bytes_per_second'] / 1e9:.4g} GB/s between machines, "
        f"{assumed['latency_seconds'] * 1e6:.4g} µs a collective, busiest experts {assumed['expert_imbalance']:.4g} × "
        "the mean",
        f"a GPU: weights {gpu['weights_bytes'] / 1e9:.4g} GB, free {gpu['free_bytes'] / 1e9:.4g} GB; "
        f"{capacity['requests_per_replica']:,} requests of {capacity['tokens']:,} tokens fit a replica, "
        f"{capacity['requests']:,} the fleet",
        f"prefill on a replica: {_times(found['prefill'])}",
        f"decode on a replica: {_times(found['decode'])}, at most {found['decode']['tokens_per_second']:,.1f} tok/s",
        f"cache of one prompt to another replica: at least {found['kv_transfer_seconds'] * 1e3:.4g} ms",
    ]
    if "service" in found:
        lines += _describe_services(found["service"], found["gpus"])
    return lines


def _times(step: dict[str, Any]) -> str:
    parts = {key.replace("_", "-"): step[key] for key in ("moving", "computing", "all_reduce", "all_to_all", "send")}
    shown = ", ".join(f"{name} {seconds * 1e3:.4g}" for name, seconds in parts.items() if seconds)
    bubble = f", bubble {step['bubble']:.1%}" if step["bubble"] else ""
    return f"at least {step['seconds'] * 1e3:.4g} ms ({shown} ms{bubble})"


def _describe_services(service: dict[str, Any], gpus: int) -> list[str]:
    lines = [
        f"{service['requests_per_second']:.4g} requests/s of {service['prompt']:,} + {service['output']:,} tokens, "
        "upper bounds without queues:"
    ]
    for name in ("colocated", "disaggregated"):
        found = service[name]
        replicas = f"{found['decode_replicas']} replicas"
        if found["prefill_replicas"]:
            replicas = f"{found['prefill_replicas']} prefill + {found['decode_replicas']} decode replicas"
        enough = "" if found["gpus"] <= gpus else f", more than the {gpus} given"
        cost = found["price_per_million_output_tokens"]
        lines.append(
            f"  {name}: {replicas} = {found['gpus']} GPUs{enough}; batch {found['batch']}, TTFT {found['ttft']:.4g} s, "
            f"TPOT {found['tpot'] * 1e3:.4g} ms, goodput ≤ {found['goodput']:.4g} requests/s"
            + ("" if cost is None else f", at least {cost:.4g} per million output tokens")
        )
    return lines
