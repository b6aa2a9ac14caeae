"""What happens between optimizer steps: record, evaluate, export weights, save, stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from rwkv_cluster.data.horizon import Horizon
from rwkv_cluster.data.windows import TokenBatch
from rwkv_cluster.train.checkpoint.saver import Saver
from rwkv_cluster.train.checkpoint.state import CheckpointState
from rwkv_cluster.train.distributed import collectives
from rwkv_cluster.train.evaluate import EvalResult, Evaluator
from rwkv_cluster.train.guards.spike_guard import Spike, SpikeGuard
from rwkv_cluster.train.guards.stop_request import StopRequest
from rwkv_cluster.train.metrics.metrics_file import StepRecord
from rwkv_cluster.train.metrics.step_recorder import StepRecorder, StepResult
from rwkv_cluster.train.module import TrainingModule, Votes
from rwkv_cluster.train.optimizers.table import EMA
from rwkv_cluster.train.sample import Sampler
from rwkv_cluster.workdir import FINAL


class AfterStep(Callback):
    """What follows a step on every rank, in this order: look for a spike, evaluate, record, end the epoch, save, stop.

    It observes the module's steps: see `StepObserver`. As a context manager it closes the files that are written to.
    """

    def __init__(
        self,
        horizon: Horizon,
        stop_request: StopRequest,
        guard: SpikeGuard,
        evaluator: Evaluator,
        sampler: Sampler,
        recorder: StepRecorder,
        saver: Saver,
    ) -> None:
        self.last_loss: float | None = None
        self.spike: Spike | None = None
        """What has ended the session, if it was that."""
        self.unfinished: StepRecord | None = None
        """Numbers of the last step, where an earlier session was stopped in what follows a step; at the end of this
        session, of its own."""
        self._horizon = horizon
        self._stop_request = stop_request
        self._guard = guard
        self.evaluator = evaluator
        self._sampler = sampler
        self._recorder = recorder
        self._saver = saver
        self._timer = recorder.timer
        self._ended_step: tuple[StepResult, Votes] | None = None

    def __enter__(self) -> AfterStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._saver.checkpointer.abandon()
        self._recorder.close()

    def votes(self) -> Votes:
        """This rank's wish to stop and to save at the next step boundary, and whether it has written its checkpoint."""
        return Votes(self._stop_request.requested(), self._saver.is_overdue(), self._saver.checkpointer.written())

    def step_ended(self, result: StepResult, agreed: Votes) -> None:
        """What the step was, for what follows it at the end of its last micro batch."""
        self._ended_step = (result, agreed)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._stop_request.begin_steps()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        self._recorder.begin(module.step)
        collectives.fault_point("train.step", step=module.step)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: TokenBatch, batch_idx: int
    ) -> None:
        assert isinstance(module, TrainingModule)
        if self.unfinished is not None and not module.should_stop:
            record, self.unfinished = self.unfinished, None
            with self._timer.phase("other"):
                self._complete_step(module, lambda: record, again=True)
            trainer.should_stop = module.should_stop

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: TokenBatch, batch_idx: int
    ) -> None:
        assert isinstance(module, TrainingModule)
        if self._ended_step is None:
            return
        (result, agreed), self._ended_step = self._ended_step, None
        module.step += 1
        collectives.fault_point("train.step", step=module.step)
        with self._timer.phase("other"):
            if agreed.written:
                with self._timer.pause("save", "saving a checkpoint"):
                    self._saver.checkpointer.finish()
            self._finish_step(module, result, save=agreed.save)
            self._recorder.profile_step()
        trainer.should_stop = module.should_stop

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._recorder.end()

    def _finish_step(self, module: TrainingModule, result: StepResult, *, save: bool) -> None:
        self.last_loss = result.loss
        self.spike = self._guard.update(result.step, result.loss)
        if self.spike is not None:
            self._record(module, self._measured(module, result))
            self._saver.checkpointer.finish()
            module.should_stop = True
            return
        self._recorder.epoch_mean.add(result.loss)
        self._complete_step(module, partial(self._measured, module, result), save=save)

    def _complete_step(
        self, module: TrainingModule, measured: Callable[[], StepRecord], *, save: bool = False, again: bool = False
    ) -> None:
        """What follows a step, in order. measured: its numbers. save: the ranks have agreed to save a checkpoint, due
        or not. again: an earlier session was stopped in this.

        A stop ends validation and sampling at once. Both then come again before the run goes on, from the same weights.
        """
        epoch = self._horizon.epoch_of(module.step - 1)
        epoch_ends = self._horizon.epoch_end(epoch) == module.step
        run_ends = module.step == self._horizon.total_steps
        val: EvalResult | None = None
        ema_loss: float | None = None
        try:
            if self.evaluator.is_due(module.step, epoch_ends=epoch_ends, run_ends=run_ends):
                with self._timer.pause("eval", "evaluating"):
                    val = self.evaluator.evaluate(self._loss_of(module), module.step, module.device)
                    ema_loss = self._ema_loss(module)
                if not run_ends and self.evaluator.ends_run(val, module.step):
                    run_ends = module.should_stop = True
            if self._sampler.is_due(module.step):
                with self._timer.pause("eval", "sampling"):
                    self._sampler.sample(module.model, module.step, partial(self._check_for_stop, module))
        except _CutShort:
            module.should_stop = True
            self.unfinished = measured()
            if not again:
                self._save(module, is_last=True)
            return
        record = measured()
        if val is not None:
            self.evaluator.accept(val)
            record = replace(record, **_of_validation(val), val_loss_ema=ema_loss)
        self._record(module, record)
        with self._timer.phase("save"):
            if epoch_ends:
                self._recorder.end_epoch(epoch, record.lr)
                if run_ends or self._saver.exports_epoch(epoch):
                    self._export(module, str(epoch))
            if run_ends:
                self._export(module, FINAL)
            is_due = save or self._saver.is_due(module.step, epoch_ends=epoch_ends)
            if run_ends or module.should_stop:
                self._save(module, is_last=True)
            elif is_due and not self._guard.is_spiking and not again:
                self._save(module, is_last=False)

    def _ema_loss(self, module: TrainingModule) -> float | None:
        """Validation loss of the averaged weights; None where there are none, or none are whole (ZeRO 3)."""
        if module.training_config.ema_decay is None:
            return None
        with module.state.with_ema() as is_possible:
            if not is_possible:
                return None
            return self.evaluator.evaluate(self._loss_of(module), module.step, module.device, of_ema=True).loss

    def _loss_of(self, module: TrainingModule) -> Callable[[TokenBatch], Tensor]:
        """Loss of a batch. Raises _CutShort."""
        model = module.trainer.strategy.model or module

        def loss_of(batch: TokenBatch) -> Tensor:
            self._check_for_stop(module)
            loss: Tensor = model(batch)
            return loss

        return loss_of

    def _check_for_stop(self, module: TrainingModule) -> None:
        """Collective. Raises _CutShort on every rank when one of them is asked to stop."""
        collectives.fault_point("train.aside", step=module.step)
        if collectives.any_rank(self._stop_request.requested(), module.device):
            raise _CutShort

    def _measured(self, module: TrainingModule, result: StepResult) -> StepRecord:
        """The step's own numbers; a new timing begins."""
        return self._recorder.measure(
            result,
            tokens_per_step=module.sample_plan.tokens_per_step,
            save_wait_s=self._saver.checkpointer.take_waited_s(),
            device=module.device,
        )

    def _record(self, module: TrainingModule, record: StepRecord) -> None:
        self._recorder.record(record, module.loggers, self._saver.checkpointer.committed_step)

    def _export(self, module: TrainingModule, label: str) -> None:
        with self._timer.pause("save", "exporting weights"):
            self._saver.export(module.state.weights(), module.step, label)
            if module.training_config.ema_decay is not None:
                self._saver.export(module.state.ema_weights(), module.step, f"{label}-{EMA}")

    def _save(self, module: TrainingModule, *, is_last: bool) -> None:
        """Save a checkpoint. is_last: the session ends with it."""
        self._recorder.flush()
        with self._timer.pause("save", "saving a checkpoint"):
            self._saver.save(module.state.files(), self._state(module), is_last=is_last)

    def _state(self, module: TrainingModule) -> CheckpointState:
        last_val = self.evaluator.last
        return CheckpointState(
            **vars(self._saver.identity),
            step=module.step,
            tokens_seen=module.step * module.sample_plan.tokens_per_step,
            epoch_loss_sum=self._recorder.epoch_mean.sum,
            epoch_loss_count=self._recorder.epoch_mean.count,
            loss=self.last_loss,
            val_loss=last_val.loss if last_val else None,
            optimizer_updates=module.state.update_count(),
            shapes=module.state.shapes(),
            skipped=module.sample_plan.skipped,
            spikes=self._guard.state,
            improvement=self.evaluator.improvement,
            loss_scale=module.scaler.state_dict() if module.scaler is not None else None,
            torch=torch.__version__,
            random_states=[],
            unfinished=self.unfinished,
        )


class _CutShort(Exception):
    """A stop ends what follows a step, on all ranks at the same place."""


def _of_validation(val: EvalResult) -> dict[str, Any]:
    """Fields of a record."""
    return {"val_loss": val.loss, "val_perplexity": val.perplexity, "val_bits_per_byte": val.bits_per_byte}
