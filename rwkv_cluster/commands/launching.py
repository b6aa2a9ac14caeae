"""launch, logs and cancel: starting a run on its target, and what has become of it."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_cluster.commands.loading import named_config
from rwkv_cluster.commands.subcommand import Result, Subcommand
from rwkv_cluster.runtime.terminal.console import print_result
from rwkv_cluster.runtime.terminal.text_safety import visible

if TYPE_CHECKING:
    from rwkv_cluster.launch.launchers.launcher import Launched, Plan

CANCEL_GRACE_S = 120.0  # for a checkpoint

logger = logging.getLogger("rwkv_cluster")


def _add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", metavar="T", help="instead of the file's launch.target")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script or the manifests, start and write nothing"
    )
    parser.add_argument("--doctor", action="store_true", help="start `rwkv-cluster doctor` there instead of training")


def launch(options: argparse.Namespace) -> Result:
    """Start the run, or `doctor`, on its target, or show what that would be."""
    from rwkv_cluster.launch.plan import plan
    from rwkv_cluster.launch.submit import submit

    target = [f"--launch.target={options.target}"] if options.target else []
    run = named_config(options, target)
    run.require_own_tokenizer()
    run.require_own_launch()
    planned = plan(run.resolved.config, Path.cwd(), "doctor" if options.doctor else "train")
    if options.dry_run:
        return _dry_run(planned)
    return _launched(submit(planned), run.resolved.config.work_dir)


def _dry_run(planned: Plan) -> Result:
    from rwkv_cluster.launch.launch_folder import CONFIG
    from rwkv_cluster.launch.submit import launch_folder

    folder = launch_folder(planned.config.work_dir, time.time())
    commands = [command.shell() for command in planned.commands]
    logger.info("would run in %s: %s", folder, "; ".join(commands))
    plans = (planned, *planned.members)
    scripts = [
        text for run in plans for name, text in run.files.items() if name.endswith((".sh", ".yaml")) and name != CONFIG
    ]
    data = {"folder": folder, "files": dict(planned.files), "commands": commands}
    if planned.members:
        data["runs"] = [dict(member.files) for member in planned.members]
    return Result("".join(scripts), data)


def _launched(launched: Launched, work_dir: str) -> Result:
    from rwkv_cluster.launch.command import Command

    rows = {"launch": str(launched.folder)}
    if launched.jobs:
        rows = {"job": " after ".join(reversed(launched.jobs)), **rows}
    if launched.jobs and launched.has_logs:
        rows |= {"log": f"{launched.folder}/job.log", "ranks": f"{launched.folder}/rank-N.log"}
    if launched.members:
        rows |= {"log": f"{launched.folder}/sweep-N-job.log", "ranks": f"{launched.members[0]}/rank-N.log"}
        rows["runs"] = f"{work_dir}/sweep/N, N from 0 to {len(launched.members) - 1}"
    if launched.jobs:
        rows["status"] = Command(("rwkv-cluster", "status", work_dir)).shell()
        rows["logs"] = Command(("rwkv-cluster", "logs", work_dir, "-f")).shell()
        rows["cancel"] = Command(("rwkv-cluster", "cancel", work_dir)).shell()
    text = "\n".join(f"{name:<7} {value}" for name, value in rows.items())
    data = {"folder": launched.folder, "jobs": launched.jobs, "exit_code": launched.code}
    return Result(text, data, launched.code or 0)


LAUNCH = Subcommand(
    "launch",
    "start the run on its target: here, torchrun, deepspeed, a container, Slurm or Kubernetes",
    launch,
    _add_launch_arguments,
    config="required",
)


def _add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", metavar="WORK_DIR", help="the directory of the run")
    parser.add_argument("-f", "--follow", action="store_true", help="until the launch has ended")
    parser.add_argument("--rank", type=int, metavar="N", help="only what this rank says")


def logs(options: argparse.Namespace) -> Result:
    """What the newest launch of a work directory, or one rank of it, has said; with --follow, says."""
    from rwkv_cluster.launch import jobs
    from rwkv_cluster.workdir import WorkDir

    folder = jobs.newest(WorkDir(options.work_dir))
    if options.follow:
        for text in jobs.follow(folder, options.rank):
            print_result(visible(text), end="")
        return Result("", {"folder": folder})
    text = jobs.logs(folder, options.rank)
    return Result(text, {"folder": folder, "text": text})


LOGS = Subcommand("logs", "what the newest launch of a work directory says", logs, _add_logs_arguments)


def _add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", metavar="WORK_DIR", help="the directory of the run")
    parser.add_argument("--now", action="store_true", help="without waiting for a checkpoint")


def cancel(options: argparse.Namespace) -> Result:
    """End the newest launch of a work directory."""
    from rwkv_cluster.launch import jobs
    from rwkv_cluster.workdir import WorkDir

    folder = jobs.newest(WorkDir(options.work_dir))
    status = jobs.cancel(folder, grace_s=0 if options.now else CANCEL_GRACE_S)
    text = f"{status.state}  {status.target}, {status.detail}\nlaunch {status.folder}"
    return Result(text, dataclasses.asdict(status))


CANCEL = Subcommand(
    "cancel",
    "end the newest launch of a work directory after a checkpoint",
    cancel,
    _add_cancel_arguments,
)
