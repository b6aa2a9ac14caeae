"""AdamW over RWKV-LM's parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.adapters.table import is_adapter_part
from rwkv_cluster.config import ModelType, TrainingConfig
from rwkv_cluster.model.versions.table import VERSIONS


def group_of(name: str, parameter: Tensor, model_type: ModelType, *, layerwise_lr: bool = True) -> tuple[float, bool]:
    """(Learning-rate multiplier, whether weight decay applies) of one parameter."""
    is_matrix = (".weight" in name or is_adapter_part(name)) and parameter.squeeze().ndim >= 2
    multiplier, decays = VERSIONS[model_type].optimizer_group(name, is_matrix)
    return (multiplier if layerwise_lr else 1.0), decays


def build(groups: list[dict[str, Any]], training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over `groups`."""
    # The fused kernel undoes fp16's loss scale by itself, too late for clipping and for the guard.
    return torch.optim.AdamW(
        groups,
        lr=training.lr_init,
        betas=(training.beta1, training.beta2),
        eps=training.adam_eps,
        fused=training.precision != "fp16",
    )
