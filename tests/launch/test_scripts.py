"""Every target in every container: the bytes of its script, and what the programs in it are told when bash runs it."""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from golden_files import Golden
from launch_stubs import install, run_script

from rwkv_cluster.config import Config
from rwkv_cluster.launch.launchers.launcher import Plan
from rwkv_cluster.launch.plan import plan
from rwkv_cluster.launch.submit import submit

CWD = Path("/home/someone/runs")
IMAGE = {"image": "registry.org/rwkv:1", "mounts": ["/data", "/vocab:/v:ro"]}
FULL: dict[str, Any] = {
    "name": "base-3b",
    "num_nodes": 2,
    "gpus_per_node": 8,
    "cpus_per_node": 64,
    "mem": "500G",
    "time": "1-00:00:00",
    "partition": "gpu",
    "account": "lab",
    "qos": "high",
    "constraint": "a100&nvlink",
    "exclude": "node[3,7-9]",
    "comment": "the long run",
    "slurm_parameters": {"reservation": "week"},
    "setup": ["module load cuda/12.8"],
    "env": {"NCCL_DEBUG": "INFO", "WORDS": "it's $HOME"},
    "pass_env": ["HF_TOKEN"],
}
CASES: dict[str, dict[str, Any]] = {
    "local": {},
    "torchrun": {"ranks_per_node": 2},
    "torchrun-2-nodes": {"num_nodes": 2, "gpus_per_node": 8, "rdzv_endpoint": "gpu01"},
    "deepspeed": {"ranks_per_node": 2},
    "deepspeed-hosts": {
        "num_nodes": 2,
        "ranks_per_node": 2,
        "hosts": ["gpu01", "gpu02"],
        "env": {"NCCL_DEBUG": "INFO"},
    },
    "deepspeed-2-nodes": {"num_nodes": 2, "gpus_per_node": 8, "hostfile": "hosts"},
    "docker": {"gpus_per_node": 2, "container": IMAGE},
    "docker-2-nodes": {"num_nodes": 2, "gpus_per_node": 8, "rdzv_endpoint": "gpu01:3000", "container": IMAGE},
    "podman": {"gpus_per_node": 2, "container": IMAGE},
    "podman-cpu": {"container": IMAGE},
    "sbatch": FULL,
    "sbatch-per-rank": {"num_nodes": 2, "ranks_per_node": 4, "cpus_per_node": 16, "task_per": "rank", "requeue": False},
    "slurm": {**FULL, "exclude_bad_nodes": True},
    "slurm-apptainer": {"num_nodes": 2, "gpus_per_node": 8, "container": {**IMAGE, "runtime": "apptainer"}},
    "slurm-sweep": {
        "sweep": [{"training.random_seed": 2}, {"training.lr_init": 1e-3, "training.random_seed": 3}],
        "sweep_at_once": 1,
        "prepare": {"own_job": True},
    },
    "sbatch-prepare": {"prepare": {"own_job": True, "cpus": 16, "mem": "32G", "time": "60", "partition": "cpu"}},
    **{
        f"sbatch-{runtime}": {"num_nodes": 2, "gpus_per_node": 8, "container": {**IMAGE, "runtime": runtime}}
        for runtime in ("pyxis", "apptainer", "podman", "docker")
    },
}


def planned(case: str, **launch: Any) -> Plan:
    values = {"target": case.partition("-")[0], "python": "python-stub", **CASES[case], **launch}
    return plan(Config(work_dir="/scratch/someone/base", launch=values), CWD)


@pytest.fixture(autouse=True)
def _one_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(os, "getgid", lambda: 1000)
    monkeypatch.setattr(sys, "executable", "python-stub")


def text_of(made: Plan) -> str:
    """Scripts and commands, as the golden file has them."""
    plans = (made, *made.members)
    scripts = "".join(text for one in plans for name, text in one.files.items() if name.endswith(".sh"))
    return scripts + "".join(f"## {command.shell()}\n" for command in made.commands)


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_golden(case: str, golden: Golden) -> None:
    golden.check_text(f"launch/{case}.sh", text_of(planned(case)))


def test_roots_podman_gets_no_ids_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses the option, and without any the run would belong to the image's user."""
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(os, "getgid", lambda: 0)
    script = planned("podman-cpu").files["job.sh"]
    assert "keep-id" not in script
    assert " --user=0:0 --env=HOME=/tmp " in script


