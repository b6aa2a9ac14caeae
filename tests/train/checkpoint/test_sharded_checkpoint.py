"""A checkpoint in pieces, as ZeRO's ranks write it, is held to what one in whole tensors is. No DeepSpeed is needed."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import losses, tiny_run_config
from torch import Tensor

from rwkv_cluster.cli import main
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.weights_file import load_pth
from rwkv_cluster.train.checkpoint import save_load
from rwkv_cluster.train.checkpoint.checkpointer import prune
from rwkv_cluster.train.checkpoint.shards import shard_key
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir

RANKS = 2
SHARDS = tuple(f"{kind}-{rank:05d}-of-{RANKS:05d}.pth" for kind in ("weights", "optimizer") for rank in range(RANKS))


def _shards(kind: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Each tensor in `RANKS` pieces, as stage 3 has them."""
    files: dict[str, dict[str, Tensor]] = {}
    for rank in range(RANKS):
        pieces = files[f"{kind}-{rank:05d}-of-{RANKS:05d}.pth"] = {}
        for name, tensor in tensors.items():
            flat, size = tensor.flatten(), math.ceil(tensor.numel() / RANKS)
            if piece := list(flat[rank * size : (rank + 1) * size]):
                pieces[shard_key(name, rank * size)] = torch.stack(piece)
    return files


def _cut_up(path: Path) -> None:
    """Write the checkpoint in `path` again, as ranks with a part each would have written it."""
    found = save_load.verify(path)
    weights, moments = dict(found.weights()), dict(found.optimizer())
    temporary = path.with_name(".tmp-cut")
    temporary.mkdir()
    files = {**_shards("weights", weights), **_shards("optimizer", moments)}
    entries = {name: save_load.write_tensors(temporary / name, pieces) for name, pieces in files.items()}
    state = replace(found.state, shapes={name: list(tensor.shape) for name, tensor in weights.items()})
    save_load.commit(temporary, path, found.step, state=state, files=entries)


def _forge(path: Path, name: str, content: Any) -> None:
    """Put `content` into a file of a checkpoint, and a right checksum of it into the manifest."""
    torch.save(content, path / name)
    body = json.loads((path / save_load.MANIFEST).read_bytes().rstrip(b"\n").rpartition(b"\n")[0])
    body["files"][name] = save_load.entry_of(path / name)
    (path / save_load.MANIFEST).write_bytes(save_load.manifest_bytes(body))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that ended after step 8, with its checkpoints of steps 4 and 8 in pieces."""
    folder = tmp_path_factory.mktemp("sharded")
    config = tiny_run_config(folder)
    train(config)
    for step in (4, 8):
        _cut_up(save_load.checkpoint_path(WorkDir(config.work_dir).checkpoints, step))
    return folder


@pytest.fixture
def run(sharded: Path, tmp_path: Path) -> WorkDir:
    """A copy of that run, to be spoilt."""
    shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
    return WorkDir(tmp_path / "work")


def _newest(run: WorkDir) -> Path:
    return save_load.checkpoint_path(run.checkpoints, 8)


@pytest.mark.system
def test_goes_on_from_pieces_as_from_whole_tensors(run: WorkDir, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    for folder in (tmp_path, tmp_path / "whole"):
        train(tiny_run_config(folder, training={"max_steps": 8}))
        train(tiny_run_config(folder, training={"max_steps": 10}))
    assert losses(run.root) == losses(tmp_path / "whole/work")
    finals = [load_pth(work / "out/rwkv-final.pth") for work in (run.root, tmp_path / "whole/work")]
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[1])


@pytest.mark.system
def test_every_truncation_is_found_and_the_previous_is_used(run: WorkDir, caplog: pytest.LogCaptureFixture) -> None:
    """Row B1."""
    files = sorted(_newest(run).iterdir())
    assert {file.name for file in files} == {*SHARDS, "state.json", "manifest.json"}
    for file in files:
        whole = file.read_bytes()
        for cut in {len(whole) * part // 20 for part in range(20)}:
            file.write_bytes(whole[:cut])
            caplog.clear()
            assert save_load.newest_verified(run.checkpoints).step == 4
            assert f"{file.name}: " in caplog.text
            assert "Step 4 is used instead" in caplog.text
            assert file.name == "manifest.json" or f"{cut} bytes, expected {len(whole)}" in caplog.text
        file.write_bytes(whole)
    assert save_load.newest_verified(run.checkpoints).step == 8


def test_300_of_300_flipped_bits_are_found(run: WorkDir) -> None:
    """Row B2."""
    path, draw = _newest(run), random.Random(2)
    files = sorted(path.iterdir())
    for _ in range(300):
        file = draw.choice(files)
        at, bit = draw.randrange(file.stat().st_size), 1 << draw.randrange(8)
        with open(file, "r+b") as handle:
            handle.seek(at)
            value = handle.read(1)[0]
            handle.seek(at)
            handle.write(bytes([value ^ bit]))
        with pytest.raises(CheckpointError, match=file.name):
            save_load.verify(path)
        with open(file, "r+b") as handle:
            handle.seek(at)
            handle.write(bytes([value]))
    save_load.verify(path)


@pytest.mark.parametrize("name", SHARDS)
def test_a_missing_shard_is_found_and_a_foreign_file_is_not_read(name: str, run: WorkDir) -> None:
    """Row B3."""
    path = _newest(run)
    torch.save({"emb.weight@0": torch.ones(3)}, path / "weights-00002-of-00003.pth")  # in no manifest
    wanted = save_load.verify(save_load.checkpoint_path(run.checkpoints, 8)).weights()
    assert torch.equal(wanted["emb.weight"], load_pth(run.final_weights)["emb.weight"])
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: No such file"):
        save_load.verify(path)
    assert save_load.newest_verified(run.checkpoints).step == 4


def test_a_shard_of_another_step_or_rank_is_found(run: WorkDir) -> None:
    """Row B3: every byte of it is good, but it is not this checkpoint's."""
    path, earlier = _newest(run), save_load.checkpoint_path(run.checkpoints, 4)
    for source, target in ((earlier / SHARDS[0], path / SHARDS[0]), (path / SHARDS[1], path / SHARDS[0])):
        whole = target.read_bytes()
        shutil.copyfile(source, target)
        assert save_load.newest_verified(run.checkpoints).step == 4
        target.write_bytes(whole)
    assert save_load.newest_verified(run.checkpoints).step == 8


