"""Masked and packed data, as plan, status and report tell of it; plain data reads as it always did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import tiny_run_config, write_config

from rwkv_cluster import cli
from rwkv_cluster.data.manifest import load_manifest
from rwkv_cluster.train.run import train


def _said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_what_is_trained_on_and_packed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"tokens": [5 + i % 9] * (4 + i), "mask": [0] * (2 + i) + [1, 1]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = tiny_run_config(
        tmp_path, data={"inputs": [str(tmp_path / "rows.jsonl")]}, training={"max_steps": 2, "val_interval_steps": 1}
    )
    path, work = str(write_config(tmp_path / "run.yaml", config)), str(tmp_path / "work")
    assert "\nsamples " not in _said(capsys, "plan", path)
    train(config)
    manifest = load_manifest(tmp_path / "work/data")
    packing = manifest.packing
    assert packing is not None
    assert packing.n_split > 0
    trained = f"{manifest.n_trained:,} of {manifest.n_tokens:,} tokens trained on"
    words = f"{trained}; {packing.n_windows} windows of 32, {packing.n_positions:,} tokens packed, "
    words += f"{packing.n_trained:,} trained on, {packing.waste:.1%} waste; {packing.n_split} long documents split"
    assert f"\nsamples        {words}" in _said(capsys, "plan", path)
    plan = json.loads(_said(capsys, "plan", path, "--json"))
    assert plan["packing"]["n_windows"] == packing.n_windows
    assert plan["epochs"] == pytest.approx(2 * 4 / packing.n_windows)
    assert plan["trained_tokens"] == manifest.n_trained
    assert "\nsamples " not in _said(capsys, "plan", path, "--model.ctx_len=64")  # it will be prepared again
    status = _said(capsys, "status", work)
    assert words in status
    assert "last, of trained tokens" in status
    assert _said(capsys, "eval", work)
    records = [json.loads(line) for line in (tmp_path / "work/logs/metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["trained_tokens"] < 4 * 32 for record in records)
    assert all("val_loss" in record for record in records)
