"""Lightning as a session uses it: for the loop and the devices. Order, records, checkpoints and the end are ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning import Callback, Trainer

from rwkv_cluster.train.datamodule import TokenDataModule
from rwkv_cluster.train.guards.stop_request import disable_lightning_signal_handlers
from rwkv_cluster.train.metrics.loggers import loggers
from rwkv_cluster.train.parallel import strategy
from rwkv_cluster.train.session import Session


def build_trainer(session: Session, callbacks: list[Callback]) -> Trainer:
    """What ends it is a callback, by step."""
    trainer = Trainer(
        **strategy.trainer_arguments(session.config.training, session.placement, session.group),
        max_epochs=1,
        accumulate_grad_batches=session.accumulate,
        callbacks=callbacks,
        logger=loggers(session.config.logging, session.work, session.recorded_step),
        default_root_dir=session.work.root,
        log_every_n_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    disable_lightning_signal_handlers(trainer)
    return trainer


def build_datamodule(session: Session) -> TokenDataModule:
    """This rank's batches from where the session starts."""
    return TokenDataModule(
        session.train_tokens(),
        session.plan,
        start_step=session.start_step,
        # one batch more where the last step has left something undone, so that the loop comes to run at all
        total_steps=max(session.horizon.total_steps, session.start_step + 1),
        micro_bsz=session.config.training.micro_bsz,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's notes on devices, data workers and its own internals are not the user's business."""
    loggers_ = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers_]
    for logger in loggers_:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="(pytorch_lightning|lightning_fabric)")
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
            yield
    finally:
        for logger, level in zip(loggers_, levels, strict=True):
            logger.setLevel(level)
