"""DeepSpeed ZeRO over gloo: the curve of one process, exact resume, other numbers of ranks and other stages."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from system.processes import Job, Watched, new_run
from tiny_run import losses, tiny_run_config, write_config

from rwkv_cluster.cli import main
from rwkv_cluster.model.weights_file import load_pth
from rwkv_cluster.train.checkpoint.save_load import checkpoint_path, list_steps, verify

pytestmark = pytest.mark.system

STEPS = 14
BREAK = 8  # between the checkpoints of 5 and 10


def _new_run(folder: Path, **training: Any) -> Watched:
    """A run whose steps take accumulation, clipping that bites, and activation checkpointing."""
    return new_run(
        folder,
        training={
            "max_steps": STEPS,
            "global_batch_size": 8,
            "micro_bsz": 2,
            "grad_cp": 1,
            "gradient_clip_val": 0.5,
            "lr_init": 3e-4,
            "lr_final": 3e-5,
            "val_max_tokens": 5 * 2 * 32,  # an odd number of batches: one rank has a turn without one
            **training,
        },
        checkpoint={"save_interval_steps": 5},
    )


def _curve(run: Watched, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (run.work.logs / "metrics.jsonl").read_text().splitlines()]


def _assert_close(run: Watched, reference: Watched) -> None:
    """fp32: every loss, and every gradient norm, which Adam cannot hide, to 1e-6 relative."""
    for key in ("loss", "grad_norm"):
        found, wanted = (torch.tensor(_curve(which, key), dtype=torch.float64) for which in (run, reference))
        assert len(found) == STEPS
        assert ((found - wanted).abs() / wanted).max() < 1e-6, key
    assert _curve(run, "lr") == _curve(reference, "lr")
    assert _curve(run, "tokens") == _curve(reference, "tokens")


@pytest.mark.parametrize(
    "training",
    [
        {"strategy": "ddp"},
        pytest.param({"zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param({"zero_stage": 1}, marks=pytest.mark.slow),
        pytest.param({"zero_stage": 2}, marks=pytest.mark.slow),
        {"zero_stage": 3},
    ],
    ids=str,
)
def test_two_ranks_give_the_curve_of_one_process(training: dict[str, Any], unbroken: Callable[..., Watched]) -> None:
    """Row G8."""
    alone = unbroken(_new_run)
    _assert_close(unbroken(_new_run, 2, **training), alone)
    clipped = [norm > 0.5 for norm in _curve(alone, "grad_norm")]
    assert any(clipped)


@pytest.mark.parametrize(
    "strategy", [pytest.param("deepspeed_stage_2_offload", marks=pytest.mark.slow), "deepspeed_stage_3_offload"]
)
def test_offload_and_the_community_s_names(
    strategy: str, unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path, strategy=strategy)
    start(run.folder, ranks=2).complete()
    _assert_close(run, unbroken(_new_run))


def _broken(folder: Path, start: Callable[..., Job], *, ranks: int | None, **training: Any) -> Watched:
    """A run killed after step BREAK, whose newest checkpoint is of step 5."""
    run = _new_run(folder, **training)
    assert start(run.folder, ranks=ranks, fault=f"train.step@{BREAK}:signal=SIGKILL").wait() != 0
    assert run.newest_checkpoint() == 5
    return run


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (2, "fp32"),
        (3, "bf16"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"))),
    ],
)
def test_a_resume_on_as_many_ranks_is_equal(
    stage: int, precision: str, unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    """Row A1, A3: equal bits of weights, optimizer and losses, so the same run twice is equal too."""
    run = _broken(tmp_path, start, ranks=2, zero_stage=stage, precision=precision)
    start(run.folder, ranks=2).complete()
    whole = unbroken(_new_run, 2, zero_stage=stage, **({} if precision == "fp32" else {"precision": precision}))
    assert losses(run.work.root) == losses(whole.work.root)
    for step in (10, STEPS):
        found, wanted = (verify(checkpoint_path(which.work.checkpoints, step)) for which in (run, whole))
        _assert_equal_tensors(dict(found.weights()), dict(wanted.weights()))
        _assert_equal_tensors(dict(found.optimizer()), dict(wanted.optimizer()))
    final = (load_pth(which.work.final_weights) for which in (run, whole))
    _assert_equal_tensors(*final)


def _assert_equal_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "sessions",
    [
        [(2, 2, 4), (None, 0, 8), (2, 3, None)],
        pytest.param([(2, 2, 4), (None, 0, 7), (4, 1, 11), (2, 3, None)], marks=pytest.mark.slow),
    ],
    ids=["two, one, two", "two, one, four, two"],
)
def test_other_numbers_of_ranks_and_stages_go_on(
    sessions: list[tuple[int | None, int, int | None]],
    unbroken: Callable[..., Watched],
    tmp_path: Path,
    start: Callable[..., Job],
) -> None:
    """Row A7; ranks, stage and last step of each session: the same samples, rates and tokens, losses to 1e-6."""
    run = _new_run(tmp_path)
    for ranks, stage, stop in sessions:
        config = run.folder / "run.yaml"
        text = config.read_text()
        assert "zero_stage:" in text
        lines = [f"  zero_stage: {stage}" if "zero_stage:" in line else line for line in text.splitlines()]
        config.write_text("\n".join(lines) + "\n")
        fault = f"train.step@{stop}:signal=SIGUSR1" if stop else None
        code = start(run.folder, ranks=ranks, fault=fault).wait()
        assert (code == 0) == (stop is None)
    _assert_close(run, unbroken(_new_run))


def test_the_global_batch_is_kept_by_itself(tmp_path: Path, start: Callable[..., Job]) -> None:
    """Row A7: without global_batch_size, another number of ranks accumulates more; what cannot be kept is refused."""
    run = _new_run(tmp_path, global_batch_size=None, zero_stage=1)
    assert start(run.folder, ranks=2, fault=f"train.step@{BREAK}:signal=SIGKILL").wait() != 0
    before = _curve(run, "tokens")[:5]
    job = start(run.folder, ranks=3)
    assert job.wait() != 0
    assert re.search(r" 4 samples, .*micro_bsz 2 \* 3 ranks = 6\. Use 1 or 2 ranks", job.text)
    start(run.folder).complete()
    assert _curve(run, "tokens")[:5] == before
    assert _curve(run, "tokens") == [4 * 32 * step for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_stage_exports_what_its_checkpoint_holds(stage: int, unbroken: Callable[..., Watched]) -> None:
    """out/rwkv-final.pth is the checkpoint's masters in the training precision, consolidated offline or by the run."""
    for training in ({"zero_stage": stage}, {"zero_stage": stage, "precision": "bf16"}):
        run = unbroken(_new_run, 2, **training)
        assert main(["consolidate", str(run.folder / "run.yaml")]) == 0
        offline = load_pth(run.work.out / f"step-{STEPS:08d}.pth")
        _assert_equal_tensors(load_pth(run.work.final_weights), offline)
        assert main(["export", str(run.work.root), "--format", "safetensors"]) == 0
        _assert_equal_tensors(load_file(run.work.out / f"step-{STEPS:08d}.safetensors"), offline)


