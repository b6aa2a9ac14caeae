"""`rwkv-cluster report`: from work directories to a page and its pictures on the disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.report import charts, draw, page
from rwkv_cluster.report.run_data import Run, read_runs
from rwkv_cluster.runtime.terminal.time_left import Countdown
from rwkv_cluster.workdir import WorkDir, atomic_write


@dataclass(frozen=True)
class Written:
    """What was made. missing: by work directory, what could not be shown and why."""

    page: Path
    images: list[Path]
    missing: dict[str, list[str]]


def write(works: Sequence[WorkDir], output: Path | None = None) -> Written:
    """Make the report of one run, or of several side by side, in `output`, by default `report` of the first directory.

    Raises ConfigError where a directory is no run, matplotlib is missing or `output` cannot be written.
    """
    draw.require_matplotlib()
    runs = read_runs(works)
    folder = (works[0].report if output is None else output).absolute()
    drawn, numbers = charts.make(runs)
    end = _end(runs)
    files = {"index.html": page.html(runs, drawn, numbers, end, time.time()).encode(errors="backslashreplace")}
    with Countdown("drawing", len(drawn) * len(_THEMES), "pictures") as left:
        for chart in drawn:
            for suffix, theme in _THEMES.items():
                files[f"{chart.key}{suffix}.png"] = draw.png(chart, theme, end)
                left.advance(1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            atomic_write(folder / name, content)
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {folder}: {error.strerror}", remedy="Name another folder with --output"
        ) from error
    images = [folder / name for name in files if name.endswith(".png")]
    return Written(folder / "index.html", images, {str(run.work.root): run.missing for run in runs})


_THEMES = {"": draw.LIGHT, "-dark": draw.DARK}


def _end(runs: Sequence[Run]) -> float:
    """End of the axis of tokens, the same in all charts."""
    return max((float(run.metrics["tokens"][-1]) for run in runs if len(run.metrics["tokens"])), default=1.0) or 1.0
