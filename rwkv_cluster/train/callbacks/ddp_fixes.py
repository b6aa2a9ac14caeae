"""Workarounds: DDP's bucket reassignment after step 1, and Lightning killing rank 0 when another rank exits."""

from __future__ import annotations

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies.launchers.subprocess_script import (
    _SubprocessScriptLauncher as SubprocessScriptLauncher,
)
from torch.nn.parallel import DistributedDataParallel

from rwkv_cluster.data.windows import TokenBatch
from rwkv_cluster.train.parallel.strategy import accumulates_in_buckets


class StableBuckets(Callback):
    """Lets DDP choose its buckets for good before the first step of a session.

    DDP assigns the parameters to buckets anew after its first backward pass. From three ranks on the order in which
    the ranks' values are added depends on the place in a bucket, so a resumed run would differ in the last bits from
    one that has long had its second assignment. Here a pass over two zero tokens comes first and is thrown away; where
    micro batches add up in the buckets its gradients become 0, so that the first step finds what every other finds. It
    compiles nothing: code for its shapes would never run again, and would make torch.compile take the next shapes for
    changing ones.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            batch = TokenBatch.of(torch.zeros(1, 3, dtype=torch.int64, device=module.device))
            with torch.compiler.set_stance("force_eager"):
                model(batch).backward()
            module.zero_grad(set_to_none=not accumulates_in_buckets(trainer))


class DetachProcessWatcher(Callback):
    """Stop Lightning's process watcher before ranks exit, so that rank 0 keeps its own exit code.

    Lightning watches the ranks that it starts itself and kills rank 0 within seconds of another's end with a code
    other than 0. That is right for a crash during training; when all ranks stop together it is a race.
    """

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        _stop_watching(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        _stop_watching(trainer)


def _stop_watching(trainer: Trainer) -> None:
    launcher = trainer.strategy.launcher
    if isinstance(launcher, SubprocessScriptLauncher):
        launcher.procs.clear()  # the watching thread has this list, and ends when it is empty
