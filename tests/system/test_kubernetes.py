"""The pods of a manifest as processes on hosts of this machine: they meet, are taken away, come back, are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from system.hosts import INTERFACE, Host, hosts, reason_not_to
from system.processes import END_S, Watched, descendants, new_run, wait_until
from tiny_run import losses

from rwkv_cluster.config.loader import resolve_config
from rwkv_cluster.launch.launchers.kubernetes_manifests import RESTART_CODE
from rwkv_cluster.launch.plan import plan

pytestmark = pytest.mark.system
AGENT = (sys.executable, "-m", "rwkv_cluster.launch.agent", "--node-variable", "N", "--restart-code", "143")
RANK = """\
import json, os, signal, sys, time
launch, state, number = os.environ["RWKV_CLUSTER_LAUNCH"], os.environ["RWKV_CLUSTER_STATE"], os.environ["PET_NODE_RANK"]
agreed = f"{state}/agreed"  # as the ranks agree in an all-reduce
signal.signal(signal.SIGUSR1, lambda *_: open(agreed, "w").close())
print(os.environ["PET_MASTER_ADDR"], file=open(f"{launch}/rank-{number}.log", "a"), flush=True)
while not os.path.exists(agreed) and not os.path.exists(f"{launch}/STOP"):
    time.sleep(0.02)
code = int(os.environ.get("CODE", 75))
report = {"rank": int(number), "host": "x", "code": code, "message": ""}
with open(f"{state}/rank-{number}.tmp", "w") as file:
    json.dump(report, file)
