"""Curves and fills that the initial values of the versions are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Fill = Callable[[Tensor, torch.Generator], Tensor]
"""Function that fills a tensor in place, drawing from a generator, and returns it."""


def zeros(value: Tensor, _: torch.Generator) -> Tensor:
    """0 everywhere."""
    return value.zero_()


def uniform(value: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [-0.01, 0.01)."""
    return value.uniform_(-0.01, 0.01, generator=generator)


def orthogonal(value: Tensor, generator: torch.Generator) -> Tensor:
    """Orthogonal with gain 1."""
    return nn.init.orthogonal_(value, 1.0, generator=generator)


def small_orthogonal(value: Tensor, generator: torch.Generator) -> Tensor:
    """Orthogonal with gain 0.1."""
    return nn.init.orthogonal_(value, 0.1, generator=generator)


def lora_orthogonal(value: Tensor, generator: torch.Generator) -> Tensor:
    """Orthogonal [rows, cols] with gain 0.1, times sqrt(rows / cols) where there are more rows."""
    rows, cols = value.shape
    gain = 0.1 * (math.sqrt(rows / cols) if rows > cols else 1.0)
    return nn.init.orthogonal_(value, gain, generator=generator)


def fraction(width: int) -> Tensor:
    """n / (width - 1), n = 0 ... width - 1, in float64."""
    return torch.arange(width, dtype=torch.float64) / max(width - 1, 1)


def delta(width: int) -> Tensor:
    """i / width, i = 0 ... width - 1, in float64."""
    return torch.arange(width, dtype=torch.float64) / width


def decay_and_bonus(att: int, rho: float) -> dict[str, Tensor]:
    """time_decay and time_faaaa [att], the same in RWKV-5 and RWKV-6."""
    n = torch.arange(att, dtype=torch.float64)
    zigzag = 0.1 * ((n + 1) % 3 - 1)
    return {
        "att.time_decay": -6 + 5 * fraction(att) ** (0.7 + 1.3 * rho),
        "att.time_faaaa": rho * (1 - fraction(att)) + zigzag,
    }
