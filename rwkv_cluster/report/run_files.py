"""What a run has written down, read back: without torch, whatever state the files are in, also while it writes them."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv_cluster.config import Config
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.data.horizon import Horizon, horizon
from rwkv_cluster.data.manifest import DataManifest, load_manifest
from rwkv_cluster.data.sampler import plan_samples
from rwkv_cluster.errors import RWKVClusterError
from rwkv_cluster.runtime.own_file import open_own, require_own
from rwkv_cluster.workdir import WorkDir

BLOCK_BYTES = 4 << 20
PIECE_BYTES = 1 << 18
TAIL_BYTES = 1 << 18  # about a thousand lines of metrics


def is_work_dir(work: WorkDir) -> bool:
    """Whether anything of a run is there: its configuration, its data, its lock or a launch."""
    signs = (work.config_yaml, work.data_manifest, work.lock_file, work.launches)
    return any(path.exists() for path in signs)


def json_lines(path: Path, *, most_bytes: int | None = None) -> Iterator[list[dict[str, Any]]]:
    """The objects of a file of JSON lines, in blocks of a few megabytes. Lines that hold none are passed over: one that
    is being written, or that a kill has cut short. Raises OSError where there is no file.

    most_bytes: read only about so much of a larger file, in pieces at equal distances.
    """
    with open(path, "rb", opener=open_own) as handle:
        size = path.stat().st_size
        if most_bytes is None or size <= most_bytes:
            while lines := handle.readlines(BLOCK_BYTES):
                yield _objects(lines)
            return
        n_pieces = max(most_bytes // PIECE_BYTES, 1)
        for number in range(n_pieces):
            handle.seek(number * size // n_pieces)
            yield _objects(handle.readlines(PIECE_BYTES)[min(number, 1) :])  # a piece but the first begins in a line


def last_json_lines(path: Path) -> list[dict[str, Any]]:
    """Those of the last `TAIL_BYTES` of the file; empty where there is no file."""
    try:
        with open(path, "rb", opener=open_own) as handle:
            start = max(handle.seek(0, 2) - TAIL_BYTES, 0)
            handle.seek(start)
            lines = handle.readlines()
    except OSError:
        return []
    return _objects(lines[1:] if start else lines)


def last_with(path: Path, field: str) -> dict[str, Any] | None:
    """The last object that has `field`, wherever in the file it is."""
    try:
        with (
            open(path, "rb", opener=open_own) as handle,
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            end = len(content)
            while (position := content.rfind(f'"{field}":'.encode(), 0, end)) >= 0:
                start, stop = content.rfind(b"\n", 0, position) + 1, content.find(b"\n", position)
                objects = _objects([content[start : stop if stop >= 0 else len(content)]])
                if objects and field in objects[0]:
                    return objects[0]
                end = start
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return None
    return None


def _objects(lines: list[bytes]) -> list[dict[str, Any]]:
    try:  # at once where all lines are whole, which is several times as fast
        values = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        values = [_object(line) for line in lines]
    return [value for value in values if isinstance(value, dict)]


def _object(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def number(values: Mapping[str, Any], name: str) -> float | None:
    """A field that is a number, maybe not a finite one; None where there is none."""
    value = values.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def events(path: Path) -> list[dict[str, Any]]:
    """What happened in a run, of `WorkDir.events`. Raises OSError where there is no file."""
    lines = [line for block in json_lines(path) for line in block]
    return [line for line in lines if isinstance(line.get("kind"), str) and number(line, "step") is not None]


def moment(seconds: float) -> str:
    """A time of the clock, in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "an unknown time"


def read_config(work: WorkDir) -> Config | str:
    """The configuration that the last session used, or why there is none."""
    path = work.config_yaml
    if not path.exists():
        return f"{path} does not exist: no training has started"
    try:
        require_own(path)
        return load_config(path)
    except RWKVClusterError as error:
        return str(error)


def read_manifest(work: WorkDir) -> DataManifest | str:
    """The manifest of the prepared data, or why there is none."""
    try:
        return load_manifest(work.data)
    except RWKVClusterError as error:
        return str(error)


def end_of_run(config: Config, manifest: DataManifest, last: Mapping[str, Any]) -> Horizon | None:
    """Where the run of `config` ends. last: a line of its metrics, whose tokens say how large a step is."""
    step, tokens = number(last, "step"), number(last, "tokens")
    if not step or not tokens:
        return None
    ctx_len = config.model.ctx_len
    samples = max(round(tokens / step / ctx_len), 1)
    try:
        plan = plan_samples(manifest, config.data, ctx_len, samples)
    except RWKVClusterError:
        return None
    return horizon(plan, config.training)
