"""When validation does not improve any more (Prechelt 1998, Early Stopping - But When?): the count that decides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EarlyStopState:
    """best: lowest validation loss, None before the first. stale: evaluations since it was found."""

    best: float | None = None
    stale: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> EarlyStopState:
        """From a checkpoint's state; one of a version without it has none."""
        return cls(**(state.get("improvement") or {}))

    def after(self, val_loss: float, min_delta: float) -> EarlyStopState:
        """With one more evaluation; only a loss lower by more than `min_delta` nats is an improvement."""
        if self.best is None or val_loss < self.best - min_delta:
            return EarlyStopState(val_loss, 0)
        return EarlyStopState(self.best, self.stale + 1)

    def ends(self, patience: int | None) -> bool:
        """Whether a run of that patience is over."""
        return patience is not None and self.stale >= patience
