"""Launching on Slurm: jobs of sbatch, which submitit may start and queue again."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from rwkv_cluster.config import Config
from rwkv_cluster.config.loader import dump_yaml, parse_config
from rwkv_cluster.errors import Interrupted, LaunchError
from rwkv_cluster.launch.command import Command
from rwkv_cluster.launch.launch_folder import JOBS, SUBMISSION
from rwkv_cluster.launch.launchers.launcher import Launched, Plan, Tool, with_record
from rwkv_cluster.launch.launchers.slurm_jobs import END_STATES, job_numbers, job_state, run_slurm
from rwkv_cluster.launch.launchers.slurm_script import array_script, batch_script, node_command, prepare_script
from rwkv_cluster.launch.logs import FileLogs
from rwkv_cluster.runtime.own_file import reason
from rwkv_cluster.workdir import atomic_write

PREPARE_JOB = "PREPARE_JOB"  # stands for the number of the prepare job, known once it is submitted
PYXIS = Tool(
    ("srun", "--help"),
    "--container-image",
    (
        "launch.container.runtime is pyxis, but srun here has no --container-image",
        "Use apptainer, podman or docker, or ask for pyxis",
    ),
)


@dataclass(frozen=True)
class Slurm:
    """Launcher of the targets sbatch and slurm. States are Slurm's words.

    Attributes:
        through_submitit: whether submitit, in each node's task, starts the agent and queues the job again.
    """

    through_submitit: bool = False

    runs_here: bool = False
    end_states: Collection[str] = END_STATES
    end_s: float = 60.0
    poll_s: float = 0.2

    def tools(self, config: Config) -> tuple[Tool, ...]:
        """sbatch, and for pyxis an srun that starts containers."""
        sbatch = Tool(("sbatch", "--version"))
        return (sbatch, PYXIS) if config.launch.container.runtime == "pyxis" else (sbatch,)

    def require(self) -> None:
        """Raise LaunchError where submitit is to start the job and is not installed."""
        if self.through_submitit and find_spec("submitit") is None:
            raise LaunchError(
                "launch.target is slurm, but submitit is not installed", remedy="`pip install submitit`, or use sbatch"
            )

    def script(self, config: Config, cwd: Path, verb: str) -> Plan:
        """The job's script, and that of its data preparation or of its array. Raises LaunchError or ConfigError."""
        if verb == "doctor" and self.through_submitit:  # which would queue it again
            launch = config.launch.model_copy(update={"target": "sbatch"})
            return Slurm().script(config.model_copy(update={"launch": launch}), cwd, verb)
        if config.launch.sweep:
            return self._sweep(config, cwd)
        files = {"job.sh": batch_script(config, str(cwd), verb, through_submitit=self.through_submitit)}
        if config.launch.prepare.own_job:
            files["prepare.sh"] = prepare_script(config, str(cwd))
        commands = _submissions(list(files), "afterok")
        return with_record(config, cwd, files, commands, node_command(config, str(cwd)))

    def _sweep(self, config: Config, cwd: Path) -> Plan:
        members = []
        for number, overrides in enumerate(config.launch.sweep):
            text = dump_yaml(config.model_copy(update={"launch": config.launch.model_copy(update={"sweep": []})}))
            place = {"work_dir": f"{config.work_dir}/sweep/{number}", "launch.name": f"{config.launch.name}-{number}"}
            changes = [f"{name}={json.dumps(value)}" for name, value in (overrides | place).items()]
            member = parse_config(text.encode(), f"launch.sweep, entry {number}", changes).config
            members.append(replace(self.script(member, cwd, "train"), commands=()))
        first = members[0].files
        scripts = [name for name in first if name.endswith(".sh")]
        files = {f"sweep-{name}": array_script(config, first[name], name, len(members)) for name in scripts}
        commands = _submissions(list(files), "aftercorr")
        plan = with_record(config, cwd, files, commands, node_command(config, str(cwd)))
        return replace(plan, members=tuple(members))

    def submit(self, plan: Plan, folder: Path, members: Sequence[Path]) -> Launched:
        """Put the jobs into the queue and return at once. Raises LaunchError."""
        if self.through_submitit:
            for run, place in zip(plan.members or (plan,), members or (folder,), strict=True):
                _write_submission(run, place)
        numbers = _submit_jobs(plan, folder)
        _record_jobs(folder, numbers)
        for index, member in enumerate(members):
            _record_jobs(member, [f"{number}_{index}" for number in numbers])
        return Launched(folder, tuple(numbers), members=tuple(members))

    def state(self, folder: Path) -> tuple[str, str]:
        """State of the training job. Raises LaunchError."""
        return job_state(job_numbers(folder)[-1])

    def logs(self, folders: Sequence[Path], rank: int | None) -> FileLogs:
        """The files of the launch directories, which all nodes share."""
        return FileLogs(folders, rank)

    def cancel(self, folder: Path, *, now: bool) -> None:
        """Send the jobs the signal for a checkpoint, or end them. Raises LaunchError."""
        if now:
            run_slurm("scancel", *job_numbers(folder))
            return
        is_running = self.state(folder)[0] == "RUNNING"  # a job that waits has nothing to save
        for number in job_numbers(folder):
            run_slurm("scancel", "--signal=USR2", number) if is_running else run_slurm("scancel", number)


def _submissions(scripts: list[str], dependency: str) -> list[Command]:
    """sbatch for the training script, which comes first and runs after the second one, if there is one."""
    job, *prepare = scripts
    if not prepare:
        return [Command(("sbatch", "--parsable", job))]
    after = (f"--dependency={dependency}:{PREPARE_JOB}", "--kill-on-invalid-dep=yes")
    return [Command(("sbatch", "--parsable", *prepare)), Command(("sbatch", "--parsable", *after, job))]


def _write_submission(plan: Plan, folder: Path) -> None:
    """Write what submitit loads, which is imported where it is used: no other target needs it."""
    from rwkv_cluster.launch.submitit_task import submission

    assert plan.node_command is not None
    launch = plan.config.launch
    try:
        os.close(os.open(folder / SUBMISSION, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        submission(plan.node_command.argv, launch.max_requeues if launch.requeue else None).dump(folder / SUBMISSION)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be made: {reason(error)}") from error


def _record_jobs(folder: Path, numbers: Sequence[str]) -> None:
    atomic_write(folder / JOBS, "".join(f"{number}\n" for number in numbers).encode())


def _submit_jobs(plan: Plan, folder: Path) -> list[str]:
    """Numbers of the submitted jobs; those already in the queue are taken back when one is refused."""
    numbers: list[str] = []
    for command in plan.commands:
        argv = [argument.replace(PREPARE_JOB, numbers[-1] if numbers else "") for argument in command.argv]
        try:
            numbers.append(_sbatch(argv, folder))
        except (LaunchError, Interrupted):
            if numbers:
                subprocess.run(["scancel", *numbers], check=False, capture_output=True)
            raise
    return numbers


def _sbatch(argv: list[str], folder: Path) -> str:
    """Number of the job that sbatch has put into the queue. Raises LaunchError."""
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise LaunchError(
            f"{argv[0]} is not here", remedy="Launch on a machine of the cluster, or with another target"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{argv[0]} gave no answer for 120 s", remedy="Look at `sinfo` and `squeue --me`") from None
    number = re.match(r"\d+", done.stdout)
    if done.returncode or not number:
        answer = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise LaunchError(f"Slurm refuses {folder / argv[-1]}: {answer}")
    return number[0]
