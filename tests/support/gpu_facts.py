"""What tests/gpu.sh says of a card: its name and versions, the rates that it reaches; and all stages' results as one.

python gpu_facts.py RESULT.json    measures the card
python gpu_facts.py --collect OUT  puts what the stages have left in OUT into OUT/results.json
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rwkv_cluster.bench.cuda_wkv import Timer, copy_bandwidth

PRODUCTS = {
    "square": (8192, 8192, 8192),
    "block of 0.19B": (65_536, 768, 768),
    "channel mix of 0.19B": (65_536, 3072, 768),
    "channel mix of 1.5B": (16_384, 8192, 2048),
    "head of 0.19B": (4096, 65_536, 768),
}
"""[m,k] x [k,n] in bf16, as m, n, k: those of a training step, and one that shows what the card can do."""


def measure() -> dict[str, Any]:
    """Bandwidth of a copy in GB/s, and TFLOP/s of each product."""
    timed = Timer()
    facts: dict[str, Any] = {"copy_gb_per_s": copy_bandwidth(timed) / 1e9, "bf16_tflops": {}}
    for name, (m, n, k) in PRODUCTS.items():
        a, b = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
        seconds = statistics.median([timed(lambda a=a, b=b: a @ b.t()) for _ in range(12)][2:])
        facts["bf16_tflops"][name] = 2 * m * n * k / seconds / 1e12
    return facts


def software() -> dict[str, Any]:
    """Card, driver and versions; None for what is not there."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card: str | None = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        card = None
    return {
        "card": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def collect(folder: Path) -> dict[str, Any]:
    """Software, how each stage ended and in how many seconds, and the figures that stages have left as JSON."""
    stages = {}
    for line in (folder / "stages.txt").read_text().splitlines():
        name, outcome, seconds = line.split()
        stages[name] = {"outcome": outcome, "seconds": int(seconds)}
    figures = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("facts", "wkv", "step")
        if (folder / f"{name}.json").exists()
    }
    return software() | {"stages": stages} | figures


def main(arguments: list[str]) -> None:
    if arguments[0] == "--collect":
        folder = Path(arguments[1])
        (folder / "results.json").write_text(json.dumps(collect(folder), indent=2) + "\n")
        return
    facts = measure()
    Path(arguments[0]).write_text(json.dumps(facts, indent=2) + "\n")
    print(f"copy {facts['copy_gb_per_s']:,.0f} GB/s")
    for name, rate in facts["bf16_tflops"].items():
        print(f"bf16 {name}: {rate:,.0f} TFLOP/s")


if __name__ == "__main__":
    main(sys.argv[1:])
