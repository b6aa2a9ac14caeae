"""Token file -> tensors: training samples by sample number, validation windows in file order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from rwkv_cluster.data.sampler import SamplePlan
from rwkv_cluster.data.windows import TokenBatch, Windows


class TokenDataset(Dataset[TokenBatch]):
    """Samples of one token file, addressed by sample number (from 1)."""

    def __init__(self, windows: Windows, sample_plan: SamplePlan) -> None:
        self._windows = windows
        self._sample_plan = sample_plan
        self._counted: tuple[int, int] | None = None  # a global batch, and its number of trained targets

    def __getitem__(self, sample: int) -> TokenBatch:
        """A batch of one sample."""
        return self.__getitems__([sample])

    def __getitems__(self, samples: Sequence[int]) -> TokenBatch:
        """A micro batch of samples of one optimizer step."""
        batch = self._windows.read([self._sample_plan.window(sample) for sample in samples])
        if batch.trained is None:
            return batch
        return batch._replace(n_trained=self._count_trained(self._sample_plan.batch_of(samples[0])))

    def _count_trained(self, batch: int) -> int:
        """Trained targets of a global batch, counted by each rank alone from the masks of all samples in it."""
        if self._counted is None or self._counted[0] != batch:
            samples = self._sample_plan.samples_of_batch(batch)
            counts = (self._windows.count_trained(self._sample_plan.window(sample)) for sample in samples)
            self._counted = (batch, sum(counts))
        return self._counted[1]


@dataclass(frozen=True)
class MicroBatches:
    """Batch sampler: the sample numbers of one rank's micro batches, from `start_step` to `total_steps`."""

    sample_plan: SamplePlan
    start_step: int
    total_steps: int
    rank: int
    world_size: int
    micro_bsz: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.total_steps):
            yield from self.sample_plan.rank_samples(
                step, rank=self.rank, world_size=self.world_size, micro_bsz=self.micro_bsz
            )

    def __len__(self) -> int:
        per_step = self.sample_plan.global_batch_size // (self.world_size * self.micro_bsz)
        return (self.total_steps - self.start_step) * per_step


def validation_batches(
    windows: Windows, *, batch_size: int, max_tokens: int, rank: int = 0, world_size: int = 1
) -> Iterator[TokenBatch | None]:
    """Batches that cover the first `max_tokens` targets of a file once, in file order.

    Ranks take whole batches in turn, so the sum over ranks does not depend on their number. None stands for the turn of
    a rank for which none is left: each has as many turns, since under ZeRO-3 no rank can compute alone.
    """
    groups = windows.groups(batch_size, max_tokens)
    for turn in range(rank, -(-len(groups) // world_size) * world_size, world_size):
        if turn >= len(groups):
            yield None
            return
        yield windows.read(*groups[turn])
