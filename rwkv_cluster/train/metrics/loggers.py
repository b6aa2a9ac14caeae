"""Lightning's own loggers, where the configuration asks for them. What they lack is said before the run starts.

A resumed run shows each step once. TensorBoard purges later steps on resume (purge_step). Weights & Biases cannot, so
steps that it already has, which are the same to the bit, are skipped; after a rollback it has the abandoned steps and
those in their place.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_fabric.loggers import Logger as AnyLogger
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from rwkv_cluster.config import LoggingConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.own_file import read_own
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.workdir import WorkDir, atomic_write


def require_packages(logging_config: LoggingConfig) -> None:
    """Raises ConfigError when a logger that was asked for is not installed, or would ask for an account."""
    if logging_config.tensorboard:
        _require("tensorboard", "logging.tensorboard")
    if logging_config.wandb_project is not None:
        _require("wandb", "logging.wandb_project")
        _require_wandb_account()


def _require(package: str, field: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{field} is set, but the package {package} is not installed",
            remedy=f"Install it with `pip install 'rwkv-cluster[{package}]'`, or remove {field}",
        )


def _require_wandb_account() -> None:
    if os.environ.get("WANDB_MODE", "online") != "online" or rank() != 0:
        return
    import wandb

    if not wandb.api.api_key:
        raise ConfigError(
            "logging.wandb_project is set, but Weights & Biases finds no API key on this machine",
            remedy="Run `wandb login`, "
            "or set WANDB_MODE=offline and send the run later with `wandb sync`, or remove logging.wandb_project",
        )


def loggers(logging_config: LoggingConfig, work: WorkDir, start_step: int) -> list[Logger]:
    """The loggers of a session that continues after `start_step`; empty when none is asked for."""
    chosen: list[Logger] = []
    if logging_config.tensorboard:
        chosen.append(TensorBoardLogger(save_dir=work.logs, name="tensorboard", version="", purge_step=start_step + 1))
    if logging_config.wandb_project is not None:
        run_id = _wandb_id(work.wandb_id) if rank() == 0 else None
        chosen.append(WandbLogger(project=logging_config.wandb_project, save_dir=work.logs, id=run_id))
    return chosen


def _wandb_id(path: Path) -> str:
    """The run's W&B id: created by the first session, reused on resume."""
    if not path.exists():
        atomic_write(path, uuid.uuid4().hex[:12].encode())
    return read_own(path).decode(errors="replace").strip()


def log_metrics(loggers: Sequence[AnyLogger], metrics: Mapping[str, float], step: int, logged_step: int) -> None:
    """Give every logger the metrics of `step`. logged_step: up to where an earlier session has done so. On rank 0."""
    for logger in loggers:
        if step > logged_step or not isinstance(logger, WandbLogger):
            logger.log_metrics(dict(metrics), step=step)


@contextmanager
def finishing(loggers: Sequence[AnyLogger]) -> Iterator[None]:
    """Weights & Biases has been given everything after the block, and the process is free for another run."""
    try:
        yield
    except BaseException:
        _finish_wandb(loggers, exit_code=1)
        raise
    _finish_wandb(loggers, exit_code=0)


def _finish_wandb(loggers: Sequence[AnyLogger], exit_code: int) -> None:
    if rank() == 0 and any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish(exit_code)
