"""What the ranks of a run agree on, what they wait for, and where tests break things."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rwkv_cluster.errors import LaunchError
from rwkv_cluster.runtime.rank_env import launched_world_size, rank

log = logging.getLogger("rwkv_cluster")

# In torch's and gloo's sentences, some of which name neither: "Application timeout caused pair closure".
COLLECTIVE_WORDS = ("gloo", "nccl", "processgroup", "pair closure", "closed by peer", "reset by peer", "broken pipe")
FAULT_VARIABLE = "RWKV_CLUSTER_FAULT"

T = TypeVar("T")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def leaving_group(destroy: Callable[[], None] = dist.destroy_process_group) -> Iterator[None]:
    """A process group made inside the block is gone after it, unless an exception ends the block.

    destroy: what ends it.

    Gloo's threads let go of tensors at their leisure, for which they need Python: one that does so while the
    interpreter ends aborts a process that has done all its work. Leaving the group waits for these threads.
    """
    had_group = dist.is_available() and dist.is_initialized()
    yield
    if dist.is_available() and dist.is_initialized() and not had_group:
        gc.collect()  # DDP and Lightning's objects, in cycles, hold the group too
        destroy()


def join_group(backend: str, group: str, timeout: timedelta, device: torch.device) -> None:
    """Make the process group of all ranks, unless this process is in one. Waits for the others as long as `timeout`.

    group: a name that no earlier group of these processes had. They may all meet at one store, torchrun's for instance,
    where the addresses that an earlier group has left would be taken for this one's.
    """
    if dist.is_initialized():
        return
    number, world_size = rank(), launched_world_size() or 1
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    log.info("Initializing distributed: rank %d of %d meets the others at %s", number, world_size, where)
    store, _, _ = next(dist.rendezvous("env://", number, world_size, timeout=timeout))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(group, store),
        rank=number,
        world_size=world_size,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )


def position() -> tuple[int, int]:
    """(rank, world size) in the process group; (0, 1) when there is none."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum of `values` over all ranks, the same bits on each. Alone: `values` itself."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether `value` holds on one of the ranks, the same answer on all."""
    if not is_distributed():
        return value
    return bool(sum_over_ranks(torch.tensor([float(value)], device=device)).item() > 0)


def all_gather_floats(value: float, device: torch.device) -> list[float]:
    """Every rank's `value`, in rank order, on all ranks."""
    if not is_distributed():
        return [value]
    row = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    row[dist.get_rank()] = value
    return sum_over_ranks(row).tolist()


def gather_objects(value: T) -> list[T] | None:
    """List of every rank's `value` on rank 0, in rank order; None on the others."""
    if not is_distributed():
        return [value]
    gathered: list[T | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered  # type: ignore[return-value]


def broadcast_object(value: T) -> T:
    """Rank 0's `value` on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def is_collective_failure(error: BaseException) -> bool:
    """Whether torch says that a collective, or the making of the process group, has failed or taken too long.

    Gloo's errors inside the backward pass are plain RuntimeErrors and known by their text only.
    """
    text = str(error).lower()
    by_text = isinstance(error, RuntimeError) and any(word in text for word in COLLECTIVE_WORDS)
    return isinstance(error, dist.DistError) or by_text


def wait_for(ready: Callable[[], T | None], *, what: str, timeout_s: float, poll_s: float = 0.2) -> T:
    """Poll until `ready` returns something other than None. Raises LaunchError, naming `what`, after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (value := ready()) is None:
        if time.monotonic() > deadline:
            raise LaunchError(f"rank {rank()} waited {timeout_s:.0f} s for {what}. See the log of rank 0", rank=0)
        time.sleep(poll_s)
    return value


def fault_point(name: str, *, step: int | None = None) -> bool:
    """Where tests make a run fail: does nothing unless the environment names this point.

    RWKV_CLUSTER_FAULT is `point[@step[-last]][#rank]:action` with action `signal=NAME` (to this process),
    `sleep=SECONDS`, `error=NAME` (raises the OSError of that errno, ENOSPC for instance) or `hit`; returns True for
    `hit`, so that the caller spoils its own value.
    """
    specification = os.environ.get(FAULT_VARIABLE)
    if not specification:
        return False
    where, _, action = specification.partition(":")
    where, _, wanted_rank = where.partition("#")
    point, _, wanted_steps = where.partition("@")
    if point != name or not _is_among(step, wanted_steps) or (wanted_rank and int(wanted_rank) != rank()):
        return False
    if action.startswith("signal="):
        os.kill(os.getpid(), signal.Signals[action.removeprefix("signal=")])
    elif action.startswith("sleep="):
        time.sleep(float(action.removeprefix("sleep=")))
    elif action.startswith("error="):
        number = getattr(errno, action.removeprefix("error="))
        raise OSError(number, os.strerror(number))
    return action == "hit"


def _is_among(step: int | None, steps: str) -> bool:
    """steps: "" for every step, "7", or "7-9"."""
    if not steps or step is None:
        return not steps
    first, _, last = steps.partition("-")
    return int(first) <= step <= int(last or first)
