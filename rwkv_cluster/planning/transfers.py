"""Predicted seconds of a step that go into transfers: between ranks, and between a GPU and its host. Torch-free.

A model beside that of `planning.step_time`, and not a measurement either. Nothing is taken to go on beside the
computation, so that it is rather too slow. What a sharding sends is read from DeepSpeed 0.19's and PyTorch's code; a
ring passes (n - 1) / n of a tensor over each link to scatter or to gather it, and twice that to sum it for all.

P elements trained, W all elements, n ranks, b bytes of the training precision.
"""

from __future__ import annotations

from rwkv_cluster.model.parameter_shapes import count
from rwkv_cluster.planning.run_plan import RunPlan
from rwkv_cluster.planning.step_time import PARAMETER_BYTES
from rwkv_cluster.runtime.gpu_specs import Gpu
from rwkv_cluster.train.memory.model_states import FP32, ITEM_BYTES

LINK_SHARE = 0.7
"""Of a link's datasheet rate that transfers reach."""
NODE_GB_PER_S = 50.0
"""Of the network for each GPU, one way: 400 Gb/s, as in DGX systems of the A100's and H100's time."""
HOST_MEMORY_GB_PER_S = 25.0
"""Of the host's memory for each rank, while the optimizer updates what is offloaded."""


def transfer_seconds(plan: RunPlan, gpu: Gpu, nodes: int) -> float:
    """Seconds of one step of the configured setting of `plan` on so many nodes, beside `step_time`."""
    gb_per_s = gpu.link_gb_per_s if nodes == 1 else min(gpu.link_gb_per_s, NODE_GB_PER_S)
    between = _between_ranks(plan) / (gb_per_s * LINK_SHARE)
    to_host = _to_host(plan) / (gpu.host_gb_per_s * LINK_SHARE)
    return (between + to_host) / 1e9 + _update_on_host(plan)


def _between_ranks(plan: RunPlan) -> float:
    """Bytes that a rank sends to others in a step."""
    setting, item = plan.configured.setting, ITEM_BYTES[plan.config.training.precision]
    P, n, stage = count(plan.parameters.trained), setting.sharding.ranks, setting.sharding.stage
    if not stage:
        sent = 2 * FP32 * P
    elif stage == 1:  # gradients once, updated parameters once
        sent = 2 * item * P
    elif stage == 2:  # gradients of each micro batch
        sent = item * P * (plan.length.accumulate + 1)
    else:  # and the parameters of each pass over the blocks
        sent = (item * P + _passes(plan) * item * _all_elements(plan)) * plan.length.accumulate
    return sent * (n - 1) / n


def _to_host(plan: RunPlan) -> float:
    """Bytes between a GPU and its host in a step: gradients there, what is updated back, and offloaded parameters."""
    setting, item = plan.configured.setting, ITEM_BYTES[plan.config.training.precision]
    moved = 0.0
    if setting.sharding.offload_optimizer:
        moved += item * count(plan.parameters.trained) * (plan.length.accumulate + 1)
    if setting.sharding.offload_parameters:
        moved += item * _all_elements(plan) * _passes(plan) * plan.length.accumulate
    return moved / setting.sharding.ranks


def _update_on_host(plan: RunPlan) -> float:
    """Seconds of the optimizer on the host."""
    sharding = plan.configured.setting.sharding
    if not sharding.offload_optimizer:
        return 0.0
    return PARAMETER_BYTES * count(plan.parameters.trained) / sharding.ranks / (HOST_MEMORY_GB_PER_S * 1e9)


def _passes(plan: RunPlan) -> int:
    """Times that a micro batch goes through the blocks: forward, backward, and forward once more with grad_cp."""
    return 2 + int(plan.configured.setting.grad_cp)


def _all_elements(plan: RunPlan) -> int:
    return count(plan.parameters.in_memory)
