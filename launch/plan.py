"""Config -> Plan: every byte that launching writes, and every command that it runs. Planning touches nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rwkv_cluster import __version__
from rwkv_cluster.config import Config
from rwkv_cluster.configfile import dump_yaml
from rwkv_cluster.launch.command import Command, refuse_control_characters
from rwkv_cluster.launch.script import batch_script, local_script, prepare_script
from rwkv_cluster.workdir import WorkDir

PREPARE_JOB = "PREPARE_JOB"  # stands for the number of the prepare job, known once it is submitted


@dataclass(frozen=True)
class Plan:
    """What a launch is.

    Attributes:
        config: as resolved, with an absolute work directory.
        files: name in the launch directory -> text. The first is the script to read.
        commands: run in the launch directory, in this order. Those of sbatch print a job number.
    """

    config: Config
    files: Mapping[str, str]
    commands: tuple[Command, ...]

    @property
    def is_batch(self) -> bool:
        """Whether a scheduler runs it."""
        return self.config.launch.target == "sbatch"


def plan(config: Config, cwd: Path) -> Plan:
    """The launch of `config` by a caller who stands in `cwd`. Raises LaunchError or ConfigError."""
    work = WorkDir(config.work_dir)
    config = config.model_copy(update={"work_dir": str(work.root)})
    refuse_control_characters(str(cwd), "the current directory")
    launch = config.launch
    if launch.target != "sbatch":
        return _with_record(config, cwd, {"job.sh": local_script(config, str(cwd))}, [Command(("bash", "job.sh"))])
    files = {"job.sh": batch_script(config, str(cwd))}
    commands = [Command(("sbatch", "--parsable", "job.sh"))]
    if launch.prepare.own_job:
        files["prepare.sh"] = prepare_script(config, str(cwd))
        after = (f"--dependency=afterok:{PREPARE_JOB}", "--kill-on-invalid-dep=yes")
        commands = [
            Command(("sbatch", "--parsable", "prepare.sh")),
            Command(("sbatch", "--parsable", *after, "job.sh")),
        ]
    return _with_record(config, cwd, files, commands)


def _with_record(config: Config, cwd: Path, files: dict[str, str], commands: list[Command]) -> Plan:
    record = {
        "target": config.launch.target,
        "name": config.launch.name,
        "cwd": str(cwd),
        "commands": [list(command.argv) for command in commands],
        "version": __version__,
    }
    files |= {"config.yaml": dump_yaml(config), "command.json": json.dumps(record, indent=2) + "\n"}
    return Plan(config, files, tuple(commands))
