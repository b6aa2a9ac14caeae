"""What only a GPU can show: the operators, a run in each precision, and an exact resume, on CUDA."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_wkv import VERSIONS, naive, random_inputs, relative_errors, values_and_gradients
from tiny_run import fingerprint, losses, tiny_run_config, write_config

from rwkv_cluster.data.windows import TokenBatch
from rwkv_cluster.errors import Preempted
from rwkv_cluster.kernels import native, ops
from rwkv_cluster.train.callbacks.after_step import AfterStep
from rwkv_cluster.train.datamodule import TokenDataModule
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.evaluate import evaluate_run
from rwkv_cluster.train.run import train
from rwkv_cluster.train.sample import generate_text

pytestmark = pytest.mark.gpu
SIZES = pytest.mark.parametrize(
    "sizes",
    [{"n_embd": 32, "head_size_a": 16}, {"n_embd": 128, "head_size_a": 64}],
    ids=["chunked", "CUDA kernels"],  # which have heads of 64
)


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    assert native.unavailable("cuda", torch.bfloat16, 64) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_operators_against_float64(version: str) -> None:
    inputs = random_inputs(version, 2, 77, 3, 64)
    wanted = values_and_gradients(partial(naive, version), inputs)
    on_gpu = [x.cuda() for x in inputs]
    found = values_and_gradients(partial(getattr(ops, version), backend="chunked"), on_gpu, torch.float32)
    assert max(relative_errors([x.cpu() for x in found], wanted)) < 5e-5


@SIZES
@pytest.mark.parametrize("model_type", ["x052", "x060", "x070"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_follows_the_cpu(model_type: str, precision: str, sizes: dict[str, int], tmp_path: Path) -> None:
    curves = {}
    for accelerator, its_precision in (("cpu", "fp32"), ("cuda", precision)):
        folder = tmp_path / accelerator
        folder.mkdir()
        training = {"accelerator": accelerator, "precision": its_precision, "lr_init": 3e-4}
        train(tiny_run_config(folder, model={"model_type": model_type, **sizes}, training=training))
        curves[accelerator] = losses(folder / "work")
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    assert curves["cuda"] == pytest.approx(curves["cpu"], rel=tolerance)


@SIZES
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_continues_exactly(
    precision: str, sizes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = []
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
        training = {"accelerator": "cuda", "precision": precision}
        configs.append(tiny_run_config(tmp_path / name, model=sizes, training=training))
    train(configs[0])
    monkeypatch.setenv(FAULT_VARIABLE, "train.step@3:signal=SIGUSR1")
    with pytest.raises(Preempted):
        train(configs[1])
    monkeypatch.delenv(FAULT_VARIABLE)
    train(configs[1])
    assert fingerprint(configs[0].work_dir) == fingerprint(configs[1].work_dir)


def _train_in_processes(folder: Path, ranks: int, fault: str | None = None) -> int:
    """Exit code of `train run.yaml` under torchrun."""
    module = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "rwkv_cluster")
    environment = {**os.environ, **({FAULT_VARIABLE: fault} if fault else {})}
    command = [sys.executable, *module, "train", "run.yaml"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300).returncode


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_killed_and_continued_is_equal(precision: str, tmp_path: Path) -> None:
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
        config = tiny_run_config(
            tmp_path / name,
            model={"n_embd": 128, "head_size_a": 64},
            training={"accelerator": "cuda", "precision": precision},
        )
        write_config(tmp_path / name / "run.yaml", config)
    assert _train_in_processes(tmp_path / "unbroken", 1) == 0
    assert _train_in_processes(tmp_path / "killed", 1, "train.step@6:signal=SIGKILL") != 0
    assert _train_in_processes(tmp_path / "killed", 1) == 0
    assert fingerprint(tmp_path / "killed/work") == fingerprint(tmp_path / "unbroken/work")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_follows_one_process(stage: int, tmp_path: Path) -> None:
    """In fp32, on as many GPUs as there are, two at most."""
    pytest.importorskip("deepspeed")
    ranks = min(2, torch.cuda.device_count())
    for name, training in (("alone", {}), ("zero", {"zero_stage": stage})):
        (tmp_path / name).mkdir()
        config = tiny_run_config(
            tmp_path / name,
            model={"n_embd": 128, "head_size_a": 64},
            training={"accelerator": "cuda", "micro_bsz": 2, "global_batch_size": 4, "lr_init": 3e-4} | training,
        )
        write_config(tmp_path / name / "run.yaml", config)
        assert _train_in_processes(tmp_path / name, ranks if training else 1) == 0
    assert losses(tmp_path / "zero/work") == pytest.approx(losses(tmp_path / "alone/work"), rel=1e-5)


def test_a_rank_tells_where_its_time_goes_and_a_profile_changes_nothing(tmp_path: Path) -> None:
    results = []
    for name, steps in (("plain", 0), ("profiled", 3)):
        (tmp_path / name).mkdir()
        training = {"accelerator": "cuda", "precision": "bf16", "grad_cp": 1}
        model = {"n_embd": 128, "head_size_a": 64}
        logging = {"profile_steps": steps, "peak_tflops": 1000.0}
        train(tiny_run_config(tmp_path / name, model=model, training=training, logging=logging))
        results.append(fingerprint(tmp_path / name / "work"))
        logs = tmp_path / name / "work/logs"
        lines = [json.loads(line) for line in (logs / "events/rank-0.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 9))
        assert all(line[part] > 0 for line in lines for part in ("forward_s", "backward_s", "optimizer_s"))
        records = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
        assert all(0 < record["mfu"] < record["hfu"] < 1 for record in records)
    assert results[0] == results[1]
    profile = json.loads((tmp_path / "profiled/work/logs/profile/rank-0.json").read_text())
    assert sum(profile["parts_s"].values()) == pytest.approx(profile["whole_s"])
    assert all(profile["parts_s"][part] > 0 for part in ("WKV", "matmul", "forward", "backward", "loss", "optimizer"))
    assert 0 < profile["busy"] <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_waits_for_nothing_but_the_numbers_of_a_step(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the end of step 2 to that of step 5 torch raises where it waits; waiting for an event is no such place."""
    ended, pinned = AfterStep.on_train_batch_end, []

    def end(self: AfterStep, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")  # what follows a step reads memory counters, for one
        ended(self, *args)
        torch.cuda.set_sync_debug_mode("error" if args[1].step in (2, 3, 4) else "default")

    given = TokenDataModule.on_before_batch_transfer

    def transfer(self: TokenDataModule, batch: TokenBatch, index: int) -> TokenBatch:
        pinned.append(batch.inputs.is_pinned() and batch.targets.is_pinned())
        return given(self, batch, index)

    monkeypatch.setattr(AfterStep, "on_train_batch_end", end)
    monkeypatch.setattr(TokenDataModule, "on_before_batch_transfer", transfer)
    try:
        train(
            tiny_run_config(
                tmp_path,
                model={"n_embd": 128, "head_size_a": 64},
                data={"validation_fraction": 0.0},
                training={"accelerator": "cuda", "precision": precision, "max_steps": 6},
                checkpoint={"save_interval_steps": 100},
            )
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pinned == [True] * 6


@pytest.mark.parametrize("low_precision", [torch.bfloat16, torch.float16])
def test_eval_and_generate_in_16_bits(
    low_precision: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU without the memory for fp32."""
    caplog.set_level(logging.INFO, logger="rwkv_cluster")
    config = tiny_run_config(tmp_path, model={"n_embd": 128, "head_size_a": 64}, training={"max_steps": 3})
    train(config)
    expected = evaluate_run(config).loss
    caplog.clear()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1 << 40))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: low_precision == torch.bfloat16)
    assert evaluate_run(config).loss == pytest.approx(expected, rel=3e-3)
    options = {"n_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert generate_text(Path(config.work_dir), "a", **options).startswith("a")
    name = "bf16" if low_precision == torch.bfloat16 else "fp16"
    assert caplog.text.count(f"the model is in {name}: in fp32") == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2 or os.geteuid() != 0, reason="needs two GPUs, and root for a mount")
def test_two_gpus_without_shared_memory(tmp_path: Path) -> None:
    """On a /dev/shm of 1 MB, in which NCCL's own transport would end the run."""
    config = tiny_run_config(tmp_path, training={"accelerator": "cuda", "strategy": "ddp", "micro_bsz": 2})
    write_config(tmp_path / "run.yaml", config)
    script = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    train_it = ("--standalone", "--nproc-per-node=2", "-m", "rwkv_cluster", "train", "run.yaml")
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "torch.distributed.run", *train_it]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "NCCL goes without" in done.stderr
    assert len(losses(tmp_path / "work")) == 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_collective_that_takes_too_long_leaves_what_each_rank_exchanged(tmp_path: Path) -> None:
    training = {"accelerator": "cuda", "strategy": "ddp", "micro_bsz": 2, "timeout_s": 20}
    write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training=training))
    train_it = ("--standalone", "--nproc-per-node=2", "-m", "rwkv_cluster", "train", "run.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", *train_it]
    environment = {**os.environ, FAULT_VARIABLE: "train.step@3#1:sleep=120"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "NCCL is used with TORCH_NCCL_HIGH_PRIORITY=1" in done.stderr
    assert (tmp_path / "work/logs/hang/nccl_trace_rank_0").stat().st_size > 0
