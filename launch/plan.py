"""Config -> Plan: every byte that launching writes, and every command that it runs. Planning touches nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_cluster import __version__
from rwkv_cluster.config import Config
from rwkv_cluster.config.launch import PrepareJobConfig
from rwkv_cluster.config.loader import dump_yaml, parse_config
from rwkv_cluster.launch.command import Command, refuse_control_characters
from rwkv_cluster.launch.launchers import HOSTFILE, hostfile
from rwkv_cluster.launch.local import local_script
from rwkv_cluster.launch.slurm import array_script, batch_script, node_command, prepare_script
from rwkv_cluster.workdir import WorkDir

PREPARE_JOB = "PREPARE_JOB"  # stands for the number of the prepare job, known once it is submitted


@dataclass(frozen=True)
class Plan:
    """What a launch is.

    Attributes:
        config: as resolved, with an absolute work directory.
        files: name in the launch directory -> text. The first is the script to read.
        commands: run in the launch directory, in this order. Those of sbatch print a job number.
        node_command: what each node of a Slurm job runs, up to the trainer's verb; None without Slurm.
        members: launches of the runs of a sweep, which have no commands: this one's script starts theirs.
    """

    config: Config
    files: Mapping[str, str]
    commands: tuple[Command, ...]
    node_command: Command | None = None
    members: tuple[Plan, ...] = ()


def plan(config: Config, cwd: Path, verb: str = "train") -> Plan:
    """The launch of `config` by a caller who stands in `cwd`. Raises LaunchError or ConfigError.

    verb: what the ranks run: train, or doctor to examine where they would.
    """
    if verb == "doctor":
        config = _once(config)
    work = WorkDir(config.work_dir)
    config = config.model_copy(update={"work_dir": str(work.root)})
    refuse_control_characters(str(cwd), "the current directory")
    launch = config.launch
    if not launch.is_batch:
        files = {"job.sh": local_script(config, str(cwd), verb)}
        if (text := hostfile(config)) is not None:
            files[HOSTFILE] = text
        return _with_record(config, cwd, files, [Command(("bash", "job.sh"))])
    if launch.sweep:
        return _sweep(config, cwd)
    files = {"job.sh": batch_script(config, str(cwd), verb)}
    if launch.prepare.own_job:
        files["prepare.sh"] = prepare_script(config, str(cwd))
    return _with_record(config, cwd, files, _submissions(list(files), "afterok"))


def _once(config: Config) -> Config:
    """`config` as one job with the same resources that nothing precedes, follows or queues again."""
    target = "sbatch" if config.launch.is_batch else config.launch.target
    plain: dict[str, object] = {
        "target": target,
        "sweep": [],
        "requeue": False,
        "exclude_bad_nodes": False,
        "prepare": PrepareJobConfig(),
    }
    return config.model_copy(update={"launch": config.launch.model_copy(update=plain)})


def _submissions(scripts: list[str], dependency: str) -> list[Command]:
    """sbatch for the training script, which comes first and runs after the second one, if there is one."""
    job, *prepare = scripts
    if not prepare:
        return [Command(("sbatch", "--parsable", job))]
    after = (f"--dependency={dependency}:{PREPARE_JOB}", "--kill-on-invalid-dep=yes")
    return [Command(("sbatch", "--parsable", *prepare)), Command(("sbatch", "--parsable", *after, job))]


def _sweep(config: Config, cwd: Path) -> Plan:
    members = []
    for number, overrides in enumerate(config.launch.sweep):
        text = dump_yaml(config.model_copy(update={"launch": config.launch.model_copy(update={"sweep": []})}))
        changes = [f"{name}={json.dumps(value)}" for name, value in overrides.items()]
        place = {"work_dir": f"{config.work_dir}/sweep/{number}", "launch.name": f"{config.launch.name}-{number}"}
        changes += [f"{name}={json.dumps(value)}" for name, value in place.items()]
        member = plan(parse_config(text.encode(), f"launch.sweep, entry {number}", changes).config, cwd)
        members.append(replace(member, commands=()))
    first = members[0].files
    scripts = [name for name in first if name.endswith(".sh")]
    files = {f"sweep-{name}": array_script(config, first[name], name, len(members)) for name in scripts}
    made = _with_record(config, cwd, files, _submissions(list(files), "aftercorr"))
    return replace(made, members=tuple(members))


def _with_record(config: Config, cwd: Path, files: dict[str, str], commands: list[Command]) -> Plan:
    record = {
        "target": config.launch.target,
        "name": config.launch.name,
        "cwd": str(cwd),
        "commands": [list(command.argv) for command in commands],
        "version": __version__,
    }
    files |= {"config.yaml": dump_yaml(config), "command.json": json.dumps(record, indent=2) + "\n"}
    node = node_command(config, str(cwd)) if config.launch.is_batch else None
    return Plan(config, files, tuple(commands), node)
