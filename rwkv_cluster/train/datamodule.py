"""LightningDataModule over the token file: one loader whose order is the sampler's, for this rank."""

from __future__ import annotations

from typing import Any

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

    def train_dataloader(self) -> DataLoader[TokenBatch]:
        assert self.trainer is not None
        batches = MicroBatches(
            self._sample_plan,
            self._start_step,
            self._total_steps,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            micro_bsz=self._micro_bsz,
        )
        return DataLoader(self._dataset, batch_sampler=batches, collate_fn=self._as_given, num_workers=0)

    def _as_given(self, batch: Any) -> Any:
        assert isinstance(self.trainer, Trainer)
        collectives.fault_point("data.batch", step=self._start_step + self.trainer.global_step)
        return batch
