"""An optimizer that there is not, as its author would add it: a row, groups and how it is built. One moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.train.optimizers.table import Optimizer

ROW = Optimizer(name="Adagrad", module="adagrad", moments=("sum",))


def group_of(name: str, parameter: Tensor, model_type: str, *, layerwise_lr: bool = True) -> tuple[float, bool]:
    return 1.0, False


def build(groups: list[dict[str, Any]], training: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(groups, lr=training.lr_init)
