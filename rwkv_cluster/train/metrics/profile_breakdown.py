"""A trace of torch's profiler -> where a step's time goes. Torch-free, and all of it is computed from the file.

Every moment belongs to one part, so the parts add up to the whole. What activation checkpointing computes again is
done, and counted, in the backward pass:

    WKV            the WKV operator, forward and backward, with all that it calls
    matmul         matrix products anywhere else, the head's included
    communication  collectives between ranks
    loss           the head's loss and its gradient, without the products
    data, forward, backward, optimizer     the rest of each phase, see `rwkv_cluster.train.metrics.step_timer`
    other          the rest: records, validation, saving

On a CPU the whole is the wall time of the profiled steps, and a moment goes to the innermost call on the main thread
that tells. Collectives run on threads of their own: they count where the main thread has nothing to do meanwhile. With
a GPU the whole is the time of all kernels and copies that the steps have launched, each with the call that launched it;
`busy` is the share of the wall time in which there was one.

The format is Chrome's "Trace Event Format", with kineto's categories: cpu_op, user_annotation, cuda_runtime, kernel.
"""

from __future__ import annotations

import bisect
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PARTS = ("data", "forward", "WKV", "matmul", "loss", "backward", "optimizer", "communication", "other")
PHASE = "rwkv_cluster.phase:"
"""Before a phase's name, in the name of its annotation."""

