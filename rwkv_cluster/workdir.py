"""Every path of a run's one directory, and the ways anything in it comes to exist.

A final path is never written in place: files and directories appear whole, by rename, after fsync
(one writer, one commit). This module knows bytes and names, not tensors.

    data/      train.bin train.idx [val.bin val.idx] vocab.txt|tokenizer.json manifest.json [train.jsonl]
    out/       rwkv-init.pth rwkv-<epoch>.pth rwkv-final.pth train_log.txt checkpoints/step-XXXXXXXX/
    logs/      metrics.jsonl metrics.csv events.jsonl environment.json train.log
               events/rank-<N>.jsonl hang/ profile/ samples/
    configs/   config.json config.yaml (what the last run used) [parent.json]
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
DATA_MANIFEST, PREPARE_LOCK, VOCABULARY = "manifest.json", ".prepare.lock", "vocab.txt"  # in a folder of data
HUB_TOKENIZER = "tokenizer.json"  # there too, in place of vocab.txt
FINAL = "final"  # label of the weights that a finished run leaves
CONFIG_YAML = Path("configs", "config.yaml")  # in a work directory
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


def write_output(path: Path, text: str) -> None:
    """Write the file that a command's --output names. Raises ConfigError where it cannot be written."""
    try:
        atomic_write(path.absolute(), text.encode(errors="backslashreplace"))
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}", remedy="Name another file") from error


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
        for folder in (*self.folders, *self.private_folders):
            with suppress(*_NOT_SEEN):
                require_folder(folder, may_link=folder in self.folders)
        for file in self.files:
            with suppress(*_NOT_SEEN):
                require_own(file)
        with suppress(*_NOT_SEEN):
            mode = os.lstat(self.stop_file).st_mode
            if stat.S_ISDIR(mode):  # any other STOP stops, and can be removed
                raise WrongKindError(self.stop_file, mode, "a regular file")

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders that may be links to folders elsewhere."""
        logs = (self.logs, self.step_times, self.hang, self.profile, self.samples, self.logs / "tensorboard")
        return (self.data, self.out, self.checkpoints, *logs, self.configs, self.report)

    @property
    def private_folders(self) -> tuple[Path, ...]:
        """Folders that are no links: a run deletes what is in the one, and locks others out of the other."""
        return (self.ranks, self.launches)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of fixed names that a run reads or writes."""
        in_data = (self.prepare_lock, self.data / "inputs.json", self.data_manifest)
        logs = (self.metrics, self.metrics_csv, self.events, self.environment, self.train_log, self.wandb_id)
        return (self.lock_file, *in_data, self.epoch_log, *logs, self.config_yaml, self.config_json, self.parent)

    @property
    def stop_file(self) -> Path:
        """File that ends the run after the step under way when somebody makes it."""
        return self.root / "STOP"

    @property
    def initial_weights(self) -> Path:
        """Weights that a run begins with."""
        return self.weights("init")

    @property
    def final_weights(self) -> Path:
        """Weights that a finished run leaves."""
        return self.weights(FINAL)

    def weights(self, label: int | str) -> Path:
        """Weights exported at the end of epoch `label`, under RWKV-LM's name."""
        return self.out / f"rwkv-{label}.pth"

    def adapter(self, label: int | str) -> Path:
        """Folder of an adapter, as peft reads it, at the end of epoch `label`."""
        return self.out / f"rwkv-{label}-peft"

    @property
    def epoch_log(self) -> Path:
        """A line for each epoch, as RWKV-LM's trainer writes it."""
        return self.out / "train_log.txt"

    @property
    def config_yaml(self) -> Path:
        """Configuration that the last session used; `config_json` is the same as JSON."""
        return self.root / CONFIG_YAML

    @property
    def config_json(self) -> Path:
        """Configuration that the last session used, as JSON."""
        return self.configs / "config.json"

    @property
    def parent(self) -> Path:
        """What a branch says of its trunk, see `rwkv_cluster.train.checkpoint.branch`; another run has no such file."""
        return self.configs / "parent.json"

    @property
    def data_manifest(self) -> Path:
        """Manifest of the prepared data, see `rwkv_cluster.data.manifest`."""
        return self.data / DATA_MANIFEST

    @property
    def vocabulary(self) -> Path:
        """Copy of the tokenizer's vocabulary file."""
        return self.data / VOCABULARY

    @property
    def prepare_lock(self) -> Path:
        """Lock of whoever prepares data."""
        return self.data / PREPARE_LOCK

    @property
    def metrics(self) -> Path:
        """Numbers of each step as JSON lines, see docs/metrics.md; `metrics_csv` has the same as a table."""
        return self.logs / "metrics.jsonl"

    @property
    def metrics_csv(self) -> Path:
        """Numbers of each step as a table."""
        return self.logs / "metrics.csv"

    @property
    def wandb_id(self) -> Path:
        """Id under which Weights & Biases knows the run."""
        return self.logs / "wandb-id"

    @property
    def launches(self) -> Path:
        """A folder for each launch, see `rwkv_cluster.launch`."""
        return self.root / "launch"

    @property
    def report(self) -> Path:
        """Page and pictures of `rwkv-cluster report`."""
        return self.root / "report"

    @property
    def environment(self) -> Path:
        """Versions and machines of the sessions, see `rwkv_cluster.train.metrics.environment`."""
        return self.logs / "environment.json"

    @property
    def events(self) -> Path:
        """History of the run, see `rwkv_cluster.train.metrics.events`."""
        return self.logs / "events.jsonl"

    @property
    def step_times(self) -> Path:
        """Timings of each rank's steps, see `rwkv_cluster.train.metrics.step_times`."""
        return self.logs / "events"

    @property
    def profile(self) -> Path:
        """Traces of torch's profiler and their tables, see `rwkv_cluster.train.metrics.profiler`."""
        return self.logs / "profile"

    @property
    def train_log(self) -> Path:
        """Log of the package's messages, with the time."""
        return self.logs / "train.log"

    @property
    def samples(self) -> Path:
        """Texts of the model in training."""
        return self.logs / "samples"

    @property
    def hang(self) -> Path:
        """What ranks leave that did not go on: stacks, and what NCCL exchanged last."""
        return self.logs / "hang"

    @property
    def ranks(self) -> Path:
        """Heartbeat files of the ranks, see `rwkv_cluster.train.distributed.rank_monitor`."""
        return self.root / ".ranks"

    @property
    def lock_file(self) -> Path:
        """Lock of the run that holds the directory."""
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
