"""Lightning's own loggers, where the configuration asks for them. A missing package is said before the run starts."""

from __future__ import annotations

import importlib.util

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from rwkv_cluster.config import LoggingConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.workdir import WorkDir


def require_packages(logging_config: LoggingConfig) -> None:
    """Raises ConfigError when a logger that was asked for is not installed."""
    if logging_config.tensorboard:
        _require("tensorboard", "logging.tensorboard")
    if logging_config.wandb_project is not None:
        _require("wandb", "logging.wandb_project")


def _require(package: str, field: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{field} is set, but the package {package} is not installed. "
            f"Install it with `pip install 'rwkv-cluster[{package}]'`, or remove {field}"
        )


def loggers(logging_config: LoggingConfig, work: WorkDir) -> list[Logger]:
    """The loggers of a run; empty when none is asked for."""
    chosen: list[Logger] = []
    if logging_config.tensorboard:
        chosen.append(TensorBoardLogger(save_dir=work.logs, name="tensorboard", version=""))
    if logging_config.wandb_project is not None:
        chosen.append(WandbLogger(project=logging_config.wandb_project, save_dir=work.logs, resume="allow"))
    return chosen
