"""Peak arithmetic and memory of common GPUs, by which a plan and a run's MFU are measured. Torch-free.

Peaks are of dense bf16 products with fp32 accumulation, at boost clock: where a datasheet states a rate with sparsity,
half of it. Memory is what is sold, in 10^9 bytes; bandwidth is the datasheet's. So are the links, one way: NVLink
between the GPUs of a node where all of them have it, else PCIe. Shared memory is that of the compute capability in the
CUDA programming guide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.terminal.nearest import suggestion


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU.

    peak_tflops: 10^12 operations per second. bandwidth_gb_per_s: of its memory. link_gb_per_s, host_gb_per_s: one way
    to another GPU of the node, and to the host. multiprocessors: those in use. shared_kib: shared memory of each.
    device_name: pattern of what CUDA calls it, after "NVIDIA ".
    """

    peak_tflops: float
    memory_gb: float
    bandwidth_gb_per_s: float
    link_gb_per_s: float
    host_gb_per_s: float
    multiprocessors: int
    shared_kib: int
    device_name: str
    source: str


GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu(
        312, 40, 1555, 300, 32, 108, 164, r"A100-(SXM4|PCIE)-40GB", "NVIDIA A100 Tensor Core GPU datasheet"
    ),
    "a100-80gb": Gpu(
        312, 80, 2039, 300, 32, 108, 164, r"A100-SXM4-80GB|A100 80GB PCIe", "NVIDIA A100 Tensor Core GPU datasheet"
    ),
    "h100": Gpu(989, 80, 3350, 450, 64, 132, 228, r"H100 80GB HBM3", "NVIDIA H100 Tensor Core GPU datasheet: SXM"),
    "h100-pcie": Gpu(756, 80, 2000, 64, 64, 114, 228, r"H100 PCIe", "NVIDIA H100 Tensor Core GPU datasheet: PCIe"),
    "h100-nvl": Gpu(835, 94, 3900, 64, 64, 132, 228, r"H100 NVL", "NVIDIA H100 Tensor Core GPU datasheet: NVL"),
    "h200": Gpu(989, 141, 4800, 450, 64, 132, 228, r"H200", "NVIDIA H200 Tensor Core GPU datasheet: SXM"),
    "b200": Gpu(2250, 180, 8000, 900, 64, 148, 228, r"B200", "NVIDIA HGX B200 datasheet"),
    "l4": Gpu(121, 24, 300, 32, 32, 58, 100, r"L4", "NVIDIA L4 Tensor Core GPU datasheet"),
    "l40s": Gpu(362, 48, 864, 32, 32, 142, 100, r"L40S", "NVIDIA L40S GPU datasheet"),
    "a10": Gpu(125, 24, 600, 32, 32, 72, 100, r"A10", "NVIDIA A10 Tensor Core GPU datasheet"),
    "a6000": Gpu(154.8, 48, 768, 32, 32, 84, 100, r"RTX A6000", "NVIDIA Ampere GA102 GPU architecture whitepaper"),
    "rtx-3090": Gpu(
        71, 24, 936, 32, 32, 82, 100, r"GeForce RTX 3090", "NVIDIA Ampere GA102 GPU architecture whitepaper"
    ),
    "rtx-4090": Gpu(165.2, 24, 1008, 32, 32, 128, 100, r"GeForce RTX 4090", "NVIDIA Ada GPU architecture whitepaper"),
    "rtx-5090": Gpu(
        209.5, 32, 1792, 64, 64, 170, 100, r"GeForce RTX 5090", "NVIDIA RTX Blackwell GPU architecture whitepaper"
    ),
}


def find_gpu(name: str) -> Gpu:
    """The GPU that a person calls `name`, with or without dashes. Raises ConfigError with the nearest known name."""
    for known_name, gpu in GPUS.items():
        if re.sub(r"[-_ ]", "", name.lower()) == known_name.replace("-", ""):
            return gpu
    known = suggestion(name.lower(), GPUS, "Known")
    raise ConfigError(
        f"--gpu is {name[:40]!a}, which is not in the table", remedy=f"{known}; or give the numbers themselves"
    )


def gpu_of_device(device_name: str) -> Gpu | None:
    """Specifications by `torch.cuda.get_device_name`; None for one that is not in the table, and for a part (MIG)."""
    called = device_name.removeprefix("NVIDIA ")
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.device_name, called)), None)
