"""WorkDir: a final name appears whole or not at all, and one run holds the directory."""

# ruff: noqa: PT012 -- the blocks below fail on purpose in the middle

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rwkv_cluster.errors import ConfigError, LaunchError
from rwkv_cluster.workdir import TEMPORARY_PREFIX, WorkDir, atomic_write, atomic_writer, remove_temporaries, sha256_file


def test_paths_of_the_layout(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "run")
    assert not work.root.exists()
    work.create()
    work.create()
    folders = {str(path.relative_to(work.root)) for path in work.root.rglob("*")}
    assert folders == {"data", "out", "out/checkpoints", "logs", "configs"}


def test_relative_and_home_roots_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert WorkDir("run").root == tmp_path / "run"
    assert WorkDir("~/run").root == tmp_path / "home" / "run"
    with pytest.raises(ConfigError, match=r"'~nobody-by-this-name/run', .*home directory"):
        WorkDir("~nobody-by-this-name/run")


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\x1bb", "a\u2028b", "a\udcffb"])
def test_unprintable_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="control character") as caught:
        WorkDir(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a b", "$(id)", "quo'te", "ünï🎉", "-x", "#", "a;b"])
def test_odd_but_printable_names_work(name: str, tmp_path: Path) -> None:
    work = WorkDir(tmp_path / name)
    with work.lock():
        work.create()
        atomic_write(work.out / "x", b"1")
    assert (tmp_path / name / "out" / "x").read_bytes() == b"1"


def test_a_root_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    work = WorkDir(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="Not a directory"):
        work.create()
    with pytest.raises(ConfigError, match="Not a directory"), work.lock():
        pass


def test_an_exception_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    with pytest.raises(RuntimeError), atomic_writer(path) as handle:
        handle.write(b"half of the new")
        handle.flush()
        assert path.read_bytes() == b"old"
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"


def test_file_and_folder_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    atomic_write(tmp_path / "file", b"x")
    assert events == ["file", "rename", "folder"]


def test_remove_temporaries_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_bytes(b"")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"{TEMPORARY_PREFIX}link").symlink_to(outside)
    (folder / f"{TEMPORARY_PREFIX}tree").mkdir()
    (folder / f"{TEMPORARY_PREFIX}tree" / "x").write_bytes(b"")
    (folder / f"{TEMPORARY_PREFIX}file").write_bytes(b"")
    (folder / "kept").write_bytes(b"")
    remove_temporaries(folder)
    assert os.listdir(folder) == ["kept"]
    assert os.listdir(outside) == ["keep"]


def test_sha256_file_equals_the_published_digest(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, example B.1
    assert sha256_file(tmp_path / "abc") == expected


REWRITER = """
import sys
from pathlib import Path
from rwkv_cluster.workdir import atomic_write
print("ready", flush=True)
number = 0
while True:
    number += 1
    atomic_write(Path(sys.argv[1]), bytes([number % 256]) * (1 << 20))
"""


def test_a_killed_writer_never_leaves_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, bytes([0]) * (1 << 20))
    moments = random.Random(0)
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", REWRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(moments.uniform(0.0, 0.02))
            writer.kill()
        content = path.read_bytes()
        assert len(content) == 1 << 20
        assert len(set(content)) == 1


HOLDER = """
import sys, time
from rwkv_cluster.workdir import WorkDir
with WorkDir(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LaunchError, match=f"process {holder.pid} on ") as caught, work.lock():
            pass
        assert caught.value.exit_code == 6
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with work.lock():
        assert json.loads(work.lock_file.read_text())["pid"] == os.getpid()


def test_a_look_at_the_lock_refuses_while_it_is_held_and_takes_nothing(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "run")
    work.require_free()
    assert not work.root.exists()
    with work.lock(), pytest.raises(LaunchError, match=rf"in use by process {os.getpid()} on "):
        work.require_free()
    work.require_free()
    with work.lock():
        pass


def test_a_damaged_lock_file_still_locks(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    with work.lock():
        work.lock_file.write_text("not JSON")
        with pytest.raises(LaunchError, match=f"in use by process {os.getpid()} on "), WorkDir(tmp_path).lock():
            pass  # refused when the holder's next heartbeat has mended it


NAMES = st.sampled_from(["a", "b", "manifest.json", "step-00000010"])
CONTENT = st.binary(max_size=40)


class VisibleFiles(RuleBasedStateMachine):
    """Writers commit, fail or are killed in any order; what is visible is always what was committed."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.work = WorkDir(self.temporary.name)
        self.committed: dict[str, bytes | dict[str, bytes]] = {}
        self.orphans = 0
        self.holder: AbstractContextManager[None] | None = None

    def teardown(self) -> None:
        if self.holder is not None:
            self.holder.__exit__(None, None, None)
        self.temporary.cleanup()

    @rule(name=NAMES, content=CONTENT)
    def write(self, name: str, content: bytes) -> None:
        if isinstance(self.committed.get(name), dict):
            with pytest.raises(IsADirectoryError):
                atomic_write(self.work.root / name, content)
        else:
            atomic_write(self.work.root / name, content)
            self.committed[name] = content

    @rule(name=NAMES, content=CONTENT)
    def writer_fails(self, name: str, content: bytes) -> None:
        with pytest.raises(KeyboardInterrupt), atomic_writer(self.work.root / name) as handle:
            handle.write(content)
            raise KeyboardInterrupt

    @rule(name=NAMES, content=CONTENT)
    def writer_is_killed(self, name: str, content: bytes) -> None:
        self.orphans += 1
        (self.work.root / f"{TEMPORARY_PREFIX}{name}-{self.orphans}").write_bytes(content)

    @precondition(lambda self: self.holder is None)
    @rule()
    def take_lock(self) -> None:
        self.holder = self.work.lock()
        self.holder.__enter__()

    @precondition(lambda self: self.holder is not None)
    @rule()
    def second_holder_is_refused(self) -> None:
        with pytest.raises(LaunchError, match="in use"), WorkDir(self.work.root).lock():
            pass

    @precondition(lambda self: self.holder is not None)
    @rule()
    def holder_cleans_up(self) -> None:
        remove_temporaries(self.work.root)
        self.orphans = 0
        assert not list(self.work.root.glob(f"{TEMPORARY_PREFIX}*"))

    @precondition(lambda self: self.holder is not None)
    @rule()
    def release_lock(self) -> None:
        assert self.holder is not None
        self.holder.__exit__(None, None, None)
        self.holder = None

    @invariant()
    def visible_is_committed(self) -> None:
        visible: dict[str, bytes | dict[str, bytes]] = {}
        for path in self.work.root.iterdir():
            if path.is_dir():
                visible[path.name] = {part.name: part.read_bytes() for part in path.iterdir()}
            elif path != self.work.lock_file and not path.name.startswith(TEMPORARY_PREFIX):
                visible[path.name] = path.read_bytes()
        assert visible == self.committed


VisibleFiles.TestCase.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)
TestVisibleFiles = VisibleFiles.TestCase
