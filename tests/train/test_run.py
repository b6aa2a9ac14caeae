"""A whole run: repeatable, stopped and continued without a trace, and refused where it would be another run."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import fingerprint, losses, tiny_run_config, write_text

from rwkv_cluster.config import Config
from rwkv_cluster.errors import CheckpointError, ConfigError, DataError, LaunchError, Preempted, TrainingError
from rwkv_cluster.model.weights_file import load_pth
from rwkv_cluster.train.checkpoint.resume import accumulation_of
from rwkv_cluster.train.checkpoint.save_load import list_steps, newest_verified
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.module import TrainingModule
from rwkv_cluster.train.placement import Placement
from rwkv_cluster.train.run import initialize, train
from rwkv_cluster.workdir import WorkDir


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(tiny_run_config(folder))
    return folder


def _copy_of(unbroken: Path, folder: Path) -> Config:
    shutil.copytree(unbroken, folder, dirs_exist_ok=True)
    return tiny_run_config(folder)


def _run_in_sessions(config: Config, stops: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for stop in stops:
        monkeypatch.setenv(FAULT_VARIABLE, f"train.step@{stop}:signal=SIGUSR1")
        with pytest.raises(Preempted) as caught:
            train(config)
        assert caught.value.exit_code == 75
        assert f"after step {stop + 1} of" in str(caught.value)
    monkeypatch.delenv(FAULT_VARIABLE)
    train(config)


def test_the_same_config_twice_is_equal(unbroken: Path, tmp_path: Path) -> None:
    train(tiny_run_config(tmp_path))
    assert fingerprint(tmp_path / "work") == fingerprint(unbroken / "work")


def test_files_of_a_finished_run(unbroken: Path) -> None:
    work = WorkDir(unbroken / "work")
    assert sorted(path.name for path in work.out.glob("*.pth")) == [
        "rwkv-0.pth",
        "rwkv-final.pth",
        "rwkv-init.pth",
    ]
    assert list_steps(work.checkpoints) == [4, 8]
    rows = (work.logs / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,grad_norm,lr,tokens,tokens_per_s,memory_mb")
    assert [row.split(",")[0] for row in rows[1:]] == [str(step) for step in range(1, 9)]
    epoch, mean, perplexity, lr = (work.out / "train_log.txt").read_text().splitlines()[-1].split()[:4]
    assert float(mean) == pytest.approx(sum(losses(work.root)) / 8, abs=1e-6)
    assert (epoch, lr) == (
        "0",
        f"{json.loads((work.logs / 'metrics.jsonl').read_text().splitlines()[-1])['lr']:.8f}",
    )
    assert float(perplexity) > 1


def test_a_gpu_would_add_up_in_fp32_while_training_and_as_before_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products, forward, seen = torch.backends.cuda.matmul, TrainingModule.forward, set()

    def setting() -> tuple[bool, bool]:
        return products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction

    def look(module: TrainingModule, batch: torch.Tensor) -> torch.Tensor:
        seen.add(setting())
        return forward(module, batch)

    monkeypatch.setattr(TrainingModule, "forward", look)
    train(tiny_run_config(tmp_path, training={"max_steps": 1}))
    assert seen == {(False, False)}
    assert setting() == (True, True)


def test_the_first_loss_is_that_of_a_uniform_guess(unbroken: Path) -> None:
    assert losses(unbroken / "work")[0] == pytest.approx(torch.log(torch.tensor(257.0)).item(), abs=0.15)
    assert losses(unbroken / "work")[-1] < losses(unbroken / "work")[0] - 0.5


@pytest.mark.parametrize(
    "stops",
    [[0], [3], [4], [1, 3, 5], *(pytest.param(each, marks=pytest.mark.slow) for each in ([1], [2], [5], [6], [2, 6]))],
    ids=str,
)
def test_stopped_and_continued_equals_unbroken(
    stops: list[int], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run_config(tmp_path)
    _run_in_sessions(config, stops, monkeypatch)
    assert fingerprint(config.work_dir) == fingerprint(unbroken / "work")


@pytest.mark.parametrize(
    ("model_type", "training"),
    [
        ("x070", {"precision": "bf16", "grad_cp": 1, "accumulate_grad_batches": 2, "micro_bsz": 2}),
        ("x060", {"precision": "fp32"}),
        ("x052", {"precision": "bf16", "weight_decay": 0.1}),
    ],
    ids=["x070-bf16", "x060-fp32", "x052-bf16"],
)
def test_every_version_and_precision_continues_exactly(
    model_type: str, training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "unbroken", tmp_path / "stopped"]
    configs = []
    for folder in folders:
        folder.mkdir()
        configs.append(
            tiny_run_config(folder, model={"model_type": model_type, "n_embd": 64, "n_layer": 1}, training=training)
        )
    train(configs[0])
    _run_in_sessions(configs[1], [3], monkeypatch)
    assert fingerprint(configs[0].work_dir) == fingerprint(configs[1].work_dir)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.system
def test_noise_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As dropout would use it, from each generator: the models have none, a user's change to them may."""
    step = TrainingModule.training_step

    def noisy(module: TrainingModule, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return step(module, batch, batch_idx) * (1 + random.random() + np.random.rand() + torch.rand(()))

    monkeypatch.setattr(TrainingModule, "training_step", noisy)
    fingerprints = []
    for name in ("unbroken", "stopped", "noise lost"):
        (tmp_path / name).mkdir()
        config = tiny_run_config(tmp_path / name)
        _seed_all(1)
        if name != "unbroken":
            monkeypatch.setenv(FAULT_VARIABLE, "train.step@3:signal=SIGUSR1")
            with pytest.raises(Preempted):
                train(config)
            monkeypatch.delenv(FAULT_VARIABLE)
            _seed_all(2)  # as another process has them
        if name == "noise lost":
            monkeypatch.setattr("rwkv_cluster.train.checkpoint.rng_state.restore", lambda states, rank: None)
        train(config)
        fingerprints.append(fingerprint(config.work_dir))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.system
def test_fp16_skips_what_overflows_and_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss scaling of CUDA runs, on a CPU: `place` refuses that, so a stand-in gives the placement."""
    monkeypatch.setattr("rwkv_cluster.train.session.place", lambda training: Placement("cpu", 1, 1, 1))
    configs = []
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
        configs.append(tiny_run_config(tmp_path / name, training={"precision": "fp16", "max_steps": 12}))
    train(configs[0])
    _run_in_sessions(configs[1], [1, 6], monkeypatch)
    assert fingerprint(configs[0].work_dir) == fingerprint(configs[1].work_dir)
    lines = (tmp_path / "unbroken/work/logs/metrics.jsonl").read_text().splitlines()
    skipped = [record["step"] for record in map(json.loads, lines) if "grad_norm" not in record]
    state = newest_verified(tmp_path / "unbroken/work/out/checkpoints").state
    assert state.optimizer_updates == 12 - len(skipped)
    assert 1 in skipped
    assert losses(configs[0].work_dir)[-1] < losses(configs[0].work_dir)[0] - 0.3


def test_accumulation_gives_the_same_curve(unbroken: Path, tmp_path: Path) -> None:
    train(tiny_run_config(tmp_path, training={"micro_bsz": 1, "global_batch_size": 4}))
    assert losses(tmp_path / "work") == pytest.approx(losses(unbroken / "work"), rel=1e-6)


@pytest.mark.system
def test_a_request_between_micro_batches_waits_for_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
        configs.append(tiny_run_config(tmp_path / name, training={"micro_bsz": 1, "accumulate_grad_batches": 4}))
    train(configs[0])
    monkeypatch.setenv(FAULT_VARIABLE, "train.loss@3:signal=SIGTERM")  # at the first of step 3's four
    with pytest.raises(Preempted, match="SIGTERM after step 4 of 8"):
        train(configs[1])
    monkeypatch.delenv(FAULT_VARIABLE)
    train(configs[1])
    assert fingerprint(configs[0].work_dir) == fingerprint(configs[1].work_dir)


def test_activation_checkpointing_changes_nothing(unbroken: Path, tmp_path: Path) -> None:
    train(tiny_run_config(tmp_path, training={"grad_cp": 1}))
    assert losses(tmp_path / "work") == losses(unbroken / "work")


def test_again_after_the_end_says_so_and_changes_nothing(
    unbroken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _copy_of(unbroken, tmp_path)
    before = fingerprint(config.work_dir)
    with caplog.at_level("INFO", "rwkv_cluster"):
        assert train(config).already_complete
    assert "complete at step 8" in caplog.text
    assert fingerprint(config.work_dir) == before


def test_final_weights_that_are_gone_are_written_again(unbroken: Path, tmp_path: Path) -> None:
    config = _copy_of(unbroken, tmp_path)
    before = fingerprint(config.work_dir)
    WorkDir(config.work_dir).final_weights.unlink()
    result = train(config)
    assert result.already_complete
    assert result.final_path.exists()
    assert fingerprint(config.work_dir) == before


def test_more_steps_go_on_from_the_end(unbroken: Path, tmp_path: Path) -> None:
    _copy_of(unbroken, tmp_path)
    result = train(tiny_run_config(tmp_path, training={"max_steps": 10, "lr_init": 2e-3}))
    assert (result.step, len(losses(tmp_path / "work"))) == (10, 10)
    assert losses(tmp_path / "work")[:8] == losses(unbroken / "work")


def test_fewer_steps_than_done_is_refused(unbroken: Path, tmp_path: Path) -> None:
    _copy_of(unbroken, tmp_path)
    with pytest.raises(CheckpointError, match=r"at step 8, .*last step 3"):
        train(tiny_run_config(tmp_path, training={"max_steps": 3}))


@pytest.mark.parametrize(
    ("changes", "kind", "difference"),
    [
        ({"model": {"n_layer": 3}}, ConfigError, "model.n_layer: 2 -> 3"),
        ({"model": {"model_type": "x060"}}, ConfigError, "model.model_type: x070 -> x060"),
        ({"model": {"ctx_len": 16}}, ConfigError, "model.ctx_len: 32 -> 16"),
        ({"training": {"micro_bsz": 8}}, ConfigError, "global batch size: 4 -> 8"),
        ({"data": {"seed": 1}}, DataError, "seed"),
        ({"data": {"tokenizer": {"type": "integer"}}}, DataError, "tokenizer"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_and_nothing_is_touched(
    changes: dict[str, Any], kind: type, difference: str, unbroken: Path, tmp_path: Path
) -> None:
    _copy_of(unbroken, tmp_path)
    manifest = (tmp_path / "work" / "data" / "manifest.json").read_bytes()
    before = fingerprint(tmp_path / "work")
    with pytest.raises(kind) as caught:
        train(tiny_run_config(tmp_path, **changes))
    assert difference in str(caught.value)
    assert fingerprint(tmp_path / "work") == before
    assert (tmp_path / "work" / "data" / "manifest.json").read_bytes() == manifest


def test_changed_input_under_checkpoints_is_refused(unbroken: Path, tmp_path: Path) -> None:
    config = _copy_of(unbroken, tmp_path)
    write_text(tmp_path / "text.jsonl", seed=5)
    with pytest.raises(DataError, match="another work_dir"):
        train(config)


def test_an_allowed_change_is_logged(unbroken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _copy_of(unbroken, tmp_path)
    train(tiny_run_config(tmp_path, training={"max_steps": 9, "lr_final": 5e-5}))
    assert "training.lr_final: 6e-05 -> 5e-05" in caplog.text


def test_the_newest_verified_checkpoint_is_used(unbroken: Path, tmp_path: Path) -> None:
    config = _copy_of(unbroken, tmp_path)
    (tmp_path / "work/out/checkpoints/step-00000008/weights.pth").write_bytes(b"cut")
    (tmp_path / "work/out/rwkv-77.pth").write_bytes(b"stray")
    train(config)
    assert fingerprint(config.work_dir) == fingerprint(unbroken / "work")


def test_only_damaged_checkpoints_never_start_from_scratch(unbroken: Path, tmp_path: Path) -> None:
    config = _copy_of(unbroken, tmp_path)
    for path in (tmp_path / "work/out/checkpoints").glob("*/state.json"):
        path.write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        train(config)


def test_leftovers_of_a_killed_save_are_removed(unbroken: Path, tmp_path: Path) -> None:
    config = _copy_of(unbroken, tmp_path)
    left = tmp_path / "work/out/checkpoints/.tmp-step-00000008-dead"
    left.mkdir()
    (left / "weights.pth").write_bytes(b"half")
    train(config)
    assert not left.exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row G1."""
    config = tiny_run_config(tmp_path, checkpoint={"save_interval_steps": 2})
    monkeypatch.setenv(FAULT_VARIABLE, f"train.{what}@5:hit")
    with pytest.raises(TrainingError, match=rf"step 5: the {what} is .*rank 0.*Samples 21 to 24") as caught:
        train(config)
    assert caught.value.exit_code == 1
    assert len(losses(config.work_dir)) == 5
    assert list_steps(WorkDir(config.work_dir).checkpoints) == [2, 4]
    monkeypatch.delenv(FAULT_VARIABLE)
    assert train(config).step == 8


def test_a_truncated_init_file_is_refused_until_renewed(tmp_path: Path) -> None:
    config = tiny_run_config(tmp_path)
    path = initialize(config)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"rwkv-init\.pth.*init --force"):
        train(config)
    initialize(config, force=True)
    assert train(config).step == 8


