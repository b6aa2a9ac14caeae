"""Where each rank's time goes, step by step: `logs/events/rank-<N>.jsonl`, written by every rank for itself.

A rank that waits for another, for its data or for the disk is seen by comparing these files. What the numbers mean is
in `rwkv_cluster.train.metrics.step_timer`. A resumed run drops the lines of steps that it repeats, as from
`metrics.jsonl`.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.runtime.own_file import open_own
from rwkv_cluster.train.metrics.metrics_file import keep_lines
from rwkv_cluster.train.metrics.step_timer import StepTiming


@dataclass(frozen=True)
class StepParts:
    """One line. step: steps done, from 1. Seconds, of all the step's micro batches.

    eval_s: of the validation after this step. save_s: of what was saved after the step before it, as `save_wait_s`
    in the metrics: this line is on the disk before the checkpoint of its step is.
    """

    step: int
    data_s: float
    forward_s: float
    backward_s: float
    optimizer_s: float
    save_s: float
    eval_s: float

    @classmethod
    def of(cls, step: int, timing: StepTiming) -> StepParts:
        """Parts of a step to the microsecond. Waits for a device that has not done the step."""
        seconds = {f"{phase}_s": round(value, 6) for phase, value in timing.phases_s().items()}
        return cls(step=step, **{field.name: seconds[field.name] for field in fields(cls) if field.name != "step"})


class StepTimes:
    """Appends to one rank's file. folder: `WorkDir.step_times`."""

    def __init__(self, folder: Path, rank: int, start_step: int) -> None:
        self._path = rank_file(folder, rank)
        self._pending: tuple[int, StepTiming] | None = None
        with writing(self._path, 0):
            folder.mkdir(exist_ok=True)
            _rewind(self._path, start_step)
            self._file = open(  # noqa: SIM115 -- closed by close()
                self._path, "a", encoding="utf-8", buffering=1, opener=open_own
            )

    def add(self, step: int, timing: StepTiming) -> None:
        """Add a line; on CUDA it is written with the next step's. Raises CheckpointError when the disk refuses it."""
        self.flush()
        self._pending = (step, timing)
        if not timing.spans:
            self.flush()

    def flush(self) -> None:
        """Write what is still to be written; waits for the device where that is of the step that has just ended."""
        if self._pending is None:
            return
        line = json.dumps(asdict(StepParts.of(*self._pending))) + "\n"
        self._pending = None
        with writing(self._path, len(line)):
            self._file.write(line)

    def close(self) -> None:
        with suppress(OSError):  # lines are written at once: what is left is one that the disk has refused
            self._file.close()


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.jsonl"


def rewind_absent(folder: Path, world_size: int, start_step: int) -> None:
    """Drop later steps' lines of ranks that this session does not have: an earlier one had more. For rank 0."""
    for path in folder.glob("rank-*.jsonl"):
        match = re.fullmatch(r"rank-(\d+)\.jsonl", path.name)
        if match and int(match[1]) >= world_size:
            _rewind(path, start_step)


def _rewind(path: Path, start_step: int) -> None:
    keep_lines(path, lambda line: json.loads(line)["step"] <= start_step)
