"""Which ranks and devices a run has, and the types that it computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rwkv_cluster.runtime import control_group

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The type of the activations by `training.precision`."""


@dataclass(frozen=True)
class Placement:
    """accelerator: "cpu" or "cuda". world_size: ranks of the run; devices: of them on this machine."""

    accelerator: str
    world_size: int
    devices: int
    num_nodes: int


def memory_bytes(placement: Placement) -> float:
    """Memory of one rank: that of its GPU, or its share of what this process may use on a CPU."""
    if placement.accelerator == "cuda":
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return control_group.memory_bytes() / placement.devices
