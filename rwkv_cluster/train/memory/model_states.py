"""Bytes of the state of training on each rank: weights, gradients, masters, moments, and what ZeRO adds to them.

Sources: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020, figure 1, for
what a stage divides by the ranks; DeepSpeed 0.19's stage_1_and_2.py and stage3.py for its buffers and copies.
P elements of the trained parameters, n ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwkv_cluster.adapters.quantized.table import quantized_bytes
from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.model.parameter_shapes import count, trained
from rwkv_cluster.model.versions.version import Shapes
from rwkv_cluster.train.optimizers.table import Optimizer

FP32 = 4  # bytes
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an element in a training precision."""

PERSISTENT_ELEMENTS = 100_000
"""Stage 3 keeps smaller parameters whole: stage3_param_persistence_threshold."""

LIVE_ELEMENTS = 550_000_000
"""Elements that stage 3 has whole at a time: half of stage3_max_reuse_distance, 10^9, which is counted there and back,
and stage3_prefetch_bucket_size, 5 * 10^7."""

ALL_REDUCE_ELEMENTS = 500_000_000
"""Elements of the flat copy in which DeepSpeed's stage 0 sums gradients: MEMORY_OPT_ALLREDUCE_SIZE in its engine."""


def keeps_copies(precision: str, stage: int | None, *, accumulates: bool, grad_cp: bool) -> bool:
    """Whether a rank keeps the blocks' matrices in the training precision, too, from one micro batch to the next.

    Without `grad_cp` autograd has such copies in memory at the peak all the same. With it they would be 2 bytes more
    for each parameter, of which there is not enough then. From ZeRO's stage 1 on parameters are in that precision.
    """
    return precision != "fp32" and not stage and accumulates and not grad_cp


@dataclass(frozen=True)
class Sharding:
    """Division of the state of training by ranks. stage: of ZeRO, None without DeepSpeed, on one rank without DDP."""

    ranks: int
    stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @classmethod
    def of(cls, training: TrainingConfig, ranks: int) -> Sharding:
        """The sharding that `training` configures."""
        return cls(ranks, training.deepspeed_stage, training.offloads_optimizer, training.offloads_parameters)

    @property
    def overrides(self) -> list[str]:
        """The fields of the configuration that say so."""
        if self.stage is None:
            return ["training.strategy=auto", "training.zero_stage=null"]
        flags = {"offload_optimizer": self.offload_optimizer, "offload_parameters": self.offload_parameters}
        return [f"training.zero_stage={self.stage}", *(f"training.{name}=true" for name, on in flags.items() if on)]


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank.

    weights: parameters, without those that the host has; in a peak also the copies of `keeps_copies`. gathered: stage
    3's parameters that are whole for a while. gradients: at the end of a backward pass. gradient_copy: fp32, in the
    update. buckets: for communication. keeps_gradients: whether the memory of gradients is held through the forward
    pass, too. host: of the same rank, offloaded.
    """

    weights: float
    gathered: float
    gradients: float
    gradient_copy: float
    masters: float
    moments: float
    buckets: float
    keeps_gradients: bool
    host: float


def theory(parameters: int, ranks: int, stage: int | None, precision: str, optimizer: Optimizer) -> dict[str, float]:
    """Bytes on each of `ranks` for a model of `parameters` elements, all trained; stage: of ZeRO, None without it.

    Stage 1 divides masters and moments by the ranks, stage 2 also gradients, stage 3 also weights. Without ZeRO and in
    stage 0 this package trains fp32 parameters in every precision and so has no masters beside them. Matrices count as
    any other parameter, also where the optimizer keeps other moments for them.
    """
    n_moments = len(optimizer.moments)
    if not stage:
        whole = float(FP32 * parameters)
        return {"weights": whole, "gradients": whole, "masters": 0.0, "moments": n_moments * whole}
    elements = parameters * ITEM_BYTES[precision]
    return {
        "weights": elements / (ranks if stage == 3 else 1),
        "gradients": elements / (ranks if stage >= 2 else 1),
        "masters": FP32 * parameters / ranks,
        "moments": n_moments * FP32 * parameters / ranks,
    }


def model_states(
    shapes: Shapes,
    sharding: Sharding,
    precision: str,
    bucket_elements: int,
    optimizer: Optimizer,
    chosen: Shapes | None = None,
    quant: str = "none",
) -> ModelStates:
    """State of training of a model with `shapes`. bucket_elements: of one bucket, training.ds_bucket_mb in elements.

    chosen: those that are trained, where the configuration freezes the others, which then have the training precision.
    quant: how the dense matrices among these are held, see `adapters.quantized.table`.
    """
    updated = trained(shapes) if chosen is None else chosen
    P, stage, ranks = count(updated), sharding.stage, sharding.ranks
    parts = theory(P, ranks, stage, precision, optimizer)
    parts["moments"] = optimizer.moment_bytes(updated) / (ranks if stage else 1)
    item = ITEM_BYTES[precision] if stage else FP32
    frozen_item = item if chosen is None or stage == 0 else ITEM_BYTES[precision]  # DeepSpeed makes stage 0 all fp32
    # frozen ones have nothing else
    held = quantized_bytes(quant, shapes, frozen_item)
    whole = count({name: shape for name, shape in shapes.items() if name not in held}) - P
    parts["weights"] += (whole * frozen_item + sum(held.values())) / (ranks if stage == 3 else 1)
    copy = FP32 * P / ranks if stage else 0.0
    host = 0.0
    if sharding.offload_optimizer:  # pinned: masters, moments, fp32 gradients, and updated parameters on their way back
        host += parts["masters"] + parts["moments"] + copy + item * P / ranks
        gradients = parts["gradients"] if stage == 1 else 0.0
        parts |= {"masters": 0.0, "moments": 0.0, "gradients": gradients}
        copy = 0.0
    if sharding.offload_parameters:
        host += parts["weights"]
        parts["weights"] = 0.0
    return ModelStates(
        **parts,
        gathered=float(_gathered(shapes) * item) if stage == 3 and (ranks > 1 or sharding.offload_parameters) else 0.0,
        gradient_copy=copy,
        buckets=_buckets(shapes if chosen is None else chosen, sharding, item, bucket_elements),
        keeps_gradients=stage == 3 or (stage is None and ranks > 1),
        host=host,
    )


def _gathered(shapes: Shapes) -> int:
    """Elements of stage 3 that are whole: of small parameters always, of others while they are in use or soon are."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    small = sum(size for size in sizes if size <= PERSISTENT_ELEMENTS)
    return small + min(sum(sizes) - small, LIVE_ELEMENTS)


def _buckets(shapes: Shapes, sharding: Sharding, item: int, elements: int) -> float:
    """Bytes of the buckets for communication, none larger than what is trained of `shapes`.

    Stages 1 and 2 fill one while the other travels (overlap_comm); stage 3 has one.
    """
    if sharding.stage == 0:
        return float(min(count(shapes), ALL_REDUCE_ELEMENTS) * item) if sharding.ranks > 1 else 0.0
    if sharding.stage is None:  # DDP's buckets are the gradients themselves: gradient_as_bucket_view
        return 0.0
    elements = min(elements, count(trained(shapes)))
    largest = max(math.prod(shape) for shape in shapes.values()) if sharding.offload_optimizer else 0
    return float((elements * (1 if sharding.stage == 3 else 2) + largest) * item)
