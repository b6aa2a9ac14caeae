"""How much of the devices' arithmetic a run uses, where their peak is known.

    MFU = tokens/s x 6 N / (ranks x peak)
    HFU = tokens/s x FLOPs that the devices do for a token / (ranks x peak)

MFU, model FLOPs utilization, is of Chowdhery et al., "PaLM", 2022, appendix B, here with the estimate 6 N for a token's
FLOPs; HFU, hardware FLOPs utilization, counts WKV, the head and what activation checkpointing computes again. Both
counts are `rwkv_cluster.model.flops`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rwkv_cluster.config import Config
from rwkv_cluster.model.flops import flops_per_token
from rwkv_cluster.runtime.gpu_specs import gpu_of_device
from rwkv_cluster.train.placement import Placement


@dataclass(frozen=True)
class Utilization:
    """model_flops: 6 N; hardware_flops: counted; both for a token. peak_flops: for a second, of all ranks together."""

    model_flops: int
    hardware_flops: int
    peak_flops: float

    def mfu(self, tokens_per_s: float) -> float:
        """Share of the peak, from 0 to 1."""
        return tokens_per_s * self.model_flops / self.peak_flops

    def hfu(self, tokens_per_s: float) -> float:
        """Share of the peak, from 0 to 1."""
        return tokens_per_s * self.hardware_flops / self.peak_flops


def utilization(config: Config, placement: Placement) -> Utilization | None:
    """Utilization of a run whose ranks all have this rank's device; None for an unknown GPU."""
    peak_tflops = config.logging.peak_tflops or _known_peak_tflops(config, placement)
    if peak_tflops is None:
        return None
    flops = flops_per_token(config.model)
    return Utilization(
        model_flops=flops.six_n,
        hardware_flops=flops.hardware(grad_cp=config.training.grad_cp == 1),
        peak_flops=placement.world_size * peak_tflops * 1e12,
    )


def _known_peak_tflops(config: Config, placement: Placement) -> float | None:
    """The table is of products in 16 bits."""
    if placement.accelerator != "cuda" or config.training.precision == "fp32":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name())
    return gpu.peak_tflops if gpu else None
