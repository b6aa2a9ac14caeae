"""What a person sees while a run goes: a bar on a terminal, lines elsewhere, with the true number of steps."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rwkv_cluster.config import LoggingConfig
from rwkv_cluster.train.progress import Progress
from rwkv_cluster.train.records import StepRecord


def _record(step: int, loss: float, val_loss: float | None = None) -> StepRecord:
    return StepRecord(step, loss, 1.0, 1e-3, step * 64, 1000.0, 100.0, val_loss)


@contextmanager
def _terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[int]:
    """stderr on a terminal of that many columns; gives the other end."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", columns and 24, columns, 0, 0))
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as stream:
        patch.setattr(sys, "stderr", stream)
        yield reader
    os.close(reader)


@pytest.mark.parametrize("columns", [120, 0])
def test_bar_counts_to_the_true_end(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with _terminal(monkeypatch, columns) as reader:
        progress = Progress(LoggingConfig(), total_steps=10, start_step=7)
        for step in (8, 9, 10):
            progress.show(_record(step, 2.0, 3.25 if step == 9 else None))
        progress.close()
        shown = b""
        while b"\n" not in shown:  # the kernel hands a terminal's output on in pieces
            assert select.select([reader], [], [], 10)[0], shown
            shown += os.read(reader, 1 << 16)
    assert "70%|" in shown.decode()
    assert re.search(
        r"100%\|█+\| step 10/10, loss 2\.000, val loss 3\.250, 1,000 tokens/s, 0:00:00 left", shown.decode()
    )


def test_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(LoggingConfig(log_interval_steps=2), total_steps=5, start_step=0)
    with caplog.at_level("INFO", "rwkv_cluster"):
        for step in range(1, 6):
            progress.show(_record(step, 3.0))
    assert [line.split(":")[0] for line in caplog.messages] == ["step 2/5", "step 4/5", "step 5/5"]
    assert re.fullmatch(r"step 4/5: loss 3\.000, 1,000 tokens/s, 0:00:0\d left", caplog.messages[1])


def test_the_shown_loss_starts_at_the_first_loss(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(LoggingConfig(log_interval_steps=1), total_steps=9, start_step=0)
    with caplog.at_level("INFO", "rwkv_cluster"):
        progress.show(_record(1, 5.0))
        progress.show(_record(2, 3.0))
    assert "loss 5.000" in caplog.messages[0]
    assert f"loss {(0.95 * 5 + 3) / 1.95:.3f}" in caplog.messages[1]
