"""The optimizer of a run over its parameter groups, and its state as named tensors.

The parameters are the fp32 masters: layers cast them to the activation dtype where they use them, so gradients
arrive in fp32 and an optimizer of fp32 is all that mixed precision needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_cluster.config import ModelType, TrainingConfig
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.train.checkpoint.shards import ShardedTensors
from rwkv_cluster.train.optimizers.ema import keep_ema
from rwkv_cluster.train.optimizers.selection import lr_multiplier
from rwkv_cluster.train.optimizers.table import BLOCK, EMA, SCALE, optimizer_of


def freeze(model: nn.Module, trained: Collection[str], dtype: torch.dtype) -> None:
    """Leave all but the parameters named in `trained` without a gradient, and hold them in `dtype`.

    Of a run's initial weights, which are stored in the training precision, this loses nothing.
    """
    for name, parameter in model.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)


def build_optimizer(model: nn.Module, model_type: ModelType, training: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of `training`. Frozen parameters are left out.

    Its groups carry `lr_multiplier`, `weight_decay`, `names` of their parameters, and `moments`: names of the tensors
    that it keeps for each of them, which are the same in all groups but for optimizers that treat matrices otherwise.
    """
    row = optimizer_of(training)
    functions = row.functions()
    members: dict[tuple[float, bool, tuple[str, ...]], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            multiplier, decays = functions.group_of(name, parameter, model_type, layerwise_lr=training.layerwise_lr)
            key = (multiplier * lr_multiplier(name, training), decays, row.moments_of(name, parameter.shape))
            members.setdefault(key, []).append((name, parameter))
    groups = [
        {
            "params": [parameter for _, parameter in named],
            "names": [name for name, _ in named],
            "moments": moments,
            "lr_multiplier": multiplier,
            "weight_decay": training.weight_decay if decays else 0.0,
        }
        for (multiplier, decays, moments), named in sorted(members.items())
    ]
    optimizer: torch.optim.Optimizer = functions.build(groups, training)
    if training.ema_decay is not None:
        keep_ema(optimizer, training.ema_decay)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]


def skips_on_device(optimizer: torch.optim.Optimizer, unusable: Tensor) -> bool:
    """Let the next update change nothing if the scalar `unusable` is true, without the host; False where it cannot.

    torch's fused AdamW looks at `found_inf`, which is for loss scaling, on the device. An average of the weights, and
    what other optimizers compute, would go on all the same.
    """
    is_fused = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    if not is_fused or any(EMA in group["moments"] for group in optimizer.param_groups):
        return False
    optimizer.found_inf = unusable.float()  # type: ignore[attr-defined]
    return True


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that it trains, by name, group by group."""
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments as `<moment>/<parameter name>` -> tensor."""
    return {
        f"{moment}/{name}": optimizer.state[parameter][moment]
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for moment in group["moments"]
        if parameter in optimizer.state
    }


def update_count(optimizer: torch.optim.Optimizer) -> int:
    """Updates made so far: the run's steps, less those that fp16's loss scaling has skipped."""
    _, first = next(named_parameters(optimizer))
    return int(optimizer.state[first]["step"]) if first in optimizer.state else 0


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor] | ShardedTensors, updates: int
) -> None:
    """Put back what `optimizer_tensors` gave after that many updates. Exact: nothing is converted.

    An average that is not there begins at the parameters, which have to be restored before.

    Raises CheckpointError for a moment that is missing or has another shape.
    """
    if updates == 0:
        return
    fused = optimizer.defaults.get("fused", False)
    begins_ema = not has_ema(tensors)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state: dict[str, Any] = {
                moment: parameter.detach().clone()
                if moment == EMA and begins_ema
                else _moment(tensors, f"{moment}/{name}", parameter)
                for moment in group["moments"]
            }
            state["step"] = torch.tensor(float(updates), device=parameter.device if fused else "cpu")
            optimizer.state[parameter] = state


def has_ema(tensors: Mapping[str, Tensor] | ShardedTensors) -> bool:
    """Whether an average is among the optimizer's tensors of a checkpoint."""
    return any(key.startswith(f"{EMA}/") for key in tensors.keys())  # noqa: SIM118 -- ShardedTensors are no mapping


def _moment(tensors: Mapping[str, Tensor] | ShardedTensors, key: str, parameter: nn.Parameter) -> Tensor:
    if key not in tensors.keys():  # noqa: SIM118 -- ShardedTensors are no mapping
        raise CheckpointError(
            f"the checkpoint's optimizer has no {key}", remedy="Move it away to go on from the one before"
        )
    moment = tensors[key]
    shape = (parameter.numel() // BLOCK,) if key.partition("/")[0].endswith(SCALE) else tuple(parameter.shape)
    if tuple(moment.shape) != shape:
        raise CheckpointError(
            f"{key} of the checkpoint's optimizer is {tuple(moment.shape)}, the model has {shape}",
            remedy="Move it away to go on from the one before",
        )
    return moment.to(parameter.device).clone()
