"""Gather check results on rank 0 through the launcher's TCPStore.

It needs no process group: the table comes also where the network or NCCL does not work. Every wait has an end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rwkv_cluster.errors import LaunchError

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_S = 0.01


class Meeting:
    """One rank's view. patience_s: for how long rank 0 waits for the others; they wait twice as long for it."""

    def __init__(self, store: Store, rank: int, world_size: int, patience_s: float) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.patience_s = patience_s

    def gather(self, what: str, value: Any, of: Iterable[int]) -> dict[int, Any]:
        """Collect on rank 0 the `value` of each rank in `of` that says it in time; nothing on the others."""
        with _reaching():
            self.store.set(f"{what}/{self.rank}", json.dumps(value))
            if self.rank != 0:
                return {}
            keys = {rank: f"{what}/{rank}" for rank in of}
            self._wait(list(keys.values()), self.patience_s)
            return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def tell(self, what: str, value: Any = None) -> Any:
        """Rank 0's `value`, on every rank. Raises LaunchError where rank 0 has not said it in time."""
        with _reaching():
            if self.rank == 0:
                self.store.set(what, json.dumps(value))
                return value
            if not self._wait([what], 2 * self.patience_s):
                raise LaunchError(f"rank 0 has not answered for {2 * self.patience_s:.0f} s", remedy="See what it says")
            return json.loads(self.store.get(what))

    def _wait(self, keys: list[str], timeout_s: float) -> bool:
        """Whether all `keys` are there, at the latest after `timeout_s`. The store's own wait fills stderr."""
        deadline = time.monotonic() + timeout_s
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True


def meet(world_size: int, rank: int, patience_s: float) -> Meeting:
    """Where the launcher says: in torchrun's store, else in one that rank 0 opens, as torch's env:// does.

    That would wait for all ranks, and this one is to tell which is missing. Raises LaunchError where there is no store.
    """
    from torch.distributed import PrefixStore, TCPStore

    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    with _reaching():
        store = TCPStore(
            os.environ.get("MASTER_ADDR", ""),
            int(os.environ.get("MASTER_PORT", "")),
            is_master=opens,
            timeout=timedelta(seconds=2 * patience_s),
            wait_for_workers=False,
        )
    return Meeting(PrefixStore("doctor", store), rank, world_size, patience_s)


@contextmanager
def _reaching() -> Iterator[None]:
    """torch says in many ways that rank 0's host does not answer."""
    from torch.distributed import DistError

    try:
        yield
    except (DistError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LaunchError(
            f"the ranks do not meet at MASTER_ADDR and MASTER_PORT: {reason}",
            remedy="Start all of them by one launcher, and look at the network between their machines",
        ) from error
