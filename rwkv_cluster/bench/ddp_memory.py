"""Bytes that one rank has really allocated of a training, by kind.

The theory is `train.memory.model_states.theory`; both speak of the moment after a step's backward pass and before its
update. What is measured are whole allocations, each counted once, with the padding that is in them:

    weights     the parameters; in stage 3 this rank's pieces of them
    whole       stage 3: the parameters that are whole at that moment; DeepSpeed keeps the small ones so
    gradients   what the update is about to read, and what is left in `.grad`
    masters     stages 1 to 3: the fp32 copy of this rank's part; elsewhere the parameters are the masters
    moments     Adam's two
    buckets     DeepSpeed's buffers for communication, allocated in full whatever is in them; stages 1 and 2 have given
                them back by then, so they are also counted while gradients are computed
    other       every other tensor that Python knows of
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.train.module import TrainingModule
from rwkv_cluster.train.optimizers.param_groups import optimizer_tensors
from rwkv_cluster.train.parallel.zero import ZeroShardedState, ZeroStrategy

KINDS = ("weights", "whole", "gradients", "masters", "moments", "buckets", "other")


def held(module: TrainingModule) -> dict[str, int]:
    """Bytes that this rank has allocated, by kind. To be called between a backward pass and its update; collective."""
    counted: set[tuple[torch.device, int]] = set()
    parameters = list(module.model.parameters())
    state = module.state
    if isinstance(state, ZeroShardedState):
        masters, moments = (list(tensors.values()) for tensors in state.files().values())
    else:
        masters, moments = [], list(optimizer_tensors(module.optimizer).values())
    kinds: dict[str, Iterable[Tensor]] = {
        "buckets": _buckets(module),  # first, because gradients lie in them
        "weights": (getattr(parameter, "ds_tensor", parameter.data) for parameter in parameters),
        "whole": (parameter.data for parameter in parameters),
        "masters": masters,
        "moments": moments,
        "gradients": _gradients(module, parameters),
        "other": (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)),
    }
    sizes = {kind: sum(_new_allocations(tensors, counted)) for kind, tensors in kinds.items()}
    return {kind: sizes[kind] for kind in KINDS}


def bucket_bytes(module: TrainingModule) -> int:
    """Bytes of DeepSpeed's buffers for communication at this moment."""
    return sum(_new_allocations(_buckets(module), set()))


def _new_allocations(tensors: Iterable[Tensor], counted: set[tuple[torch.device, int]]) -> Iterator[int]:
    """Bytes of each allocation under `tensors` that is not in `counted` yet, and is after it."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        place = (tensor.device, storage.data_ptr())
        if storage.nbytes() and place not in counted:
            counted.add(place)
            yield storage.nbytes()


def _zero_optimizer(module: TrainingModule) -> Any:
    """DeepSpeed's optimizer of stages 1 to 3, else None."""
    strategy = module.trainer.strategy
    return strategy.deepspeed_engine.optimizer if isinstance(strategy, ZeroStrategy) and strategy.stage else None


def _gradients(module: TrainingModule, parameters: list[Any]) -> Iterator[Tensor]:
    for parameter in parameters:
        for gradient in (parameter.grad, getattr(parameter, "grad_accum", None)):
            if gradient is not None:
                yield gradient
    zero = _zero_optimizer(module)
    if zero is not None:
        for tensors in zero.averaged_gradients.values():
            yield from tensors or ()


def _buckets(module: TrainingModule) -> Iterator[Tensor]:
    zero = _zero_optimizer(module)
    if zero is not None:
        for bucket in zero.ipg_buckets.values():
            buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
            yield from (buffer for buffer in buffers if buffer is not None)
