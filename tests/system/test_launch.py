"""`rwkv-cluster launch` and what follows it on real processes: two hosts, DeepSpeed's launcher, a cancelled job."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from system.hosts import INTERFACE, hosts, reason_not_to
from system.processes import Job, Watched, alive, descendants, new_run, wait_for_end, wait_until
from tiny_run import losses

pytestmark = pytest.mark.system


def _new_run(folder: Path, training: dict[str, Any], **launch: Any) -> Watched:
    training = {"micro_bsz": 2, "global_batch_size": 4, "timeout_s": 60} | training
    return new_run(folder, training=training, checkpoint={"save_interval_steps": 5000}, launch=launch)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = _new_run(tmp_path_factory.mktemp("one"), {"max_steps": 10})
    Job(run.folder).complete()
    return losses(run.work.root)


def test_torchrun_on_two_hosts_with_their_own_addresses(
    one_process: list[float], tmp_path: Path, start: Callable[..., Job]
) -> None:
    """The same command on each; nothing but launch.rdzv_endpoint tells them of each other."""
    if reason := reason_not_to():
        pytest.skip(reason)
    run = _new_run(
        tmp_path / "two", {"max_steps": 10}, target="torchrun", num_nodes=2, ranks_per_node=1, rdzv_endpoint="gpu01"
    )
    with hosts(["gpu01", "gpu02"]) as machines:
        prefixes = [(*machine.prefix, "env", f"--chdir={run.folder}") for machine in machines]
        launched = [start(run.folder, verb="launch", prefix=prefix) for prefix in prefixes]
        for job in launched:
            job.complete()
    assert losses(run.work.root) == pytest.approx(one_process, rel=1e-6)


@pytest.mark.slow
def test_torchrun_on_a_machine_whose_name_leads_nowhere(tmp_path: Path) -> None:
    """As a laptop without a network, or a container with none."""
    if reason := reason_not_to():
        pytest.skip(reason)
    run = _new_run(tmp_path / "run", {"max_steps": 4}, target="torchrun", ranks_per_node=2)
    prefix = ("unshare", "--net", "--uts", "sh", "-c", 'ip link set lo up && hostname nowhere && exec "$@"', "sh")
    Job(run.folder, verb="launch", prefix=prefix).complete()
    assert run.newest_checkpoint() == 4


@pytest.mark.slow
def test_deepspeeds_own_launcher(one_process: list[float], tmp_path: Path) -> None:
    run = _new_run(tmp_path / "two", {"max_steps": 10, "zero_stage": 2}, target="deepspeed", ranks_per_node=2)
    Job(run.folder, verb="launch", environment={"DS_ACCELERATOR": "cpu"}).complete()
    assert losses(run.work.root) == pytest.approx(one_process, rel=1e-6)


def test_deepspeed_reaches_another_host_by_ssh(one_process: list[float], tmp_path: Path) -> None:
    """launch.hosts becomes its hostfile, and launch.env the environment of the other host's ranks too."""
    if reason := reason_not_to():
        pytest.skip(reason)
    run = _new_run(
        tmp_path / "two",
        {"max_steps": 10, "zero_stage": 1},
        target="deepspeed",
        num_nodes=2,
        ranks_per_node=1,
        hosts=["gpu01", "gpu02"],
        env={"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": INTERFACE},
    )
    with hosts(["gpu01", "gpu02"], etc={"ssh": _ssh_settings(tmp_path / "ssh")}) as machines:
        daemons = [
            subprocess.Popen([*machine.prefix, "/usr/sbin/sshd", "-D", "-e"], stderr=subprocess.DEVNULL)
            for machine in machines
        ]
        Job(run.folder, verb="launch", prefix=(*machines[0].prefix, "env", f"--chdir={run.folder}")).complete()
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(10)
    assert losses(run.work.root) == pytest.approx(one_process, rel=1e-6)
    (folder,) = (run.work.root / "launch").iterdir()
    assert sorted(path.name for path in folder.glob("rank-*.log")) == ["rank-0.log", "rank-1.log"]


def _ssh_settings(folder: Path) -> Path:
    """An /etc/ssh with which these hosts, and no others, let each other in."""
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "user.pub").rename(folder / "authorized")
    daemon = ["HostKey /etc/ssh/host", "AuthorizedKeysFile /etc/ssh/authorized", "StrictModes no", "UsePAM no"]
    daemon += ["PermitRootLogin prohibit-password", "PidFile none"]
    client = [
        "IdentityFile /etc/ssh/user",
        "StrictHostKeyChecking no",
        "UserKnownHostsFile /dev/null",
        "LogLevel ERROR",
    ]
    (folder / "sshd_config").write_text("\n".join(daemon) + "\n")
    (folder / "ssh_config").write_text("\n".join(client) + "\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("target", [pytest.param("local", marks=pytest.mark.slow), "torchrun"])
def test_a_running_job_is_cancelled_from_its_work_directory(
    target: str, tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path, {"max_steps": 100_000}, target=target, ranks_per_node=1 if target == "local" else 2)
    job = start(run.folder, verb="launch")
    run.wait_for_steps(job, sessions=0, step=5)
    workers = descendants(job.process.pid)
    found = _say("status", run)
    assert (found["state"], found["launch"]["state"]) == ("running", "running")
    assert "100,000 steps" in _say("logs", run)["text"]
    found = _say("cancel", run)
    assert (found["state"], found["detail"]) == ("ended", "exit code 75")
    assert job.wait(20) == 75
    assert run.newest_checkpoint() > 0
    wait_for_end(workers, timeout_s=15)


def test_a_cancelled_job_that_does_not_end_is_killed(tmp_path: Path, start: Callable[..., Job]) -> None:
    run = _new_run(tmp_path, {"max_steps": 100_000}, target="torchrun", ranks_per_node=2)
    job = start(run.folder, verb="launch")
    run.wait_for_steps(job, sessions=0, step=5)
    workers = descendants(job.process.pid)
    assert _say("cancel", run, "--now")["state"] == "ended"
    wait_for_end(workers, timeout_s=15)
    wait_until(lambda: not alive(job.process.pid), what="the end of the launching process", timeout_s=15)


def _say(verb: str, run: Watched, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "rwkv_cluster", verb, str(run.work.root), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize(
    "name",
    [
        """it's "a" $HOME;b ünï back\\slash""",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("two words", "it's", 'a "b"', "$HOME", "a;b", "ünï", "back\\slash")
        ),
    ],
)
def test_any_directory_name_from_text_to_weights(name: str, tmp_path: Path) -> None:
    """H5: through bash, torchrun and the agent; a newline is refused (tests/launch/test_hostile.py)."""
    (tmp_path / name / "work").mkdir(parents=True)  # or `$HOME` in it is a variable
    run = _new_run(tmp_path / name, {"max_steps": 2}, target="torchrun", ranks_per_node=2)
    Job(run.folder, verb="launch").complete()
    assert run.work.final_weights.exists()
