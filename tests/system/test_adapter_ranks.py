"""Adapters and partial training on several ranks: DDP and ZeRO give the curve of one process, and resume exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from system.processes import Job, Watched, new_run
from tiny_models import tiny_model
from tiny_run import losses

from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.train.checkpoint.save_load import checkpoint_path, verify

pytestmark = pytest.mark.system

STEPS, BREAK = 10, 7
PARTS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora", "rank": 4}},
    "pissa": {"adapter": {"kind": "pissa", "rank": 4}},
    "dora": {"adapter": {"kind": "dora", "rank": 4}},
    "miss": {"adapter": {"kind": "miss", "rank": 4}},
    "state": {"adapter": {"kind": "state", "token_shifts": True}, "data": {"documents": "reset"}},
    "nf4": {"adapter": {"kind": "lora", "rank": 4, "quant": "nf4"}},
    "int8": {"adapter": {"kind": "state", "quant": "int8"}},
    "patterns": {"training": {"train": ["blocks.*.ffn.*", "head.weight"]}},
}


def _new_run(folder: Path, part: str = "lora", **training: Any) -> Watched:
    folder.mkdir(parents=True, exist_ok=True)
    save_pth(folder / "released.pth", tiny_model("x070", vocab_size=257).state_dict())
    sections = {name: dict(fields) for name, fields in PARTS[part].items()}
    sections["training"] = {
        "max_steps": STEPS,
        "global_batch_size": 8,
        "micro_bsz": 2,
        "grad_cp": 1,
        "lr_init": 3e-3,
        "lr_final": 3e-4,
        "init_from": str(folder / "released.pth"),
        **sections.get("training", {}),
        **training,
    }
    return new_run(folder, checkpoint={"save_interval_steps": 5}, **sections)


def _curve(run: Watched, key: str) -> torch.Tensor:
    lines = (run.work.logs / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)[key] for line in lines], dtype=torch.float64)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("part", "training"),
    [
        ("lora", {"zero_stage": 2}),
        ("state", {"zero_stage": 3}),
        *(
            pytest.param(part, training, marks=SLOW)
            for part, training in (
                ("lora", {"strategy": "ddp"}),
                ("lora", {"zero_stage": 0}),
                ("lora", {"zero_stage": 1}),
                ("lora", {"zero_stage": 3}),
                ("dora", {"zero_stage": 3}),
                ("pissa", {"zero_stage": 3}),
                ("miss", {"zero_stage": 3}),
                ("nf4", {"strategy": "ddp"}),
                ("nf4", {"zero_stage": 0}),
                ("nf4", {"zero_stage": 2}),
                ("nf4", {"zero_stage": 3}),
                ("int8", {"zero_stage": 3}),
                ("state", {"strategy": "ddp"}),
                ("state", {"zero_stage": 2}),
                ("patterns", {"strategy": "ddp"}),
                ("patterns", {"zero_stage": 2}),
                ("patterns", {"zero_stage": 3}),
            )
        ),
    ],
    ids=str,
)
def test_two_ranks_give_the_curve_of_one_process(
    part: str, training: dict[str, Any], unbroken: Callable[..., Watched]
) -> None:
    alone, run = unbroken(_new_run, part=part), unbroken(_new_run, 2, part=part, **training)
    for key in ("loss", "grad_norm"):
        found, wanted = _curve(run, key), _curve(alone, key)
        assert len(found) == STEPS
        assert ((found - wanted).abs() / wanted).max() < 1e-5, key
    final = [load_pth(each.work.final_weights) for each in (run, alone)]
    assert final[0].keys() == final[1].keys()
    for name, tensor in final[1].items():
        torch.testing.assert_close(final[0][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "training"),
    [
        ("lora", {"zero_stage": 2}),  # runs of the test before
        ("state", {"zero_stage": 3}),
        *(
            pytest.param(part, training, marks=SLOW)
            for part, training in (
                ("lora", {"zero_stage": 1}),
                ("lora", {"precision": "bf16", "strategy": "ddp"}),
                ("lora", {"precision": "bf16", "zero_stage": 2}),
                ("dora", {"zero_stage": 3}),
                ("pissa", {"precision": "bf16", "zero_stage": 3}),
                ("miss", {"precision": "bf16", "zero_stage": 3}),
                ("nf4", {"precision": "bf16", "zero_stage": 2}),
                ("nf4", {"precision": "bf16", "zero_stage": 3}),
                ("state", {"precision": "bf16", "zero_stage": 2}),
                ("state", {"precision": "bf16", "zero_stage": 3}),
                ("patterns", {"precision": "bf16", "zero_stage": 2}),
                ("patterns", {"zero_stage": 3}),
            )
        ),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_with_equal_bits(
    part: str,
    training: dict[str, Any],
    unbroken: Callable[..., Watched],
    tmp_path: Path,
    start: Callable[..., Job],
) -> None:
    run = _new_run(tmp_path, part, **training)
    assert start(run.folder, ranks=2, fault=f"train.step@{BREAK}:signal=SIGKILL").wait() != 0
    assert run.newest_checkpoint() == 5
    start(run.folder, ranks=2).complete()
    whole = unbroken(_new_run, 2, part=part, **training)
    assert losses(run.work.root) == losses(whole.work.root)
    found, wanted = (verify(checkpoint_path(each.work.checkpoints, STEPS)) for each in (run, whole))
    for mine, theirs in ((found.weights(), wanted.weights()), (found.optimizer(), wanted.optimizer())):
        mine, theirs = dict(mine), dict(theirs)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    final = [load_pth(each.work.final_weights) for each in (run, whole)]
    assert all(torch.equal(final[0][name], tensor) for name, tensor in final[1].items())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"zero_stage": 3}, {"strategy": "auto"}),
        pytest.param({"strategy": "auto"}, {"zero_stage": 2}, marks=SLOW),
    ],
)
def test_a_checkpoint_goes_on_under_another_strategy(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path, start: Callable[..., Job]
) -> None:
    ranks = [2 if "zero_stage" in training else None for training in (before, after)]
    run = _new_run(tmp_path, "pissa", precision="bf16", **before)
    assert start(run.folder, ranks=ranks[0], fault=f"train.step@{BREAK}:signal=SIGKILL").wait() != 0
    _new_run(tmp_path, "pissa", precision="bf16", **after)
    start(run.folder, ranks=ranks[1]).complete()
    assert len(losses(run.work.root)) == STEPS