_STEP = re.compile(r"ProfilerStep#\d+")
_KINDS = (
    ("WKV", re.compile(r"[Ww]kv[567]|ChunkRWKV6|ChunkDPLR")),  # the last two: flash-linear-attention's
    ("communication", re.compile(r"nccl|gloo:|c10d::|record_param_comms", re.IGNORECASE)),
    (
        "matmul",
        re.compile(r"aten::(add|b|addb|baddb)?mm_?|aten::(linear|matmul)|mkldnn::_linear_pointwise"),
    ),
)
_LOSS = re.compile(r"_HeadLoss(Backward)?")
_CALLS = ("cpu_op", "user_annotation")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Breakdown:
    """Time of `n_steps` steps together. parts_s add up to whole_s. busy: of a GPU; None on a CPU."""

    n_steps: int
    wall_s: float
    whole_s: float
    parts_s: dict[str, float]
    busy: float | None

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the whole, from 0 to 1."""
        return {part: seconds / self.whole_s for part, seconds in self.parts_s.items()}


class Interval(NamedTuple):
    begin: float
    end: float


class Call(NamedTuple):
    """Something that a thread does. part: what it tells of itself; None where its caller decides."""

    begin: float
    end: float
    name: str
    part: str | None
    correlation: int | None


class Moment(NamedTuple):
    """A piece of a thread's time. idle: no operation runs, but the Python code of a phase or nothing."""

    begin: float
    end: float
    part: str
    idle: bool
    correlation: int | None


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Complete events of a gzipped trace. Times are microseconds."""
    with gzip.open(path, "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def break_down(events: list[dict[str, Any]], n_steps: int | None = None) -> Breakdown:
    """The first `n_steps` profiled steps of a trace; by default all. Raises ValueError where there is none."""
    steps = [event for event in events if event.get("cat") == "user_annotation" and _STEP.fullmatch(event["name"])]
    steps = sorted(steps, key=lambda event: event["ts"])[:n_steps]
    if not steps:
        raise ValueError("the trace has no step")
    window = Interval(min(event["ts"] for event in steps), max(event["ts"] + event["dur"] for event in steps))
    main = steps[0]["tid"]
    work = [event for event in events if event.get("cat") in _DEVICE_WORK]
    threads = _threads(events, window)
    if work:
        parts, busy = _device_parts(work, threads, main, window)
    else:
        parts, busy = _main_thread_parts(events, threads.get(main, []), main, window), None
    seconds = {part: parts.get(part, 0.0) / 1e6 for part in PARTS}
    return Breakdown(len(steps), (window.end - window.begin) / 1e6, sum(seconds.values()), seconds, busy)


def _threads(events: list[dict[str, Any]], window: Interval) -> dict[Any, list[Call]]:
    """Calls by thread, as far as they are in the window, callers before what they call."""
    threads: dict[Any, list[Call]] = {}
    for event in events:
        begin, end = max(event["ts"], window.begin), min(event["ts"] + event["dur"], window.end)
        is_launch = event.get("cat") in _LAUNCHES
        if begin >= end or not (is_launch or event.get("cat") in _CALLS) or _STEP.fullmatch(event["name"]):
            continue
        correlation = event.get("args", {}).get("correlation") if is_launch else None
        part = None if is_launch else part_of(event["name"])
        threads.setdefault(event["tid"], []).append(Call(begin, end, event["name"], part, correlation))
    return {tid: sorted(calls, key=lambda call: (call.begin, -call.end)) for tid, calls in threads.items()}


def part_of(name: str) -> str | None:
    """Part that a call tells by its name; None where it tells nothing."""
    if name.startswith(PHASE):
        phase = name.removeprefix(PHASE)
        return phase if phase in PARTS else "other"
    own = name.removeprefix("autograd::engine::evaluate_function: ")
    for part, pattern in _KINDS:
        if (pattern.fullmatch if part == "matmul" else pattern.search)(own):
            return part
    return "loss" if _LOSS.fullmatch(own) else None


def _moments(calls: Iterable[Call], window: Interval) -> Iterator[Moment]:
    """The whole window, cut where a call of a thread begins or ends."""
    now, running = window.begin, [Moment(window.begin, window.end, "other", True, None)]
    for call in [*calls, Call(window.end, window.end, "", None, None)]:
        while running and running[-1].end <= call.begin:
            ended = running.pop()
            if ended.end > now:
                yield ended._replace(begin=now)
                now = ended.end
        if running and call.begin > now:
            yield running[-1]._replace(begin=now, end=call.begin)
            now = call.begin
        if running:
            running.append(_called(call, running[-1]))


def _called(call: Call, caller: Moment) -> Moment:
    is_phase = call.name.startswith(PHASE)
    return Moment(call.begin, min(call.end, caller.end), _nearer(caller.part, call.part), is_phase, call.correlation)


def _nearer(outer: str, own: str | None) -> str:
    """A call has its own part, unless its caller is WKV, communication or matmul: these keep all that they call."""
    kinds = [part for part, _ in _KINDS]
    return outer if own is None or outer in kinds else own


def _main_thread_parts(
    events: list[dict[str, Any]], calls: list[Call], main: Any, window: Interval
) -> dict[str, float]:
    elsewhere = _union(
        Interval(event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["tid"] != main and event.get("cat") in _CALLS and part_of(event["name"]) == "communication"
    )
    parts: dict[str, float] = {}
    for moment in _moments(calls, window):
        waited = _overlap(elsewhere, moment) if moment.idle else 0.0
        parts["communication"] = parts.get("communication", 0.0) + waited
        parts[moment.part] = parts.get(moment.part, 0.0) + moment.end - moment.begin - waited
    return parts


def _device_parts(
    work: list[dict[str, Any]], threads: dict[Any, list[Call]], main: Any, window: Interval
) -> tuple[dict[str, float], float]:
    """Device time by part, and the share of the window in which the device was busy."""
    phases = [call for call in threads.get(main, []) if call.name.startswith(PHASE)]
    launched = {
        moment.correlation: moment.part
        for tid, calls in threads.items()
        for moment in _moments(calls if tid == main else _with_phases(calls, phases), window)
        if moment.correlation is not None
    }
    parts: dict[str, float] = {}
    for event in work:
        part = launched.get(event.get("args", {}).get("correlation"))
        if part is None:  # launched before or after the steps
            continue
        part = "communication" if part_of(event["name"]) == "communication" else part
        parts[part] = parts.get(part, 0.0) + event["dur"]
    busy = _overlap(_union(Interval(event["ts"], event["ts"] + event["dur"]) for event in work), window)
    return parts, busy / (window.end - window.begin)


def _with_phases(calls: list[Call], phases: list[Call]) -> list[Call]:
    """Autograd has a thread for each GPU, on which a phase of the main thread, which waits for it, is not marked."""
    return sorted([*phases, *calls], key=lambda call: (call.begin, -call.end))


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint and in order."""
    merged: list[Interval] = []
    for interval in sorted(intervals):
        if merged and interval.begin <= merged[-1].end:
            merged[-1] = Interval(merged[-1].begin, max(merged[-1].end, interval.end))
        else:
            merged.append(interval)
    return merged


def _overlap(union: list[Interval], moment: Moment | Interval) -> float:
    """How long `moment` lies in `union`."""
    first = max(bisect.bisect_right(union, (moment.begin, float("inf"))) - 1, 0)
    total = 0.0
    for interval in union[first:]:
        if interval.begin >= moment.end:
            break
        total += max(0.0, min(interval.end, moment.end) - max(interval.begin, moment.begin))
    return total
