"""Nothing that a file says commands the terminal of the person who reads it: at every door of the command line."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rwkv_cluster.cli import main
from rwkv_cluster.commands import COMMANDS
from rwkv_cluster.commands.subcommand import Result
from rwkv_cluster.config import Config, LoggingConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.launch import submit
from rwkv_cluster.launch.command import Command
from rwkv_cluster.launch.launchers.launcher import Plan
from rwkv_cluster.runtime.terminal.text_safety import visible
from rwkv_cluster.train.metrics.console_log import log_file

TITLE = "\x1b]0;owned\x07"
SHOWN = r"\x1b]0;owned\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (TITLE, SHOWN),
        ("a\tb\nc", "a\tb\nc"),
        ("over\rwritten\b\x0e\x0c\x7f\x9b", r"over\rwritten\x08\x0e\x0c\x7f\x9b"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("one\u2028line", r"one\u2028line"),
        ("é 😀 \u200f\u200d שלום \\x1b", "é 😀 \u200f\u200d שלום \\x1b"),
        ("", ""),
    ],
)
def test_what_commands_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


Answer = Callable[[Result | Exception], None]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Make `status` answer so."""

    def choose(result: Result | Exception) -> None:
        def run(options: object) -> Result:
            logging.getLogger("rwkv_cluster").warning("heard: %s", TITLE)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setitem(COMMANDS, "status", dataclasses.replace(COMMANDS["status"], run=run))

    return choose


def test_a_result_a_log_line_and_an_error_reach_the_person_visibly(
    answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(Result(f"{TITLE}\n", {"text": TITLE}))
    assert main(["status", "w"]) == 0
    assert capsys.readouterr() == (f"{SHOWN}\n", f"heard: {SHOWN}\n")
    assert main(["status", "w", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": TITLE}
    for error in (ConfigError(TITLE), RuntimeError(TITLE)):
        answer(error)
        assert main(["status", "w"]) > 0
        captured = capsys.readouterr()
        assert (captured.out, "\x1b" in captured.err, SHOWN in captured.err) == ("", False, True)


def test_generated_text_is_raw_only_in_json_and_in_the_file_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("rwkv_cluster.train.sample")
    module.generate_text = lambda *arguments, **options: TITLE  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rwkv_cluster.train.sample", module)
    assert main(["generate", "w"]) == 0
    assert capsys.readouterr().out == f"{SHOWN}\n"
    assert main(["generate", "w", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == TITLE
    assert main(["generate", "w", "--output", str(tmp_path / "text")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/text\n"
    assert (tmp_path / "text").read_text() == TITLE
    assert main(["generate", "w", "--output", str(tmp_path / "no" / "text")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("follow", [[], ["--follow"]])
def test_logs_are_shown_visibly(follow: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "launch" / "1"
    folder.mkdir(parents=True)
    (folder / "command.json").write_text('{"target": "local"}')
    (folder / "exit").write_text(f"0{TITLE}\n")
    (folder / "rank-0.log").write_text(f"{TITLE}\n")
    assert main(["logs", str(tmp_path), *follow]) == 0
    assert capsys.readouterr().out == f"{SHOWN}\n"
    assert main(["cancel", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_the_output_of_a_launch_here_is_shown_visibly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = Config(work_dir=str(tmp_path / "w"), logging=LoggingConfig(sample_tokens=0))
    said = Command((sys.executable, "-c", f"print({TITLE!r})"))
    assert submit.submit(Plan(config, {}, (said,), None)).code == 0
    assert capfd.readouterr().err == f"{SHOWN}\n"


def test_the_log_file_keeps_what_was_said_visibly(tmp_path: Path) -> None:
    with log_file(tmp_path / "train.log"):
        logging.getLogger("rwkv_cluster").info("sample: %s", TITLE)
    assert (tmp_path / "train.log").read_text().endswith(f"sample: {SHOWN}\n")
