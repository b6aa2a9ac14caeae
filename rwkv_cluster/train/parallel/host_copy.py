"""Small tensors that go between a GPU and the host without stopping either."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopy:
    """A copy of `values` in the host's memory, which on CUDA is put into the queue at once and waited for when read.

    What is put into the queue after it, the device does while the host reads.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tolist(self) -> list[float]:
        """The values. Waits on CUDA until the device has come to the copy."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._values.tolist()
        return values


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """[n] fp64 tensor of `values` on `device`, which is not waited for: from pinned memory, if it is a GPU."""
    tensor = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
