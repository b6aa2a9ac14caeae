"""`train --profile`: a trace of a few steps by torch's profiler, and a table of where their time goes, on each rank.

`logs/profile/rank-<N>.trace.json.gz` opens in https://ui.perfetto.dev and in chrome://tracing; `rank-<N>.json` and
`rank-<N>.txt` are what `rwkv_cluster.train.metrics.profile_breakdown` finds in it. The profiler watches and changes
nothing: the weights are the same to the bit. Steps under it are slower, by what it costs to note every operation.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from torch import profiler

from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.metrics.profile_breakdown import Breakdown, break_down, read_trace
from rwkv_cluster.workdir import TEMPORARY_PREFIX, atomic_write

log = logging.getLogger("rwkv_cluster")

SKIPPED_STEPS = 2  # which load kernels, compile, and fill caches
WARM_UP_STEPS = 1  # of the profiler itself


class StepProfile:
    """Profiles `n_steps` of a session into `folder`, or as many as it still has after its first three."""

    def __init__(self, folder: Path, n_steps: int, *, on_cuda: bool) -> None:
        activities = [profiler.ProfilerActivity.CPU]
        activities += [profiler.ProfilerActivity.CUDA] if on_cuda else []
        schedule = profiler.schedule(wait=SKIPPED_STEPS, warmup=WARM_UP_STEPS, active=n_steps, repeat=1)
        self._folder = folder
        self._on_cuda = on_cuda
        self._n_steps = n_steps
        self._done = 0
        self._first_step = 0
        self._wanted = True
        self._profiler: profiler.profile | None = profiler.profile(
            activities=activities, schedule=schedule, on_trace_ready=self._write
        )

    def begin(self, step: int) -> None:
        """Start the session, after `step` steps of the run."""
        self._first_step = step + SKIPPED_STEPS + WARM_UP_STEPS + 1
        if self._profiler is not None:
            self._profiler.start()

    def step(self) -> None:
        """Note the end of a step. Writes the profile after the last that belongs to it."""
        self._done += 1
        if self._profiler is not None:
            self._profiler.step()

    def end(self) -> None:
        """Write what there is, where the session ends before the last step that was asked for."""
        if self._profiler is None:
            return
        self._stop()
        if self._wanted and rank() == 0:
            log.warning(
                "no step was profiled: this session has ended before its step %d",
                SKIPPED_STEPS + WARM_UP_STEPS + 1,
            )

    def close(self) -> None:
        """Stop profiling without writing."""
        self._wanted = False
        self._stop()

    def _stop(self) -> None:
        active, self._profiler = self._profiler, None
        if active is not None:
            active.stop()

    def _write(self, finished: profiler.profile) -> None:
        n_steps = min(self._done - SKIPPED_STEPS - WARM_UP_STEPS, self._n_steps)
        if not self._wanted or n_steps < 1:
            return
        self._wanted = False
        path = self._folder / f"rank-{rank()}.trace.json.gz"
        temporary = path.with_name(TEMPORARY_PREFIX + path.name)
        with writing(path, 0):
            self._folder.mkdir(exist_ok=True)
            finished.export_chrome_trace(str(temporary))
            temporary.replace(path)
        self._tell(path, n_steps)

    def _tell(self, path: Path, n_steps: int) -> None:
        breakdown = break_down(read_trace(path), n_steps)
        last = self._first_step + n_steps - 1
        where = f"steps {self._first_step} to {last} on rank {rank()}"
        facts = {"first_step": self._first_step, "last_step": last, "rank": rank(), **asdict(breakdown)}
        text = f"{table(breakdown, where)}\ntrace {path}\n"
        for name, content in ((f"rank-{rank()}.json", json.dumps(facts) + "\n"), (f"rank-{rank()}.txt", text)):
            with writing(self._folder / name, len(content)):
                atomic_write(self._folder / name, content.encode())
        if self._on_cuda and breakdown.busy is None:
            log.warning("rank %d: the profiler has seen no work of the GPU; the table is of the host's time", rank())
        if rank() == 0:
            log.info(text.rstrip("\n"))


def table(breakdown: Breakdown, where: str) -> str:
    """The parts, for a person."""
    step_ms = 1e3 / breakdown.n_steps
    head = f"profile of {where}: {step_ms * breakdown.wall_s:.2f} ms a step"
    if breakdown.busy is not None:
        head += (
            f", of the GPU {step_ms * breakdown.whole_s:.2f} ms, which is busy {100 * breakdown.busy:.1f} % of the time"
        )
    lines = [head]
    for part, share in breakdown.shares.items():
        bar = "#" * round(40 * share)
        lines.append(f"{part:14}{step_ms * breakdown.parts_s[part]:10.3f} ms {100 * share:6.1f} %  {bar}".rstrip())
    return "\n".join(lines)