def test_a_work_dir_with_another_models_init_is_refused(tmp_path: Path) -> None:
    initialize(tiny_run_config(tmp_path, model={"n_embd": 64}))
    with pytest.raises(CheckpointError, match=r"rwkv-init\.pth cannot start this run"):
        train(tiny_run_config(tmp_path))


def test_init_from_another_runs_weights(unbroken: Path, tmp_path: Path) -> None:
    source = unbroken / "work/out/rwkv-final.pth"
    train(tiny_run_config(tmp_path, training={"init_from": str(source), "max_steps": 2}))
    started = load_pth(tmp_path / "work/out/rwkv-init.pth")
    assert all(torch.equal(started[name], tensor) for name, tensor in load_pth(source).items())
    assert losses(tmp_path / "work")[0] < losses(unbroken / "work")[0] - 0.5


def test_a_held_work_dir_is_refused(tmp_path: Path) -> None:
    config = tiny_run_config(tmp_path)
    work = WorkDir(config.work_dir)
    with work.lock(), pytest.raises(LaunchError, match=r"in use by process \d+ on \S+ since"):
        train(config)


def test_too_little_data_says_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too few for ctx_len 4096.*model\.ctx_len of at most"):
        train(tiny_run_config(tmp_path, model={"ctx_len": 4096}))
    assert not (tmp_path / "work/out/rwkv-init.pth").exists()


