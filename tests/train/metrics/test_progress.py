"""What a person sees while a run goes: a live line on a terminal, lines elsewhere, with the true number of steps."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import select
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_run import tiny_run_config

from rwkv_cluster.cli import main
from rwkv_cluster.config import LoggingConfig
from rwkv_cluster.config.loader import dump_yaml
from rwkv_cluster.train.metrics.metrics_file import StepRecord
from rwkv_cluster.train.metrics.progress import Progress

log = logging.getLogger("rwkv_cluster")


def _record(step: int, loss: float, val_loss: float | None = None, mfu: float | None = None) -> StepRecord:
    return StepRecord(step, loss, 1.0, 1e-3, step * 64, 1000.0, 20100.0, val_loss, mfu=mfu)


@contextmanager
def _terminal(monkeypatch: pytest.MonkeyPatch, columns: int, kind: str = "xterm-256color") -> Iterator[int]:
    """stderr on a terminal of that many columns; gives the other end."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", columns and 24, columns, 0, 0))
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as stream:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", kind)
        patch.setenv("COLUMNS", str(columns or 80))  # rich asks the process's own three descriptors
        yield reader
    os.close(reader)


def _shown(reader: int, until: str) -> str:
    """What has come to the terminal, without colours and movements of the cursor."""
    shown = b""
    while until.encode() not in shown:  # the kernel hands a terminal's output on in pieces
        assert select.select([reader], [], [], 10)[0], shown
        shown += os.read(reader, 1 << 16)
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", shown.decode())


@pytest.mark.parametrize("columns", [130, 80, 0])
def test_live_line_counts_to_the_true_end(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with _terminal(monkeypatch, columns) as reader:
        progress = Progress(LoggingConfig(), total_steps=10, start_step=7)
        for step in (8, 9, 10):
            progress.show(_record(step, 2.0, 3.25 if step == 9 else None, mfu=0.412), 8 if step > 8 else None)
        progress.close()
        print("closed", file=sys.stderr, flush=True)
        lines = _shown(reader, "closed").replace("\r", "\n").splitlines()
    assert any(line.startswith("━" * 14) and "70% step 7/10" in line for line in lines)
    last = " ".join(" ".join(lines).rpartition("100%")[2].split())  # on a narrow terminal it goes on below
    assert last.startswith(
        "step 10/10: loss 2.000, val loss 3.250, 1,000 tokens/s, MFU 41.2 %, 20.1 GB, 0:00:00 left, checkpoint 8"
    )


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (69, "step 9/10: loss 2.000, val loss 3.250, 1,000 tokens/s, ? left"),
        (40, "step 9/10: loss 2.000, ? left"),
        (20, "step 9/10: "),
        (8, "step 9/…"),
    ],
)
def test_a_narrow_terminal_has_one_row_of_what_fits(columns: int, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with _terminal(monkeypatch, columns) as reader:
        progress = Progress(LoggingConfig(), total_steps=10, start_step=8)
        progress.show(_record(9, 2.0, 3.25, mfu=0.412), 8)
        progress.close()
        print("closed", file=sys.stderr, flush=True)
        lines = _shown(reader, "closed").replace("\r", "\n").splitlines()
    assert [line.rstrip() for line in lines if line][-2:] == [row.rstrip(), "closed"[:columns]]
    assert max(map(len, lines)) <= columns


def test_a_terminal_that_is_closed_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    stream = os.fdopen(writer, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        progress = Progress(LoggingConfig(), total_steps=10, start_step=8)
        os.close(reader)
        progress.show(_record(9, 2.0))
        progress.close()
    with pytest.raises(OSError, match="Input/output error"):
        stream.close()


def test_what_is_logged_appears_above_the_live_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with _terminal(monkeypatch, 100) as reader:
        handler = logging.StreamHandler(sys.stderr)
        monkeypatch.setattr(log, "handlers", [handler])
        caplog.set_level(logging.INFO, log.name)
        terminal = sys.stderr
        progress = Progress(LoggingConfig(log_interval_steps=1), total_steps=9, start_step=0)
        progress.show(_record(1, 2.0))
        log.info("checkpoint [red]of step 1[/red]")
        progress.close()
        log.info("closed")
        lines = _shown(reader, "closed").replace("\r", "\n").splitlines()
        assert handler.stream is terminal is sys.stderr
    assert "checkpoint [red]of step 1[/red]" in lines  # alone on its line, and rich's own marks mean nothing in it
    assert not any(line.startswith("step 1/9") for line in lines)  # the live line has said it


def test_lines_on_a_terminal_that_cannot_move_its_cursor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with _terminal(monkeypatch, 80, "dumb") as reader, caplog.at_level("INFO", "rwkv_cluster"):
        progress = Progress(LoggingConfig(log_interval_steps=1), total_steps=1, start_step=0)
        progress.show(_record(1, 2.0))
        progress.close()
        assert select.select([reader], [], [], 0)[0] == []
    assert len(caplog.messages) == 1


def test_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(LoggingConfig(log_interval_steps=2), total_steps=5, start_step=0)
    with caplog.at_level("INFO", "rwkv_cluster"):
        for step in range(1, 6):
            progress.show(_record(step, 3.0))
    assert [line.split(":")[0] for line in caplog.messages] == ["step 2/5", "step 4/5", "step 5/5"]
    assert re.fullmatch(r"step 4/5: loss 3\.000, 1,000 tokens/s, 20\.1 GB, 0:00:0\d left", caplog.messages[1])


def test_the_shown_loss_starts_at_the_first_loss(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(LoggingConfig(log_interval_steps=1), total_steps=9, start_step=0)
    with caplog.at_level("INFO", "rwkv_cluster"):
        progress.show(_record(1, 5.0))
        progress.show(_record(2, 3.0))
    assert "loss 5.000" in caplog.messages[0]
    assert f"loss {(0.95 * 5 + 3) / 1.95:.3f}" in caplog.messages[1]


def test_the_first_checkpoint_shown_is_the_one_that_is_continued(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(LoggingConfig(log_interval_steps=1), total_steps=9, start_step=4)
    with caplog.at_level("INFO", "rwkv_cluster"):
        progress.show(_record(5, 5.0))
        progress.show(_record(6, 5.0), 6)
    assert [line.rpartition(", ")[2] for line in caplog.messages] == ["checkpoint 4", "checkpoint 6"]


def test_a_whole_run_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live line at the foot, and in logs/train.log the plain lines with everything that was said."""
    (tmp_path / "run.yaml").write_text(dump_yaml(tiny_run_config(tmp_path, logging={"log_interval_steps": 4})))
    with _terminal(monkeypatch, 130) as reader:
        assert main(["train", str(tmp_path / "run.yaml")]) == 0
        print("closed", file=sys.stderr, flush=True)
        lines = _shown(reader, "closed").replace("\r", "\n").splitlines()
    assert any(re.match(r"━+ 100% step 8/8: loss .*, val loss .*tokens/s, .* left, checkpoint 4", x) for x in lines)
    log_lines = (tmp_path / "work/logs/train.log").read_text().splitlines()
    said = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line) for line in log_lines]
    assert [line.partition(":")[0] for line in said if line.startswith("step ")] == ["step 4/8", "step 8/8"]
    assert any(line.startswith("checkpoint of step 4 is saved") for line in said)
    assert [line for line in lines if line.startswith("checkpoint of step")] == [
        line for line in said if line.startswith("checkpoint of step")
    ]
