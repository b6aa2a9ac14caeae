"""Bytes that a run writes next, and whether the disk has space for them: asked while nothing is lost yet.

Torch-free, because a plan of a run asks the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.runtime.disk_errors import free_bytes
from rwkv_cluster.train.optimizers.selection import RunParameters
from rwkv_cluster.train.optimizers.table import Optimizer

SPARE = 1.1  # a file system's own blocks, and what others write in the meantime
_TENSOR = 300  # torch's format beside the values of a tensor: two zip headers, its name, its place in the pickle
_FP32 = 4  # bytes
STAGING_BYTES = 2 * 64 * 2**20
"""Of pinned memory, through which a GPU's tensors come to the host's memory before they are written."""
_RANK = 33_000  # a rank's random states as JSON

Shapes = Mapping[str, Sequence[int]]
"""Shapes of the parameters, by name."""


def weights_bytes(shapes: Shapes, item_bytes: int) -> int:
    """Approximate size of a weights file whose elements have `item_bytes`."""
    return sum(math.prod(shape) for shape in shapes.values()) * item_bytes + _TENSOR * len(shapes)


def checkpoint_bytes(shapes: Shapes, world_size: int, optimizer: Optimizer, trained: Shapes | None = None) -> int:
    """Approximate size of a checkpoint, all its files together: masters, moments and the state of each rank.

    shapes: of what it saves. trained: of what has moments, default all of it.
    """
    trained = shapes if trained is None else trained
    n_moments = sum(len(optimizer.moments_of(name, shape)) for name, shape in trained.items())
    moments = int(optimizer.moment_bytes(trained)) + _TENSOR * n_moments
    return weights_bytes(shapes, _FP32) + moments + _RANK * world_size


def checkpoint_bytes_of(parameters: RunParameters, world_size: int, optimizer: Optimizer) -> int:
    """`checkpoint_bytes` of a run."""
    chosen = parameters.trained if parameters.is_partial else None
    return checkpoint_bytes(parameters.saved, world_size, optimizer, chosen)


def bytes_needed_next(
    parameters: RunParameters, item_bytes: int, world_size: int, optimizer: Optimizer, *, begins: bool
) -> int:
    """Bytes that the next save writes: a checkpoint, the weights, their average where the optimizer keeps it, and the
    initial weights where a run `begins`.
    """
    n_exports = 1 + begins + optimizer.keeps_ema
    return checkpoint_bytes_of(parameters, world_size, optimizer) + n_exports * weights_bytes(
        parameters.model, item_bytes
    )


def require_disk_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raise CheckpointError when `n_bytes` and a tenth of it do not fit into the file system of `folder`."""
    needed, free = int(n_bytes * SPARE), free_bytes(folder)
    if free < needed:
        raise CheckpointError(
            f"there is no room for {what}: it needs {needed:,} bytes and {free:,} are free on {folder}",
            remedy="Make room there, or choose another work_dir, and run the same command again",
        )
