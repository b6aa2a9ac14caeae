"""The logs of a launch: job.log, node-N.log of each agent and its launcher, rank-N.log of each rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from rwkv_cluster.runtime.exit_report import rank_log
from rwkv_cluster.runtime.own_file import open_own


class Tail:
    """What a file has gained since the last look. A file that does not exist yet is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def read(self) -> str:
        """New text. A character of which not all bytes are there yet is shown as �."""
        try:
            with open(self.path, "rb", opener=open_own) as handle:
                handle.seek(self._position)
                content = handle.read()
        except FileNotFoundError:
            return ""
        self._position += len(content)
        return content.decode(errors="replace")


class Logs(Protocol):
    """What a launch says, or one rank of it."""

    def read(self) -> Iterator[str]:
        """New text since the last call. Raises LaunchError."""


class FileLogs:
    """The logs in launch directories: of one rank, or the first rank's after those of the launchers.

    folders: that of the launch, and those of a sweep's runs.
    """

    def __init__(self, folders: Sequence[Path], rank: int | None) -> None:
        self._folders = folders
        self._rank = rank
        self._tails: dict[Path, Tail] = {}

    def read(self) -> Iterator[str]:
        """New text, file by file. Files may come with time."""
        paths = [rank_log(folder, self._rank or 0) for folder in self._folders]
        if self._rank is None:
            others = [path for run in self._folders for path in sorted({*run.glob("*.log")} - {*run.glob("rank-*")})]
            paths = others + paths
        for path in paths:
            if text := self._tails.setdefault(path, Tail(path)).read():
                yield text


class Echo:
    """Copies the logs of a node's ranks to stdout, each line with its rank, where a container's output is what is read.

    What is there already, from an earlier start of the job, is left out.
    """

    def __init__(self, launch: Path, ranks: Sequence[int]) -> None:
        self._tails = {rank: Tail(rank_log(launch, rank)) for rank in ranks}
        self._rests = dict.fromkeys(ranks, "")
        for tail in self._tails.values():
            tail.read()

    def copy(self) -> None:
        """Copy the whole lines that have come since the last call."""
        for rank, tail in self._tails.items():
            *lines, self._rests[rank] = (self._rests[rank] + tail.read()).split("\n")
            sys.stdout.write("".join(f"[rank {rank}] {line}\n" for line in lines))
        sys.stdout.flush()
