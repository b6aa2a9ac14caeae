"""What the ranks exchange in a step, and how much of DDP's exchange is hidden behind the backward pass.

Collectives are counted in torch's profile of one step, as they are handed to the process group. What is hidden is the
share of the reduction alone by which a forward and backward pass does not become longer with it:

    hidden = 1 - (with - without) / alone

The step with it also scales the gradients and copies them into the buckets, which counts as not hidden. On CPUs gloo
takes the cores that the pass computes on, so that little can be hidden and the share says nothing of a network. There a
`Network` can stand for the reduction, which takes time and no core.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

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


class Network:
    """A simulated network for gradients: each byte takes its time and no core, and no value changes.

    Buckets travel one after the other, as on NCCL's stream.
    """

    def __init__(self, seconds_per_byte: float) -> None:
        self._seconds_per_byte = seconds_per_byte
        self._link = ThreadPoolExecutor(max_workers=1)

    def reduce(self, bucket: Tensor) -> Future[Tensor]:
        """Send `bucket`. The future, which has it when it has arrived."""
        arrived: Future[Tensor] = Future()
        self._link.submit(self._send, bucket, arrived)
        return arrived

    def _send(self, bucket: Tensor, arrived: Future[Tensor]) -> None:
        time.sleep(bucket.nbytes * self._seconds_per_byte)
        arrived.set_result(bucket)


def all_reduce(bucket: Tensor) -> Future[Any]:
    """The process group's sum of `bucket`, begun: what DDP does with each by itself."""
    work = dist.all_reduce(bucket, async_op=True)
    assert work is not None
    return work.get_future()


def measure_network(model: DistributedDataParallel, batch: Any, rounds: int, alone_s: float) -> Overlap:
    """`measure_overlap` with a `Network` for good in place of the reduction, which takes about `alone_s` by itself."""
    network = Network(alone_s / sum(_bucket_bytes(model)))
    model.register_comm_hook(None, lambda _, bucket: network.reduce(bucket.buffer()))
    return measure_overlap(model, batch, rounds, network.reduce)


def measure_overlap(
    model: DistributedDataParallel,
    batch: Any,
    rounds: int,
    reduce: Callable[[Tensor], Future[Any]] = all_reduce,
) -> Overlap:
    """Medians of `rounds` turns, as the slowest rank has them. Collective; gradients are None afterwards.

    model: returns the loss of `batch`, and has trained. reduce: what it does with a bucket.
    """
    device = next(model.parameters()).device
    buckets = [torch.zeros(n_bytes // 4, device=device) for n_bytes in _bucket_bytes(model)]

    def reduce_alone() -> None:
        for future in [reduce(bucket) for bucket in buckets]:
            future.wait()

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


def _bucket_bytes(model: DistributedDataParallel) -> list[int]:
    return [int(n_bytes) for n_bytes in str(model._get_ddp_logging_data()["rebuilt_bucket_sizes"]).split(",")]


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


READING = {
    "cpu": """\
On CPUs the collectives take cores from the pass, so what is hidden of them says nothing of a network. "a network": in
place of the reduction a wait for half of the pass's time, which takes no core: what DDP's buckets allow to be hidden,
which is all but the last bucket's part, as long as the network keeps up.""",
    "cuda": "The collectives run beside the pass: what is not hidden is what the reduction costs in a step.",
}
"""What the table's last column says on a device."""

SEEN = 0.1
"""Least share of the pass that a reduction has to take alone: the time of a pass varies by some hundredths."""


def table(cases: Iterable[dict[str, Any]], name: Callable[[dict[str, Any]], str], device: str) -> list[str]:
    """Lines for the cases of `bench.ddp` on "cpu" or "cuda". name: of a case, 24 characters wide."""
    counts, times = ("MB", "MB sent"), ("with s", "without", "alone")
    heads = [f"{'calls':>7}", *(f"{head:>10}" for head in counts), *(f"{head:>9}" for head in times), f"{'hidden':>8}"]
    lines = [f"{'a step exchanges':24}" + "".join(heads)]
    for case in cases:
        kinds = case["exchange"].values()
        calls, given, sent = (sum(kind[field] for kind in kinds) for field in ("calls", "n_bytes", "sent"))
        line = f"{name(case)}{calls:>7}{given / 1e6:>10,.2f}{sent / 1e6:>10,.2f}"
        lines.append(line + _overlap_cells(case["overlap"]))
        if case["network"] is not None:
            lines.append(f"{'      a network':51}" + _overlap_cells(case["network"]))
    return [
        *lines,
        "MB that a rank hands to collectives, and sends by a ring; forward and backward pass with and without DDP's "
        "reduction,",
        "and this alone: hidden = 1 - (with - without) / alone, if alone is at least a tenth of without",
        *READING[device].splitlines(),
    ]


def _overlap_cells(overlap: dict[str, dict[str, float]] | None) -> str:
    if overlap is None:
        return ""
    times = [overlap[field]["median"] for field in ("with_s", "without_s", "alone_s")]
    hidden = f"{overlap['hidden']['median']:.0%}" if times[2] >= SEEN * times[1] else "-"
    return "".join(f"{seconds:>9.3f}" for seconds in times) + f"{hidden:>8}"
