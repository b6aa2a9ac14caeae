"""The learning rate as a pure function of the step: a table of schedules, each a function of the tokens before a step.

A further schedule is a row here, its name in `config.schema.ScheduleName`, and its fields beside it. Torch-free, as a
plan draws it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from rwkv_cluster.config import TrainingConfig

DECAY_SHARE = 5  # wsd decays over a fifth of the run where no length is given

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "1-sqrt": math.sqrt,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}
"""Share of the way from lr_init to lr_final that is done after a share of the decay, by `training.decay_shape`.

1-sqrt, and a decay over a fifth of the run: Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed
Training Durations", 2024, arXiv 2405.18392.
"""


@dataclass(frozen=True)
class RunTokens:
    """Tokens of a run at which its learning rate may turn. warmup: end of warm-up; end: of the run."""

    per_step: int
    warmup: int
    end: int

    @classmethod
    def of(cls, training: TrainingConfig, tokens_per_step: int, horizon_tokens: int) -> RunTokens:
        """Those of `training`."""
        warmup = training.warmup_tokens
        return cls(
            tokens_per_step, training.warmup_steps * tokens_per_step if warmup is None else warmup, horizon_tokens
        )

    def progress(self, tokens: int, begin: int) -> float:
        """How far `tokens` is from `begin` to the end: 0 to 1."""
        if tokens <= begin:
            return 0.0
        return 1.0 if tokens >= self.end else (tokens - begin) / (self.end - begin)


@dataclass(frozen=True)
class Schedule:
    """One schedule.

    Attributes:
        rate: learning rate of the step before which the run has seen so many tokens, without warm-up.
        turns: tokens at which it turns, but for the end of warm-up and the run's.
    """

    rate: Callable[[TrainingConfig, RunTokens, int], float]
    turns: Callable[[TrainingConfig, RunTokens], list[int]] = lambda training, run: []


def _cosine(training: TrainingConfig, run: RunTokens, tokens: int) -> float:
    """RWKV-LM `src/trainer.py`, exit_tokens > 0."""
    middle = (training.lr_init + training.lr_final) / 2
    swing = (training.lr_init - training.lr_final) / 2
    return middle + swing * math.cos(math.pi * run.progress(tokens, run.warmup))


def _linear(training: TrainingConfig, run: RunTokens, tokens: int) -> float:
    return _between(training.lr_init, training.lr_final, run.progress(tokens, run.warmup))


def _constant(training: TrainingConfig, run: RunTokens, tokens: int) -> float:
    return training.lr_init


def _wsd(training: TrainingConfig, run: RunTokens, tokens: int) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, arXiv 2404.06395). Before the decay it is lr_init to the bit,
    wherever the run ends: a run that decays at once and one that branches off a longer run's trunk are the same.
    """
    done = DECAY_SHAPES[training.decay_shape or "1-sqrt"](run.progress(tokens, _decay_begin(training, run)))
    return _between(training.lr_init, training.lr_final, done)


def _decay_begin(training: TrainingConfig, run: RunTokens) -> int:
    """Tokens at which wsd begins to decay: in a run that is too short, at the end of warm-up."""
    return max(run.end - (_decay_length(training, run) or run.end // DECAY_SHARE), run.warmup)


def _decay_length(training: TrainingConfig, run: RunTokens) -> int:
    """Tokens of the decay that was asked for, 0 without."""
    return training.decay_tokens or (training.decay_steps or 0) * run.per_step


def _points(training: TrainingConfig, run: RunTokens, tokens: int) -> float:
    """Straight lines between the points; before the first and after the last the rate stays."""
    points = training.lr_points or []
    after = bisect.bisect_right([place for place, _ in points], tokens)
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (begin, low), (end, high) = points[after - 1 : after + 1]
    return _between(low, high, (tokens - begin) / (end - begin))


def _between(first: float, last: float, progress: float) -> float:
    """`first` at 0 and `last` at 1, both exactly."""
    return last if progress == 1 else first + (last - first) * progress


SCHEDULES = {
    "cosine": Schedule(_cosine),
    "wsd": Schedule(_wsd, lambda training, run: [_decay_begin(training, run)]),
    "linear": Schedule(_linear),
    "constant": Schedule(_constant),
    "points": Schedule(_points, lambda training, run: [int(place) for place, _ in training.lr_points or []]),
}
"""Schedules by the name of `training.schedule`."""


def learning_rate(step: int, *, training: TrainingConfig, tokens_per_step: int, horizon_tokens: int) -> float:
    """Rate of optimizer step `step` (from 0), before a group's multiplier.

    That of `training.schedule` and during warm-up, which comes first in every schedule, additionally a linear factor
    from 0.01 to 1. The step counts from the run's beginning, so a resume does not warm up again.
    """
    run, tokens = RunTokens.of(training, tokens_per_step, horizon_tokens), step * tokens_per_step
    rate = SCHEDULES[training.schedule].rate(training, run, tokens)
    in_steps = training.warmup_tokens is None
    done, length = (step, training.warmup_steps) if in_steps else (tokens, run.warmup)
    if done < length:
        rate *= 0.01 + 0.99 * done / length
    return rate


def turning_steps(training: TrainingConfig, tokens_per_step: int, horizon_tokens: int) -> list[int]:
    """First steps at or after each place where the learning rate turns: the end of warm-up, the begin of a decay."""
    run = RunTokens.of(training, tokens_per_step, horizon_tokens)
    places = [run.warmup, *SCHEDULES[training.schedule].turns(training, run)]
    return [-(-place // tokens_per_step) for place in places if 0 <= place < horizon_tokens]


def decay_is_cut(training: TrainingConfig, tokens_per_step: int, horizon_tokens: int) -> bool:
    """Whether the decay that was asked for is longer than what follows warm-up, and so begins there."""
    run = RunTokens.of(training, tokens_per_step, horizon_tokens)
    return _decay_length(training, run) > max(run.end - run.warmup, 0)
