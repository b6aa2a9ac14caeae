"""A run's own names lead to regular files: links, pipes, sockets, devices and folders are refused, never waited for."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import tiny_run_config, write_config

from rwkv_cluster.cli import main
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime import own_file
from rwkv_cluster.runtime.own_file import WrongKindError, open_own, read_own, reason, require_folder
from rwkv_cluster.train.checkpoint.files import newest_good
from rwkv_cluster.workdir import WorkDir


def link(path: Path) -> None:
    victim = path.parent / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "a symbolic link": link,
    "a pipe": os.mkfifo,
    "a socket": bind,
    "a folder": Path.mkdir,
    "a device": lambda path: os.mknod(path, 0o20666, os.makedev(1, 3)),
}
EVERY_KIND = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.skipif(os.geteuid() != 0, reason="takes root")) if "dev" in kind else kind
        for kind in KINDS
    ],
)


@EVERY_KIND
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_APPEND, os.O_RDWR | os.O_CREAT])
def test_only_a_regular_file_is_opened(kind: str, flags: int, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "file")
    with pytest.raises(WrongKindError, match=f"file is {kind}, .*a regular file") as caught:
        open_own(tmp_path / "file", flags)
    assert (caught.value.strerror, caught.value.filename) == (f"this is {kind}, not a regular file", f"{tmp_path}/file")
    assert isinstance(caught.value, OSError)


def test_what_takes_the_place_after_the_look_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(own_file, "require_own", lambda path: None)
    with pytest.raises(OSError, match="symbolic links"):
        open_own(tmp_path / "link", os.O_WRONLY)
    with pytest.raises(WrongKindError, match="pipe is a pipe"):
        open_own(tmp_path / "pipe", os.O_RDONLY)


def test_a_regular_file_is_opened_as_ever(tmp_path: Path) -> None:
    with open(tmp_path / "file", "a", opener=open_own) as handle:
        handle.write("x")
    assert read_own(tmp_path / "file") == b"x"
    with pytest.raises(FileNotFoundError):
        read_own(tmp_path / "absent")
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to("disk")
    require_folder(tmp_path / "linked")
    require_folder(tmp_path / "absent")
    with pytest.raises(WrongKindError, match=r"linked is a symbolic link, .*a folder"):
        require_folder(tmp_path / "linked", may_link=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.yaml and the work directory of two steps."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_run_config(folder, training={"max_steps": 2}, logging={"sample_tokens": 3, "progress_bar": False})
    path = write_config(folder / "run.yaml", config)
    path.write_text(path.read_text().replace(f"{folder}/", ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "run.yaml"]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "work"


NOWHERE = WorkDir("/nowhere")
FOLDERS = [str(path.relative_to(NOWHERE.root)) for path in (*NOWHERE.folders, *NOWHERE.private_folders)]
NAMES = [str(path.relative_to(NOWHERE.root)) for path in NOWHERE.files if path != NOWHERE.wandb_id]


@pytest.mark.parametrize("name", [*NAMES, *FOLDERS, "STOP"])
def test_every_name_of_a_work_directory_is_looked_at_before_a_run_writes(name: str, tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "work")
    path = work.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if name in NAMES or name == "STOP" else path.write_text("")
    with pytest.raises(WrongKindError, match=f"{name} is a (file, .*a folder|folder, .*a regular file)"):
        work.create()
    path.rmdir() if path.is_dir() else path.unlink()
    work.create()
    work.create()


@pytest.mark.parametrize("verb", ["train", "status"])
@pytest.mark.parametrize("name", [".lock", "logs/train.log", "logs/metrics.jsonl", "data/manifest.json"])
def test_a_link_is_never_written_through(verb: str, name: str, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / name).unlink()
    link(run / name)
    source = "work" if verb == "status" else "run.yaml"
    assert main([verb, source, *(["--training.max_steps=3"] if verb == "train" else [])]) == 2
    assert f"{run / name} is a symbolic link, " in capfd.readouterr().err
    assert (run / name).with_name("victim").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "code", "command"),
    [
        ("data/manifest.json", 3, ["eval", "work"]),
        ("configs/config.yaml", 2, ["eval", "work"]),
        ("configs/config.yaml", 2, ["generate", "work"]),
        ("out/rwkv-final.pth", 4, ["inspect", "work/out/rwkv-final.pth"]),
        ("logs/events.jsonl", 2, ["status", "work"]),
        ("logs/metrics.jsonl", 0, ["report", "work"]),
        (".lock", 2, ["train", "run.yaml"]),
        ("launch/1/command.json", 2, ["cancel", "work"]),
        ("launch/1/job.log", 2, ["logs", "work"]),
        ("launch/1/exit", 2, ["cancel", "work"]),
        ("vocab", 3, ["prepare", "run.yaml", "--data.tokenizer={type: generic, vocab_file: work/vocab}"]),
    ],
)
def test_nobody_waits_for_a_pipe(
    name: str, code: int, command: list[str], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run / "launch/1").mkdir(parents=True)
    (run / "launch/1/command.json").write_text('{"target": "local"}')
    (run / "launch/1/exit").write_text("0")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert main(command) == code
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert code == 0 or name.rpartition("/")[2] in err


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "weights.pth"])
def test_a_pipe_in_a_checkpoint_is_a_damaged_checkpoint(name: str, run: Path) -> None:
    path = run / "out/checkpoints/step-00000002" / name
    path.unlink()
    os.mkfifo(path)
    found, faults = newest_good(run / "out/checkpoints")
    assert (found, faults) == (None, [f"{path}: this is a pipe, not a regular file"])


def test_folders_may_lie_on_another_disk(run: Path, tmp_path: Path) -> None:
    for name in ("data", "out/checkpoints", "out", "logs", "configs"):
        (run / name).rename(tmp_path / f"disk-{name.replace('/', '-')}")
        (run / name).symlink_to(tmp_path / f"disk-{name.replace('/', '-')}")
    run.rename(tmp_path / "elsewhere")
    run.symlink_to(tmp_path / "elsewhere")
    assert main(["train", "run.yaml", "--training.max_steps=3"]) == 0


def test_what_is_in_a_linked_folder_of_ranks_is_not_deleted(run: Path, tmp_path: Path) -> None:
    (tmp_path / "home/documents").mkdir(parents=True)
    (run / ".ranks").symlink_to(tmp_path / "home")
    assert main(["train", "run.yaml", "--training.max_steps=3"]) == 2
    assert (tmp_path / "home/documents").is_dir()


def test_a_refused_permission_names_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(13, "Permission denied", str(tmp_path / "no" / "such"))
    assert reason(error) == f"Permission denied at {tmp_path}/no/such"
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert reason(error) == f"Permission denied at {tmp_path}/no/such; {tmp_path} belongs to {own_file.owner(tmp_path)}"
    monkeypatch.setattr(own_file.pwd, "getpwuid", lambda number: {}[number])
    assert own_file.owner(tmp_path) == f"user {tmp_path.stat().st_uid}"
    assert issubclass(WrongKindError, ConfigError)
