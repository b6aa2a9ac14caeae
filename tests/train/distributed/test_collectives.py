"""What a rank leaves behind when its session is over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rwkv_cluster.train.distributed.collectives import is_collective_failure, leaving_group


def _thread_names() -> set[str]:
    return {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads in /proc")
def test_no_thread_of_gloo_outlives_the_session(tmp_path: Path) -> None:
    """One that releases a tensor while the interpreter ends would abort a rank that has done its work."""
    with leaving_group():
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        assert "pt_gloo_runloop" in _thread_names()
    assert not dist.is_initialized()
    assert "pt_gloo_runloop" not in _thread_names()


def test_a_group_that_was_there_before_stays(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with leaving_group():
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:4: Connection reset by peer"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_failed_collectives_are_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_collective_failure(error) is expected
