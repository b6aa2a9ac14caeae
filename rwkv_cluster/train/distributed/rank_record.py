"""Text about a rank for log and error messages."""

from __future__ import annotations

from typing import Any

from rwkv_cluster.runtime.heartbeat import Watch


def name(record: dict[str, Any]) -> str:
    """Rank, host and process, as the beginning of a sentence."""
    return f"rank {record.get('rank')} on {record.get('host')}, process {record.get('pid')},"


def name_and_step(record: dict[str, Any]) -> str:
    """With its last finished step, where it has one."""
    return name(record) + (f" last finished step {record['step']}," if record.get("step") is not None else "")


def describe_dead(watch: Watch) -> str:
    return f"{name_and_step(watch.record)} has died without a word. See its log, and the kernel's"


def describe_silent(watch: Watch) -> str:
    return f"{name_and_step(watch.record)} has shown no sign of life for {watch.still_s:.0f} s"


def describe_late(watch: Watch) -> str:
    doing = watch.record["doing"]
    return f"{name_and_step(watch.record)} lives but has not come to the next exchange: it is {doing}"
