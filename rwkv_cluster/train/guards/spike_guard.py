"""Loss spikes: when is a loss one, what does the run remember of it, and back to which checkpoint it goes.

PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1) met about 20 spikes, although gradients were clipped. What
helped was to start again from a checkpoint some 100 steps before the spike and to leave out 200 to 500 batches, those
seen before and during it. The same batches did no harm from another checkpoint, so it takes both: a state and its data.

A rollback therefore returns to a checkpoint from before the spike and leaves out the batches of the steps
[first spiking step - lead, step at which patience ended]. Steps from the checkpoint to the first of these are repeated
as they were. Which batches are left out depends on the losses alone, not on which checkpoints there are, so that a run
that is killed and continued anywhere goes the same way. The number of steps, the learning rate of each and the tokens
seen stay those of the run: what was left out was not seen. docs/guards.md says it to users.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

from rwkv_cluster.config import GuardConfig
from rwkv_cluster.runtime.counts import Count

DEVIATIONS_PER_MAD = 1.4826  # of a normal distribution (Hampel 1974, The influence curve)
SMALLEST_DEVIATION = 1e-3  # of the median: where the losses of a window are all alike, rounding is no spike


@dataclass(frozen=True)
class Spike:
    """Steps `first_step` to `last_step` (from 0) in a row had losses above `limit`. loss: of the last of them."""

    first_step: int
    last_step: int
    loss: float
    median: float
    limit: float

    def __str__(self) -> str:
        return (
            f"steps {self.first_step} to {self.last_step}: the loss spikes, to {self.loss:.4f} where the median before "
            f"it was {self.median:.4f} and {self.limit:.4f} the limit"
        )


@dataclass(frozen=True)
class SpikeState:
    """What has to outlive a restart. losses: of the window. spiking: steps in a row, so far. rollbacks: of the run."""

    losses: tuple[float, ...]
    spiking: Count
    rollbacks: Count

    @classmethod
    def at_start(cls) -> SpikeState:
        """The state of a run that has seen nothing yet."""
        return cls((), 0, 0)


class SpikeGuard:
    """Looks at the loss of every step. Every rank has one and, as losses are those of all ranks, sees the same."""

    def __init__(self, config: GuardConfig, state: SpikeState) -> None:
        self._config = config
        self._losses = deque(state.losses, maxlen=config.spike_window_steps)
        self._spiking = state.spiking
        self._rollbacks = state.rollbacks

    @property
    def state(self) -> SpikeState:
        return SpikeState(tuple(self._losses), self._spiking, self._rollbacks)

    @property
    def is_spiking(self) -> bool:
        """Whether the last step has spiked: a checkpoint of this moment could hold what a rollback has to undo."""
        return self._spiking > 0

    def update(self, step: int, loss: float) -> Spike | None:
        """Count the loss of `step` (from 0). Returns a Spike once patience has ended."""
        if self._config.on_spike == "ignore":
            return None
        median, limit = self._median_and_limit()
        if loss <= limit:
            self._losses.append(loss)
            self._spiking = 0
            return None
        self._spiking += 1
        if self._spiking < self._config.spike_patience_steps:
            return None
        return Spike(step - self._spiking + 1, step, loss, median, limit)

    def _median_and_limit(self) -> tuple[float, float]:
        """Median of the window, and the largest loss that is no spike."""
        if len(self._losses) < self._config.spike_window_steps:
            return float("nan"), float("inf")
        median = statistics.median(self._losses)
        distance = statistics.median(abs(loss - median) for loss in self._losses)
        deviation = max(DEVIATIONS_PER_MAD * distance, SMALLEST_DEVIATION * abs(median))
        return median, median + self._config.spike_factor * deviation
