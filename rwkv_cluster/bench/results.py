"""The figures of a benchmark that takes minutes: in its file and in the log after each case, whatever comes later."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rwkv_cluster.workdir import write_output

log = logging.getLogger("rwkv_cluster")


def keep(result: dict[str, Any], path: str | None, lines: str) -> None:
    """Write the `result` so far as JSON to `path`, where there is one, and tell `lines`, the newest of its table."""
    if path is not None:
        write_output(Path(path), json.dumps(result, indent=1) + "\n")
    log.info("%s", lines)
