"""A run that takes a second: two layers, 32 channels, a few kilobytes of made-up text; and what it left behind."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rwkv_cluster.config import Config
from rwkv_cluster.config.loader import dump_yaml
from rwkv_cluster.train.checkpoint.state import CheckpointState, RngState
from rwkv_cluster.train.run import train

WORDS = [
    "the",
    "a",
    "river",
    "stone",
    "moves",
    "under",
    "light",
    "and",
    "every",
    "morning",
    "we",
    "count",
    "seven",
    "small",
    "birds",
    "in",
    "it",
]


def write_text(path: Path, n_words: int = 1500, seed: int = 0) -> Path:
    """JSON lines of made-up sentences."""
    draw = random.Random(seed)
    lines = []
    while n_words > 0:
        length = draw.randrange(8, 40)
        n_words -= length
        lines.append(json.dumps({"text": " ".join(draw.choices(WORDS, k=length))}))
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_run_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """A valid run in `folder`/work on text in `folder`/text.jsonl, with changes by section."""
    source = folder / "text.jsonl"
    if not source.exists():
        write_text(source)
    values: dict[str, Any] = {
        "work_dir": str(folder / "work"),
        "model": {"model_type": "x070", "n_layer": 2, "n_embd": 32, "head_size_a": 16, "ctx_len": 32},
        "data": {
            "inputs": [str(source)],
            "n_epochs_duplication": 1,
            "validation_fraction": 0.1,
            "num_workers": 1,
        },
        "training": {
            "precision": "fp32",
            "micro_bsz": 4,
            "grad_cp": 0,
            "max_steps": 8,
            "lr_init": 1e-3,
            "warmup_steps": 2,
            "val_max_tokens": 1024,
            "num_threads": 1,
        },
        "checkpoint": {"save_interval_steps": 4},
        "logging": {"sample_tokens": 0},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
    return Config(**values)


def write_config(path: Path, config: Config) -> Path:
    path.write_text(dump_yaml(config))
    return path


def state_of(step: int, **changes: Any) -> CheckpointState:
    """The state of a checkpoint as a run of one rank writes it, without the random states of a real one."""
    values: dict[str, Any] = {
        "config": {"model": {}, "training": {}},
        "data_fingerprint": "0",
        "global_batch_size": 4,
        "magic_prime": 5,
        "step": step,
        "tokens_seen": 0,
        "epoch_loss_sum": 0.0,
        "epoch_loss_count": 0,
        "loss": 2.5,
        "val_loss": None,
        "optimizer_updates": step,
        "torch": "2",
        "random_states": [RngState((3, [], None), ("MT19937", [], 0, 0, 0.0), "")],
    }
    return CheckpointState(**values | changes)


def losses(work_dir: str | Path) -> list[float]:
    """The exact loss of every step."""
    lines = (Path(work_dir) / "logs" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def fingerprint(work_dir: str | Path) -> dict[str, Any]:
    """Everything that must be equal in two runs that are the same: final weights, optimizer state, every loss."""
    out = Path(work_dir) / "out"
    newest = max((out / "checkpoints").glob("step-*"))
    hashes = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (out / "rwkv-final.pth", newest / "weights.pth", newest / "optimizer.pth")
    }
    return {**hashes, "losses": [value.hex() for value in losses(work_dir)]}


def break_off(config: Config, *, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until an error in `step`, as of a disk."""
    with monkeypatch.context() as patch:
        patch.setenv("RWKV_CLUSTER_FAULT", f"train.step@{step}:error=EIO")
        with pytest.raises(OSError, match="Input/output error"):
            train(config)
