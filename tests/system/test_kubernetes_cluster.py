"""What launch, status and cancel do to a real API server, and what the Job controller makes of pods' exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from system.kubernetes_cluster import MISSING, Cluster, cluster
from system.processes import wait_until

from rwkv_cluster import cli
from rwkv_cluster.launch import jobs
from rwkv_cluster.workdir import WorkDir

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} in KUBEBUILDER_ASSETS or PATH"),
]


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("kubernetes")) as made:
        yield made


@pytest.fixture
def run_file(tmp_path: Path, kubernetes: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two nodes with everything that a manifest may have."""
    monkeypatch.setenv("KUBECONFIG", str(kubernetes.config))
    own = {
        "volumes": [f"shared:{tmp_path}", "data:/data:ro"],
        "secrets": {"KEY": "wandb/key"},
        "pull_secrets": ["pull"],
    }
    own |= {"context": "test", "namespace": "default", "run_as": "1000:1000", "resources": {"rdma/hca": 1}}
    own |= {"node_selector": {"gpu": "h100"}, "tolerations": ["nvidia.com/gpu"], "queue": "research"}
    launch = {"target": "kubernetes", "num_nodes": 2, "gpus_per_node": 8, "cpus_per_node": 4, "mem": "64G"}
    launch |= {"container": {"image": "rwkv:1"}, "env": {"A": "$(B)"}, "kubernetes": own}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"work_dir": str(tmp_path / "work"), "launch": launch}))
    return path


def pods(kubernetes: Cluster, folder: Path) -> dict[int, str]:
    """Names of the pods that have not ended, by their index."""
    name = json.loads((folder / "kubernetes.json").read_text())["name"]
    found = kubernetes.get("pods", f"--selector=rwkv-cluster/run={name}")["items"]
    index = "batch.kubernetes.io/job-completion-index"
    return {
        int(pod["metadata"]["annotations"][index]): pod["metadata"]["name"]
        for pod in found
        if pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in pod["metadata"]
    }


def launch(run_file: Path) -> Path:
    assert cli.main(["launch", str(run_file)]) == 0
    return jobs.newest(WorkDir(run_file.parent / "work"))


def test_a_launch_is_made_found_and_refused_while_it_goes_on(
    run_file: Path, kubernetes: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = launch(run_file)
    assert jobs.status(folder).state == "Pending"
    assert cli.main(["launch", str(run_file)]) == 6
    assert "has not ended" in capsys.readouterr().err
    assert cli.main(["cancel", str(run_file.parent / "work")]) == 0
    assert jobs.status(folder).state == "ended"
    assert not kubernetes.get("configmaps,services,jobs,pods", "--selector=rwkv-cluster/run")["items"]


def test_what_the_server_does_not_accept_leaves_nothing(
    run_file: Path, kubernetes: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", str(run_file), "--launch.kubernetes.namespace=absent"]) == 6
    (said,) = capsys.readouterr().err.splitlines()
    assert 'namespaces "absent" not found' in said
    assert not kubernetes.get("configmaps,services,jobs", "--selector=rwkv-cluster/run")["items"]


def test_the_job_controller_does_what_the_exit_codes_are_for(run_file: Path, kubernetes: Cluster) -> None:
    folder = launch(run_file)
    wait_until(lambda: len(pods(kubernetes, folder)) == 2, what="two pods")
    first = pods(kubernetes, folder)
    for name in first.values():  # taken away: they come back, and it counts for nothing
        kubernetes.end_pod(name, 143)
    wait_until(lambda: len(pods(kubernetes, folder)) == 2, what="two pods again")
    second = pods(kubernetes, folder)
    assert not set(first.values()) & set(second.values())
    kubernetes.end_pod(second[1], 3)  # a mistake
    wait_until(lambda: jobs.status(folder).has_ended, what="the end of the job")
    status = jobs.status(folder)
    assert status.state == "Failed"
    assert "PodFailurePolicy" in status.detail
    assert "exit code 3" in status.detail
    folder = launch(run_file)  # in its place
    wait_until(lambda: len(pods(kubernetes, folder)) == 2, what="two pods of the next launch")
    for name in pods(kubernetes, folder).values():
        kubernetes.end_pod(name, 0)
    wait_until(lambda: jobs.status(folder).has_ended, what="the end of the job")
    assert jobs.status(folder).state == "Complete"
