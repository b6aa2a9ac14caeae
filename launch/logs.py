"""The logs of a launch: job.log, node-N.log of each agent and its launcher, rank-N.log of each rank."""

from __future__ import annotations

from pathlib import Path

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
