"""tokens/s, MFU and HFU in the metrics: computed again from the formulas of docs/metrics.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_run_config

from rwkv_cluster.config import Config
from rwkv_cluster.model.flops import flops_per_token
from rwkv_cluster.train import evaluate as evaluation
from rwkv_cluster.train.checkpoint.checkpointer import Checkpointer
from rwkv_cluster.train.metrics.throughput import utilization
from rwkv_cluster.train.placement import Placement
from rwkv_cluster.train.run import train

H100 = "NVIDIA H100 80GB HBM3"


def _records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "work/logs/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("grad_cp", [0, 1])
def test_mfu_and_hfu_are_those_of_the_formulas(grad_cp: int, tmp_path: Path) -> None:
    config = tiny_run_config(tmp_path, training={"grad_cp": grad_cp}, logging={"sample_tokens": 0, "peak_tflops": 0.5})
    train(config)
    flops = flops_per_token(config.model, vocab_size=257)
    hardware = flops.training + grad_cp * (flops.blocks + flops.wkv)
    records = _records(tmp_path)
    for record in records:
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] * flops.six_n / 0.5e12, rel=1e-12)
        assert record["hfu"] == pytest.approx(record["tokens_per_s"] * hardware / 0.5e12, rel=1e-12)
    header, *rows = (tmp_path / "work/logs/metrics.csv").read_text().splitlines()
    columns = header.split(",")
    assert [float(row.split(",")[columns.index("mfu")]) for row in rows] == [record["mfu"] for record in records]


def test_no_mfu_where_the_peak_is_not_known(tmp_path: Path) -> None:
    train(tiny_run_config(tmp_path, training={"max_steps": 1}))
    assert not {"mfu", "hfu"} & _records(tmp_path)[0].keys()


@pytest.mark.parametrize(
    ("name", "precision", "given", "peak_flops"),
    [
        (H100, "bf16", None, 4 * 989e12),
        (H100, "fp32", None, None),  # the table is of products in 16 bits
        (H100, "fp32", 67.0, 4 * 67e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None, None),
    ],
)
def test_the_peak_is_the_devices(
    name: str, precision: str, given: float | None, peak_flops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    config = Config.model_validate(
        {"model": {"vocab_size": 257}, "training": {"precision": precision}, "logging": {"peak_tflops": given}}
    )
    found = utilization(config, Placement("cuda", world_size=4, devices=4, num_nodes=1))
    assert (found and found.peak_flops) == peak_flops


def test_pauses_do_not_lower_the_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation, checkpoints and exported weights that take a second each, against steps of some milliseconds."""
    import time

    clock = time.perf_counter
    skipped = [0.0]

    def slow(function):  # type: ignore[no-untyped-def]
        def slower(*args, **kwargs):  # type: ignore[no-untyped-def]
            skipped[0] += 1000.0
            return function(*args, **kwargs)

        return slower

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + skipped[0])
    monkeypatch.setattr("rwkv_cluster.train.evaluate.evaluate", slow(evaluation.evaluate))
    monkeypatch.setattr("rwkv_cluster.train.checkpoint.saver.save_pth", slow(lambda *args: None))
    monkeypatch.setattr(Checkpointer, "begin", slow(Checkpointer.begin))
    monkeypatch.setattr("rwkv_cluster.train.fit.sample_text", lambda *args: None)
    training = {"val_interval_steps": 2, "samples_per_epoch": 8}
    train(tiny_run_config(tmp_path, training=training, checkpoint={"save_interval_steps": 2}))
    records = _records(tmp_path)
    assert skipped[0] >= 12_000
    assert all(128 / record["tokens_per_s"] < 500 for record in records)
    assert [record["step"] for record in records if "val_loss" in record] == [2, 4, 6, 8]
