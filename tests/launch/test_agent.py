"""What the agent says of a node whose ranks have failed, from their exit reports."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from rwkv_cluster.errors import DataError, LaunchError, MissingDataError, RWKVClusterError, TrainingError
from rwkv_cluster.launch.agent import Node, Ranks, classify_exit, gpus_of_job
from rwkv_cluster.launch.command import ALL_GPUS_VARIABLE
from rwkv_cluster.launch.outcome import Outcome, read_outcome
from rwkv_cluster.runtime.exit_report import STATE_VARIABLE, ExitReport, read_exit_report, report_exit


def outcome(folder: Path, *reports: ExitReport, stop_signal: str | None = None) -> Outcome | None:
    """What a node with three ranks tells the batch script."""
    for report in reports:
        (folder / f"rank-{report.rank}").write_text(json.dumps(asdict(report)))
    node = Node("node1", 0, ("node1",), folder, folder, ranks=(0, 1, 2), world_size=3)
    process = subprocess.Popen(["true"])
    process.wait()
    classify_exit(node, Ranks(process, stop_signal))
    return read_outcome(folder)


def ended(rank: int, code: int = 1, message: str = "", about: int | None = None, quoted: bool = False) -> ExitReport:
    return ExitReport(rank, "node1", code, message, about, quoted)


def test_a_ranks_own_error_comes_before_those_about_it(tmp_path: Path) -> None:
    about = ended(0, message="rank 2 has died", about=2)
    own = ended(2, code=3, message="rank 7 is no word of x.jsonl")
    assert outcome(tmp_path, about, ended(1, message="lost", about=2), own) == Outcome(
        "failed", 3, "rank 2 on node1 failed (data): rank 7 is no word of x.jsonl"
    )


def test_an_error_that_is_quoted_is_told_as_the_other_ranks(tmp_path: Path) -> None:
    """The rank that has raised it may have been ended before it could report."""
    quoting = ended(0, code=3, message="x.jsonl: bad", about=2, quoted=True)
    assert outcome(tmp_path, quoting, ended(1, code=0)) == Outcome(
        "failed", 3, "rank 2 on node1 failed (data): x.jsonl: bad"
    )


def test_a_rank_without_a_report_is_named_where_others_only_speak_about_it(tmp_path: Path) -> None:
    found = outcome(tmp_path, ended(0, message="rank 2 has died", about=2), ended(1, message="lost", about=2))
    assert found is not None
    assert (found.how, found.exit_code, found.stop_signal) == ("failed", 1, None)
    assert found.message.startswith("rank 2 on node1 exited without reporting")
    assert found.message.endswith(f"See {tmp_path}/rank-2.log")


@pytest.mark.parametrize(("stop_signal", "how"), [("SIGUSR2", "preempted"), (None, "stopped")])
def test_ranks_that_have_all_saved_were_preempted_by_a_signal_or_stopped_by_a_file(
    tmp_path: Path, stop_signal: str | None, how: str
) -> None:
    found = outcome(tmp_path, *(ended(rank, 75) for rank in range(3)), stop_signal=stop_signal)
    assert found is not None
    assert (found.how, found.exit_code, found.stop_signal) == (how, 75, stop_signal)


def test_the_first_node_to_end_is_the_one_that_is_believed_and_a_cut_line_is_none(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    Outcome("failed", 4, "the first").write(tmp_path)
    Outcome("failed", 1, "the second").write(tmp_path)
    assert read_outcome(tmp_path) == Outcome("failed", 4, "the first")
    (tmp_path / "outcome").write_text("failed 4")
    assert read_outcome(tmp_path) is None


@pytest.mark.parametrize(
    ("variables", "visible"),
    [
        ({"SLURM_STEP_GPUS": "4,5", "SLURM_JOB_GPUS": "4,5,6", ALL_GPUS_VARIABLE: "1"}, "4,5"),
        ({"SLURM_JOB_GPUS": "4,5", ALL_GPUS_VARIABLE: "1"}, "4,5"),
        ({"SLURM_STEP_GPUS": "4,5"}, None),  # where cgroups hide the others
        ({ALL_GPUS_VARIABLE: "1"}, None),
    ],
)
def test_a_docker_container_under_slurm_takes_the_gpus_of_its_job(
    variables: dict[str, str], visible: str | None
) -> None:
    """CUDA_VISIBLE_DEVICES counts them from 0, whatever others the node has."""
    found = gpus_of_job({"CUDA_VISIBLE_DEVICES": "0,1", **variables})
    wanted = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if visible else {}
    assert found == wanted


@pytest.mark.parametrize(
    ("error", "text", "report"),
    [
        (DataError("bad"), "bad", ended(4, 3, "bad")),
        (MissingDataError("none", rank=1, is_quoted=True), "rank 1: none", ended(4, 3, "none", 1, True)),
        (TrainingError("rank 1 has died", rank=1), "rank 1 has died", ended(4, 1, "rank 1 has died", 1)),
        (LaunchError(), "", ended(4, 6, "")),
    ],
)
def test_an_exit_report_carries_the_fields_of_the_error(
    error: RWKVClusterError, text: str, report: ExitReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setattr("socket.gethostname", lambda: "node1")
    report_exit(error.exit_code, error)
    assert str(error) == text
    assert read_exit_report(tmp_path, 4) == report
    assert read_exit_report(tmp_path, 5) is None
