"""`rwkv-cluster doctor` on real ranks and real faults: small shared memory, wrong clocks, no network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from system.hosts import hosts, reason_not_to
from system.processes import Job
from system.slurm_cluster import Cluster, needs_slurm
from system.slurm_runs import finish, launch, launch_folder, new_run
from tiny_run import tiny_run_config, write_config

pytestmark = pytest.mark.system

IS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


def _new_run(folder: Path, **launch: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(folder / "run.yaml", tiny_run_config(folder, launch=launch))


def _rows(text: str) -> dict[str, dict[str, Any]]:
    """Of the one JSON document in `text`."""
    document = json.loads(text[text.index("{\n") : text.rindex("\n}") + 2])
    return {row["name"]: row for row in document["rows"]}


def test_two_ranks_of_torchrun_print_one_table(tmp_path: Path, start: Callable[..., Job]) -> None:
    _new_run(tmp_path)
    job = start(tmp_path, verb="doctor", ranks=2, arguments=["--json"])
    job.complete()
    rows = _rows(job.text)
    assert rows["all-reduce"]["state"] == "ok"
    assert rows["all-reduce"]["figure"] > 0
    assert re.fullmatch(r"gloo: [\d.]+ MiB over 2 ranks: \S+ ms, \S+ GB/s", rows["all-reduce"]["text"])
    assert rows["ranks"]["text"] == "2 on 1 machine"
    assert rows["run"]["text"].startswith("2 ranks on ")
    names = ("installations", "clocks", "shared directory", "shared locks")
    assert {rows[name]["state"] for name in names} == {"ok"}
    assert {row["where"] for row in rows.values()} == {""}
    assert not (tmp_path / "work").exists()


def test_ranks_that_do_not_reach_each_other(tmp_path: Path, start: Callable[..., Job]) -> None:
    _new_run(tmp_path)
    job = start(tmp_path, verb="doctor", ranks=2, environment={"GLOO_SOCKET_IFNAME": "ib7"})
    assert job.wait() == 1  # torchrun has one code for every failure
    assert "exitcode  : 6" in job.text
    (sentence,) = [line for line in job.text.splitlines() if "error: gloo does not connect" in line]
    assert "address for: ib7. Set GLOO_SOCKET_IFNAME" in sentence
    assert "warning  GLOO_SOCKET_IFNAME" in job.text
    assert job.text.count("problem  all-reduce") == 1
    assert "ok       clocks" in job.text


def test_a_rank_that_never_comes(tmp_path: Path, start: Callable[..., Job]) -> None:
    _new_run(tmp_path)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29541", "RWKV_CLUSTER_MEET_S": "2"}
    job = start(tmp_path, verb="doctor", environment=place)
    assert job.wait(60) == 6, job.text
    assert re.search(r"error: 1 of 2 ranks .* 2 s: 1\. ", job.text)
    assert "Traceback" not in job.text


def test_launch_looks_where_the_ranks_would_run(tmp_path: Path, start: Callable[..., Job]) -> None:
    _new_run(tmp_path, target="torchrun", ranks_per_node=2)
    job = start(tmp_path, verb="launch", arguments=["--doctor"])
    job.complete()
    assert job.text.count("ok       all-reduce") == 1
    (folder,) = (tmp_path / "work" / "launch").iterdir()
    assert "ok       shared directory" in (folder / "rank-0.log").read_text()
    assert not (tmp_path / "work" / "out").exists()


@needs_slurm
@pytest.mark.slow
@pytest.mark.parametrize("task_per", ["node", "rank"])
def test_two_nodes_of_slurm(task_per: str, slurm: Cluster, tmp_path: Path) -> None:
    run = new_run(tmp_path, target="slurm", task_per=task_per)
    finish(slurm, run, launch(slurm, run, "--doctor"))
    table = (launch_folder(run) / "rank-0.log").read_text()
    assert "ok       ranks " in table
    assert "2 on 2 machines" in table
    assert "ok       all-reduce " in table
    assert "ok       shared locks " in table
    assert "problem" not in table


@IS_ROOT
def test_small_shared_memory_beside_two_gpus(tmp_path: Path) -> None:
    """On a tmpfs of 32 MB, as docker gives 64, with an nvidia-smi that shows GPUs."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor i in 1 2; do echo 'NVIDIA A100-SXM4-80GB, 81920, 3, 550.54'; done\n")
    smi.chmod(0o755)
    script = 'mount -t tmpfs -o size=32m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "rwkv_cluster", "doctor", "--json"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    row = _rows(done.stdout)["shared memory"]
    assert row["state"] == "warning"
    assert row["text"].startswith("32 MiB free of 32 in /dev/shm: training keeps NCCL from")


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that lives five minutes in the future."""
    folder = tmp_path_factory.mktemp("clock")
    source = Path(__file__).with_name("wrong_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "wrong_clock.so", source], check=True, timeout=60)
    (folder / "clock").write_text("+300")
    return {"LD_PRELOAD": str(folder / "wrong_clock.so"), "WRONG_CLOCK": str(folder / "clock")}


def test_a_clock_that_is_not_the_files(wrong_clock: dict[str, str], tmp_path: Path, start: Callable[..., Job]) -> None:
    _new_run(tmp_path)
    job = start(tmp_path, verb="doctor", environment=wrong_clock)
    job.complete()
    assert "clock is 300 s behind" in job.text
    assert "warning  clock " in job.text


@pytest.mark.slow
def test_two_hosts_of_which_one_lives_in_the_future_and_in_another_directory(
    wrong_clock: dict[str, str], tmp_path: Path, start: Callable[..., Job]
) -> None:
    if reason := reason_not_to():
        pytest.skip(reason)
    launch = {"target": "torchrun", "num_nodes": 2, "ranks_per_node": 1, "rdzv_endpoint": "gpu01"}
    _new_run(tmp_path, **launch)
    work = tmp_path / "work"
    with hosts(["gpu01", "gpu02"]) as machines:
        launcher = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=gpu01", "--master-port=29400"]
        jobs = []
        for number, machine in enumerate(machines):
            if number == 1:
                mount = ["mount", "-t", "tmpfs", "none", str(work)]
                work.mkdir()
                subprocess.run([*machine.prefix, *mount], check=True)
            jobs.append(
                start(
                    tmp_path,
                    verb="doctor",
                    prefix=(*machine.prefix, "env", f"--chdir={tmp_path}"),
                    launcher=[*launcher, f"--node-rank={number}"],
                    environment=wrong_clock if number else {},
                )
            )
        assert jobs[0].wait() == 1
        jobs[1].wait()
    text = jobs[0].text
    assert "warning  clocks" in text
    assert "rank 1 on gpu02 is 300 s ahead" in text
    assert re.search(rf"error: rank 1 on gpu02 does not see .*{re.escape(str(work))} .*rank 0 .*Set work_dir", text)
    assert "ok       all-reduce" in text
    assert "2 on 2 machines" in text
