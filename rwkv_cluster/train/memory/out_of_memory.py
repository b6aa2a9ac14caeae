"""Whether an error says that memory has run out, by all the names that this has, and what the user can do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.errors import KernelMemoryError, TrainingError

WORDS = ("out of memory", "_status_alloc_failed", "can't allocate memory")
"""In sentences of the CUDA runtime and NCCL, of cuBLAS and its relatives, and of torch's CPU allocator, which raise
plain RuntimeErrors."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the host has no memory left: torch's own, a library's, or Python's."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, KernelMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in WORDS)


@contextmanager
def naming_remedy(training: TrainingConfig) -> Iterator[None]:
    """Raise TrainingError, with settings of `training` that need less, where memory runs out inside the block."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).partition("\n")[0].rstrip(". ") or type(error).__name__
        raise TrainingError(f"there is not enough memory to train: {first_line}", remedy=_remedy(training)) from error


def _remedy(training: TrainingConfig) -> str:
    ways = [] if training.grad_cp == 1 else ["training.grad_cp=1"]
    if training.micro_bsz > 1:
        ways.append(f"a training.micro_bsz below {training.micro_bsz}, with more accumulation")
    if not ways:
        ways.append("training.zero_stage or training.offload_optimizer")
    return f"Use {' or '.join(ways)}; `rwkv-cluster plan` counts what each needs"
