"""Points of a chart from a run's millions of lines: columns, smoothing, thinning.

A thinned series keeps real records only, with the smallest and the largest value of each stretch, so that no spike is
lost however long the run was. Values that are not finite stay where they are, as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.data.manifest import DataManifest
from rwkv_cluster.report import run_files
from rwkv_cluster.train.metrics.metrics_file import STATISTICS_COLUMNS

Columns = dict[str, np.ndarray]
"""Equally long arrays of float64 by field, in order of "step", each step once. NaN: not a number, or not there."""

METRICS = (
    *("loss", "val_loss", "val_loss_ema", "lr", "grad_norm", "tokens_per_s", "memory_mb", "mfu"),
    *STATISTICS_COLUMNS,
)
RARE = ("val_loss", "val_loss_ema", *STATISTICS_COLUMNS)
"""Fields that most lines are without, which is no gap."""
PARTS = ("data_s", "forward_s", "backward_s", "optimizer_s", "save_s", "eval_s")
MOST_POINTS = 1200  # of a line: two for each of the widest chart's pixels
MOST_BARS = 120  # of the stacked chart
SMOOTHING_STEPS = 20


@dataclass(frozen=True)
class Series:
    """A line of a chart. n_records: of which these are; thinned when there are fewer points."""

    step: np.ndarray
    tokens: np.ndarray
    value: np.ndarray
    n_records: int

    def data(self) -> dict[str, Any]:
        """Values for JSON, which has no word for NaN."""
        points = {"step": integers(self.step), "tokens": integers(self.tokens), "value": numbers(self.value)}
        return {**points, "n_records": self.n_records}


def loss_unit(manifests: Sequence[DataManifest | None]) -> str:
    """Unit of a loss, which says where it is the mean over some tokens only."""
    masked = any(manifest is not None and manifest.n_trained is not None for manifest in manifests)
    return "nats per trained token" if masked else "nats per token"


def integers(values: np.ndarray) -> list[int]:
    return [int(value) for value in values]


def numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def read_columns(path: Path, names: Sequence[str], *, most_bytes: int | None = None) -> Columns:
    """Columns of a file of JSON lines; of a step that is there twice the last counts. Raises OSError without one.

    most_bytes: as for `run_files.json_lines`.
    """
    lines = run_files.json_lines(path, most_bytes=most_bytes)
    blocks = [{name: _column(block, name) for name in ("step", *names)} for block in lines]
    columns = {name: np.concatenate([np.empty(0), *(block[name] for block in blocks)]) for name in ("step", *names)}
    step = columns["step"]
    known = np.isfinite(step) & (step >= 0) & (step < 2**53)
    last = len(step) - 1 - np.unique(step[::-1], return_index=True)[1]
    rows = last[known[last]]
    return {name: values[rows] for name, values in columns.items()}


def _column(block: list[dict[str, Any]], name: str) -> np.ndarray:
    values = [record.get(name) for record in block]
    try:
        return np.array(values, float)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        return np.array([_float(record, name) for record in block], float)


def _float(record: dict[str, Any], name: str) -> float:
    try:
        value = run_files.number(record, name)
        return float("nan") if value is None else float(value)
    except OverflowError:
        return float("nan")


def line(columns: Columns, name: str) -> Series:
    """The values of a field that is there; every one when they are few."""
    present = _present(columns, name)
    step, tokens, value = (columns[key][present] for key in ("step", "tokens", name))
    points = thin(value, MOST_POINTS)
    return Series(step[points], tokens[points], value[points], len(value))


def _present(columns: Columns, name: str) -> np.ndarray:
    """Where a field counts as recorded."""
    values = columns[name]
    sparse = name in RARE or not np.isfinite(values).any()
    return np.flatnonzero(np.isfinite(values)) if sparse else np.arange(len(values))


def smoothed(columns: Columns, name: str) -> Series:
    """The exponential mean over about `smoothing_span` steps, without start-up bias: both of its sums start at zero.

    At the start it looks back a fifth of the way only, so that it does not hang behind a loss that falls fast.
    """
    values = columns[name]
    span = smoothing_span(len(values))
    result, total, weight = np.full(len(values), np.nan), 0.0, 0.0
    for index, value in enumerate(values.tolist()):
        if value - value == 0:  # finite
            decay = 1 - 1 / max(min(span, index / 5), 1)
            total, weight = decay * total + value, decay * weight + 1
        if weight:
            result[index] = total / weight
    n_points = MOST_POINTS // 2 if len(values) else 0
    points = np.unique(np.linspace(0, len(values) - 1, n_points).astype(int))
    return Series(columns["step"][points], columns["tokens"][points], result[points], len(values))


def smoothing_span(n_steps: int) -> int:
    """Steps that the smoothed line looks back: those of the progress line, and a fiftieth of a long run."""
    return max(SMOOTHING_STEPS, n_steps // 50)


def thin(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` values: all, or of each of equal stretches the smallest and the largest, in order."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), most // 2).astype(int)[:-1]
    stretch = np.searchsorted(edges, np.arange(len(values)), side="right") - 1
    order = np.lexsort((values, stretch))  # NaN comes last, and so is kept as a largest one
    last = np.append(edges[1:], len(values)) - 1
    return np.unique(np.concatenate(([0], order[edges], order[last], [len(values) - 1])))


def bars(columns: Columns, parts: Sequence[str]) -> tuple[Columns, int]:
    """Means of the parts over stretches of equally many steps, at their middles; and how many steps that is."""
    n_steps = len(columns["step"])
    width = max(-(-n_steps // MOST_BARS), 1)
    starts = np.arange(0, n_steps, width)
    sizes = np.diff(np.append(starts, n_steps))
    sums = {name: np.add.reduceat(np.nan_to_num(columns[name]), starts) if n_steps else starts for name in parts}
    middle = columns["step"][starts + (sizes - 1) // 2] if n_steps else np.empty(0)
    return {"step": middle, **{name: values / sizes for name, values in sums.items()}}, width
