"""The table of launchers: a row for each target, and nothing about a target anywhere else."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pytest

from rwkv_cluster.config import Config
from rwkv_cluster.config.launch import SWEEP_TARGETS, Target
from rwkv_cluster.doctor.checks.tools import launch_tools
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch import jobs
from rwkv_cluster.launch.launchers import LAUNCHERS
from rwkv_cluster.launch.launchers.launcher import Launched, Plan, Tool, with_record
from rwkv_cluster.launch.launchers.slurm import Slurm
from rwkv_cluster.launch.logs import FileLogs
from rwkv_cluster.launch.plan import plan
from rwkv_cluster.launch.submit import submit
from rwkv_cluster.workdir import WorkDir


def test_every_target_of_the_configuration_has_a_launcher() -> None:
    assert set(LAUNCHERS) == set(get_args(Target))


def test_the_targets_that_may_sweep_are_slurms() -> None:
    assert {target for target, launcher in LAUNCHERS.items() if isinstance(launcher, Slurm)} == set(SWEEP_TARGETS)


@dataclass
class Pods:
    """A launcher that the rest of the package does not know."""

    runs_here: bool = False
    end_states: Collection[str] = ("Succeeded",)
    end_s: float = 0.0
    poll_s: float = 0.0
    calls: list[str] = field(default_factory=list)

    def tools(self, config: Config) -> tuple[Tool, ...]:
        return (Tool(("/absent/kubectl", "version")),)

    def require(self) -> None:
        self.calls.append("require")

    def script(self, config: Config, cwd: Path, verb: str) -> Plan:
        return with_record(config, cwd, {"pod.yaml": verb}, [])

    def submit(self, plan: Plan, folder: Path, members: Sequence[Path]) -> Launched:
        self.calls.append((folder / "pod.yaml").read_text())
        return Launched(folder, jobs=("pod-1",))

    def state(self, folder: Path) -> tuple[str, str]:
        return ("Succeeded" if "cancel now" in self.calls else "Running"), folder.name

    def logs(self, folders: Sequence[Path], rank: int | None) -> FileLogs:
        return FileLogs(folders, rank)

    def cancel(self, folder: Path, *, now: bool) -> None:
        self.calls.append("cancel now" if now else "cancel")


def test_a_new_kind_of_launcher_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, submitted, followed, cancelled and examined by its row alone."""
    pods = Pods()
    monkeypatch.setitem(LAUNCHERS, "sbatch", pods)
    config = Config(work_dir=str(tmp_path / "work"), launch={"target": "sbatch"})
    assert submit(plan(config, tmp_path)).jobs == ("pod-1",)
    folder = jobs.newest(WorkDir(tmp_path / "work"))
    assert (jobs.status(folder).state, jobs.status(folder).has_ended) == ("Running", False)
    assert jobs.cancel(folder, grace_s=0.01).state == "Succeeded"
    assert pods.calls == ["require", "train", "cancel", "cancel now"]
    assert list(jobs.follow(folder, None)) == []
    (row,) = launch_tools(CheckContext(config))
    assert (row.state, row.exit_code) == ("problem", LaunchError.exit_code)
