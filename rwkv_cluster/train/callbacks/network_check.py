"""Callback that checks before the first step that ranks reach each other and add up correctly, and how fast."""

from __future__ import annotations

import logging

from pytorch_lightning import Callback, LightningModule, Trainer

from rwkv_cluster.train.distributed.all_reduce_check import measure_all_reduce
from rwkv_cluster.train.distributed.collectives import is_distributed

log = logging.getLogger("rwkv_cluster")


class AllReduceCheck(Callback):
    """Logs the measurement on rank 0; one rank alone has no network."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_distributed():
            measured = measure_all_reduce(pl_module.device)
            if trainer.is_global_zero:
                log.info("%s", measured)