os.rename(file.name, f"{state}/rank-{number}")
sys.exit(code)
"""


def _pod(host: Host, container: dict[str, Any], number: int, config: Path, output: Path) -> subprocess.Popen[bytes]:
    """What a kubelet starts: the container's arguments with its environment, and the number of its pod."""
    variables = {entry["name"]: entry["value"] for entry in container["env"]} | {"JOB_COMPLETION_INDEX": str(number)}
    with open(output, "ab") as log:
        return subprocess.Popen(
            [*host.prefix, *container["args"][:-1], str(config)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


@contextmanager
def _pods(run: Watched, machines: list[Host], container: dict[str, Any]) -> Iterator[list[subprocess.Popen[bytes]]]:
    with ExitStack() as stack:
        pods = []
        for number, host in enumerate(machines):
            output = run.folder / f"pod-{number}.txt"
            pods.append(_pod(host, container, number, run.folder / "run.yaml", output))
            stack.callback(_end, pods[-1])
        yield pods


def _end(pod: subprocess.Popen[bytes]) -> None:
    for pid in (*descendants(pod.pid), pod.pid) if pod.poll() is None else ():
        os.kill(pid, signal.SIGKILL)
    pod.wait()


def _agent(pod: subprocess.Popen[bytes]) -> int:
    """The container's first process, which the kubelet signals."""
    return next(pid for pid in descendants(pod.pid) if b"launch.agent" in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.mark.parametrize(
    ("asked", "code", "ends"),
    [("SIGTERM", 75, RESTART_CODE), ("SIGTERM", 1, RESTART_CODE), ("SIGTERM", 3, 3), ("STOP", 75, 75), ("STOP", 1, 1)],
)
def test_how_ranks_end_becomes_the_code_by_which_kubernetes_decides(
    asked: str, code: int, ends: int, tmp_path: Path
) -> None:
    """Two agents with ranks that only pretend. SIGTERM reaches one pod; the other learns of it, and of no STOP file."""
    (tmp_path / "rank.py").write_text(RANK)
    launch = tmp_path / "launch"
    own = {"RWKV_CLUSTER_LAUNCH": str(launch), "RWKV_CLUSTER_NODES": "localhost 127.0.0.1", "CODE": str(code)}
    command = [*AGENT, "--echo", "--", sys.executable, str(tmp_path / "rank.py")]
    pods = [
        subprocess.Popen(command, env={**os.environ, **own, "N": str(number)}, stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    try:
        wait_until(lambda: len(list(launch.glob("rank-*.log"))) == 2, what="both ranks")
        if asked == "STOP":
            (launch / "STOP").touch()
        else:
            pods[1].send_signal(signal.SIGTERM)
        assert [pod.communicate(timeout=END_S)[0] for pod in pods] == ["[rank 0] localhost\n", "[rank 1] localhost\n"]
        assert [pod.returncode for pod in pods] == [ends, ends]
    finally:
        for pod in pods:
            pod.kill()
            pod.wait()


def test_a_pod_that_is_taken_away_while_it_waits_is_not_counted_on(tmp_path: Path) -> None:
    environment = {"RWKV_CLUSTER_LAUNCH": str(tmp_path), "RWKV_CLUSTER_NODES": "a b", "N": "1"}
    pod = subprocess.Popen([*AGENT, "--", "true"], env={**os.environ, **environment})
    waiting = tmp_path / ".state/meeting/node-1"
    wait_until(waiting.exists, what="the pod to wait")
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(END_S) == RESTART_CODE
    assert not waiting.exists()


@pytest.mark.parametrize(("agent", "ends"), [(AGENT, RESTART_CODE), (AGENT[:-2], 6)])
def test_a_pod_that_has_waited_for_others_for_long_comes_back_to_wait(
    agent: tuple[str, ...], ends: int, tmp_path: Path
) -> None:
    environment = {"RWKV_CLUSTER_LAUNCH": str(tmp_path), "RWKV_CLUSTER_NODES": "a b", "N": "0"}
    environment |= {**os.environ, "RWKV_CLUSTER_MEET_S": "0.1"}
    done = subprocess.run([*agent, "--", "true"], env=environment, stderr=subprocess.PIPE, text=True, timeout=END_S)
    assert done.returncode == ends
    assert "b has not started after 0 s" in done.stderr


@pytest.mark.slow
def test_a_pod_that_is_taken_away_ends_all_after_a_checkpoint_and_they_go_on(tmp_path: Path) -> None:
    """SIGTERM to one pod: all end with the code that starts pods again. A STOP file: with the one that ends the job."""
    if reason := reason_not_to():
        pytest.skip(reason)
    kubernetes = {"volumes": [f"shared:{tmp_path}"]}
    launch = {"target": "kubernetes", "num_nodes": 2, "ranks_per_node": 1, "python": sys.executable}
    launch |= {"container": {"image": "rwkv"}, "kubernetes": kubernetes, "env": {"GLOO_SOCKET_IFNAME": INTERFACE}}
    training = {"micro_bsz": 2, "max_steps": 100_000, "timeout_s": 60}
    run = new_run(tmp_path, training=training, checkpoint={"save_interval_steps": 50_000}, launch=launch)
    made = plan(resolve_config(run.folder / "run.yaml").config, tmp_path)
    job = list(yaml.safe_load_all(made.files["job.yaml"]))[-1]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    names = next(entry["value"] for entry in container["env"] if entry["name"] == "RWKV_CLUSTER_NODES").split()

    def reached(step: int) -> None:
        def look() -> bool:
            texts = [path.read_text() for path in sorted(run.folder.glob("pod-*.txt"))]
            assert all(pod.poll() is None for pod in pods), "\n".join(texts)
            return run.steps_logged() >= step

        wait_until(look, what=f"step {step}")

    with hosts(names) as machines:
        with _pods(run, machines, container) as pods:
            reached(5)
            os.kill(_agent(pods[1]), signal.SIGTERM)
            assert [pod.wait(END_S) for pod in pods] == [RESTART_CODE, RESTART_CODE]
        saved = run.newest_checkpoint()
        assert saved == len(losses(run.work.root)) >= 5
        with _pods(run, machines, container) as pods:
            reached(saved + 5)
            (run.work.root / "STOP").touch()
            assert [pod.wait(END_S) for pod in pods] == [75, 75]
    assert run.newest_checkpoint() == len(losses(run.work.root)) >= saved + 5
    text = (run.folder / "pod-0.txt").read_text()
    assert "[rank 0] " in text
    assert "[rank 1] " not in text
