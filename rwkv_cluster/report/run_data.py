"""A run as its work directory shows it, with a sentence for everything that is not there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.config import Config
from rwkv_cluster.data.horizon import Horizon
from rwkv_cluster.data.manifest import DataManifest
from rwkv_cluster.errors import CheckpointError, ConfigError
from rwkv_cluster.report import run_files, series
from rwkv_cluster.report.series import Columns
from rwkv_cluster.runtime.own_file import read_own
from rwkv_cluster.train.checkpoint.branch import Parent, read_parent
from rwkv_cluster.train.checkpoint.files import CheckpointFiles, check, checkpoint_path, list_steps
from rwkv_cluster.workdir import WorkDir

MOST_RANKS = 16  # whose step times are read: the files of a large run would take minutes
MOST_BYTES = 32 << 20  # of all those ranks together: a quarter of a million steps


@dataclass
class Run:
    """What is known of a run. parts: means over the ranks, per step; rank_totals: seconds of each part, by rank.

    missing: what the page cannot show, and why.
    """

    name: str
    work: WorkDir
    metrics: Columns
    parts: Columns
    rank_totals: dict[int, dict[str, float]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    config: Config | None = None
    manifest: DataManifest | None = None
    sessions: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[CheckpointFiles] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    horizon: Horizon | None = None
    parent: Parent | None = None

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, where its data says it."""
        return self.horizon.total_steps if self.horizon else None

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Tokens seen after so many steps: in proportion, since the global batch of a run does not change."""
        last_step, last_tokens = self.metrics["step"], self.metrics["tokens"]
        return steps * (last_tokens[-1] / max(last_step[-1], 1)) if len(last_step) else steps * np.nan


def read_runs(works: Sequence[WorkDir]) -> list[Run]:
    """Every run. Raises ConfigError for a directory that is none, or that is named twice."""
    for work in works:
        if not run_files.is_work_dir(work) and not (work.metrics).exists():
            raise ConfigError(
                f"{work.root}: there is no run to report on: it has no logs/metrics.jsonl and no configs/config.yaml",
                remedy="Name the work directory of a run",
            )
    roots = [str(work.root) for work in works]
    if len(set(roots)) < len(roots):
        raise ConfigError(
            f"{next(root for root in roots if roots.count(root) > 1)} is named twice", remedy="Name each run once"
        )
    return [_read(work, name) for work, name in zip(works, _names(roots), strict=True)]


def _names(roots: Sequence[str]) -> list[str]:
    """The folders' own names, or what is behind their common path where two are the same."""
    names = [Path(root).name or root for root in roots]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(roots)
    return [os.path.relpath(root, common) for root in roots]


def _read(work: WorkDir, name: str) -> Run:
    missing: list[str] = []
    run = Run(name, work, _metrics(work, missing), {}, missing=missing)
    run.parts, run.rank_totals = _step_times(work, missing)
    run.events = _events(work, missing)
    config, manifest = run_files.read_config(work), run_files.read_manifest(work)
    run.config = config if isinstance(config, Config) else None
    run.manifest = manifest if isinstance(manifest, DataManifest) else None
    missing += [
        f"{what}: {why}" for what, why in (("configuration", config), ("data", manifest)) if isinstance(why, str)
    ]
    run.parent = _parent(work, missing)
    run.sessions = _sessions(work, missing)
    run.checkpoints = _checkpoints(work, missing)
    if run.config and run.manifest and len(run.metrics["step"]):
        last = {key: float(run.metrics[key][-1]) for key in ("step", "tokens")}
        run.horizon = run_files.end_of_run(run.config, run.manifest, last)
    return run


def _parent(work: WorkDir, missing: list[str]) -> Parent | None:
    try:
        return read_parent(work)
    except CheckpointError as error:
        missing.append(f"the run that it has branched off: {error}")
        return None


