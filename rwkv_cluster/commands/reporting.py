"""status and report: what a run, or several, are doing and have done."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rwkv_cluster.commands.subcommand import Result, Subcommand


def _add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", metavar="WORK_DIR", help="the directory of the run")
    parser.add_argument("--verify", action="store_true", help="read every byte of newest checkpoint and data")


def status(options: argparse.Namespace) -> Result:
    """What a run is doing."""
    from rwkv_cluster.report import status
    from rwkv_cluster.workdir import WorkDir

    run = status.read_status(WorkDir(options.work_dir), verify=options.verify)
    data = dataclasses.asdict(run) | {"data": run.data and run.data.model_dump(mode="json")}
    return Result(status.format(run), data)


STATUS = Subcommand(
    "status",
    "what a run is doing: who holds it, its step, losses, checkpoint, time left and launch",
    status,
    _add_status_arguments,
)


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dirs", nargs="+", metavar="WORK_DIR", help="one, or several to compare")
    parser.add_argument("--output", metavar="DIR", help="default: WORK_DIR/report, of the first")


def report(options: argparse.Namespace) -> Result:
    """One page about one run or several."""
    from rwkv_cluster.report.write import write
    from rwkv_cluster.workdir import WorkDir

    work_dirs = [WorkDir(work_dir) for work_dir in options.work_dirs]
    written = write(work_dirs, Path(options.output) if options.output else None)
    text = str(written.page)
    n_missing = sum(map(len, written.missing.values()))
    if n_missing:
        text += f"\n{n_missing} things are not shown, the page says why"
    return Result(text, dataclasses.asdict(written))


REPORT = Subcommand(
    "report",
    "one HTML page and pictures of what a run, or several, have done",
    report,
    _add_report_arguments,
)
