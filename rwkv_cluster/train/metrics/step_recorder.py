"""The numbers of each step, and all that they are written to: metrics, step times, progress, loggers, epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lightning_fabric.loggers import Logger

from rwkv_cluster.runtime.malloc import peak_memory_mb
from rwkv_cluster.train.metrics.loggers import log_metrics
from rwkv_cluster.train.metrics.metrics_file import MetricsWriter, StepRecord
from rwkv_cluster.train.metrics.profiler import StepProfile
from rwkv_cluster.train.metrics.progress import Progress
from rwkv_cluster.train.metrics.step_timer import StepTimer
from rwkv_cluster.train.metrics.step_times import StepTimes
from rwkv_cluster.train.metrics.throughput import Utilization
from rwkv_cluster.train.metrics.train_log import TrainLog


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. step: from 0. loss: mean over the targets that are trained on, without L2Wrap.

    grad_norm: before clipping; infinite where fp16's loss scaling skipped the update. lr: before a group's multiplier.
    n_trained: number of those targets; None where all are trained on. statistics: fields of `StepRecord` beside these.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    n_trained: int | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)


class EpochMean:
    """Running mean of the losses of an epoch; `sum` and `count` carry it over a resume."""

    def __init__(self, sum: float = 0.0, count: int = 0) -> None:
        self.sum = sum
        self.count = count

    def add(self, loss: float) -> None:
        """Count one more step's loss."""
        self.sum += loss
        self.count += 1

    def take(self) -> float:
        """The mean so far; starts anew."""
        mean = self.sum / self.count
        self.sum, self.count = 0.0, 0
        return mean


@dataclass(frozen=True)
class RunRecords:
    """Files and lines that rank 0 writes for all ranks."""

    metrics: MetricsWriter
    train_log: TrainLog
    progress: Progress

    def close(self) -> None:
        """Close the files, and end the live line."""
        self.metrics.close()
        self.progress.close()


class StepRecorder:
    """Measures the steps of this rank and writes them down. Every rank has one; what all share is written by rank 0.

    run_records: None on every rank but 0. utilization: None where the devices' peak is not known. profile: None
    where none is wanted.
    """

    def __init__(
        self,
        timer: StepTimer,
        step_times: StepTimes,
        epoch_mean: EpochMean,
        *,
        run_records: RunRecords | None,
        utilization: Utilization | None,
        profile: StepProfile | None,
    ) -> None:
        self.timer = timer
        self.epoch_mean = epoch_mean
        self._step_times = step_times
        self._run_records = run_records
        self._utilization = utilization
        self._profile = profile

    def begin(self, step: int) -> None:
        """Begin the profile. step: steps done."""
        if self._profile is not None:
            self._profile.begin(step)

    def measure(
        self, result: StepResult, *, tokens_per_step: int, save_wait_s: float, device: torch.device
    ) -> StepRecord:
        """The numbers of the step that has ended, everything since the step before included; a new timing begins."""
        step, timing = result.step + 1, self.timer.finish_step()
        self._step_times.add(step, timing)
        tokens_per_s = tokens_per_step / timing.training_s
        return StepRecord(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            lr=result.lr,
            tokens=step * tokens_per_step,
            tokens_per_s=tokens_per_s,
            memory_mb=peak_memory_mb(device),
            save_wait_s=save_wait_s or None,
            mfu=self._utilization.mfu(tokens_per_s) if self._utilization else None,
            hfu=self._utilization.hfu(tokens_per_s) if self._utilization else None,
            trained_tokens=result.n_trained,
            **result.statistics,
        )

    def record(self, record: StepRecord, loggers: Sequence[Logger], committed_step: int | None) -> None:
        """Write one step's numbers. committed_step: of the newest checkpoint that this session has committed."""
        if self._run_records is not None:
            metrics = self._run_records.metrics
            metrics.step(record)
            self._run_records.progress.show(record, committed_step)
            log_metrics(loggers, record.metrics(), record.step, metrics.logged_step)

    def end_epoch(self, epoch: int, lr: float) -> None:
        """Write the epoch's mean loss; the next epoch's begins. lr: of its last step."""
        mean = self.epoch_mean.take()
        if self._run_records is not None:
            self._run_records.train_log.epoch(epoch, mean, lr)

    def profile_step(self) -> None:
        """Let the profiler do its work between two steps."""
        if self._profile is not None:
            with self.timer.phase("profile"):
                self._profile.step()

    def flush(self) -> None:
        """Write what is measured and not written yet, so that every line up to a checkpoint is there before it is."""
        self._step_times.flush()

    def end(self) -> None:
        """Write what is left after the session's last step."""
        self._step_times.flush()
        if self._profile is not None:
            self._profile.end()

    def close(self) -> None:
        """Close the files; a profile under way is left unwritten."""
        for writer in (self._profile, self._run_records, self._step_times):
            if writer is not None:
                writer.close()
