"""What one process really keeps and allocates in a training step on a CPU, as autograd and the profiler say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from rwkv_cluster.config import ModelConfig, TrainingConfig
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.layers import Linear, LowPrecisionCopy, OwnMatrices
from rwkv_cluster.model.loss import next_token_loss
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.train.optimizers.low_precision import keep_copies
from rwkv_cluster.train.optimizers.param_groups import build_optimizer
from rwkv_cluster.train.placement import DTYPES


def model_of(config: ModelConfig, precision: str, *, wkv: str, fused: str, grad_cp: bool = False) -> RWKV:
    """As a run without ZeRO has it: fp32 parameters, activations in the precision."""
    model = RWKV(config, wkv_backend=wkv, fused=fused, grad_cp=grad_cp)
    initialize(model, 0)
    model.compute_dtype = DTYPES[precision]
    return model


def some_batch(config: ModelConfig, micro_bsz: int) -> Tensor:
    assert config.vocab_size is not None
    return torch.randint(0, config.vocab_size, (micro_bsz, config.ctx_len + 1))


def saved_bytes(model: RWKV, batch: Tensor) -> int:
    """Of every storage that autograd saves in a forward pass, but the parameters'."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = next_token_loss(model, batch)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(model: RWKV, batch: Tensor, training: TrainingConfig, micro_batches: int = 1) -> int:
    """Of a whole step, the second: parameters and moments are there before it, everything else is allocated in it.

    With several micro batches there are also copies of matrices that are kept.
    """
    optimizer = build_optimizer(model, model.config.model_type, training)
    if micro_batches > 1:
        keep_copies(model, optimizer)

    def step() -> None:
        for _ in range(micro_batches):
            next_token_loss(model, batch, training.l2wrap).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    standing = sum(p.nbytes for p in model.parameters())
    standing += sum(p.nbytes for state in optimizer.state.values() for p in state.values() if p.ndim)
    standing += sum(copy.values.nbytes for copy in kept_copies(model) if copy.values is not None)
    now = most = 0
    for _, size in sorted(_allocations(profiled.profiler.kineto_results.experimental_event_tree())):
        now += size
        most = max(most, now)
    return standing + most


def kept_copies(model: RWKV) -> list[LowPrecisionCopy]:
    """Those of `keep_copies`, with or without values."""
    found: list[LowPrecisionCopy] = []
    for module in model.modules():
        if isinstance(module, OwnMatrices):
            found += module.kept.values()
        elif isinstance(module, Linear) and module.kept is not None:
            found.append(module.kept)
    return found


def _allocations(events: Any) -> list[tuple[int, int]]:
    """(time, bytes; negative where they are freed)."""
    found = []
    for event in events:
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
        found += _allocations(event.children)
    return found
