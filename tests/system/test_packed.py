"""Packed and masked data on real processes: resumed bit for bit, and one loss for every split into ranks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from system.processes import Job, Watched, new_run
from tiny_run import losses

from rwkv_cluster.data.manifest import load_manifest
from rwkv_cluster.train.checkpoint.save_load import checkpoint_path, verify

pytestmark = pytest.mark.system

STEPS = 16
BREAK = 13  # after the checkpoint of 10


def _write_rows(path: Path) -> None:
    """Rows of tokens of which some are trained on, a few longer than a sample."""
    draw = random.Random(1)
    rows = []
    for _ in range(60):
        length = draw.randint(2, 50)
        mask = [int(draw.random() < 0.3) for _ in range(length - 1)]
        rows.append(json.dumps({"tokens": [draw.randint(1, 40) for _ in range(length)], "mask": [*mask, 1]}))
    path.write_text("\n".join(rows) + "\n")


def _new_run(folder: Path, **training: Any) -> Watched:
    """A run of two micro batches a step whose epochs end between them."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder / "rows.jsonl")
    return new_run(
        folder,
        data={"inputs": [str(folder / "rows.jsonl")]},
        training={"max_steps": STEPS, "global_batch_size": 8, "micro_bsz": 2, "lr_init": 3e-4, **training},
        checkpoint={"save_interval_steps": 10},
    )


@pytest.mark.parametrize(
    ("ranks", "training"),
    [(None, {}), pytest.param(2, {"strategy": "ddp"}, marks=pytest.mark.slow), (2, {"zero_stage": 2})],
    ids=["1", "ddp 2", "zero 2"],
)
def test_killed_and_resumed_it_is_the_unbroken_run(
    ranks: int | None,
    training: dict[str, Any],
    unbroken: Callable[..., Watched],
    tmp_path: Path,
    start: Callable[..., Job],
) -> None:
    run = _new_run(tmp_path, **training)
    assert start(run.folder, ranks=ranks, fault=f"train.step@{BREAK}:signal=SIGKILL").wait() != 0
    assert run.newest_checkpoint() == 10
    start(run.folder, ranks=ranks).complete()
    whole = unbroken(_new_run, ranks, **training)
    _assert_equal(run, whole)
    packing = load_manifest(run.work.data).packing
    assert packing is not None
    assert packing.n_trained < packing.n_positions
    _assert_close(whole, unbroken(_new_run, None))


def _assert_equal(run: Watched, whole: Watched) -> None:
    """Every loss, and every bit of the last checkpoint."""
    assert losses(run.work.root) == losses(whole.work.root)
    found, wanted = (verify(checkpoint_path(which.work.checkpoints, STEPS)) for which in (run, whole))
    for tensors, others in ((found.weights(), wanted.weights()), (found.optimizer(), wanted.optimizer())):
        pairs = dict(tensors), dict(others)
        assert pairs[0].keys() == pairs[1].keys()
        assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])
    assert found.state.data_fingerprint == wanted.state.data_fingerprint
    assert (found.state.order or "").startswith("all, ")


def _assert_close(run: Watched, alone: Watched) -> None:
    """Loss and gradient norm, which Adam cannot hide, of each step, and the held-out loss of one process."""
    for key in ("loss", "grad_norm"):
        found, wanted = (_values(which, key) for which in (run, alone))
        assert len(found) == STEPS
        assert ((found - wanted).abs() / wanted).max() < 1e-6, key
    assert _values(run, "trained_tokens").tolist() == _values(alone, "trained_tokens").tolist()
    held_out = [json.loads((which.work.logs / "metrics.jsonl").read_text().splitlines()[-1]) for which in (run, alone)]
    assert held_out[0]["val_loss"] == pytest.approx(held_out[1]["val_loss"], rel=1e-6)


def _values(run: Watched, key: str) -> torch.Tensor:
    lines = (run.work.logs / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)[key] for line in lines], dtype=torch.float64)


def test_a_run_that_has_begun_refuses_other_windows(tmp_path: Path, start: Callable[..., Job]) -> None:
    run = _new_run(tmp_path, max_steps=2)
    start(run.folder).complete()
    before = losses(run.work.root)
    for changed, told in (
        ("--data.too_long=drop", "too_long: split -> drop"),
        ("--data.documents=continue", "documents: reset -> None"),
        ("--data.order=rwkv-lm", "order: all, "),
    ):
        job = start(run.folder, arguments=(changed, "--training.max_steps=4"))
        assert job.wait() == 3
        assert told in job.text
    assert losses(run.work.root) == before
