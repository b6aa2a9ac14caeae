"""Where the time of a training step goes, measured without waiting for the device.

A rank is always in one phase; to begin one ends the one before:

    data       from the end of what follows a step until the next batch is on the device: reading, and its transfer
    forward    the network and the loss of a micro batch
    backward   its gradients, and their exchange between ranks as far as it happens meanwhile
    optimizer  agreement of the ranks on the step, clipping, update
    eval       validation, and samples of the model
    save       checkpoints as far as training waits for them, and exported weights
    profile    the profiler's own work between steps
    other      records and whatever else lies between two steps

On a CPU all of them are the host's seconds, by `time.perf_counter`. On CUDA the host only puts work into a queue and
runs ahead, so its seconds would say nothing about forward, backward and optimizer. These are taken there between CUDA
events in the queue itself: the time from when the device has come to the first operation of the phase until it has
finished the last, which includes what it idles while the host is late. The events of a step are read a step later, when
the device has long passed them, because to read them at once would stop the host. The other phases are the host's
seconds on CUDA too: a `data` of many milliseconds need not delay the device, which may have work queued.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from rwkv_cluster.train.metrics.profile_breakdown import PHASE

Phase = Literal["data", "forward", "backward", "optimizer", "eval", "save", "profile", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
ON_DEVICE: tuple[Phase, ...] = ("forward", "backward", "optimizer")
PAUSES: tuple[Phase, ...] = ("eval", "save", "profile")
"""Phases that do not count as training."""


@dataclass(frozen=True)
class Span:
    """What the device did between two events in its queue."""

    phase: Phase
    begin: torch.cuda.Event
    end: torch.cuda.Event


@dataclass(frozen=True)
class StepTiming:
    """Everything from the end of one step to the end of the next. host_s: by phase; spans: instead, on CUDA."""

    host_s: dict[Phase, float]
    spans: list[Span]

    @property
    def training_s(self) -> float:
        """Seconds of the host, without pauses; over many steps of the device too: each step waits for its loss."""
        return sum(seconds for phase, seconds in self.host_s.items() if phase not in PAUSES)

    def phases_s(self) -> dict[Phase, float]:
        """Seconds by phase. Waits where the device has not done the step yet: ask a step later."""
        if not self.spans:
            return self.host_s
        seconds = {phase: 0.0 if phase in ON_DEVICE else value for phase, value in self.host_s.items()}
        self.spans[-1].end.synchronize()
        for span in self.spans:
            seconds[span.phase] += span.begin.elapsed_time(span.end) / 1e3
        return seconds


class StepTimer(Callback):
    """Follows the phases of this rank. First among the callbacks that do something at the end of a batch.

    annotate: mark the phases in the profile that torch takes. report_activity: called with a short text ("evaluating")
    before anything that may take long.
    """

    def __init__(
        self, *, on_cuda: bool, annotate: bool = False, report_activity: Callable[[str], None] = lambda activity: None
    ) -> None:
        self._report_activity = report_activity
        self._on_cuda = on_cuda
        self._annotate = annotate
        self._annotation: Any = None
        self._phase: Phase = "other"
        self._mark: torch.cuda.Event | None = None
        self._begin_step()

    def _begin_step(self) -> None:
        self._since = time.perf_counter()
        self._host_s: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._spans: list[Span] = []

    def enter(self, phase: Phase) -> None:
        """Begin `phase`."""
        now = time.perf_counter()
        self._host_s[self._phase] += now - self._since
        if self._on_cuda and (phase in ON_DEVICE or self._phase in ON_DEVICE):
            self._mark_queue()
        if self._annotate:
            self._annotate_as(phase)
        self._phase, self._since = phase, now

    def _mark_queue(self) -> None:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        if self._phase in ON_DEVICE and self._mark is not None:
            self._spans.append(Span(self._phase, self._mark, mark))
        self._mark = mark

    def _annotate_as(self, phase: Phase) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
        self._annotation = torch.profiler.record_function(PHASE + phase)
        self._annotation.__enter__()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Be in `phase` during the block, and in the one before it again afterwards."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def pause(self, phase: Phase, activity: str) -> Iterator[None]:
        """Be in `phase` for something that is no training and may take long, and report it. activity: "sampling"."""
        self._report_activity(activity)
        with self.phase(phase):
            yield

    def finish_step(self) -> StepTiming:
        """What has been measured since the last call."""
        self.enter(self._phase)
        timing = StepTiming(self._host_s, self._spans)
        self._begin_step()
        return timing

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._begin_step()
        self.enter("data")

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        self.enter("forward")

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self.enter("backward")

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        self.enter("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self.enter("data")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.enter("other")
