"""Token file -> tensors: training samples by sample number, validation windows in file order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rwkv_cluster.data.binidx import IndexedTokens
from rwkv_cluster.data.sampler import SamplePlan


class TokenDataset(Dataset[Tensor]):
    """Samples of one token file, addressed by sample number (from 1).

    Documents are not looked at: a sample is a flat slice of the file, as in RWKV-LM.
    """

    def __init__(self, tokens: IndexedTokens, sample_plan: SamplePlan) -> None:
        self._tokens = tokens
        self._sample_plan = sample_plan

    def __getitem__(self, sample: int) -> Tensor:
        """[T + 1] int64: inputs are all but the last, targets all but the first."""
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[int]) -> Tensor:
        """[len(samples), T + 1] int64."""
        offsets = [self._sample_plan.offset(sample) for sample in samples]
        return torch.from_numpy(self._tokens.read_rows(offsets, self._sample_plan.ctx_len + 1).astype(np.int64))


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
    tokens: IndexedTokens, *, ctx_len: int, batch_size: int, max_tokens: int, rank: int = 0, world_size: int = 1
) -> Iterator[Tensor | None]:
    """[b, length + 1] int64 windows that cover the first `max_tokens` targets of a file once, in file order.

    The last window may be shorter than ctx_len and then comes alone. Ranks take whole batches in turn, so the sum
    over ranks does not depend on their number. None stands for the turn of a rank for which none is left: each has as
    many turns, since under ZeRO-3 no rank can compute alone.
    """
    n_targets = min(tokens.n_tokens - 1, max_tokens)
    full, rest = divmod(n_targets, ctx_len)
    starts = [index * ctx_len for index in range(full)]
    batches = [(starts[i : i + batch_size], ctx_len) for i in range(0, full, batch_size)]
    if rest:
        batches.append(([full * ctx_len], rest))
    for turn in range(rank, -(-len(batches) // world_size) * world_size, world_size):
        if turn >= len(batches):
            yield None
            return
        group, length = batches[turn]
        yield torch.from_numpy(tokens.read_rows(group, length + 1).astype(np.int64))
