"""Long work says how far it has come: nothing at first, then a line now and then, and the time that is left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_run import tiny_run_config, write_config

from rwkv_cluster import cli
from rwkv_cluster.runtime.terminal import time_left
from rwkv_cluster.runtime.terminal.live_line import clock_time
from rwkv_cluster.runtime.terminal.time_left import Countdown, bytes_left
from rwkv_cluster.train.run import train


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_left, "FIRST_S", -1.0)
    monkeypatch.setattr(time_left, "EVERY_S", -1.0)


def test_hours_minutes_and_seconds() -> None:
    assert [clock_time(seconds) for seconds in (0.4, 59.6, 3599, 90_061)] == [
        "0:00:00",
        "0:01:00",
        "0:59:59",
        "25:01:01",
    ]


def test_short_work_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rwkv_cluster"), Countdown("working", 2, "things") as left:
        left.advance(1)
    assert caplog.messages == []


def test_amounts_have_their_unit(talkative: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rwkv_cluster"):
        for what, n_bytes in (("small", 5_000_000), ("large", 13_400_000_000)):
            with bytes_left(what, n_bytes) as left:
                left.advance(n_bytes / 2)
        with Countdown("many", 12_000, "tokens") as left:
            left.advance(6_000)
    assert caplog.messages == [
        "small: 2.5 of 5.0 MB, 0:00:00 left",
        "large: 6.7 of 13.4 GB, 0:00:00 left",
        "many: 6,000 of 12,000 tokens, 0:00:00 left",
    ]


def test_other_ranks_say_nothing(
    talkative: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level("INFO", "rwkv_cluster"), Countdown("working", 2, "things") as left:
        left.advance(1)
    assert caplog.messages == []


@pytest.mark.system
def test_every_long_command_counts_down_to_its_end(
    talkative: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run_config(tmp_path, training={"max_steps": 2})
    run_yaml, work = str(write_config(tmp_path / "run.yaml", config)), config.work_dir
    train(config)
    pth = f"{work}/out/rwkv-final.pth"
    for command, what, unit in (
        (["eval", run_yaml], "evaluating", "tokens"),
        (["eval", run_yaml], "verifying step-00000002", "MB"),
        (["generate", work, "--tokens", "5", "--prompt", "a"], "generating", "tokens"),
        (["inspect", pth], "reading rwkv-final.pth", "MB"),
        (["consolidate", work], "verifying step-00000002", "MB"),
        (["status", work, "--verify"], "verifying step-00000002", "MB"),
        (["report", work], "drawing", "pictures"),
    ):
        capsys.readouterr()
        assert cli.main(command) == 0
        said = re.findall(
            rf"^{what}: ([\d,.]+) of ([\d,.]+) {unit}, \d+:\d\d:\d\d left$", capsys.readouterr().err, re.M
        )
        assert said, (command, what)
        assert command[0] == "generate" or said[-1][0] == said[-1][1]  # which may end before