@pytest.mark.parametrize(
    "stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_one_checkpoint_comes_out_of_every_stage_alike(
    stage: int, unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    """A step with a rate of zero changes no weight: whichever stage makes it writes the same file."""
    run = _new_run(tmp_path)
    source = unbroken(_new_run, 2, zero_stage=2)
    shutil.copytree(source.work.root, run.work.root)
    for step in list_steps(run.work.checkpoints)[1:]:
        shutil.rmtree(checkpoint_path(run.work.checkpoints, step))
    config = tiny_run_config(
        run.folder,
        training={
            "max_steps": 6,
            "global_batch_size": 8,
            "micro_bsz": 2,
            "grad_cp": 1,
            "lr_init": 0.0,
            "lr_final": 0.0,
            "zero_stage": stage,
        },
    )
    write_config(run.folder / "run.yaml", config)
    start(run.folder, ranks=2).complete()
    wanted = verify(checkpoint_path(source.work.checkpoints, 5)).weights()
    _assert_equal_tensors(load_pth(run.work.final_weights), dict(wanted))


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_gradients_travel_in_the_dtype_that_is_asked_for(
    dtype: str, unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path, zero_stage=2, communication_dtype=dtype, ds_bucket_mb=1)
    start(run.folder, ranks=2).complete()
    found, wanted = (torch.tensor(_curve(which, "loss")) for which in (run, unbroken(_new_run)))
    error = ((found - wanted).abs() / wanted).max()
    assert error < 1e-6 if dtype == "fp32" else 1e-6 < error < 1e-2


def test_saving_in_the_background_changes_nothing(
    unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path, zero_stage=2)
    text = (run.folder / "run.yaml").read_text()
    (run.folder / "run.yaml").write_text(text.replace("background: null", "background: true"))
    job = start(run.folder, ranks=2, fault="checkpoint.after_weights@5#1:sleep=8")
    run.wait_for_steps(job, sessions=0, step=8)
    assert list_steps(run.work.checkpoints) == []  # rank 1 is still writing
    job.complete()
    assert losses(run.work.root) == losses(unbroken(_new_run, 2, zero_stage=2).work.root)
    assert list_steps(run.work.checkpoints) == [5, 10, STEPS]
    assert any("save_wait_s" in line for line in (run.work.logs / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    "training",
    [
        {"zero_stage": 3},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"zero_stage": 2, "precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_samples_on_two_ranks_change_nothing(
    training: dict[str, Any], tmp_path: Path, start: Callable[..., Job]
) -> None:
    """Under stage 3 neither rank has the model, and both are needed for each token."""
    runs = []
    for interval in (None, 3):
        run = _new_run(tmp_path / f"every {interval}", max_steps=6, **training)
        sampling = [f"--logging.sample_interval_steps={interval}", "--logging.sample_tokens=12"]
        start(run.folder, ranks=2, arguments=sampling if interval else []).complete()
        runs.append(run)
    without, with_samples = runs
    assert _curve(with_samples, "loss") == _curve(without, "loss")
    newest = [max(run.work.checkpoints.glob("step-*")) for run in runs]
    for path in newest[0].glob("*.pth"):
        assert path.read_bytes() == (newest[1] / path.name).read_bytes()
    assert [path.name for path in sorted(with_samples.work.samples.iterdir())] == [
        "step-00000003.txt",
        "step-00000006.txt",
    ]
    assert (with_samples.work.samples / "step-00000006.txt").read_text()
