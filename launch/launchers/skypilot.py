"""A task file for SkyPilot, which starts machines of many clouds. It is printed, and `sky` is run by its user."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rwkv_cluster.config import Config
from rwkv_cluster.config.kubernetes import volume
from rwkv_cluster.config.loader import dump_yaml
from rwkv_cluster.errors import ConfigError, LaunchError
from rwkv_cluster.launch.command import Command
from rwkv_cluster.launch.launchers.kubernetes_manifests import Dumper
from rwkv_cluster.launch.launchers.launcher import Launched, Plan, Tool, with_record
from rwkv_cluster.launch.launchers.rank_command import interpreter, joined_torchrun
from rwkv_cluster.launch.logs import FileLogs
from rwkv_cluster.workdir import WorkDir

TASK = "task.yaml"
CONFIG_FILE = '"$HOME/rwkv-cluster.yaml"'


@dataclass(frozen=True)
class Skypilot:
    """Launcher of the target skypilot, which starts nothing."""

    runs_here: bool = False
    end_states: Collection[str] = ()
    end_s: float = 0.0
    poll_s: float = 0.2

    def tools(self, config: Config) -> tuple[Tool, ...]:
        """No programs: a task file is all that is made here."""
        return ()

    def require(self) -> None:
        """Raise LaunchError: only --dry-run has this target."""
        raise LaunchError(
            "launch.target is skypilot, of which rwkv-cluster writes the task file alone",
            remedy="Add --dry-run > task.yaml, and start it with `sky jobs launch task.yaml`",
        )

    def script(self, config: Config, cwd: Path, verb: str) -> Plan:
        """The task file. Raises ConfigError."""
        text = yaml.dump(_task(config, verb), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)
        secrets = [word for name in config.launch.pass_env for word in ("--secret", name)]
        return with_record(config, cwd, {TASK: text}, [Command(("sky", "jobs", "launch", *secrets, TASK))])

    def submit(self, plan: Plan, folder: Path, members: Sequence[Path]) -> Launched:
        """Raise LaunchError, as `require` does."""
        self.require()
        return Launched(folder)

    def state(self, folder: Path) -> tuple[str, str]:
        """Raise LaunchError: `sky` knows."""
        raise LaunchError(f"{folder}: SkyPilot's tasks are not followed from here", remedy="Look at `sky jobs queue`")

    def logs(self, folders: Sequence[Path], rank: int | None) -> FileLogs:
        """The files of the launch directory."""
        return FileLogs(folders, rank)

    def cancel(self, folder: Path, *, now: bool) -> None:
        """Raise LaunchError: `sky` ends its tasks."""
        raise LaunchError(f"{folder}: SkyPilot's tasks are not ended from here", remedy="Use `sky jobs cancel`")


def _task(config: Config, verb: str) -> dict[str, Any]:
    launch, sky = config.launch, config.launch.skypilot
    volumes = [volume(text) for text in sky.volumes]
    if launch.num_nodes > 1 and not any(each.holds(config.work_dir) for each in volumes):
        raise ConfigError(
            f"work_dir is {config.work_dir}, which lies in no volume that the {launch.num_nodes} machines share: "
            f"launch.skypilot.volumes is {', '.join(sky.volumes) or 'not set'}",
            remedy="Mount a volume at it, or above it",
        )
    resources: dict[str, Any] = {}
    if sky.infra:
        resources["infra"] = sky.infra
    if launch.gpus_per_node:
        resources["accelerators"] = f"{sky.accelerator}:{launch.gpus_per_node}"
    if launch.cpus_per_node:
        resources["cpus"] = f"{launch.cpus_per_node}+"
    if sky.spot:
        resources["use_spot"] = True
    if launch.container.image:
        resources["image_id"] = f"docker:{launch.container.image}"
    task: dict[str, Any] = {"name": launch.name, "num_nodes": launch.num_nodes}
    if resources:
        task["resources"] = resources
    if volumes:
        task["volumes"] = {each.path: each.name for each in volumes}
    task["envs"] = {"RWKV_CLUSTER_CONFIG": dump_yaml(config), **launch.env}
    if launch.pass_env:
        task["secrets"] = dict.fromkeys(launch.pass_env)  # `sky --secret NAME` gives them their values
    return task | {"run": _run(config, verb)}


def _run(config: Config, verb: str) -> str:
    """What each machine runs, in bash."""
    folder = str(WorkDir(config.work_dir).launches / "skypilot")
    command = joined_torchrun(config, interpreter(config, "skypilot"), "/", "SKYPILOT_NODE_RANK")
    lines = [
        "set -u",
        Command(("export", f"RWKV_CLUSTER_LAUNCH={folder}")).shell(),
        'export RWKV_CLUSTER_NODES="$SKYPILOT_NODE_IPS"',
        *(f"{Command(('eval', '--', line)).shell()} || exit 6" for line in config.launch.setup),
        f'printf %s "$RWKV_CLUSTER_CONFIG" > {CONFIG_FILE}',
        f"exec {command.shell()} {verb} {CONFIG_FILE}",
    ]
    return "\n".join(lines) + "\n"
