"""What a launcher is, and what it exchanges with the rest of the package."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rwkv_cluster import __version__
from rwkv_cluster.config import Config
from rwkv_cluster.config.loader import dump_yaml
from rwkv_cluster.launch.command import Command
from rwkv_cluster.launch.launch_folder import COMMAND, CONFIG
from rwkv_cluster.launch.logs import Logs


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


@dataclass(frozen=True)
class Launched:
    """A launch under way.

    jobs: numbers or names that the scheduler has, the training job last; code: of one that ended; members: folders of a
    sweep's runs; has_logs: whether the logs come into the folder.
    """

    folder: Path
    jobs: tuple[str, ...] = ()
    code: int | None = None
    members: tuple[Path, ...] = ()
    has_logs: bool = True


@dataclass(frozen=True)
class Tool:
    """A program that has to work where a run is launched.

    Attributes:
        argv: runs to its end without a fault where the program works.
        output: text that `argv` must print; empty: anything will do.
        fault: what is wrong where it does not print that, and the remedy.
    """

    argv: tuple[str, ...]
    output: str = ""
    fault: tuple[str, str] = ("", "")


class Launcher(Protocol):
    """All that is particular to one way of starting a run."""

    @property
    def runs_here(self) -> bool:
        """Whether the ranks run on the machine that launches, outside a container."""

    @property
    def end_states(self) -> Collection[str]:
        """States of a launch that is over."""

    @property
    def end_s(self) -> float:
        """Seconds in which a launch ends that is cancelled without a checkpoint."""

    @property
    def poll_s(self) -> float:
        """Seconds between two looks at a launch."""

    def tools(self, config: Config) -> tuple[Tool, ...]:
        """Programs that launching `config` needs on this machine."""

    def script(self, config: Config, cwd: Path, verb: str) -> Plan:
        """Every file and command of the launch, above all its script. Touches nothing. Raises LaunchError.

        cwd: where the caller stands. verb: what the ranks run, train or doctor.
        """

    def require(self) -> None:
        """Raise LaunchError where this Python cannot launch so."""

    def submit(self, plan: Plan, folder: Path, members: Sequence[Path]) -> Launched:
        """Start what is written in `folder`, and for a sweep in `members`. Raises LaunchError."""

    def state(self, folder: Path) -> tuple[str, str]:
        """State of the launch in a word, and what else is known of it. Raises LaunchError."""

    def logs(self, folders: Sequence[Path], rank: int | None) -> Logs:
        """What a launch says, or one rank of it. folders: that of the launch, and those of a sweep's runs."""

    def cancel(self, folder: Path, *, now: bool) -> None:
        """Ask for a checkpoint and the end, or end the launch at once. Raises LaunchError."""


def with_record(
    config: Config,
    cwd: Path,
    files: Mapping[str, str],
    commands: Sequence[Command],
    node_command: Command | None = None,
) -> Plan:
    """The plan of these scripts and commands, with the configuration and the record that each launch leaves."""
    record = {
        "target": config.launch.target,
        "name": config.launch.name,
        "cwd": str(cwd),
        "commands": [list(command.argv) for command in commands],
        "version": __version__,
    }
    own = {CONFIG: dump_yaml(config), COMMAND: json.dumps(record, indent=2) + "\n"}
    return Plan(config, {**files, **own}, tuple(commands), node_command)
