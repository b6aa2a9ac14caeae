"""Numbers of a run: of every step from its metrics, and those that the charts of its report show.

rwkv-cluster report work/quickstart && python examples/read_report.py work/quickstart
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any


def steps(work_dir: Path) -> list[dict[str, Any]]:
    """One record a step; docs/metrics.md has the fields."""
    return [json.loads(line) for line in (work_dir / "logs/metrics.jsonl").read_text().splitlines()]


def charts(work_dir: Path) -> dict[str, Any]:
    """Series by name, each with its tokens and values: what `rwkv-cluster report` has drawn."""
    page = (work_dir / "report/index.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None, "the page is no report"
    return json.loads(data[1])["runs"][0]["series"]


def main(work_dir: Path) -> None:
    """Print the loss at ten steps, and the names of the series of the report."""
    records = steps(work_dir)
    for record in records[:: max(1, len(records) // 10)]:
        print(f"step {record['step']:>6}  loss {record['loss']:.4f}")
    print("series:", ", ".join(charts(work_dir)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
