"""What submitit runs on a node, where real Slurm leaves an outcome to chance."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import pytest

from rwkv_cluster.launch import submitit_task
from rwkv_cluster.launch.submitit_task import NodeTask
from rwkv_cluster.runtime.exit_report import LAUNCH_VARIABLE


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeTask]:
    """One whose agent does not end by itself."""
    monkeypatch.setenv(LAUNCH_VARIABLE, str(tmp_path))
    monkeypatch.setattr(submitit_task, "SLURM_ENDS_US_S", 0.01)
    made = NodeTask(("sh", "-c", "exec sleep 60"), 1)
    kept = signal.getsignal(signal.SIGUSR1)
    yield made
    signal.signal(signal.SIGUSR1, kept)
    if made._agent is not None:
        made._agent.kill()
        made._agent.wait()


@pytest.mark.parametrize(("code", "fails"), [(-signal.SIGTERM, False), (1, True)])
def test_scontrol_may_end_with_the_job_that_it_queues_again(code: int, fails: bool, task: NodeTask) -> None:
    """By the signal that ends the job: no failure. By itself, as on a site that queues nothing again: one."""
    error = subprocess.CalledProcessError(code, ["scontrol", "requeue", "8"])

    def requeue(number: int, frame: FrameType | None) -> None:
        raise error

    signal.signal(signal.SIGUSR1, requeue)
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGUSR1])
    timer.start()
    with pytest.raises(subprocess.CalledProcessError) if fails else nullcontext():
        task()
    timer.join()
