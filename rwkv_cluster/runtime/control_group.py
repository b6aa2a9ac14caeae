"""Limits that the control group of this process sets: memory and processor time. Linux, versions 2 and 1."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def total_memory_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_bytes() -> int:
    """Memory that this process may use: that of the machine, or the limit of its control group where that is lower."""
    limits = [int(text) for text in _contents("memory.max", "memory/memory.limit_in_bytes") if text.isdigit()]
    return min([total_memory_bytes(), *limits])


def cpu_quota() -> float:
    """CPUs whose time this process's control group may use up; infinite without a limit."""
    quotas = [text.split() for text in _contents("cpu.max", "cpu.max")]  # `max 100000` or `150000 100000`
    return min((int(used) / int(period) for used, period in quotas if used.isdigit()), default=float("inf"))


def _contents(name: str, old_name: str) -> list[str]:
    """Content of this process's control files, as seen inside a container and outside; version 2, then 1."""
    own = next((line.partition("::")[2] for line in _read(Path("/proc/self/cgroup")).splitlines() if "::" in line), "")
    paths = (_ROOT / own.lstrip("/") / name, _ROOT / name, _ROOT / old_name)
    return [text for path in paths if (text := _read(path))]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
