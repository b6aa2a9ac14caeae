"""Lightning callback that reports this rank's last finished step and current activity to the rank monitor."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from rwkv_cluster.train.distributed.rank_monitor import RankMonitor
from rwkv_cluster.train.module import TrainingModule


class RankStatusCallback(Callback):
    """Marks this rank's last finished step and what it does now."""

    def __init__(self, rank_monitor: RankMonitor) -> None:
        self._rank_monitor = rank_monitor

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._mark(module, "loading data")

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        self._mark(module, "computing")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self._mark(module, "loading data")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._mark(module, "ending")

    def _mark(self, module: LightningModule, doing: str) -> None:
        assert isinstance(module, TrainingModule)
        self._rank_monitor.set_activity(doing, step=module.step)