def test_only_root_raises_limits_with_podman(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's podman, asked for more than the user has, does not start the container."""
    assert " --ulimit=host " in planned("podman").files["job.sh"]
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert " --ulimit=memlock=-1 " in planned("podman").files["job.sh"]


@pytest.mark.parametrize(
    ("runtime", "option"), [("apptainer", "--nv"), ("docker", "--gpus=all"), ("podman", "--device=nvidia.com/gpu=all")]
)
def test_a_container_gets_gpus_that_slurm_is_asked_for_by_type(runtime: str, option: str) -> None:
    """As docs/slurm.md has it: slurm_parameters in place of gpus_per_node."""
    case, container = f"sbatch-{runtime}", {**IMAGE, "runtime": runtime}
    for parameters in ({"gres": "gpu:a100:8"}, {"gpus-per-task": "1"}):
        made = planned(case, gpus_per_node=None, ranks_per_node=8, slurm_parameters=parameters, container=container)
        assert f" {option} " in made.files["job.sh"]
    made = planned(case, gpus_per_node=None, slurm_parameters={"gres": "license:2"}, container=container)
    assert f" {option} " not in made.files["job.sh"]


@pytest.mark.parametrize("runtime", ["none", "apptainer", "docker", "podman"])
def test_the_job_that_prepares_data_asks_for_no_gpus(runtime: str) -> None:
    """However the training job asks for them: a partition of CPUs refuses such a job, or never starts it."""
    parameters = {
        "gres": "gpu:a100:8,nvme:1",
        "tres-per-node": "gres/gpu:8",
        "gpus": "8",
        "gpus-per-task": "1",
        "gpu-bind": "closest",
        "mem-per-gpu": "60G",
        "reservation": "week",
    }
    container = {**IMAGE, "runtime": runtime} if runtime != "none" else {}
    made = planned("sbatch-prepare", gpus_per_node=8, slurm_parameters=parameters, container=container)
    prepare, job = made.files["prepare.sh"], made.files["job.sh"]
    assert all(f"#SBATCH --{name}={value}\n" in job for name, value in parameters.items())
    assert "#SBATCH --gres=nvme:1\n" in prepare
    assert "#SBATCH --reservation=week\n" in prepare
    assert "gpu" not in prepare
    assert " --nv " not in prepare


@pytest.mark.parametrize("case", [case for case in CASES if case != "slurm-sweep"])
def test_bash_runs_it_with_exact_arguments(case: str, tmp_path: Path) -> None:
    made = planned(case)
    stubs = install(tmp_path / "bin")
    setup = {"setup": ["export MODULES=cuda"]} if CASES[case].get("setup") else {}
    calls = run_script(planned(case, **setup), "job.sh", tmp_path, stubs)
    end = ' "$PWD"' if case.startswith("slurm") else ' train "$PWD/config.yaml"'
    (line,) = [line for line in made.files["job.sh"].splitlines() if line.endswith(end)]
    words = line.removeprefix("exec ").removeprefix("check_nodes && ")
    expected = shlex.split(words.replace("$PWD", str(tmp_path / "launch")))
    (call,) = [call for call in calls if call.argv == expected]
    assert call.environment["RWKV_CLUSTER_LAUNCH"] == str(tmp_path / "launch")
    if case in ("sbatch", "slurm"):
        assert call.environment["WORDS"] == "it's $HOME"
        assert call.environment["MODULES"] == "cuda"
        assert call.environment["RWKV_CLUSTER_ATTEMPT"] == "7.0"
        assert call.environment["RWKV_CLUSTER_NODES"].split() == ["node1"]


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_sound_bash(case: str, tmp_path: Path) -> None:
    """`bash -n` on every machine, shellcheck where it is installed; `$HOME` in a value is meant literally."""
    for name, text in planned(case).files.items():
        if name.endswith(".sh"):
            (tmp_path / name).write_text(text)
            checks = [["bash", "-n", name]] + (
                [["shellcheck", "--exclude=SC2016", name]] if shutil.which("shellcheck") else []
            )
            for check in checks:
                done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr


def test_a_step_of_slurm_ends_with_a_failed_rank_and_keeps_its_logs() -> None:
    """C9."""
    text = planned("sbatch").files["job.sh"]
    step = next(line for line in text.splitlines() if " && srun " in line)
    assert {"--kill-on-bad-exit=1", "--wait=60", "--open-mode=append"} <= set(step.split())
    assert {"#SBATCH --signal=USR2@120", "#SBATCH --open-mode=append", "#SBATCH --requeue"} <= set(text.splitlines())
    assert "#SBATCH --no-requeue" in planned("sbatch-per-rank").files["job.sh"]


def test_a_signal_before_the_agent_listens_queues_the_job_again(tmp_path: Path) -> None:
    """srun ends with 128 + 12 when SIGUSR2 ends a task that knows nothing of it."""
    stubs = install(tmp_path / "bin")
    calls = run_script(planned("sbatch", setup=[]), "job.sh", tmp_path, stubs, step_code=140, expected_code=75)
    assert ["scontrol", "requeue", "7"] in [call.argv for call in calls]
    assert (tmp_path / "launch" / "requeued").read_text() == "7.0\n"


def test_what_submitit_is_given_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E8: two plain values, in a file and a directory for the owner alone."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    stubs = install(tmp_path / "bin")
    (stubs / "sbatch").write_text("#!/bin/sh\necho 12\n")
    monkeypatch.setenv("PATH", f"{stubs}:/usr/bin:/bin")
    values = {"target": "slurm", "name": "x", "pass_env": ["HF_TOKEN"]}
    launched = submit(plan(Config(work_dir=str(tmp_path / "work"), launch=values), tmp_path))
    pickled = launched.folder / "submission.pkl"
    assert stat.S_IMODE(pickled.stat().st_mode) == 0o600
    assert stat.S_IMODE(launched.folder.stat().st_mode) == 0o700
    task = pickle.loads(pickled.read_bytes()).function
    assert vars(task) == {"argv": task.argv, "max_requeues": 100, "_agent": None}
    assert all(b"hf_secret" not in path.read_bytes() for path in launched.folder.iterdir())
