"""What the ranks exchange in a step, and how much of DDP's exchange is hidden behind the backward pass.

Collectives are counted in torch's profile of one step, as they are handed to the process group. What is hidden is the
share of the reduction alone by which a forward and backward pass does not become longer with it:

    hidden = 1 - (with - without) / alone

The step with it also scales the gradients and copies them into the buckets, which counts as not hidden.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from rwkv_cluster.data.windows import TokenBatch

UNCOUNTED_STEPS = 2
"""Steps at the end of a turn whose time does not count: one is profiled, in the other the memory is looked at."""

ITEM_BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2}
"""Bytes of an element by the profiler's name of its dtype; any other has one."""

_COLLECTIVE = re.compile(r"(?:gloo|nccl):_?(\w+)")


@dataclass(frozen=True)
class Collectives:
    """Collectives of one kind in a step. n_bytes: of the tensors that a rank hands in. sent: see `ring_factor`."""

    calls: int
    n_bytes: int
    sent: float


@dataclass(frozen=True)
class Overlap:
    """Seconds of a forward and backward pass with and without the reduction, and of the reduction alone."""

    with_s: float
    without_s: float
    alone_s: float

    @property
    def hidden(self) -> float:
        """Share of the reduction that costs no time; below 0 where it costs more than alone."""
        return 1 - (self.with_s - self.without_s) / self.alone_s


def ring_factor(collective: str, n_ranks: int) -> float:
    """Bytes that a rank sends for each byte it hands in, by the ring algorithms of NCCL.

    All-reduce 2 (n - 1) / n; all-gather n - 1, where a rank hands in its part; reduce-scatter, reduce and broadcast
    (n - 1) / n, the last two as the mean over ranks.
    """
    if "all" in collective and "reduce" in collective:
        return 2 * (n_ranks - 1) / n_ranks
    if "gather" in collective:
        return float(n_ranks - 1)
    return 0.0 if "barrier" in collective else (n_ranks - 1) / n_ranks


def collectives(events: Iterable[Any], n_ranks: int) -> dict[str, dict[str, float]]:
    """The fields of `Collectives` for each kind that is in a profile's `events`, recorded with shapes."""
    found: dict[str, Collectives] = {}
    for event in events:
        if (match := _COLLECTIVE.fullmatch(event.name)) is None:
            continue
        kind = match.group(1)
        n_bytes = sum(
            math.prod(shape) * ITEM_BYTES.get(dtype, 1)
            for shape, dtype in zip(event.input_shapes, event.input_dtypes, strict=True)
            if shape
        )
        before = found.get(kind, Collectives(0, 0, 0.0))
        sent = before.sent + n_bytes * ring_factor(kind, n_ranks)
        found[kind] = Collectives(before.calls + 1, before.n_bytes + n_bytes, sent)
    return {kind: asdict(each) for kind, each in found.items()}


def measure_overlap(model: DistributedDataParallel, batch: TokenBatch, rounds: int) -> Overlap:
    """Medians of `rounds` turns, as the slowest rank has them. Collective; gradients are None afterwards."""
    device = batch.inputs.device
    sizes = [int(size) // 4 for size in str(model._get_ddp_logging_data()["rebuilt_bucket_sizes"]).split(",")]
    buckets = [torch.zeros(size, device=device) for size in sizes]

    def reduce_alone() -> None:
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            work.wait()

    def forward_backward(*, exchanges: bool) -> None:
        with nullcontext() if exchanges else model.no_sync():
            model(batch).backward()

    turns = [
        (
            _seconds(lambda: forward_backward(exchanges=True), model, device),
            _seconds(lambda: forward_backward(exchanges=False), model, device),
            _seconds(reduce_alone, model, device),
        )
        for _ in range(rounds)
    ]
    medians = torch.tensor([statistics.median(times) for times in zip(*turns, strict=True)], device=device)
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return Overlap(*medians.tolist())


def _seconds(run: Callable[[], None], model: torch.nn.Module, device: torch.device) -> float:
    """Time of `run` with all ranks beginning together and nothing left to do."""
    model.zero_grad()
    dist.barrier()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - begin
    model.zero_grad()
    return took


def table(cases: Iterable[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> list[str]:
    """Lines for the cases of `bench.ddp`. name: of a case, 24 characters wide."""
    counts, times = ("MB", "MB sent"), ("with s", "without", "alone")
    heads = [f"{'calls':>7}", *(f"{head:>10}" for head in counts), *(f"{head:>9}" for head in times), f"{'hidden':>8}"]
    lines = [f"{'a step exchanges':24}" + "".join(heads)]
    for case in cases:
        kinds = case["exchange"].values()
        calls, given, sent = (sum(kind[field] for kind in kinds) for field in ("calls", "n_bytes", "sent"))
        line = f"{name(case)}{calls:>7}{given / 1e6:>10,.2f}{sent / 1e6:>10,.2f}"
        if (overlap := case["overlap"]) is not None:
            line += "".join(f"{overlap[field]['median']:>9.3f}" for field in ("with_s", "without_s", "alone_s"))
            hidden = overlap["hidden"]
            line += f"{'-':>8}" if hidden is None else f"{hidden['median']:>8.0%}"
        lines.append(line)
    return [
        *lines,
        "MB that a rank hands to collectives, and sends by a ring; forward and backward pass with and without DDP's "
        "reduction,",
        "and this alone: hidden = 1 - (with - without) / alone",
    ]