@pytest.mark.parametrize("micro_bsz", [11, 256])
def test_any_batch_size_trains(micro_bsz: int, tmp_path: Path) -> None:
    assert train(tiny_run_config(tmp_path, training={"micro_bsz": micro_bsz, "max_steps": 1})).step == 1


def test_epochs_are_passes_over_the_slots(tmp_path: Path) -> None:
    config = tiny_run_config(
        tmp_path,
        training={"max_steps": None, "num_epochs": 2, "micro_bsz": 64},
        checkpoint={"save_interval_steps": None},
    )
    result = train(config)
    out = tmp_path / "work/out"
    assert sorted(path.name for path in out.glob("rwkv-?.pth")) == ["rwkv-0.pth", "rwkv-1.pth"]
    lines = [line for line in (out / "train_log.txt").read_text().splitlines() if line[0].isdigit()]
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert result.step == result.total_steps


def test_fp16_on_a_cpu_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"precision is fp16, .*CUDA device"):
        train(tiny_run_config(tmp_path, training={"precision": "fp16", "accelerator": "cpu"}))


def test_another_number_of_ranks_keeps_the_global_batch(unbroken: Path) -> None:
    """Row A6: accumulation follows; what does not divide is refused with the numbers that would."""
    config = tiny_run_config(unbroken)
    found = newest_verified(WorkDir(config.work_dir).checkpoints)
    assert found is not None
    assert found.state.global_batch_size == 4  # of one rank with micro_bsz 4
    halves = config.training.model_copy(update={"micro_bsz": 1})
    assert accumulation_of(found, halves, world_size=2) == 2
    assert accumulation_of(found, config.training, world_size=1) is None
    assert accumulation_of(found, halves.model_copy(update={"global_batch_size": 8}), world_size=2) is None
    with pytest.raises(ConfigError) as caught:
        accumulation_of(found, config.training, world_size=2)
    assert re.search(rf"{found.path} .* 4 samples, .*micro_bsz 4 \* 2 ranks = 8$", caught.value.what)
    assert re.fullmatch("Use 1 rank, .*micro_bsz of 1 or 2", caught.value.remedy)


def test_deepspeed_that_cannot_be_imported_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"ZeRO stage 2 .*package deepspeed, .*cannot be imported: .*ddp"):
        train(tiny_run_config(tmp_path, training={"zero_stage": 2}))
    assert not (tmp_path / "work").exists()
