"""docs/metrics.md names every field that a run writes, and no other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from rwkv_cluster.train.metrics.metrics_file import COLUMNS
from rwkv_cluster.train.metrics.profile_breakdown import PARTS
from rwkv_cluster.train.metrics.step_times import StepParts

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()


def _documented(section: str) -> list[str]:
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_every_field_of_the_metrics_is_described() -> None:
    assert _documented("metrics.jsonl") == list(COLUMNS)


def test_every_field_of_the_ranks_events_is_described() -> None:
    assert _documented("events/rank-N.jsonl") == [field.name for field in fields(StepParts)]


def test_every_part_of_a_profile_is_described() -> None:
    assert set(_documented("profile/")) == set(PARTS)
