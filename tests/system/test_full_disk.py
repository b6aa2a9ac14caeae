"""A disk that is full, too small or read-only: the last checkpoint stays good, the run ends and says what it needs.

Rows B5 and B6, on real disks: a tmpfs of a few megabytes that a file fills.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from system.processes import PAUSE, Job, Watched, new_run
from tiny_run import losses, state_of

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.runtime.disk_errors import free_bytes
from rwkv_cluster.train.checkpoint import save_load
from rwkv_cluster.train.checkpoint.checkpointer import Checkpointer
from rwkv_cluster.workdir import TEMPORARY_PREFIX

pytestmark = [pytest.mark.system, pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk takes root")]

PAGE = 4096
LEVELS = 20
END_S = 30.0
NO_OVERRIDE = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")  # permissions bind root as anybody
REFUSED = re.compile(r"needs (?:about )?([\d,]+) bytes and ([\d,]+) are free on (\S+)\. (.+)and run the same")

Mount = Callable[..., Path]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts an empty tmpfs on a folder until the test ends."""
    mounted: list[Path] = []

    def on(folder: Path, size: int = 4 << 20) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        mounted.append(folder)
        return folder

    yield on
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


def _leave(folder: Path, free: int) -> None:
    """Fill the file system of `folder` but for `free` bytes, to the page."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    with open(filler, "xb") as handle:
        os.posix_fallocate(handle.fileno(), 0, free_bytes(folder) - free)


def _files(value: float) -> dict[str, dict[str, torch.Tensor]]:
    """Of a checkpoint of about 600 kB."""
    weights = {f"blocks.{layer}.weight": torch.full((50, 100), value) for layer in range(10)}
    moments = {f"{moment}/{name}": weights[name] for name in weights for moment in ("exp_avg", "exp_avg_sq")}
    return {"weights.pth": weights, "optimizer.pth": moments}


def _pages(folder: Path) -> int:
    return sum(-(-file.stat().st_size // PAGE) for file in folder.iterdir())


@pytest.mark.parametrize("background", [False, True])
def test_full_at_twenty_levels(background: bool, mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another program took the room while the checkpoint is written: the look before it is off."""
    monkeypatch.setattr(
        "rwkv_cluster.train.checkpoint.checkpointer.require_disk_space", lambda folder, n_bytes, what: None
    )
    disk = mount(tmp_path / "disk")
    directory = disk / "checkpoints"
    directory.mkdir()
    checkpointer = Checkpointer(directory, 3, background=background, n_bytes=600_000)
    checkpointer.save(1, _files(1.0), state_of(1))
    needed = _pages(save_load.checkpoint_path(directory, 1))
    levels = {needed * level // LEVELS for level in range(LEVELS - 1)} | {needed - 2, needed - 1}  # state, manifest
    assert len(levels) > LEVELS
    for pages in sorted(levels):
        _leave(disk, pages * PAGE)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            checkpointer.save(2, _files(2.0), state_of(2))
        found = REFUSED.search(str(caught.value))
        assert found, caught.value
        assert found.groups() == ("600,000", f"{pages * PAGE:,}", str(directory), "Make room ")
        assert [entry.name for entry in directory.iterdir()] == ["step-00000001"]
        assert save_load.newest_verified(directory).weights()["blocks.0.weight"][0, 0] == 1.0
    _leave(disk, needed * PAGE)
    checkpointer.save(2, _files(2.0), state_of(2))
    assert save_load.newest_verified(directory).step == 2


def test_a_weights_file_on_a_full_disk_leaves_the_one_before(mount: Mount, tmp_path: Path) -> None:
    disk = mount(tmp_path / "disk")
    path = disk / "rwkv-0.pth"
    save_pth(path, _files(1.0)["weights.pth"])
    needed = -(-path.stat().st_size // PAGE)
    for pages in range(0, needed, needed // LEVELS):
        _leave(disk, pages * PAGE)
        with pytest.raises(CheckpointError, match=r"rwkv-0\.pth cannot be written: No space left on device") as caught:
            save_pth(path, _files(2.0)["weights.pth"])
        assert REFUSED.search(str(caught.value))[2] == f"{pages * PAGE:,}"
        assert sorted(entry.name for entry in disk.iterdir()) == ["filler", "rwkv-0.pth"]
        assert load_pth(path)["blocks.0.weight"][0, 0] == 1.0


def _new_run(folder: Path, max_steps: int = 3000, **training: object) -> Watched:
    return new_run(folder, training={"max_steps": max_steps, **training}, checkpoint={"save_interval_steps": 10})


def _assert_refused(run: Watched, job: Job, *, reason: str, step: int) -> None:
    """Within `END_S` code 4 and one sentence, the checkpoint of `step` or a later one whole, nothing half-written."""
    assert job.wait(END_S) == 4, job.text
    (sentence,) = [line for line in job.text.splitlines() if "error: " in line]
    assert reason in sentence
    assert REFUSED.search(sentence), sentence
    assert "Traceback" not in job.text
    assert run.newest_checkpoint() >= step
    assert not list(run.work.root.rglob(f"{TEMPORARY_PREFIX}*"))


def test_the_whole_work_dir_is_full(mount: Mount, tmp_path: Path, start: Callable[..., Job]) -> None:
    """Whatever comes first: a line of the metrics, the log, or the room for the next checkpoint. Then there is room."""
    run = _new_run(tmp_path, max_steps=60)
    mount(run.work.root, size=8 << 20)
    job = start(run.folder, fault=f"train.step@12:{PAUSE}")
    with job.paused():
        _leave(run.work.root, 0)
    _assert_refused(run, job, reason=f"on {run.work.root}/", step=10)
    (run.work.root / "filler").unlink()
    start(run.folder).complete()
    assert len(losses(run.work.root)) == 60


def test_the_disk_fills_up_while_a_checkpoint_is_written(
    mount: Mount, tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path)
    mount(run.work.checkpoints)
    job = start(run.folder, fault=f"checkpoint.after_weights@20:{PAUSE}")
    with job.paused():
        assert run.newest_checkpoint() == 10
        assert run.half_written("weights.pth")
        _leave(run.work.checkpoints, 100_000)
    _assert_refused(run, job, reason="step-00000020 cannot be written: No space left on device", step=10)


def test_the_disk_becomes_read_only(mount: Mount, tmp_path: Path, start: Callable[..., Job]) -> None:
    run = _new_run(tmp_path)
    mount(run.work.checkpoints)
    job = start(run.folder, fault=f"train.step@12:{PAUSE}")
    with job.paused():
        subprocess.run(["mount", "-o", "remount,ro", run.work.checkpoints], check=True)
    _assert_refused(run, job, reason="step-00000020 cannot be written: Read-only file system", step=10)
    assert "Make it writable" in job.text


def test_the_disk_fails(tmp_path: Path, start: Callable[..., Job]) -> None:
    """By a library between the run and a disk that cannot be had broken: the second save's files do not reach it."""
    library, source = tmp_path / "bad_disk.so", Path(__file__).with_name("bad_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True, timeout=60)
    run = _new_run(tmp_path)
    job = start(run.folder, environment={"LD_PRELOAD": str(library), "BAD_DISK": "step-00000020"})
    _assert_refused(run, job, reason="step-00000020 cannot be written: Input/output error", step=10)
    assert "Look at that disk" in job.text


def test_the_folder_is_not_ours_to_write(tmp_path: Path, start: Callable[..., Job]) -> None:
    run = _new_run(tmp_path)
    job = start(run.folder, fault=f"train.step@12:{PAUSE}", prefix=NO_OVERRIDE)
    with job.paused():
        run.work.checkpoints.chmod(0o555)
    _assert_refused(run, job, reason="step-00000020 cannot be written: Permission denied", step=10)


def test_a_limit_on_the_size_of_a_file(tmp_path: Path, start: Callable[..., Job]) -> None:
    run = _new_run(tmp_path)
    assert start(run.folder, fault="train.step@12:signal=SIGKILL").wait() == -9
    job = start(run.folder, prefix=("prlimit", "--fsize=300000"))  # the optimizer's file has 500,000 bytes
    _assert_refused(run, job, reason="step-00000020 cannot be written: File too large", step=10)
    assert "(`ulimit -f`)" in job.text


@pytest.mark.parametrize(("ranks", "training"), [(None, {}), (2, {"zero_stage": 2})], ids=["alone", "zero"])
def test_a_disk_that_is_too_small_is_refused_before_training(
    ranks: int | None, training: dict[str, int], mount: Mount, tmp_path: Path, start: Callable[..., Job]
) -> None:
    """Row B6."""
    run = _new_run(tmp_path, **training)
    mount(run.work.root, size=1 << 20)
    job = start(run.folder, ranks=ranks)
    assert job.wait(END_S) == (4 if ranks is None else 1), job.text  # torchrun has one code for every failure
    sentences = {line.partition("error: ")[2].removeprefix("rank 0: ") for line in job.text.splitlines()} - {""}
    assert len(sentences) == 1, job.text
    found = REFUSED.search(sentences.pop())
    assert found[3] == str(run.work.checkpoints)
    assert int(found[1].replace(",", "")) > int(found[2].replace(",", ""))
    assert run.sessions() == 0
    assert not list(run.work.out.glob("*.pth"))
    assert not ranks or "exitcode  : 4" in job.text
