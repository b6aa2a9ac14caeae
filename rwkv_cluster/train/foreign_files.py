"""Files of another program where a run would write: refused before anything is overwritten.

A directory in which this package has ever worked is known by what is left there first, its lock, or by any other file
that only it writes. What merely has the names of a run's files, and none of these signs beside it, is somebody else's.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from rwkv_cluster.config.loader import load_config
from rwkv_cluster.data.manifest import parse_manifest
from rwkv_cluster.errors import ConfigError, RWKVClusterError
from rwkv_cluster.runtime.own_file import read_own
from rwkv_cluster.workdir import WorkDir

_TOKEN_FILES = ("train.bin", "train.idx", "val.bin", "val.idx")


def overwritten(work: WorkDir) -> list[Path]:
    """Files that a run overwrites, whatever its data. Those of epochs are the ones that are there."""
    logs = (work.metrics, work.metrics_csv, work.events, work.environment, work.train_log, work.epoch_log)
    configs = (work.config_yaml, work.config_json)
    epochs = sorted(work.out.glob(work.weights("[0-9]*").name))
    return [*configs, work.data_manifest, *logs, work.final_weights, *epochs]


def require_no_foreign_files(work: WorkDir, inputs: Sequence[str] | None, init_from: str | None = None) -> None:
    """Raises ConfigError where a run would overwrite what no run of this package has made, or as `require_kinds`.

    inputs: data.inputs, which are the user's own files and may lie in `data`; None: not known yet. init_from: weights
    that the run starts from, which may lie in `out`.
    """
    work.require_kinds()
    token_files = [] if _some_are_in(work.data, inputs) else [work.data / name for name in _TOKEN_FILES]
    written = [path for path in (*overwritten(work), *token_files) if path.exists()]
    foreign = [path for path in written if not _is_same(path, init_from)]
    if foreign and not _is_ours(work):
        names = ", ".join(str(path.relative_to(work.root)) for path in foreign[:5]) + (", ..." if foreign[5:] else "")
        raise ConfigError(
            f"work_dir {work.root} holds files that no run of rwkv-cluster has made, and a run would overwrite them: "
            f"{names}",
            remedy="Choose another work_dir, or move them away",
        )


def _is_ours(work: WorkDir) -> bool:
    """Whether anything is there that this package leaves behind."""
    locks = (work.lock_file, work.prepare_lock)  # made before any other file, and never removed
    if any(path.exists() for path in locks) or any(work.checkpoints.glob("step-*/manifest.json")):
        return True
    try:
        load_config(work.config_yaml)
        return True
    except RWKVClusterError:
        pass
    try:
        path = work.data_manifest
        parse_manifest(read_own(path), path)
        return True
    except (OSError, RWKVClusterError):
        return False


def _some_are_in(folder: Path, inputs: Sequence[str] | None) -> bool:
    """Whether the user reads from `folder`, or may do so."""
    if inputs is None:
        return True
    real = os.path.realpath(folder)
    places = [os.path.realpath(_without_pattern(entry)) for entry in inputs if "\0" not in entry]
    return any(os.path.commonpath((real, place)) in (real, place) for place in places)


def _without_pattern(entry: str) -> str:
    """The part of a path that stands for itself."""
    parts = Path(os.path.expanduser(entry)).parts
    return os.path.join(*takewhile(lambda part: not glob.has_magic(part), parts), "")


def _is_same(path: Path, other: str | None) -> bool:
    return other is not None and os.path.realpath(path) == os.path.realpath(os.path.expanduser(other))
