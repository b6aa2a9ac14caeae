"""How fast the ranks add up, and whether correctly. Imports no Lightning: `rwkv-cluster doctor` measures it too."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rwkv_cluster.errors import LaunchError

LARGEST_BYTES = 64 * 2**20
LONG_ENOUGH_S = 0.02  # for a measurement; a slow network is not asked for more


@dataclass(frozen=True)
class AllReduce:
    """One measured all-reduce: bytes of each rank's fp32 tensor, seconds, ranks."""

    n_bytes: int
    seconds: float
    n_ranks: int

    @property
    def bus_gb_per_s(self) -> float:
        """10^9 bytes per second over each rank's link, 2 (n - 1) / n of the tensor: the bus bandwidth of nccl-tests."""
        return 2 * (self.n_ranks - 1) / self.n_ranks * self.n_bytes / self.seconds / 1e9

    def __str__(self) -> str:
        return (
            f"all-reduce of {self.n_bytes / 2**20:.3g} MiB over {self.n_ranks} ranks: {self.seconds * 1e3:.3g} ms, "
            f"{self.bus_gb_per_s:.3g} GB/s"
        )


def measure_all_reduce(device: torch.device) -> AllReduce:
    """Sum growing tensors over all ranks until one takes long enough. Raises LaunchError for a wrong sum."""
    n_ranks, expected = dist.get_world_size(), dist.get_world_size() * (dist.get_world_size() + 1) / 2
    n_bytes = 2**16
    while True:
        values = torch.full((n_bytes // 4,), dist.get_rank() + 1.0, device=device)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(values)
        wrong = int((values != expected).sum())  # waits for the device
        took = torch.tensor([time.perf_counter() - begin, float(wrong)], dtype=torch.float64, device=device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        seconds, most_wrong = took.tolist()
        if most_wrong:
            raise LaunchError(
                f"an all-reduce of {n_bytes:,} bytes over {n_ranks} ranks gave {int(most_wrong):,} wrong sums",
                remedy="The network or a device of this job computes wrongly: launch on other nodes",
            )
        if seconds >= LONG_ENOUGH_S or n_bytes >= LARGEST_BYTES:
            return AllReduce(n_bytes, seconds, n_ranks)
        n_bytes *= 4
