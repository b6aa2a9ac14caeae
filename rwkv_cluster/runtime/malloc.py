"""The memory of the process: its peak, and how its allocator treats tensors that were freed."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGEST_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Let malloc keep what tensors on the CPU free, for the next step's; returns whether it does.

    By default glibc maps every large tensor afresh and returns it when freed: the kernel clears the same pages again
    in every step, a tenth of a small model's training time. Tensors of 1 GiB and more still come and go so. Nothing
    is done where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB: the GPU allocator's on CUDA, resident memory elsewhere."""
    if device.type == "cuda":
        # max_memory_allocated reads the same, out of a flat and sorted copy of everything that is counted
        peak: int = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"]
        return peak / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
