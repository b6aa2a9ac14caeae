"""Where a run ends, in steps and tokens, and where its epochs do."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.data.sampler import SamplePlan


@dataclass(frozen=True)
class Horizon:
    """Where a run ends. `tokens` is the learning rate's horizon; it can be below steps * tokens_per_step."""

    total_steps: int
    tokens: int
    epoch_samples: int
    global_batch_size: int

    def epoch_end(self, epoch: int) -> int:
        """Number of steps after which epoch `epoch` (from 0) is complete, at most `total_steps`."""
        return min(self.total_steps, -(-(epoch + 1) * self.epoch_samples // self.global_batch_size))

    def epoch_of(self, step: int) -> int:
        """Epoch that optimizer step `step` (from 0) belongs to."""
        return step * self.global_batch_size // self.epoch_samples


def horizon(plan: SamplePlan, training: TrainingConfig) -> Horizon:
    """The earliest of the bounds in `training`: num_epochs, max_steps, max_tokens; one epoch when none is set."""
    epoch_samples = training.samples_per_epoch or plan.order.n_windows
    num_epochs, max_steps, max_tokens = training.num_epochs, training.max_steps, training.max_tokens
    if num_epochs is None and max_steps is None and max_tokens is None:
        num_epochs = 1
    bounds = []
    if num_epochs is not None:
        steps = -(-num_epochs * epoch_samples // plan.global_batch_size)
        bounds.append((steps, steps * plan.tokens_per_step))
    if max_steps is not None:
        bounds.append((max_steps, max_steps * plan.tokens_per_step))
    if max_tokens is not None:
        bounds.append((-(-max_tokens // plan.tokens_per_step), max_tokens))
    total_steps, tokens = min(bounds)
    return Horizon(total_steps, tokens, epoch_samples, plan.global_batch_size)


def is_due(step: int, interval_steps: int | None, *, epoch_ends: bool) -> bool:
    """Whether what is done every `interval_steps`, or with None at each epoch's end, is due after `step` steps."""
    return epoch_ends if interval_steps is None else step % interval_steps == 0
