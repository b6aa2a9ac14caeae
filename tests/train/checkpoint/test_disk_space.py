"""Room on the disk is asked for before anything is written: the sizes fit what is written, the sentence says enough."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import torch
from tiny_run import losses, state_of, tiny_run_config

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.weights_file import load_pth
from rwkv_cluster.runtime.disk_errors import WriteFailure, free_bytes, writing
from rwkv_cluster.train.checkpoint import disk_space
from rwkv_cluster.train.checkpoint.checkpointer import Checkpointer
from rwkv_cluster.train.checkpoint.save_load import list_steps
from rwkv_cluster.train.optimizers.table import ADAMW
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["x052", "x060", "x070"])
def test_sizes_are_those_of_what_is_written(model_type: str, precision: str, tmp_path: Path) -> None:
    """Row B6. To a tenth, which is what `SPARE` covers, of the smallest of models: its values are not much of it."""
    model = {"model_type": model_type, "n_layer": 2, "n_embd": 32, "head_size_a": 16, "ctx_len": 32}
    result = train(tiny_run_config(tmp_path, model=model, training={"max_steps": 1, "precision": precision}))
    shapes = {name: list(tensor.shape) for name, tensor in load_pth(result.final_path).items()}
    folder = WorkDir(result.work_dir).checkpoints / "step-00000001"
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert disk_space.checkpoint_bytes(shapes, 1, ADAMW) == pytest.approx(written, rel=0.1)
    item_bytes = {"fp32": 4, "bf16": 2}[precision]
    assert disk_space.weights_bytes(shapes, item_bytes) == pytest.approx(result.final_path.stat().st_size, rel=0.1)


def test_a_large_model_is_its_values() -> None:
    shapes = {"emb.weight": [65536, 4096], "blocks.0.ffn.key.weight": [16384, 4096]}
    parameters = (65536 + 16384) * 4096
    assert disk_space.checkpoint_bytes(shapes, 64, ADAMW) == pytest.approx(12 * parameters, rel=0.01)
    assert disk_space.weights_bytes(shapes, 2) == pytest.approx(2 * parameters, rel=0.01)


@pytest.mark.parametrize("factor", [0.5, 1.05])
def test_a_run_without_room_is_refused_before_it_starts(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would just fit is refused too: a tenth is kept to spare."""
    asked: list[int] = []
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 1 << 40)
    monkeypatch.setattr(
        "rwkv_cluster.train.fit.require_disk_space", lambda folder, n_bytes, what: asked.append(n_bytes)
    )
    train(tiny_run_config(tmp_path, training={"max_steps": 1}))
    monkeypatch.undo()
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: int(factor * asked[0]))
    with pytest.raises(CheckpointError) as caught:
        train(tiny_run_config(other))
    checkpoints = WorkDir(other / "work").checkpoints
    needed, free = (f"{int(amount):,}" for amount in (asked[0] * 1.1, factor * asked[0]))
    assert re.search(rf"the next checkpoint .* {needed} bytes and {free} .* on {checkpoints}$", caught.value.what)
    assert "another work_dir" in caught.value.remedy
    assert caught.value.exit_code == 4
    assert list((other / "work/out").iterdir()) == [checkpoints]
    assert list(checkpoints.iterdir()) == []


def test_a_disk_that_fills_up_while_it_trains_is_found_before_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frees = iter([1 << 40, 1 << 40, 1000])  # at the start, at the save of step 4, at that of step 8
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: next(frees))
    config = tiny_run_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"no room for the checkpoint of step 8: it needs [\d,]+ bytes and 1,000"):
        train(config)
    checkpoints = WorkDir(config.work_dir).checkpoints
    assert [entry.name for entry in checkpoints.iterdir()] == ["step-00000004"]
    assert list_steps(checkpoints) == [4]
    monkeypatch.undo()
    assert train(config).step == 8
    assert len(losses(config.work_dir)) == 8


def test_a_complete_run_on_a_full_disk_still_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run_config(tmp_path, training={"max_steps": 1})
    train(config)
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 0)
    assert train(config).already_complete


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Make room and"),
        (errno.EDQUOT, "room in your quota"),
        (errno.EFBIG, r"\(`ulimit -f`\)"),
        (errno.EROFS, "Make it writable"),
        (errno.EACCES, "Make it writable"),
        (errno.EIO, "Look at that disk"),
    ],
)
def test_the_sentence_of_a_refusal(number: int, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "absent" / "rwkv-0.pth"
    error = RuntimeError("[enforce fail at inline_container.cc:672]")
    error.__context__ = OSError(number, "any text")  # as torch covers it
    with pytest.raises(CheckpointError) as caught, writing(path, 12_345):
        raise error
    found = WriteFailure.of(OSError(number, ""))
    before, between, after = str(caught.value).partition(f" are free on {tmp_path}. ")
    assert before.startswith(f"{path} cannot be written: {found.reason}. It needs about 12,345 bytes and ")
    assert int(before.rpartition(" ")[2].replace(",", "")) == pytest.approx(free_bytes(tmp_path), rel=0.1)
    assert between.startswith(" are")
    assert re.fullmatch(f".*{remedy}.* same command again", after)


def test_what_is_not_the_disks_fault_is_not_reported_as_such(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), writing(tmp_path / "x", 1):
        raise RuntimeError("a bug")


def test_what_training_waited_for_a_checkpoint_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rwkv_cluster"):
        Checkpointer(tmp_path, 3, background=True, n_bytes=0).save(
            7, {"weights.pth": {"a": torch.ones(2)}}, state_of(7)
        )
    assert "checkpoint of step 7 is saved; training waited 0." in caplog.text
