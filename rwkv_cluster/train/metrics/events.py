"""What happened in a run, when: `logs/events.jsonl`, one line of JSON for each event, written by rank 0.

    {"time": 1764158400.1, "step": 400, "kind": "save", "path": "...", "waited_s": 0.4}

time: seconds since 1970. step: optimizer steps done by then. The file is history: a run that goes on appends to it, and
what was done in vain before a kill or a rollback stays in it, unlike in `metrics.jsonl`.

    start       of a run: total_steps, tokens_per_step, world_size, host
    resume      the same, and from_step: of the checkpoint that is continued
    branch      the run begins at the checkpoint of this step of another: work_dir, the other's
    save        a checkpoint was committed: path, waited_s (seconds that training has waited for it)
    export      weights were written: path
    validation  loss, n_tokens; for text also n_bytes, bits_per_byte
    validation_ema  the same of the averaged weights
    sample      path of the text
    nonfinite   what ("loss" or "gradient"), ranks, losses of all ranks, samples, positions
    spike       first_step, last_step, loss, median, limit: see `train.guards.spike_guard`
    rollback    to_step, skipped_steps: how many steps' samples are left out, skipped: all batches left out so far
    early_stop  best (validation loss), stale: evaluations since then
    stop        the session ended before the run's end: reason, exit_code
    end         the run is complete: loss, val_loss
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from rwkv_cluster.errors import CheckpointError, Interrupted
from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.runtime.own_file import open_own

Kind = Literal[
    "start", "resume", "branch", "save", "export", "validation",
    "validation_ema", "sample",
    "nonfinite", "spike", "rollback", "early_stop", "stop", "end",
]  # fmt: skip


class Events:
    """Appends to `path`. None, as ranks but 0 have it: every event is dropped, so that callers need not ask."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def add(self, kind: Kind, step: int, **details: Any) -> None:
        """Write one event. Raises CheckpointError when the disk refuses the line."""
        if self._path is None:
            return
        event = {"time": time.time(), "step": step, "kind": kind, **details}
        line = json.dumps(_plain(event), allow_nan=False) + "\n"
        with writing(self._path, len(line)), open(self._path, "ab+", buffering=0, opener=open_own) as file:
            file.write(_end_of_cut_line(file) + line.encode())

    @contextmanager
    def log_exit(self, step: Callable[[], int]) -> Iterator[None]:
        """Write "stop" when an exception ends the block. step: steps done by then."""
        try:
            yield
        except (Exception, Interrupted) as error:
            with suppress(CheckpointError):  # the disk that refuses this line may be what `error` is about
                reason = str(error) or type(error).__name__
                self.add("stop", step(), reason=reason, exit_code=getattr(error, "exit_code", 1))
            raise


def _end_of_cut_line(file: Any) -> bytes:
    """A line feed where a kill has cut the last line short."""
    if file.seek(0, os.SEEK_END) == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def _plain(value: Any) -> Any:
    """`value` with numbers that JSON has no word for as text: nan, inf."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
