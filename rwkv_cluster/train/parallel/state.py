"""What a rank holds of a run's weights and optimizer, behind one interface for every strategy.

ReplicatedState   everything, as alone, under DDP and ZeRO stage 0; rank 0 saves for all
ZeroShardedState  a part of it, under ZeRO stages 1 to 3 (`parallel.zero`); every rank saves its own
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from rwkv_cluster.adapters.layers import saved_names
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.checkpoint.save_load import Checkpoint, Files
from rwkv_cluster.train.optimizers.param_groups import (
    named_parameters,
    optimizer_tensors,
    restore_optimizer,
    skips_on_device,
    update_count,
)
from rwkv_cluster.train.optimizers.table import EMA


class ModelAndOptimizerState(Protocol):
    """Weights, gradients and moments of a run, as this rank has them.

    clips_in_update: the optimizer measures and clips gradients itself, and makes no update when they are not finite.
    """

    clips_in_update: bool

    def clip_gradients(self, limit: float) -> Tensor:
        """Clip after the last backward pass of a step, before its update, without waiting for the device.

        Returns the scalar global norm before clipping; where `clips_in_update`, NotImplementedError is raised.
        """

    def skips_update(self, unusable: Tensor) -> bool:
        """Let the device leave weights and moments as they are in the next update, if the scalar `unusable` is true.

        False where it cannot: then nobody may ask for the update before the host knows.
        """

    def grad_norm(self) -> float:
        """Global norm of the gradients of the last update, before clipping, where `clips_in_update`."""

    def release_gradients(self) -> None:
        """Give back the memory of the gradients after an update, before the next forward pass needs it."""

    def update_count(self) -> int:
        """Updates that the optimizer has made."""

    def masters(self) -> Iterable[tuple[str, Tensor]]:
        """What this rank has of the fp32 masters of each trained parameter, by name."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load moments, and masters that are not the parameters, into a model that has the checkpoint's weights.

        Exactly as they were saved, by whatever number of ranks and whatever strategy.
        """

    def files(self) -> Files:
        """What this rank has to save: fp32 masters, what is frozen in its own precision, and moments."""

    def shapes(self) -> dict[str, list[int]] | None:
        """Shapes of the parameters where files hold pieces of them; None where they hold them whole."""

    def weights(self) -> dict[str, Tensor] | None:
        """Collective. On rank 0 every parameter by name, in the dtype it is trained in; None on the others."""

    def ema_weights(self) -> dict[str, Tensor] | None:
        """Collective. As `weights`, with the fp32 averages in place of the trained parameters."""

    def with_ema(self) -> AbstractContextManager[bool]:
        """Collective. The model has the averages for its parameters inside the block, and its own bits after it.

        False, and nothing done, where the strategy cannot.
        """


class ReplicatedState:
    """The same masters and moments on every rank.

    keeps_gradients: the next backward pass adds to them where they lie, so they become 0 and stay.
    """

    clips_in_update = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, keeps_gradients: bool = False) -> None:
        self._model = model
        self._optimizer = optimizer
        self._keeps_gradients = keeps_gradients

    def clip_gradients(self, limit: float) -> Tensor:
        parameters = [parameter for _, parameter in named_parameters(self._optimizer)]
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def skips_update(self, unusable: Tensor) -> bool:
        return skips_on_device(self._optimizer, unusable)

    def grad_norm(self) -> float:
        raise NotImplementedError("the norm is known before the update")

    def release_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=not self._keeps_gradients)

    def update_count(self) -> int:
        return update_count(self._optimizer)

    def masters(self) -> Iterable[tuple[str, Tensor]]:
        return named_parameters(self._optimizer)

    def restore(self, checkpoint: Checkpoint) -> None:
        restore_optimizer(self._optimizer, checkpoint.optimizer(), checkpoint.state.optimizer_updates)

    def files(self) -> Files:
        if rank() != 0:
            return {}
        names = saved_names(self._model)
        weights = {name: tensor for name, tensor in self._model.state_dict().items() if name in names}
        return {"weights.pth": weights, "optimizer.pth": optimizer_tensors(self._optimizer)}

    def shapes(self) -> dict[str, list[int]] | None:
        return None

    def weights(self) -> dict[str, Tensor] | None:
        return self._model.state_dict() if rank() == 0 else None

    def ema_weights(self) -> dict[str, Tensor] | None:
        return {**self._model.state_dict(), **self._averages()} if rank() == 0 else None

    def with_ema(self) -> AbstractContextManager[bool]:
        return replaced(self._model, self._averages())

    def _averages(self) -> dict[str, Tensor]:
        """Empty before the first update."""
        tensors, prefix = optimizer_tensors(self._optimizer), f"{EMA}/"
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[bool]:
    """Let parameters of `model` be `tensors` inside the block, without a copy. True, as for `with_ema`."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in tensors}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = tensors[name]
        yield True
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
