"""`train --profile`: a trace and a table of where the step goes, from a run that is otherwise the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_run import fingerprint, tiny_run_config, write_config

from rwkv_cluster.cli import main
from rwkv_cluster.train.metrics.profile_breakdown import PARTS, break_down, read_trace
from rwkv_cluster.train.run import train

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a profile, on the command line."""
    folder = tmp_path_factory.mktemp("profiled")
    write_config(folder / "run.yaml", _config(folder))
    assert main(["train", str(folder / "run.yaml"), "--profile", "2"]) == 0
    return folder


def _config(folder: Path, **logging: Any) -> Any:
    training = {"grad_cp": 1, "micro_bsz": 2, "accumulate_grad_batches": 2}
    return tiny_run_config(folder, training=training, logging={"sample_tokens": 0, **logging})


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "work/logs/profile/rank-0.json").read_text())


def test_the_weights_are_the_same_to_the_bit(profiled: Path, tmp_path: Path) -> None:
    train(_config(tmp_path))
    assert not (tmp_path / "work/logs/profile").exists()
    assert fingerprint(tmp_path / "work") == fingerprint(profiled / "work")


def test_files_of_a_profile(profiled: Path) -> None:
    folder = profiled / "work/logs/profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json", "rank-0.trace.json.gz", "rank-0.txt"]
    text = (folder / "rank-0.txt").read_text()
    assert text.startswith("profile of steps 4 to 5 on rank 0: ")
    assert text in (profiled / "work/logs/train.log").read_text()


def test_the_parts_add_up_and_are_those_of_the_trace(profiled: Path) -> None:
    result = _result(profiled)
    assert (result["first_step"], result["last_step"], result["n_steps"], result["busy"]) == (4, 5, 2, None)
    assert result["whole_s"] == pytest.approx(result["wall_s"])
    assert sum(result["parts_s"].values()) == pytest.approx(result["whole_s"])
    assert all(result["parts_s"][part] > 0 for part in PARTS if part != "communication")
    found = break_down(read_trace(profiled / "work/logs/profile/rank-0.trace.json.gz"))
    assert found.parts_s == result["parts_s"]
    rows = re.findall(r"^(\w+) +([\d.]+) ms +([\d.]+) %", (profiled / "work/logs/profile/rank-0.txt").read_text(), re.M)
    assert [row[0] for row in rows] == list(PARTS)
    for part, ms, share in rows:
        assert float(ms) == pytest.approx(1e3 * result["parts_s"][part] / 2, abs=1e-3)
        assert float(share) == pytest.approx(100 * result["parts_s"][part] / result["whole_s"], abs=0.1)


def test_what_a_part_holds_is_what_the_profiler_counts(profiled: Path) -> None:
    """Against the sums of torch's own spans, of calls that lie in no other of their kind."""
    events = read_trace(profiled / "work/logs/profile/rank-0.trace.json.gz")
    wkv = [event for event in events if event["name"] in ("rwkv_cluster::wkv7", "rwkv_cluster::wkv7_backward")]
    assert len(wkv) == 2 * 2 * 2 * 3  # steps, micro batches, layers; forward, and with grad_cp again, and backward
    outer = "autograd::engine::evaluate_function: GeneratedBackwardFor_rwkv_cluster_wkv7_defaultBackward"
    whole = sum(event["dur"] for event in events if event["name"] in ("rwkv_cluster::wkv7", outer))
    assert _result(profiled)["parts_s"]["WKV"] == pytest.approx(whole / 1e6, rel=0.01)


def test_pauses_of_the_profiler_do_not_count_as_training(profiled: Path) -> None:
    """Writing and reading the trace takes a hundred times what a step does."""
    records = [json.loads(line) for line in (profiled / "work/logs/metrics.jsonl").read_text().splitlines()]
    assert min(record["tokens_per_s"] for record in records[1:]) > max(r["tokens_per_s"] for r in records) / 50


@pytest.mark.parametrize(("max_steps", "steps"), [(5, "steps 4 to 5"), (3, None)])
def test_a_session_shorter_than_its_profile(
    max_steps: int, steps: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_run_config(
        tmp_path, training={"max_steps": max_steps}, logging={"sample_tokens": 0, "profile_steps": 50}
    )
    train(config)
    path = tmp_path / "work/logs/profile/rank-0.txt"
    if steps:
        assert path.read_text().startswith(f"profile of {steps} on rank 0")
    else:
        assert not path.exists()
        assert re.search("no step was profiled: .*before its step 4", caplog.text)


def test_a_number_of_steps_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--profile", "run.yaml"]) == 2
    assert "'run.yaml' is not a number" in capsys.readouterr().err
    write_config(tmp_path / "run.yaml", _config(tmp_path))
    assert main(["train", str(tmp_path / "run.yaml"), "--profile=-2"]) == 2
    assert "logging.profile_steps is -2" in capsys.readouterr().err
