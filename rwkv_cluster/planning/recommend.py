"""Which settings fit a GPU, and where the configured one does not, the smallest change that does.

The order of changes is that of their price: activation checkpointing costs a forward pass of the blocks, a smaller
micro batch some efficiency (accumulation keeps the global batch), each ZeRO stage more communication, offloading most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.data.batch_size import divisors
from rwkv_cluster.train.memory.model_states import Sharding
from rwkv_cluster.train.memory.peak import MemoryModel, Setting, needed


def shardings(ranks: int, training: TrainingConfig) -> list[Sharding]:
    """Every sharding, from the one that keeps all to the one that keeps least.

    DeepSpeed refuses fp16, and moments of 8 bits are not cut.
    """
    if training.precision == "fp16":
        return [Sharding(ranks)]
    plain = [Sharding(ranks), Sharding(ranks, 0)]
    if training.optimizer == "adamw8bit":
        return plain
    stages = [Sharding(ranks, stage, offload) for stage in (1, 2, 3) for offload in (False, True)]
    return [*plain, *stages, Sharding(ranks, 3, True, True)]


def change(memory_model: MemoryModel, configured: Setting, gpu_bytes: float) -> Setting | None:
    """The first setting that fits: the configured one, else that with the fewest changes; None where none does."""
    for setting in _cheapest_first(configured, memory_model.training):
        if needed(memory_model.memory(setting)) <= gpu_bytes:
            return setting
    return None


def _cheapest_first(configured: Setting, training: TrainingConfig) -> Iterator[Setting]:
    yield configured
    checkpointed = replace(configured, grad_cp=True)
    for sharding in (configured.sharding, *_keeping_less(configured.sharding, training)):
        for size in reversed(divisors(configured.micro_bsz)):  # which accumulation makes up for
            accumulates = configured.accumulates or size < configured.micro_bsz
            yield replace(checkpointed, sharding=sharding, micro_bsz=size, accumulates=accumulates)


def _keeping_less(configured: Sharding, training: TrainingConfig) -> list[Sharding]:
    """Stages above the configured one, then those with offloading. ZeRO needs more than one rank."""
    stage = configured.stage or 0
    more = [s for s in shardings(configured.ranks, training) if s.stage and s.stage >= max(stage, 1)]
    on_device = [s for s in more if not s.offload_optimizer and s.stage != stage and s.ranks > 1]
    return on_device + [s for s in more if s.offload_optimizer and s != configured]
