"""The verb: what it says of a run is what the run then does, and a mistake is one sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run_config, write_config

from rwkv_cluster import cli
from rwkv_cluster.planning import run_plan
from rwkv_cluster.planning.options import Assumptions
from rwkv_cluster.train.run import train

Capture = pytest.CaptureFixture[str]


def plan(path: Path, *options: str, capsys: Capture) -> dict[str, Any]:
    assert cli.main(["plan", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_run_does_what_the_plan_says(tmp_path: Path, capsys: Capture) -> None:
    """Before anything is there, and after: steps, rates, parameters, the size of a checkpoint and of the weights."""
    config = tiny_run_config(tmp_path, checkpoint={"save_interval_steps": 8})
    path = write_config(tmp_path / "run.yaml", config)
    before = plan(path, capsys=capsys)
    assert not (tmp_path / "work").exists()
    assert (before["total_steps"], before["total_tokens"], before["epochs"]) == (8, 8 * 4 * 32, None)
    result = train(config)
    records = [json.loads(line) for line in (tmp_path / "work/logs/metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["lr"] for row in before["learning_rates"]}
    assert set(rates) == {0, 1, 2, 3, 5, 7}
    assert rates == {step: records[step]["lr"] for step in rates}
    assert result.tokens_seen == before["total_tokens"]
    checkpoint = sum(file.stat().st_size for file in (tmp_path / "work/out/checkpoints/step-00000008").iterdir())
    assert before["disk"]["checkpoint"] == pytest.approx(checkpoint, rel=0.1)
    assert before["disk"]["weights"] == pytest.approx(result.final_path.stat().st_size, rel=0.1)
    after = plan(path, capsys=capsys)
    assert after["epochs"] > 0
    exports = sum(file.stat().st_size for file in (tmp_path / "work/out").glob("rwkv-*.pth"))
    assert after["disk"]["exports"] == pytest.approx(exports, rel=0.1)
    data = sum(file.stat().st_size for file in (tmp_path / "work/data").iterdir())
    assert after["disk"]["data"] == pytest.approx(data, rel=0.1)


def test_the_end_of_a_run_may_hang_on_its_data(tmp_path: Path, capsys: Capture) -> None:
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training={"max_steps": None}))
    assert plan(path, capsys=capsys)["total_steps"] is None
    assert cli.main(["plan", str(path), "--tokens-per-s", "1000"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"unknown.*rwkv-cluster prepare", text)
    assert re.search(r"unknown.*1,000 tokens/s", text)
    assert cli.main(["prepare", str(path)]) == 0
    capsys.readouterr()
    found = plan(path, "--tokens-per-s", "1000", capsys=capsys)
    assert found["epochs"] == pytest.approx(1, abs=0.05)
    assert found["seconds"] == found["total_tokens"] / 1000


def test_the_schedule_is_drawn(tmp_path: Path, capsys: Capture) -> None:
    """A column for each of 64 steps at equal distances, as high as its rate, and numbers where it turns."""
    training = {"max_steps": 64, "schedule": "wsd", "lr_init": 1e-3, "lr_final": 2e-4, "warmup_steps": 4}
    training |= {"decay_steps": 16, "decay_shape": "linear"}
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training=training))
    assert cli.main(["plan", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("learning rate  wsd; step 0: 1e-05, "))
    assert "step 4: 0.001, " in lines[first]
    assert "step 48: 0.001, step 63: 0.00025" in lines[first]
    picture = [line.partition("|")[2].ljust(64) for line in lines[first + 1 : first + 6]]
    assert lines[first + 1].split() == ["0.001", "|", "#" * 46]
    heights = ["".join(column).count("#") for column in zip(*picture, strict=True)]
    assert heights[:5] == [0, 1, 3, 4, 5]
    assert set(heights[4:50]) == {5}
    assert heights[50:] == sorted(heights[50:], reverse=True)
    assert heights[-1] == 1
    assert lines[first + 6].split() == ["0", "+" + "-" * 64]


def test_data_may_end_a_run_earlier(tmp_path: Path, capsys: Capture) -> None:
    path = write_config(
        tmp_path / "run.yaml", tiny_run_config(tmp_path, training={"num_epochs": 1, "max_steps": 10**6})
    )
    assert cli.main(["plan", str(path)]) == 0
    assert "at most 1,000,000 steps" in capsys.readouterr().out
    path = write_config(
        tmp_path / "run.yaml", tiny_run_config(tmp_path, training={"samples_per_epoch": 40, "max_steps": 20})
    )
    assert plan(path, capsys=capsys)["epochs"] == 2


def test_ranks_come_from_the_launch_section_or_the_option(tmp_path: Path, capsys: Capture) -> None:
    launch = {"target": "sbatch", "num_nodes": 2, "gpus_per_node": 4}
    training = {"global_batch_size": 64, "strategy": "deepspeed_stage_2", "precision": "bf16"}
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, launch=launch, training=training))
    found = plan(path, capsys=capsys)
    assert (found["ranks"], found["accumulate_grad_batches"], found["tokens_per_step"]) == (8, 2, 64 * 32)
    (row,) = [row for row in found["memory"] if row["configured"]]
    assert (row["name"], row["zero_stage"], row["grad_cp"], row["micro_bsz"]) == ("ZeRO 2", 2, 0, 4)
    assert plan(path, "--ranks", "16", capsys=capsys)["accumulate_grad_batches"] == 1
    assert plan(path, "--training.devices=2", "--launch.gpus_per_node=null", capsys=capsys)["ranks"] == 4


def test_what_fits_and_what_to_change(tmp_path: Path, capsys: Capture) -> None:
    """The advice, taken, fits; the global batch stays."""
    model = {"model_type": "x070", "n_layer": 24, "n_embd": 2048, "head_size_a": 64, "vocab_size": 65536}
    training = {"precision": "bf16", "micro_bsz": 16, "max_steps": 10}
    path = write_config(
        tmp_path / "run.yaml", tiny_run_config(tmp_path, model={**model, "ctx_len": 4096}, training=training)
    )
    options = ["--ranks", "8", "--gpu", "a100-40gb"]
    assert cli.main(["plan", str(path), *options]) == 0
    text = capsys.readouterr().out
    assert "does not fit 40 GB" in text
    advice = text.rpartition("Change first: ")[2].split()
    assert advice[0] == "--training.grad_cp=1"
    found = plan(path, *options, *advice, capsys=capsys)
    assert found["global_batch_size"] == 128
    assert [row["fits"] for row in found["memory"] if row["configured"]] == [True]
    assert found["to_fit"] == []
    assert cli.main(["plan", str(path), *options, *advice]) == 0
    assert "setting fits 40 GB" in capsys.readouterr().out
    assert cli.main(["plan", str(path), "--gpu-memory-gb", "2"]) == 0
    assert "No setting does" in capsys.readouterr().out


def test_grad_cp_auto_follows_the_gpu(tmp_path: Path, capsys: Capture) -> None:
    model = {"model_type": "x070", "n_layer": 12, "n_embd": 768, "head_size_a": 64, "vocab_size": 65536}
    training = {"precision": "bf16", "micro_bsz": 8, "max_steps": 10, "grad_cp": "auto", "accelerator": "auto"}
    path = write_config(
        tmp_path / "run.yaml", tiny_run_config(tmp_path, model={**model, "ctx_len": 4096}, training=training)
    )
    for gpu, wanted in (((), 1), (("--gpu", "rtx-4090"), 1), (("--gpu", "h200"), 0)):
        found = plan(path, *gpu, capsys=capsys)
        (row,) = [row for row in found["memory"] if row["configured"]]
        assert found["grad_cp"] == row["grad_cp"] == wanted
        assert cli.main(["plan", str(path), *gpu]) == 0
        assert ("auto is " if gpu else "auto: chosen on the GPU") in capsys.readouterr().out


def test_grad_cp_auto_on_cpus_shares_a_node_among_its_own_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_plan, "memory_bytes", lambda: 4e9)
    for nodes, ranks, share in ((1, 4, 1e9), (4, 4, 4e9), (2, 4, 2e9)):
        config = tiny_run_config(
            tmp_path,
            training={"grad_cp": "auto", "accelerator": "cpu"},
            launch={"target": "sbatch", "num_nodes": nodes},
        )
        choice = run_plan.plan_run(config, Assumptions(ranks, None, None, None, None)).grad_cp
        assert choice is not None
        assert choice.available == share


def test_time_by_utilisation(tmp_path: Path, capsys: Capture) -> None:
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path))
    found = plan(path, "--mfu", "0.5", "--peak-tflops", "2", "--ranks", "1", capsys=capsys)
    assert found["tokens_per_s"] == pytest.approx(1e12 / found["flops_per_token"]["six_n"])
    assert found["flops_per_token"]["six_n"] == 6 * (
        found["parameters"]["total"] - found["parameters"]["by_part"]["emb"]
    )


def test_a_missing_file_is_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["plan", str(tmp_path / "run.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rwkv-cluster: error: {tmp_path}/run.yaml: ")
    assert "no such file" in line


def test_damaged_data_is_refused(tmp_path: Path, capsys: Capture) -> None:
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path))
    (tmp_path / "work/data").mkdir(parents=True)
    (tmp_path / "work/data/manifest.json").write_text("{")
    assert cli.main(["plan", str(path)]) == 3
    assert "manifest.json is not JSON" in capsys.readouterr().err


def test_the_text_of_a_recipe(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "quickstart.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model          x070, 4 layers, width 128, head size 64, vocabulary 257")
    assert lines[1].startswith("parameters     1,026,304: emb 32,896, head 32,896, time mix 268,288")
    assert lines[2].endswith("= 16 samples, 2,048 tokens a step")
    assert "500 steps, 1,024,000 tokens" in lines[3]
    table = [line.split() for line in lines if line.startswith(("one process", "ZeRO 3, opt"))]
    assert table[0][2:6] == ["4.11", "4.07", "0.00", "8.14"]
    assert [line for line in lines if "*" in line][-1].startswith("one process")


def test_the_verb_leaves_torch_alone(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path))
    code = f"from rwkv_cluster.cli import main; assert main(['plan', {str(path)!r}]) == 0"
    code += f"\nassert main(['plan', {str(path)!r}, '--fit', '--gpu', 'h100']) == 0"
    code += "\nimport sys; assert not {'torch', 'pytorch_lightning', 'deepspeed'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
