"""The agents of a job meet before the ranks start: C8, each node that is missing or different is named."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch import preflight
from rwkv_cluster.launch.preflight import BadNode, check_gpus, check_nodes

NAMES = ("node1", "node2", "node3")


@pytest.fixture(autouse=True)
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_CLUSTER_ATTEMPT", "7.0")
    monkeypatch.setenv("RWKV_CLUSTER_MEET_S", "0.3")


def _check(state: Path, number: int) -> int | None:
    return check_nodes(state, number, NAMES, first=number == 0)


def test_all_nodes_meet_on_one_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_CLUSTER_MEET_S", "30")
    ports: dict[int, int | None] = {}
    threads = [
        threading.Thread(target=lambda n=number: ports.update({n: _check(tmp_path, n)}), daemon=True)
        for number in (2, 1, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(ports) == {0, 1, 2}
    (port,) = set(ports.values())
    assert port is not None
    assert port > 1024


@pytest.mark.system
def test_a_node_that_does_not_see_the_directory_is_named(tmp_path: Path) -> None:
    for number in (1, 2):
        with pytest.raises(BadNode, match=r"^node1 has not been"):
            _check(tmp_path, number)
    (tmp_path / "node-1").unlink()
    with pytest.raises(BadNode, match=r"^node2 has not been .* leave the node out"):
        _check(tmp_path, 0)


@pytest.mark.system
def test_a_node_with_other_code_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, digest in ((1, "a" * 64), (2, "b" * 64)):
        monkeypatch.setattr(preflight, "code_digest", lambda digest=digest: digest)
        with pytest.raises(LaunchError, match="has not been seen"):
            _check(tmp_path, number)
    monkeypatch.setattr(preflight, "code_digest", lambda: "a" * 64)
    with pytest.raises(BadNode, match=r"^node3 runs other code .*node1: .* b{12}, not a"):
        _check(tmp_path, 0)


@pytest.mark.system
def test_a_node_with_another_image_is_named_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = preflight.packages()
    assert own["torch"]
    for number, found in ((1, own), (2, {**own, "torch": "1.0"})):
        monkeypatch.setattr(preflight, "packages", lambda found=found: found)
        with pytest.raises(LaunchError, match="has not been seen"):
            _check(tmp_path, number)
    monkeypatch.setattr(preflight, "packages", lambda: own)
    with pytest.raises(BadNode, match=r"^node3 has other packages than node1: torch 1.0, there 2"):
        _check(tmp_path, 0)


def test_a_directory_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        _check(tmp_path / "nowhere", 0)


def test_gpus_that_are_not_there_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub for nvidia-smi, which cannot exist here."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadNode, match=r"^node1 has 0 GPUs, but .* is 2; nvidia-smi -L: no such program"):
        check_gpus(2, "node1")
    stub = tmp_path / "nvidia-smi"
    stub.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho 'GPU 1: H100 (UUID: GPU-2)'\n")
    stub.chmod(0o755)
    check_gpus(2, "node1")
    with pytest.raises(BadNode, match=r"^node1 has 2 GPUs, but launch.gpus_per_node is 3; .*UUID"):
        check_gpus(3, "node1")
