"""Which process of a run this is, as its launcher says through the environment. The one place that reads that."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, Lightning's own) has started this process."""
    return "RANK" in os.environ or "LOCAL_RANK" in os.environ


def rank() -> int:
    """This process's number among all ranks; 0 without a launcher.

    Lightning's own launcher sets LOCAL_RANK only, on its one machine.
    """
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def launched_world_size() -> int | None:
    """Number of ranks that a launcher has started, or None when there is none."""
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value else None


def launched_local_world_size() -> int | None:
    """Number of those that are on this machine, or None where the launcher does not say."""
    value = os.environ.get("LOCAL_WORLD_SIZE")
    return int(value) if value else None


def end_with_launcher() -> None:
    """Let the kernel kill this process when the one that launched it is gone.

    Without this the workers of a killed torchrun train on for ever, and a rank that waits for a killed rank 0 to open
    the process group waits for half an hour. Does nothing in a process that a person or a batch system started.
    """
    if rank() != 0 or launched_local_world_size() is not None:
        end_with_parent()


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent is gone. Does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
