"""Where other ranks wait for rank 0: for the data that it prepares, and for the session that it opens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rwkv_cluster.config import Config
from rwkv_cluster.data.manifest import DataManifest, load_manifest
from rwkv_cluster.errors import CheckpointError, DataError, RWKVClusterError
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.checkpoint import save_load
from rwkv_cluster.train.checkpoint.initial_weights import with_model, with_sizes_of_weights
from rwkv_cluster.train.distributed import collectives
from rwkv_cluster.train.distributed.rank_monitor import RankMonitor
from rwkv_cluster.train.memory.grad_cp import with_grad_cp
from rwkv_cluster.train.session import Session, open_session
from rwkv_cluster.workdir import WorkDir

SHARED_DIRECTORY_S = 120.0  # for what one machine has written to be seen on another


def session_of_rank_0(config: Config, work: WorkDir, rank_monitor: RankMonitor) -> Session:
    """The session that rank 0 has opened, as seen from here, or a run that is complete and needs no rank 0 any more.

    Raises CheckpointError where this machine sees other checkpoints than rank 0's.
    """

    def own_session() -> Session:
        return open_session(with_sizes_of_weights(config), work, load_manifest(work.data))

    def is_complete() -> bool:
        return work.final_weights.exists() and own_session().is_complete

    what = "the preparation of the data"
    is_there = once_each(lambda: save_load.list_steps(work.checkpoints), is_complete)
    begins = rank_monitor.wait_for_rank_0(lambda record: record.begins, what=what, is_there=is_there)
    if begins is None:
        return own_session()
    manifest, step = manifest_seen_here(work, begins.data), begins.step

    def look() -> bool | None:
        return step == 0 or step in save_load.list_steps(work.checkpoints) or None

    what = f"the checkpoint of step {step} to be seen in {work.checkpoints} on this machine"
    collectives.wait_for(look, what=what, timeout_s=SHARED_DIRECTORY_S)
    session = open_session(with_grad_cp(with_model(config, begins.model), begins.grad_cp), work, manifest)
    if session.start_step != step:
        raise CheckpointError(
            f"rank 0 begins at step {step}, and {work.checkpoints} as rank {rank()} sees it leads to step "
            f"{session.start_step}. Look whether both machines see the same directory",
            rank=0,
        )
    return replace(session, group=begins.group)


def once_each(stamp: Callable[[], Any], look: Callable[[], bool]) -> Callable[[], bool]:
    """`look`, at most once for each value of `stamp`: it may read much. False where it cannot tell."""
    seen: list[Any] = [None]

    def is_there() -> bool:
        now = stamp()
        if not now or now == seen[0]:
            return False
        seen[0] = now
        try:
            return look()
        except (RWKVClusterError, OSError):  # rank 0 finds the same, and says it
            return False

    return is_there


def stamp_of(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def manifest_seen_here(work: WorkDir, fingerprint: str) -> DataManifest:
    """The manifest that rank 0 has written, once the shared directory shows it to this machine."""

    def look() -> DataManifest | None:
        try:
            manifest = load_manifest(work.data)
        except DataError:
            return None
        return manifest if manifest.fingerprint == fingerprint else None

    what = f"the data that rank 0 has prepared to be seen in {work.data} on this machine"
    return collectives.wait_for(look, what=what, timeout_s=SHARED_DIRECTORY_S)
