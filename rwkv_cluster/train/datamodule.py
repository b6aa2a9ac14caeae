"""LightningDataModule over the token file: one loader whose order is the sampler's, for this rank."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from rwkv_cluster.data.dataset import MicroBatches, TokenDataset
from rwkv_cluster.data.sampler import SamplePlan
from rwkv_cluster.data.windows import TokenBatch, Windows
from rwkv_cluster.train.distributed import collectives


class TokenDataModule(LightningDataModule):
    """Micro batches of this rank from `start_step` on.

    Reading a sample is a slice of a memory-mapped file, microseconds: no worker processes are worth their trouble.
    """

    def __init__(
        self, windows: Windows, sample_plan: SamplePlan, *, start_step: int, total_steps: int, micro_bsz: int
    ) -> None:
        super().__init__()
        self._dataset = TokenDataset(windows, sample_plan)
        self._sample_plan = sample_plan
        self._start_step = start_step
        self._total_steps = total_steps
        self._micro_bsz = micro_bsz

    def train_dataloader(self) -> DataLoader[TokenBatch] | OneAhead:
        """Loader of the batches, on CUDA pinned, so that nothing waits for their transfer, and read one ahead."""
        assert self.trainer is not None
        batches = MicroBatches(
            self._sample_plan,
            self._start_step,
            self._total_steps,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            micro_bsz=self._micro_bsz,
        )
        device = self.trainer.strategy.root_device
        loader: DataLoader[TokenBatch] = DataLoader(
            self._dataset,
            batch_sampler=batches,
            collate_fn=_as_given,
            num_workers=0,
            pin_memory=device.type == "cuda",
        )
        return OneAhead(loader, device) if device.type == "cuda" else loader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert isinstance(self.trainer, Trainer)
        collectives.fault_point("data.batch", step=self._start_step + self.trainer.global_step)
        return batch


class OneAhead:
    """The batches of `loader` in their order, the next one read by a thread while one is trained on.

    device: for which the thread pins memory. torch keeps pinned memory that a batch no longer needs for the next.
    What reading raises is raised where the batch is asked for.
    """

    def __init__(self, loader: DataLoader[TokenBatch], device: torch.device) -> None:
        self._loader, self._device = loader, device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self._handed_out(iter(self._loader))

    def _handed_out(self, batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
        with ThreadPoolExecutor(1, "batches", self._begin_thread) as thread:
            coming = thread.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = thread.submit(next, batches, None)
                yield batch

    def _begin_thread(self) -> None:
        if self._device.type == "cuda":  # else it would take the first GPU, whatever the rank
            torch.cuda.set_device(self._device)


def _as_given(batch: Any) -> Any:
    return batch
