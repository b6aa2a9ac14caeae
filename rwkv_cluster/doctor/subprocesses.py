"""Asking another program, which may be missing, fail or never answer."""

from __future__ import annotations

import subprocess

PATIENCE_S = 5.0


def output_of(*argv: str) -> str | None:
    """What the program prints, stripped; None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
