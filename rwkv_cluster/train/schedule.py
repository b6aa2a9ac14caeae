"""The learning rate as a pure function of the step (RWKV-LM `src/trainer.py`, exit_tokens > 0)."""

from __future__ import annotations

import math

from rwkv_cluster.config import TrainingConfig


def learning_rate(step: int, *, training: TrainingConfig, tokens_per_step: int, horizon_tokens: int) -> float:
    """Rate of optimizer step `step` (from 0), before a group's multiplier.

    Cosine from lr_init to lr_final between the end of warm-up and `horizon_tokens`; during warm-up additionally a
    linear factor from 0.01 to 1. The step counts from the run's beginning, so a resume does not warm up again.
    """
    warmup_tokens = training.warmup_steps * tokens_per_step
    tokens = step * tokens_per_step
    if tokens <= warmup_tokens:
        progress = 0.0
    elif tokens >= horizon_tokens:
        progress = 1.0
    else:
        progress = (tokens - warmup_tokens) / (horizon_tokens - warmup_tokens)
    middle = (training.lr_init + training.lr_final) / 2
    swing = (training.lr_init - training.lr_final) / 2
    rate = middle + swing * math.cos(math.pi * progress)
    if step < training.warmup_steps:
        rate *= 0.01 + 0.99 * step / training.warmup_steps
    return rate
