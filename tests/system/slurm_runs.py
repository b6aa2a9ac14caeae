"""Runs of the tests on a Slurm cluster: launched as a user does, watched through files and Slurm's own commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from system import processes
from system.processes import Watched, wait_until
from system.slurm_cluster import Cluster


def new_run(
    folder: Path, training: dict[str, Any] | None = None, *, save_interval_steps: int = 100_000, **launch: Any
) -> Watched:
    """A tiny run for two nodes with a rank each. launch: fields of that section."""
    launch = {"target": "sbatch", "num_nodes": 2, "ranks_per_node": 1} | launch
    training = {"max_steps": 30, "micro_bsz": 2, "timeout_s": 60} | (training or {})
    return processes.new_run(
        folder, training=training, checkpoint={"save_interval_steps": save_interval_steps}, launch=launch
    )


def launch(slurm: Cluster, run: Watched, *arguments: str) -> str:
    """Launch a run; the number of its training job."""
    command(slurm, run, "launch", "run.yaml", f"--launch.env.GLOO_SOCKET_IFNAME={slurm.interface}", *arguments)
    return jobs(run)[-1]


def rwkv_cluster(slurm: Cluster, verb: str, run: Watched, *arguments: str) -> str:
    """What `rwkv-cluster VERB WORK_DIR` prints."""
    return command(slurm, run, verb, str(run.work.root), *arguments)


def command(slurm: Cluster, run: Watched, *arguments: str) -> str:
    """What `rwkv-cluster ...` prints in the folder of a run."""
    environment = {**os.environ, **slurm.environment, "OMP_NUM_THREADS": "1"}
    argv = [*slurm.prefix, "env", f"--chdir={run.folder}", sys.executable, "-m", "rwkv_cluster", *arguments]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch_folder(run: Watched) -> Path:
    """The newest launch directory."""
    return max((run.work.root / "launch").iterdir())


def jobs(run: Watched) -> list[str]:
    """Numbers of all jobs of the newest launch, in the order of their submission."""
    return (launch_folder(run) / "jobs").read_text().split()


def job_log(run: Watched) -> str:
    return (launch_folder(run) / "job.log").read_text()


def logs(run: Watched) -> str:
    files = sorted((run.work.root / "launch").glob("*/*.log"))
    return "".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in files)


def finish(slurm: Cluster, run: Watched, job: str, *, state: str = "COMPLETED") -> dict[str, str]:
    facts = slurm.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", timeout_s=300)
    assert facts["JobState"] == state, logs(run)
    return facts


def wait_for_steps(slurm: Cluster, run: Watched, job: str, step: int, sessions: int = 0) -> None:
    def reached() -> bool:
        return run.sessions() > sessions and run.steps_logged() >= step

    try:
        wait_until(reached, what=f"step {step}", timeout_s=90)
    except AssertionError as error:
        raise AssertionError(f"{error}, job {slurm.state(job)}\n{logs(run)}") from None


def processes_of(run: Watched) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [text for text in found if str(run.work.root) in text]


def rank_process(run: Watched, rank: int) -> int:
    """Process id of a rank that trains."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().decode(errors="replace").split("\0")
            command_line = (path.parent / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if (
            f"RANK={rank}" in environment
            and str(run.work.root) in command_line
            and "torch.distributed" not in command_line
        ):
            return int(path.parent.name)
    raise AssertionError(f"rank {rank} does not run")
