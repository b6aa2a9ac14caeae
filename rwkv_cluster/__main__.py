"""`rwkv-cluster`, `python -m rwkv_cluster`: before anything else is imported, a signal ends it without a traceback."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """The command line; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    from rwkv_cluster.cli import main as run

    return run()


def _end(number: int, frame: FrameType | None) -> None:
    """There is nothing to clean up, before the command line has begun and after it has ended."""
    os.write(2, f"rwkv-cluster: interrupted by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
