"""Metrics of each step, as JSON lines and CSV.

A resumed run first drops the lines of steps that it is going to repeat, so that every file reads as if the run had
never been interrupted.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

from rwkv_cluster.runtime.counts import Count
from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.runtime.own_file import open_own, read_own
from rwkv_cluster.workdir import WorkDir, atomic_write, atomic_writer


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics. step: steps done, from 1. grad_norm: None where fp16 skipped the update.

    tokens: seen so far. tokens_per_s: without pauses for validation, checkpoints and exported weights. memory_mb: peak
    of this process. val_bits_per_byte: None where tokens are no text. save_wait_s: seconds that training has waited for
    checkpoints since the step before. mfu, hfu: shares of the devices' peak, see `metrics.throughput`; None where it is
    not known. trained_tokens: of this step; None where all are trained on. val_loss_ema: of the averaged weights. The
    rest: see `train.optimizers.update_statistics`. docs/metrics.md says it all.
    """

    step: Count
    loss: float
    grad_norm: float | None
    lr: float
    tokens: Count
    tokens_per_s: float
    memory_mb: float
    val_loss: float | None = None
    val_perplexity: float | None = None
    val_bits_per_byte: float | None = None
    save_wait_s: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    trained_tokens: Count | None = None
    val_loss_ema: float | None = None
    grad_signal: float | None = None
    grad_noise: float | None = None
    update_ratio_emb: float | None = None
    update_ratio_blocks: float | None = None
    update_ratio_head: float | None = None

    def metrics(self) -> dict[str, float]:
        """The values that this step has, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


COLUMNS = tuple(field.name for field in fields(StepRecord))
EMA_COLUMNS = ("val_loss_ema",)
STATISTICS_COLUMNS = COLUMNS[COLUMNS.index("grad_signal") :]
OPTIONAL_COLUMNS = (*EMA_COLUMNS, *STATISTICS_COLUMNS)
"""Those that a table has only where the run is to record them."""


class MetricsWriter:
    """Appends to the metrics files of a work directory. Only rank 0 has one.

    start_step: up to where the files hold steps that are complete; later lines go. is_first_session: of this process.
    logged_step: up to where an earlier session has recorded, and logged, numbers that are the same to the bit; whether
    or not a checkpoint holds them. After a rollback others come. optional: those of OPTIONAL_COLUMNS in the table.
    """

    def __init__(
        self, work: WorkDir, *, start_step: int, is_first_session: bool = True, optional: Collection[str] = ()
    ) -> None:
        self._columns = [name for name in COLUMNS if name not in OPTIONAL_COLUMNS or name in optional]
        self._jsonl_path, self._csv_path = work.metrics, work.metrics_csv
        with writing(work.logs, 0):
            recorded_step = _last_step(self._jsonl_path)
            keep_lines(self._jsonl_path, lambda line: json.loads(line)["step"] <= start_step)
            self._rewrite_csv()
            self._jsonl, self._csv = appending(self._jsonl_path), appending(self._csv_path)
        self.logged_step = recorded_step if is_first_session else start_step

    def _rewrite_csv(self) -> None:
        """Write the CSV anew from the JSON lines: an earlier version's may have other columns."""
        with atomic_writer(self._csv_path) as file:
            file.write((",".join(self._columns) + "\n").encode())
            for line in _lines(self._jsonl_path):
                file.write(_csv_row(json.loads(line), self._columns).encode())

    def step(self, record: StepRecord) -> None:
        """Write the step's line. Raises CheckpointError when the disk refuses it."""
        values = record.metrics()
        for path, file, line in (
            (self._jsonl_path, self._jsonl, json.dumps(values) + "\n"),
            (self._csv_path, self._csv, _csv_row(values, self._columns)),
        ):
            with writing(path, len(line)):
                file.write(line)

    def close(self) -> None:
        for file in (self._jsonl, self._csv):
            with suppress(OSError):  # lines are written at once: what is left is one that the disk has refused
                file.close()


def appending(path: Path) -> TextIO:
    """Open a record file for appending; each line goes to it at once."""
    return open(path, "a", encoding="utf-8", buffering=1, newline="", opener=open_own)


def _csv_row(values: Mapping[str, float], columns: Sequence[str]) -> str:
    row = io.StringIO()
    csv.writer(row, lineterminator="\n").writerow(values.get(name, "") for name in columns)
    return row.getvalue()


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that may not be there. A line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = read_own(path).decode(errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _last_step(path: Path) -> int:
    """Highest step of a file of metrics; 0 when there is none."""
    for line in reversed(_lines(path)):
        with suppress(ValueError, KeyError):
            return int(json.loads(line)["step"])
    return 0


def keep_lines(path: Path, is_kept: Callable[[str], bool]) -> None:
    """Rewrite `path` with the lines that are kept. A line cut short by a kill is dropped."""
    if not path.exists():
        return
    lines = []
    for line in _lines(path):
        try:
            if is_kept(line):
                lines.append(line)
        except (ValueError, KeyError, IndexError):
            continue
    atomic_write(path, "".join(lines).encode())