def test_a_run_with_damaged_shards_only_never_starts_anew(run: WorkDir, tmp_path: Path) -> None:
    """Row B4."""
    for step in (4, 8):
        (save_load.checkpoint_path(run.checkpoints, step) / SHARDS[-1]).write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        train(tiny_run_config(tmp_path, training={"max_steps": 10}))
    assert str(caught.value).count(f"{SHARDS[-1]}: 0 bytes, expected") == 2


class _Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", [SHARDS[1], SHARDS[3]])
def test_code_in_a_shard_does_not_run(
    name: str, run: WorkDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row E2: neither when the run goes on nor offline, although the forger has renewed the checksums."""
    canary = tmp_path / "canary"
    _forge(_newest(run), name, {"emb.weight@0": torch.ones(1), "x@0": _Bomb(canary)})
    with pytest.raises(CheckpointError, match=rf"{name}: refused: .*'posix\.system'"):
        train(tiny_run_config(tmp_path, training={"max_steps": 10}))
    code = main(["consolidate", str(run.root)])
    if name.startswith("weights"):  # it reads nothing else
        assert code == 4
        assert re.search(rf"{name}: refused: .*'posix\.system'", capsys.readouterr().err)
        assert not list(run.out.glob("step-*.pth"))
    assert not canary.exists()


def test_an_export_is_what_consolidate_writes(run: WorkDir) -> None:
    assert main(["export", str(run.root), "--format", "pth"]) == 0
    pth = run.out / "step-00000008.pth"
    content = pth.read_bytes()
    pth.unlink()
    assert main(["consolidate", str(run.root)]) == 0
    assert pth.read_bytes() == content
    assert main(["export", str(run.root), "--format", "safetensors", "--dtype", "bf16"]) == 0
    found = load_file(run.out / "step-00000008.safetensors")
    assert {name: tensor.bfloat16().tolist() for name, tensor in load_pth(pth).items()} == {
        name: tensor.tolist() for name, tensor in found.items()
    }


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(name: str, value: float, run: WorkDir, tmp_path: Path) -> None:
    """Row G2: with right checksums, in a master or in a moment."""
    path = _newest(run)
    pieces = load_pth(path / name)
    key = next(key for key in pieces if "ffn.key.weight" in key)
    pieces[key][5] = value
    _forge(path, name, pieces)
    tensor = key.partition("@")[0]
    with pytest.raises(CheckpointError, match=rf"{name} is not usable: {tensor} .*NaN or infinite"):
        train(tiny_run_config(tmp_path, training={"max_steps": 10}))


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_a_value_that_is_not_finite_in_whole_tensors_too(kind: str, tmp_path: Path) -> None:
    """Row G2, without pieces."""
    config = tiny_run_config(tmp_path)
    train(config)
    path = save_load.checkpoint_path(WorkDir(config.work_dir).checkpoints, 8)
    tensors = load_pth(path / f"{kind}.pth")
    name = next(name for name in tensors if "ffn.key.weight" in name)
    tensors[name][0, 0] = math.nan
    _forge(path, f"{kind}.pth", tensors)
    with pytest.raises(CheckpointError, match=rf"{kind}\.pth is not usable: {name} .*NaN or infinite"):
        train(tiny_run_config(tmp_path, training={"max_steps": 10}))


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_a_value_that_is_not_finite_is_not_saved(kind: str, tmp_path: Path) -> None:
    name = f"{kind}-00001-of-00002.pth"
    with pytest.raises(CheckpointError, match=rf"{name} is not written: a@2 has a NaN"):
        save_load.write_tensors(tmp_path / name, {"a@2": torch.tensor([1.0, math.nan])})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [-300, 300])
def test_newest_is_the_highest_step_whatever_the_clocks_say(seconds: int, run: WorkDir) -> None:
    """Row A11: step 4 saved by a machine whose clock is five minutes ahead of, or behind, that of step 8's."""
    then = _newest(run).stat().st_mtime
    for step, shift in ((4, seconds), (8, 0)):
        path = save_load.checkpoint_path(run.checkpoints, step)
        for entry in (*path.iterdir(), path):
            os.utime(entry, (then + shift, then + shift))
    assert save_load.newest_verified(run.checkpoints).step == 8
    prune(run.checkpoints, 1)
    assert save_load.list_steps(run.checkpoints) == [8]
