"""Every path of a run's one directory, and the ways anything in it comes to exist.

A final path is never written in place: files and directories appear whole, by rename, after fsync
(house rule: one writer, one commit). This module knows bytes and names, not tensors.

    data/      train.bin train.idx [val.bin val.idx] vocab.txt manifest.json [train.jsonl]
    out/       rwkv-init.pth rwkv-<epoch>.pth rwkv-final.pth train_log.txt checkpoints/step-XXXXXXXX/
    logs/      metrics.jsonl metrics.csv events.jsonl environment.json train.log
               events/rank-<N>.jsonl hang/ profile/ samples/
    configs/   config.json config.yaml (what the last run used)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime import lock
from rwkv_cluster.runtime.own_file import WrongKindError, reason, require_folder, require_own
from rwkv_cluster.runtime.paths import written_out

TEMPORARY_PREFIX = ".tmp-"
_FOLDERS = (
    "data", "out", "out/checkpoints", "logs", "logs/events", "logs/hang", "logs/profile", "logs/samples",
    "logs/tensorboard", "configs", "report",
)  # fmt: skip
_PRIVATE_FOLDERS = (".ranks", "launch")  # a run deletes what is in the one, and locks others out of the other
_FILES = (
    ".lock", "data/.prepare.lock", "data/inputs.json", "data/manifest.json", "out/train_log.txt", "logs/metrics.jsonl",
    "logs/metrics.csv", "logs/events.jsonl", "logs/environment.json", "logs/train.log", "logs/wandb-id",
    "configs/config.yaml", "configs/config.json",
)  # fmt: skip
_NOT_SEEN = (FileNotFoundError, NotADirectoryError, PermissionError)  # whoever wants the file says so


def fsync_directory(path: Path) -> None:
    """Make the names in directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path, advance: Callable[[int], None] = lambda n_bytes: None) -> str:
    """Hexadecimal sha256 of a file's bytes, read in constant memory. advance: told of each piece that is done."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """Binary file that takes the name `path` only when the block ends without an exception."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def atomic_write(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that readers see the old file or the whole new one."""
    with atomic_writer(path) as handle:
        handle.write(content)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Directory to fill, renamed to `path` (which must not exist) when the block ends without an exception.

    Every file in it is fsynced first, then the directory, then its parent.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        fsync_directory(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def remove_temporaries(directory: Path) -> None:
    """Delete what killed writers left in `directory`. Only the holder of the work directory's lock may call this."""
    for entry in directory.glob(f"{TEMPORARY_PREFIX}*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


class WorkDir:
    """The directory of one run. Construction touches nothing; `create` makes the folders."""

    def __init__(self, root: str | Path) -> None:
        text = written_out(root, "work_dir")
        if any(not character.isprintable() for character in text):
            raise ConfigError(
                f"work_dir {text!r} has a control character or an unprintable one", remedy="Choose another name"
            )
        self.root = Path(text).absolute()
        self.data = self.root / "data"
        self.out = self.root / "out"
        self.checkpoints = self.out / "checkpoints"
        self.logs = self.root / "logs"
        self.configs = self.root / "configs"

    def create(self) -> None:
        """Make every folder. Raises ConfigError where that is not possible, or where `require_kinds` does."""
        self.require_kinds()
        for folder in (self.data, self.out, self.checkpoints, self.logs, self.configs):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"work_dir {self.root} cannot be made: {reason(error)}",
                    remedy="Choose a directory that you may write to",
                ) from error

    def require_kinds(self) -> None:
        """Raises WrongKindError where a file has the name of a folder of the run, or anything else that of a file."""
        for name in (*_FOLDERS, *_PRIVATE_FOLDERS):
            with suppress(*_NOT_SEEN):
                require_folder(self.root / name, may_link=name in _FOLDERS)
        for name in _FILES:
            with suppress(*_NOT_SEEN):
                require_own(self.root / name)
        with suppress(*_NOT_SEEN):
            found = os.lstat(self.stop_file).st_mode
            if stat.S_ISDIR(found):  # any other STOP stops, and can be removed
                raise WrongKindError(self.stop_file, found, "a regular file")

    @property
    def stop_file(self) -> Path:
        """Whoever makes it ends the run after the step under way."""
        return self.root / "STOP"

    @property
    def initial_weights(self) -> Path:
        """What a run begins with."""
        return self.out / "rwkv-init.pth"

    @property
    def final_weights(self) -> Path:
        """Where a finished run leaves its weights."""
        return self.out / "rwkv-final.pth"

    @property
    def environment(self) -> Path:
        """What the sessions ran on, see `rwkv_cluster.train.metrics.environment`."""
        return self.logs / "environment.json"

    @property
    def events(self) -> Path:
        """History of the run, see `rwkv_cluster.train.metrics.events`."""
        return self.logs / "events.jsonl"

    @property
    def step_times(self) -> Path:
        """Where each rank's time goes, see `rwkv_cluster.train.metrics.step_times`."""
        return self.logs / "events"

    @property
    def profile(self) -> Path:
        """Traces of torch's profiler and their tables, see `rwkv_cluster.train.metrics.profiler`."""
        return self.logs / "profile"

    @property
    def train_log(self) -> Path:
        """What the package has said, with the time."""
        return self.logs / "train.log"

    @property
    def samples(self) -> Path:
        """Texts of the model in training."""
        return self.logs / "samples"

    @property
    def hang(self) -> Path:
        """Stacks of ranks that did not go on, see `rwkv_cluster.train.distributed.hang_detector`."""
        return self.logs / "hang"

    @property
    def ranks(self) -> Path:
        """Where the ranks of a run show each other that they live."""
        return self.root / ".ranks"

    @property
    def lock_file(self) -> Path:
        return self.root / ".lock"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the work directory for this process. Raises LaunchError when another run holds it.

        A run that was killed, or whose machine is gone, does not hold it: see `rwkv_cluster.runtime.lock`.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            holding = lock.acquire(self.lock_file, f"work_dir {self.root}")
            holding.__enter__()
        except WrongKindError:
            raise
        except OSError as error:
            raise ConfigError(
                f"work_dir {self.root} cannot be used: {reason(error)}",
                remedy="Choose a directory that you may write to",
            ) from error
        with ExitStack() as stack:
            stack.push(holding)
            yield

    def require_free(self) -> None:
        """Raises LaunchError when another run holds the directory. A look before slow imports; `lock` decides."""
        lock.require_free(self.lock_file, f"work_dir {self.root}")
