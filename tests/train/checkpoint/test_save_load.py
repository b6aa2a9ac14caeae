"""A checkpoint exists whole and verified, or not at all: truncation, bit flips, leftovers, order, deletion."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import state_of

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.train.checkpoint import rng_state, save_load
from rwkv_cluster.train.checkpoint.checkpointer import Checkpointer, HostCopies, prune
from rwkv_cluster.train.checkpoint.disk_space import STAGING_BYTES
from rwkv_cluster.train.guards.early_stop import EarlyStopState
from rwkv_cluster.train.guards.spike_guard import SpikeState


def _save(directory: Path, step: int, value: float = 1.0) -> Path:
    weights = {"emb.weight": torch.full((3, 4), value), "head.weight": torch.arange(12.0).view(3, 4)}
    files = {"weights.pth": weights, "optimizer.pth": {"exp_avg/emb.weight": torch.full((3, 4), value)}}
    Checkpointer(directory, keep_last=100, background=False, n_bytes=0).save(step, files, state_of(step))
    return save_load.checkpoint_path(directory, step)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_round_trip(directory: Path) -> None:
    _save(directory, 7, 0.1)
    found = save_load.newest_verified(directory)
    assert (found.step, found.state) == (7, state_of(7))
    assert torch.equal(found.weights()["emb.weight"], torch.full((3, 4), 0.1))
    assert torch.equal(found.optimizer()["exp_avg/emb.weight"], torch.full((3, 4), 0.1))


def test_no_checkpoint_is_none(directory: Path, tmp_path: Path) -> None:
    assert save_load.newest_verified(directory) is None
    assert save_load.newest_verified(tmp_path / "absent") is None


def test_newest_is_by_number_not_by_name_or_time(directory: Path) -> None:
    for step in (999_999_99, 10, 9, 100_000_000):
        _save(directory, step)
    assert save_load.list_steps(directory) == [9, 10, 99_999_999, 100_000_000]
    assert save_load.newest_verified(directory).step == 100_000_000


def test_every_truncation_is_found_and_the_previous_is_used(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save(directory, 1)
    newest = _save(directory, 2)
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for cut in {len(whole) * part // 20 for part in range(20)}:
            file.write_bytes(whole[:cut])
            caplog.clear()
            assert save_load.newest_verified(directory).step == 1
            assert file.name in caplog.text
            assert "Step 1 is used instead" in caplog.text
            if file.name != "manifest.json":
                assert f"{cut} bytes, expected {len(whole)}" in caplog.text
        file.write_bytes(whole)
    assert save_load.newest_verified(directory).step == 2


def test_300_of_300_flipped_bits_are_found(directory: Path) -> None:
    path = _save(directory, 1)
    files = sorted(path.iterdir())
    draw = random.Random(0)
    for _ in range(300):
        file = draw.choice(files)
        whole = file.read_bytes()
        altered = bytearray(whole)
        altered[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(altered)
        with pytest.raises(CheckpointError, match=file.name):
            save_load.verify(path)
        file.write_bytes(whole)
    save_load.verify(path)


def test_missing_and_foreign_and_left_over(directory: Path) -> None:
    _save(directory, 1)
    for name in ("weights.pth", "optimizer.pth", "state.json"):
        newest = _save(directory, 2)
        (newest / name).unlink()
        assert save_load.newest_verified(directory).step == 1
    (directory / ".tmp-step-00000009-abc").mkdir()
    (directory / "step-abc").mkdir()
    (directory / "step-00000011").write_text("a file")
    (directory / "rwkv-99.pth").write_text("stray")
    assert save_load.list_steps(directory) == [1, 2]


@pytest.mark.parametrize("content", [b"", b"{", b"null\n", b'{"format": 1}\n' + b"0" * 64 + b"\n"])
def test_a_foreign_manifest_is_refused(directory: Path, content: bytes) -> None:
    path = _save(directory, 1)
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        save_load.verify(path)


def test_another_version_is_refused(directory: Path) -> None:
    path = _save(directory, 1)
    text = (path / "manifest.json").read_bytes().rpartition(b"}")[0] + b"}"
    body = {**json.loads(text), "format": 99}
    (path / "manifest.json").write_bytes(save_load.manifest_bytes(body))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        save_load.verify(path)


def _sign(path: Path, body: Any) -> None:
    """A manifest of that content, with the right checksum of itself."""
    text = json.dumps(body).encode()
    (path / "manifest.json").write_bytes(text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n")


def _body(path: Path) -> Any:
    return json.loads((path / "manifest.json").read_bytes().rstrip(b"\n").rpartition(b"\n")[0])


def _places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every entry of a tree, of lists only the first."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*at, key)
        yield from _places(value, (*at, key))


def _spoilt(tree: Any) -> Iterator[tuple[str, Any]]:
    """`tree` with one entry deleted, renamed or of another type; every one of these."""
    for *way, key in _places(tree):
        for how, value in (("deleted", None), ("renamed", None), *((repr(x), x) for x in ([], {}, "x", -1, 1.5, None))):
            copy = json.loads(json.dumps(tree))
            place = functools.reduce(lambda inner, step: inner[step], way, copy)
            if type(value) is type(place[key]) and how == repr(value):
                continue
            if how == "deleted":
                del place[key]
            elif how == "renamed" and isinstance(place, dict):
                place[f"{key}_"] = place.pop(key)
            else:
                place[key] = value
            yield f"{how}: {'.'.join(map(str, [*way, key]))}", copy


@pytest.mark.parametrize("body", [[], 3, None, "x", {}])
def test_a_manifest_of_another_shape_is_refused(directory: Path, body: Any) -> None:
    path = _save(directory, 1)
    _sign(path, body)
    with pytest.raises(CheckpointError, match=r"manifest\.json: format None, this version reads 1"):
        save_load.verify(path)


def test_a_manifest_with_any_field_spoilt_is_refused_and_the_step_before_is_used(directory: Path) -> None:
    """By another version or by a mistake, with the right checksum: every field deleted, renamed, of another type."""
    _save(directory, 1)
    path = _save(directory, 2)
    body, n_spoilt = _body(path), 0
    for how, spoilt in _spoilt(body):
        _sign(path, spoilt)
        assert save_load.newest_verified(directory).step == 1, how
        n_spoilt += 1
    for added in ({**body, "codec": "zstd"}, {**body, "format": True}, {**body, "format": 1.5}):
        _sign(path, added)
        assert save_load.newest_verified(directory).step == 1
    assert n_spoilt > 60
    _sign(path, body)
    assert save_load.newest_verified(directory).step == 2


@pytest.mark.parametrize("left_out", [("weights.pth",), ("state.json",), ("optimizer.pth", "weights.pth")])
def test_a_manifest_that_does_not_list_all_files_is_refused(directory: Path, left_out: tuple[str, ...]) -> None:
    _save(directory, 1)
    path = _save(directory, 2)
    body = _body(path)
    for name in left_out:
        del body["files"][name]
    _sign(path, body)
    with pytest.raises(CheckpointError, match=rf"it does not list {left_out[0]}, without which"):
        save_load.verify(path)
    assert save_load.newest_verified(directory).step == 1


def test_a_manifest_that_lists_a_strange_file_is_refused(directory: Path) -> None:
    path = _save(directory, 1)
    body = _body(path)
    for name in ("more.pth", "../weights.pth", "weights-00000-of-00001.pth", "/etc/passwd"):
        _sign(path, {**body, "files": {**body["files"], name: body["files"]["weights.pth"]}})
        with pytest.raises(CheckpointError, match=r"manifest\.json: it (lists|does not list) "):
            save_load.verify(path)


NUMBERS = {"-1", "1.5"}
NO_FAULT = {  # what these fields may be as well
    "loss": NUMBERS | {"None"},
    "val_loss": NUMBERS | {"None"},
    "epoch_loss_sum": NUMBERS,
    "improvement.best": NUMBERS | {"None"},
    "spikes.losses": {"[]"},
    "spikes.losses.0": NUMBERS | {"deleted"},
    "skipped": {"deleted", "[]"},
    "skipped.0": {"deleted"},
    "spikes": {"deleted", "None"},
    "improvement": {"deleted", "None"},
    "shapes": {"deleted", "{}"},
    "loss_scale": {"deleted", "{}"},
    "unfinished": {"deleted"},
    "data_fingerprint": {"'x'"},
    "torch": {"'x'"},
}


def test_a_state_with_any_field_spoilt_is_refused_and_the_step_before_is_used(directory: Path) -> None:
    _save(directory, 1)
    path = _save(directory, 2)
    spikes, improvement = SpikeState((1.0,), 0, 0), EarlyStopState(1.0, 0)
    state = json.loads(state_of(2, skipped=((1, 2),), spikes=spikes, improvement=improvement).to_json())
    others = [("another: field", state | {"codec": 1}), ("another: kind", []), ("another: step", state | {"step": 1})]
    n_refused = 0
    for how, spoilt in [*_spoilt(state), *others]:
        kind, _, place = how.partition(": ")
        if kind in NO_FAULT.get(place, ()) or place.startswith("random_states.0."):
            continue
        (path / "state.json").write_text(json.dumps(spoilt))
        _forge_manifest(path)
        assert save_load.newest_verified(directory).step == 1, how
        n_refused += 1
    assert n_refused > 120
    (path / "state.json").write_text(json.dumps(state))
    _forge_manifest(path)
    assert save_load.newest_verified(directory).step == 2


def test_random_states_that_are_none_are_refused() -> None:
    whole = rng_state.capture()
    captured = [name for name, value in vars(whole).items() if value is not None]
    for name, value in itertools.product(
        captured, ([], [1], "zz", "00", None, [3, [1], None], ["MT19937", [1], 2, 3, 4.0])
    ):
        if name == "cuda" and value is None:
            continue
        with pytest.raises(CheckpointError, match="random states of rank 0"):
            rng_state.restore([replace(whole, **{name: value})], 0)
    rng_state.restore([whole], 0)


def test_a_renamed_checkpoint_is_refused(directory: Path) -> None:
    _save(directory, 1).rename(directory / "step-00000005")
    with pytest.raises(CheckpointError, match="belongs to step 1"):
        save_load.verify(directory / "step-00000005")


def test_all_bad_is_an_error_that_lists_each(directory: Path) -> None:
    for step in (1, 2):
        (_save(directory, step) / "weights.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints") as caught:
        save_load.newest_verified(directory)
    assert "step-00000001/weights.pth" in str(caught.value)
    assert "step-00000002/weights.pth" in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_nan_is_not_saved(directory: Path, kind: str, background: bool) -> None:
    files = {"weights.pth": {"a": torch.ones(2)}, "optimizer.pth": {"b": torch.ones(2)}}
    next(iter(files[f"{kind}.pth"].values()))[1] = float("nan")
    with pytest.raises(CheckpointError, match=rf"{kind}\.pth is not written: [ab] .*NaN or infinite"):
        Checkpointer(directory, keep_last=3, background=background, n_bytes=0).save(3, files, state_of(3))
    assert list(directory.iterdir()) == []


def _some_of_each_kind(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(37, 11, generator=generator)
    tensors = {
        "odd": wide[:, 0].contiguous(), "transposed": wide.t(), "strided": wide[::2, ::3],
        "broadcast": wide[:1].expand(9, 11),
        "scalar": wide[3, 3], "empty": wide[:, :0], "half": wide.bfloat16(), "double": wide.double(),
        "codes": wide.to(torch.uint8), "numbers": wide.long(), "flags": wide > 0, "parameter": torch.nn.Parameter(wide),
    }  # fmt: skip
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("half_bytes", [1, 7, 64, 1000, 100_000])
def test_staged_copies_are_exact(half_bytes: int) -> None:
    tensors = _some_of_each_kind("cpu")
    copies = {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in tensors.items()}
    host_copies = HostCopies(half_bytes)
    for _ in range(2):
        host_copies.stage((tensors[name], copy.detach().zero_()) for name, copy in copies.items())
        for name, tensor in tensors.items():
            assert copies[name].dtype == tensor.dtype
            assert torch.equal(copies[name], tensor), name


def _require_copies_of_their_own(device: str) -> None:
    tensors = _some_of_each_kind(device)
    before = {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}
    copies = HostCopies(1000).of(tensors)
    for name, tensor in tensors.items():
        tensor.data = torch.zeros_like(tensor) if name == "broadcast" else tensor.data.zero_()
        assert (copies[name].is_cpu, copies[name].requires_grad) == (True, False)
        assert copies[name].shape == before[name].shape
        assert torch.equal(copies[name], before[name]), name


def test_copies_stay_when_training_goes_on() -> None:
    _require_copies_of_their_own("cpu")


@pytest.mark.gpu
def test_copies_of_a_gpus_tensors_pin_one_buffer() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    _require_copies_of_their_own("cuda")
    if not hasattr(torch.cuda, "host_memory_stats"):
        pytest.skip("this torch does not count what it has pinned")
    large = {str(number): torch.randn(40_000_001, device="cuda") for number in range(4)}
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    host_copies = HostCopies()
    copies = [host_copies.of(large) for _ in range(2)]
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] - before == STAGING_BYTES
    for copy in copies:
        for name, tensor in large.items():
            assert not copy[name].is_pinned()
            assert torch.equal(copy[name], tensor.cpu())


def test_a_save_that_fails_leaves_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(directory, 1)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"No space left on device\. It needs about .* free on .*Make room"):
        _save(directory, 2)
    assert [entry.name for entry in directory.iterdir()] == ["step-00000001"]
    assert save_load.newest_verified(directory).step == 1


def test_prune_keeps_the_newest(directory: Path) -> None:
    for step in (3, 10, 9, 200):
        _save(directory, step)
    prune(directory, 2)
    assert save_load.list_steps(directory) == [10, 200]
    assert len(list(directory.iterdir())) == 2
    prune(directory, 1)
    assert save_load.list_steps(directory) == [200]
    prune(directory, 1)
    assert save_load.list_steps(directory) == [200]


DELETING = ("os.rename", "os.remove", "os.rmdir")  # audit events of the interpreter, each before its system call


def _prune_until(directory: Path, point: int) -> bool:
    """Prune to one checkpoint in a process that kills itself at its `point`-th deletion; whether it came to that."""
    child = os.fork()
    if child == 0:
        left = itertools.count(point, -1)

        def kill_at_point(event: str, arguments: tuple[object, ...]) -> None:
            if event in DELETING and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill_at_point)
        prune(directory, 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.system
def test_killed_while_it_prunes_leaves_the_newest_and_no_half(directory: Path, tmp_path: Path) -> None:
    """Row B9: at every single deletion."""
    for step in range(1, 6):
        _save(directory, step)
    points = 0
    while True:
        copy = tmp_path / f"killed-{points}"
        shutil.copytree(directory, copy)
        killed = _prune_until(copy, points)
        for step in save_load.list_steps(copy):
            save_load.verify(save_load.checkpoint_path(copy, step))
        assert save_load.newest_verified(copy).step == 5
        if not killed:
            break
        points += 1
    assert points >= 20
    assert [entry.name for entry in copy.iterdir()] == ["step-00000005"]


def test_replaces_a_damaged_one_of_the_same_step(directory: Path) -> None:
    (_save(directory, 4, 1.0) / "weights.pth").write_bytes(b"")
    _save(directory, 4, 2.0)
    assert save_load.newest_verified(directory).weights()["emb.weight"][0, 0] == 2.0


class _Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def _forge_manifest(path: Path) -> None:
    text, _, _ = (path / "manifest.json").read_bytes().rstrip(b"\n").rpartition(b"\n")
    body = json.loads(text)
    for name in body["files"]:
        body["files"][name] = save_load.entry_of(path / name)
    (path / "manifest.json").write_bytes(save_load.manifest_bytes(body))


def test_code_in_a_checkpoint_does_not_run(directory: Path, tmp_path: Path) -> None:
    """A forger who also renews the checksums still gets nothing executed."""
    path = _save(directory, 1)
    canary = tmp_path / "canary"
    torch.save({"emb.weight": torch.ones(1), "x": _Bomb(canary)}, path / "weights.pth")
    _forge_manifest(path)
    with pytest.raises(CheckpointError, match=r"weights\.pth"):
        save_load.newest_verified(directory).weights()
    (path / "optimizer.pth").write_bytes(pickle.dumps(_Bomb(canary)))
    _forge_manifest(path)
    with pytest.raises(CheckpointError, match=r"optimizer\.pth"):
        save_load.newest_verified(directory).optimizer()
    assert not canary.exists()


def test_a_checkpoint_copied_elsewhere_is_whole(directory: Path, tmp_path: Path) -> None:
    _save(directory, 12)
    shutil.copytree(directory, tmp_path / "copy")
    assert save_load.newest_verified(tmp_path / "copy").step == 12
