"""When validation does not improve any more (Prechelt 1998, Early Stopping - But When?): the count that decides it."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_cluster.runtime.counts import Count


@dataclass(frozen=True)
class EarlyStopState:
    """best: lowest validation loss, None before the first. stale: evaluations since it was found."""

    best: float | None
    stale: Count

    @classmethod
    def at_start(cls) -> EarlyStopState:
        """The state of a run that has evaluated nothing yet."""
        return cls(None, 0)

    def after(self, val_loss: float, min_delta: float) -> EarlyStopState:
        """Count one more evaluation; only a loss lower by more than `min_delta` nats is an improvement."""
        if self.best is None or val_loss < self.best - min_delta:
            return EarlyStopState(val_loss, 0)
        return EarlyStopState(self.best, self.stale + 1)

    def ends(self, patience: int | None) -> bool:
        """Whether `stale` evaluations have reached `patience`; never where that is None."""
        return patience is not None and self.stale >= patience
