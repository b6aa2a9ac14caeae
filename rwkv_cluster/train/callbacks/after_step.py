"""What happens between optimizer steps: record, evaluate, export weights, save, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from rwkv_cluster.config import Config
from rwkv_cluster.data.binidx import IndexedTokens
from rwkv_cluster.data.sampler import Horizon
from rwkv_cluster.model.state_dict import save_pth
from rwkv_cluster.runtime.malloc import peak_memory_mb
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.checkpoint import rng_state
from rwkv_cluster.train.checkpoint.checkpointer import Checkpointer
from rwkv_cluster.train.distributed import collectives
from rwkv_cluster.train.evaluate import EvalResult, evaluate
from rwkv_cluster.train.guards.early_stop import EarlyStopState
from rwkv_cluster.train.guards.spike_guard import Spike, SpikeGuard
from rwkv_cluster.train.guards.stop_request import StopRequest
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.train.metrics.loggers import log_metrics
from rwkv_cluster.train.metrics.metrics_file import MetricsWriter, StepRecord
from rwkv_cluster.train.metrics.profiler import StepProfile
from rwkv_cluster.train.metrics.progress import Progress
from rwkv_cluster.train.metrics.step_timer import Phase, StepTimer
from rwkv_cluster.train.metrics.step_times import StepTimes
from rwkv_cluster.train.metrics.throughput import Utilization
from rwkv_cluster.train.module import StepResult, TrainingModule
from rwkv_cluster.train.parallel.precision import DTYPES
from rwkv_cluster.train.sample import Sampler
from rwkv_cluster.workdir import WorkDir


class EpochMean:
    """Running mean of the losses of an epoch; `sum` and `count` carry it over a resume."""

    def __init__(self, sum: float = 0.0, count: int = 0) -> None:
        self.sum = sum
        self.count = count

    def add(self, loss: float) -> None:
        self.sum += loss
        self.count += 1

    def take(self) -> float:
        """The mean so far; starts anew."""
        mean = self.sum / self.count
        self.sum, self.count = 0.0, 0
        return mean


class AfterStep(Callback):
    """After each step, on every rank and in this order: look for a spike, evaluate, record, end the epoch, save, stop.

    identity: what state.json says of the run. records and progress: None on every rank but 0. val_tokens: None
    without validation. token_sizes: see `evaluate`. use: None where the devices' peak is not known. profile: None
    without one. unfinished: numbers of the last step, where an earlier session was stopped in what follows a step; at
    the end of this session, of its own. logged_step: up to where an earlier session has logged the same numbers, see
    `train.loggers`. do: told what this rank is going to do. As a context manager it closes the files it writes.
    """

    def __init__(
        self,
        config: Config,
        work: WorkDir,
        horizon: Horizon,
        *,
        identity: dict[str, Any],
        timer: StepTimer,
        stop_request: StopRequest,
        records: MetricsWriter | None,
        step_times: StepTimes,
        progress: Progress | None,
        use: Utilization | None,
        profile: StepProfile | None,
        logged_step: int,
        val_tokens: IndexedTokens | None,
        token_sizes: Tensor | None,
        sampler: Sampler,
        epoch_mean: EpochMean,
        start_epoch: int,
        random_states: list[dict[str, Any]] | None,
        unfinished: StepRecord | None,
        checkpointer: Checkpointer,
        events: Events,
        guard: SpikeGuard,
        improvement: EarlyStopState,
        do: Callable[[str], None],
    ) -> None:
        self.last_loss: float | None = None
        self.last_val: EvalResult | None = None
        self.spike: Spike | None = None
        """What has ended the session, if it was that."""
        self.unfinished = unfinished
        self.improvement = improvement
        self._config = config
        self._work = work
        self._horizon = horizon
        self._identity = identity
        self._timer = timer
        self._stop_request = stop_request
        self._records = records
        self._step_times = step_times
        self._progress = progress
        self._use = use
        self._profile = profile
        self._logged_step = logged_step
        self._val_tokens = val_tokens
        self._token_sizes = token_sizes
        self._sampler = sampler
        self._epoch_mean = epoch_mean
        self._start_epoch = start_epoch
        self._random_states = random_states
        self._saved_at = time.monotonic()
        self._checkpointer = checkpointer
        self._events = events
        self._guard = guard
        self._do = do

    def __enter__(self) -> AfterStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpointer.abandon()
        for writer in (self._profile, self._records, self._step_times, self._progress):
            if writer is not None:
                writer.close()

    def votes(self) -> tuple[bool, bool, bool]:
        """This rank's wish to stop and to save at the next step boundary, and whether it has written its checkpoint."""
        interval = self._config.checkpoint.save_interval_s
        overdue = interval is not None and time.monotonic() - self._saved_at > interval
        return self._stop_request.requested(), overdue and rank() == 0, self._checkpointer.written()

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._stop_request.begin_steps()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        if self._random_states is not None:
            rng_state.restore(self._random_states, rank())
        if self._profile is not None:
            self._profile.begin(module.step)
        collectives.fault_point("train.step", step=module.step)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        assert isinstance(module, TrainingModule)
        if self.unfinished is not None and not module.should_stop:
            record, self.unfinished = self.unfinished, None
            with self._timer.phase("other"):
                self._complete_step(module, lambda: record, again=True)
            trainer.should_stop = module.should_stop

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        assert isinstance(module, TrainingModule)
        if module.result is None:
            return
        result, module.result = module.result, None
        module.step += 1
        collectives.fault_point("train.step", step=module.step)
        with self._timer.phase("other"):
            if module.all_written:
                with self._pause("save", "saving a checkpoint"):
                    self._checkpointer.finish()
            self._finish_step(module, result)
            if self._profile is not None:
                with self._timer.phase("profile"):
                    self._profile.step()
        trainer.should_stop = module.should_stop

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._step_times.flush()
        if self._profile is not None:
            self._profile.end()

    @contextmanager
    def _pause(self, phase: Phase, doing: str) -> Iterator[None]:
        """Something that is no training and may take long."""
        self._do(doing)
        with self._timer.phase(phase):
            yield

    def _finish_step(self, module: TrainingModule, result: StepResult) -> None:
        self.last_loss = result.loss
        self.spike = self._guard.update(result.step, result.loss)
        if self.spike is not None:
            self._record(module, self._measured(module, result))
            self._checkpointer.finish()
            module.should_stop = True
            return
        self._epoch_mean.add(result.loss)
        self._complete_step(module, partial(self._measured, module, result))

    def _complete_step(
        self, module: TrainingModule, measured: Callable[[], StepRecord], *, again: bool = False
    ) -> None:
        """What follows a step, in order. measured: its numbers. again: an earlier session was stopped in this.

        A stop ends validation and sampling at once. Both then come again before the run goes on, from the same weights.
        """
        epoch = self._horizon.epoch_of(module.step - 1)
        epoch_ends = self._horizon.epoch_end(epoch) == module.step
        run_ends = module.step == self._horizon.total_steps
        training, saving = self._config.training, self._config.checkpoint
        val, improvement = None, self.improvement
        try:
            if self._val_tokens is not None and (
                run_ends or _is_due(module.step, training.val_interval_steps, epoch_ends)
            ):
                val = self._evaluate(module, self._val_tokens)
                improvement = improvement.after(val.loss, training.early_stop_min_delta)
                if improvement.ends(training.early_stop_patience) and not run_ends:
                    self._events.add("early_stop", module.step, **vars(improvement))
                    run_ends = module.should_stop = True
            if self._sampler.is_due(module.step):
                with self._pause("eval", "sampling"):
                    self._sampler.sample(module.model, module.step, partial(self._check_for_stop, module))
        except _CutShort:
            module.should_stop = True
            self.unfinished = measured()
            if not again:
                self._save_last(module)
            return
        self.improvement, self.last_val = improvement, val or self.last_val
        record = measured()
        self._record(module, replace(record, **_of_validation(val)) if val is not None else record)
        with self._timer.phase("save"):
            if epoch_ends:
                self._end_epoch(module, epoch, record.lr, run_ends=run_ends)
            if run_ends:
                self._export(module, "final")
            due = module.should_save or _is_due(module.step, saving.save_interval_steps, epoch_ends)
            if run_ends or module.should_stop:
                self._save_last(module)
            elif due and not self._guard.is_spiking and not again:
                self._step_times.flush()  # every line up to a checkpoint's step is there before the checkpoint is
                self._save(module, at_once=not self._checkpointer.background)

    def _evaluate(self, module: TrainingModule, tokens: IndexedTokens) -> EvalResult:
        """Raises _CutShort."""
        model = module.trainer.strategy.model or module

        def loss_of(batch: Tensor) -> Tensor:
            self._check_for_stop(module)
            return model(batch)

        with self._pause("eval", "evaluating"):
            val = evaluate(
                loss_of,
                tokens,
                ctx_len=self._config.model.ctx_len,
                batch_size=self._config.training.micro_bsz,
                max_tokens=self._config.training.val_max_tokens,
                device=module.device,
                token_sizes=self._token_sizes,
            )
        self._events.add("validation", module.step, **vars(val), bits_per_byte=val.bits_per_byte)
        return val

    def _check_for_stop(self, module: TrainingModule) -> None:
        """Collective. Raises _CutShort on every rank when one of them is asked to stop."""
        collectives.fault_point("train.aside", step=module.step)
        if collectives.any_rank(self._stop_request.requested(), module.device):
            raise _CutShort

    def _measured(self, module: TrainingModule, result: StepResult) -> StepRecord:
        """The step's own numbers; a new timing begins."""
        timing = self._timer.finish_step()
        self._step_times.add(module.step, timing)
        tokens_per_s = module.plan.tokens_per_step / timing.training_s
        return StepRecord(
            step=module.step,
            loss=result.loss,
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            lr=result.lr,
            tokens=module.step * module.plan.tokens_per_step,
            tokens_per_s=tokens_per_s,
            memory_mb=peak_memory_mb(module.device),
            save_wait_s=self._checkpointer.take_waited_s() or None,
            mfu=self._use.mfu(tokens_per_s) if self._use else None,
            hfu=self._use.hfu(tokens_per_s) if self._use else None,
        )

    def _record(self, module: TrainingModule, record: StepRecord) -> None:
        if self._records is not None:
            self._records.step(record)
        if self._progress is not None:
            self._progress.show(record, self._checkpointer.committed_step)
        if self._records is not None:
            log_metrics(module.loggers, record.metrics(), module.step, self._logged_step)

    def _end_epoch(self, module: TrainingModule, epoch: int, lr: float, *, run_ends: bool) -> None:
        mean = self._epoch_mean.take()
        if self._records is not None:
            self._records.epoch(epoch, mean, lr, epoch - self._start_epoch)
        if run_ends or (epoch + 1) % self._config.training.epoch_save == 0:
            self._export(module, str(epoch))

    def _export(self, module: TrainingModule, label: str) -> None:
        """RWKV-LM's flat file of weights, in the training precision."""
        self._do("exporting weights")
        weights = module.state.weights()
        if weights is not None:
            path = self._work.out / f"rwkv-{label}.pth"
            save_pth(path, weights, DTYPES[self._config.training.precision])
            self._events.add("export", module.step, path=path)

    def _save_last(self, module: TrainingModule) -> None:
        """The session's last checkpoint."""
        self._step_times.flush()
        self._save(module, at_once=True)

    def _save(self, module: TrainingModule, *, at_once: bool) -> None:
        self._do("saving a checkpoint")
        random_states = collectives.gather_objects(rng_state.capture())
        self._checkpointer.begin(module.step, module.state.files(), self._state(module, random_states))
        if at_once:
            self._checkpointer.finish()
        self._saved_at = time.monotonic()

    def _state(self, module: TrainingModule, random_states: list[dict[str, Any]] | None) -> dict[str, Any]:
        return {
            **self._identity,
            "step": module.step,
            "tokens_seen": module.step * module.plan.tokens_per_step,
            "epoch_loss_sum": self._epoch_mean.sum,
            "epoch_loss_count": self._epoch_mean.count,
            "loss": self.last_loss,
            "val_loss": self.last_val.loss if self.last_val else None,
            "optimizer_updates": module.state.update_count(),
            "shapes": module.state.shapes(),
            "skipped": module.plan.skipped,
            "spikes": vars(self._guard.state),
            "improvement": vars(self.improvement),
            "loss_scale": module.scaler.state_dict() if module.scaler is not None else None,
            "torch": torch.__version__,
            "random_states": random_states,
            "unfinished": asdict(self.unfinished) if self.unfinished is not None else None,
        }


class _CutShort(Exception):
    """A stop ends what follows a step, on all ranks at the same place."""


def _of_validation(val: EvalResult) -> dict[str, Any]:
    """Fields of a record."""
    return {"val_loss": val.loss, "val_perplexity": val.perplexity, "val_bits_per_byte": val.bits_per_byte}


def _is_due(done: int, interval: int | None, epoch_ends: bool) -> bool:
    return epoch_ends if interval is None else done % interval == 0
