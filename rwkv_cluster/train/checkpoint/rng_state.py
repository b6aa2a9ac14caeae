"""Capture and restore the random generators of a rank."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.train.checkpoint.state import RngState


def capture() -> RngState:
    """State of python's, numpy's, torch's CPU and, where present, this rank's CUDA generator."""
    generator = np.random.get_state(legacy=True)
    assert isinstance(generator, tuple)
    kind, keys, position, has_gauss, cached = generator
    version, internal, gauss_next = random.getstate()
    return RngState(
        python=(version, list(internal), gauss_next),
        numpy=(kind, keys.tolist(), position, has_gauss, cached),
        torch=torch.get_rng_state().numpy().tobytes().hex(),
        cuda=torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    )


def restore(states: Sequence[RngState], rank: int) -> None:
    """Put back the generators of `rank`. A rank that the saving run did not have keeps its own.

    Raises CheckpointError for a state that is none.
    """
    if rank >= len(states):
        return
    try:
        _restore(states[rank])
    except (TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"the random states of rank {rank} in the checkpoint are damaged or of another version: {error}",
            remedy="Move that checkpoint away to go on from the one before",
        ) from error


def _restore(state: RngState) -> None:
    version, internal, gauss_next = state.python
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, cached = state.numpy
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_byte_tensor(state.torch))
    if state.cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_byte_tensor(state.cuda))


def _byte_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