def _metrics(work: WorkDir, missing: list[str]) -> Columns:
    names = ("tokens", *series.METRICS)
    path = work.metrics
    try:
        columns = series.read_columns(path, names)
    except OSError as error:
        missing.append(f"curves: {path}: {error.strerror}")
        return {name: np.empty(0) for name in ("step", *names)}
    known = np.isfinite(columns["tokens"])
    if not known.any():
        missing.append(f"curves: {path} has no line of a step yet")
    for name, what in (("val_loss", "validation loss"), ("grad_norm", "gradient norm"), ("memory_mb", "memory")):
        if known.any() and not np.isfinite(columns[name]).any():
            missing.append(f"{what}: {path} has no {name}")
    return {name: values[known] for name, values in columns.items()}


def _step_times(work: WorkDir, missing: list[str]) -> tuple[Columns, dict[int, dict[str, float]]]:
    """Means over the ranks that are read, and each rank's totals."""
    folder = work.step_times
    paths = {int(path.stem[5:]): path for path in folder.glob("rank-*.jsonl") if path.stem[5:].isdecimal()}
    if not paths:
        missing.append(f"parts of a step: {folder} has no rank-N.jsonl")
    ranks = sorted(paths)[:MOST_RANKS]
    if len(paths) > len(ranks):
        missing.append(f"parts of a step of ranks {ranks[-1] + 1} to {max(paths)}: the first {MOST_RANKS} are read")
    most_bytes = MOST_BYTES // max(len(ranks), 1)
    by_rank = {rank: series.read_columns(paths[rank], series.PARTS, most_bytes=most_bytes) for rank in ranks}
    shares = {rank: max(paths[rank].stat().st_size / most_bytes, 1.0) for rank in ranks}
    totals = {
        rank: {name: float(np.nansum(columns[name])) * shares[rank] for name in series.PARTS}
        for rank, columns in by_rank.items()
    }
    if any(share > 1 for share in shares.values()):
        missing.append("parts of every step: of their long files evenly spaced pieces are read, and sums are estimates")
    return _mean(list(by_rank.values())), totals


def _mean(by_rank: Sequence[Columns]) -> Columns:
    steps = np.unique(np.concatenate([np.empty(0), *(columns["step"] for columns in by_rank)]))
    n_ranks = np.zeros(len(steps))
    sums = {name: np.zeros(len(steps)) for name in series.PARTS}
    for columns in by_rank:
        place = np.searchsorted(steps, columns["step"])
        n_ranks[place] += 1
        for name in series.PARTS:
            sums[name][place] += np.nan_to_num(columns[name])
    return {"step": steps, **{name: values / np.maximum(n_ranks, 1) for name, values in sums.items()}}


def _events(work: WorkDir, missing: list[str]) -> list[dict[str, Any]]:
    try:
        return run_files.events(work.events)
    except OSError as error:
        missing.append(f"resumes and other events: {work.events}: {error.strerror}")
        return []


def _sessions(work: WorkDir, missing: list[str]) -> list[dict[str, Any]]:
    try:
        content = json.loads(read_own(work.environment))
    except OSError as error:
        missing.append(f"environment: {work.environment}: {error.strerror}")
        return []
    except (ValueError, RecursionError):
        missing.append(f"environment: {work.environment} is not JSON")
        return []
    sessions = content.get("sessions") if isinstance(content, dict) else None
    return [session for session in sessions if isinstance(session, dict)] if isinstance(sessions, list) else []


def _checkpoints(work: WorkDir, missing: list[str]) -> list[CheckpointFiles]:
    """Those whose files have the sizes that their manifests say. Newest first."""
    checkpoints = []
    for step in reversed(list_steps(work.checkpoints)):
        try:
            checkpoints.append(check(checkpoint_path(work.checkpoints, step), checksums=False))
        except CheckpointError as error:
            missing.append(f"checkpoint of step {step}: {error}")
    if not checkpoints:
        missing.append(f"checkpoints: {work.checkpoints} has no whole one")
    return checkpoints
