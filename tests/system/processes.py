"""Real `rwkv_cluster` processes for the system tests: started in a folder, watched through files, ended by their id."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from system.warm_start import Process, rank_of, serves, start_server
from tiny_run import fingerprint, tiny_run_config, write_config

from rwkv_cluster.train.checkpoint.save_load import checkpoint_path, list_steps, verify
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.workdir import WorkDir

LAUNCHED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
PAUSE = "signal=SIGSTOP"  # what a fault does to a process that the test then finds `paused`
END_S = 120.0  # far beyond what any of these runs takes, so that a hang fails instead of lasting


def wait_until(condition: Callable[[], bool], *, what: str, timeout_s: float = END_S) -> None:
    """Poll `condition`, a tenth of the time at most. Fails, naming `what`, after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        begun = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        assert now < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(max(0.003, 9 * (now - begun)))  # a condition that asks Slurm or an engine costs a core otherwise


class Job:
    """One `python -m rwkv_cluster VERB run.yaml`, alone or as the ranks of a torchrun, with its output in a file.

    launcher: torchrun's arguments, in place of those for `ranks` on one machine. prefix: a command that runs the rest.
    script: a file to run in place of the command line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        verb: str = "train",
        ranks: int | None = None,
        fault: str | None = None,
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        prefix: Sequence[str] = (),
        config: str = "run.yaml",
        arguments: Sequence[str] = (),
        script: Path | None = None,
    ) -> None:
        program = [str(script)] if script else ["-m", "rwkv_cluster", verb, config, *arguments]
        launcher = ["--standalone", "--nproc-per-node", str(ranks)] if ranks else launcher
        launcher = ["-m", "torch.distributed.run", *launcher] if launcher else []
        inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHED_BY}
        inherited |= {"OMP_NUM_THREADS": "1"} | ({FAULT_VARIABLE: fault} if fault else {})
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
        warm = verb != "launch" and not prefix and serves(environment or ())  # launch imports none of the libraries
        start = partial(Process, server=start_server()) if warm else partial(subprocess.Popen, stdin=subprocess.DEVNULL)
        with open(self.output, "wb") as output:
            self.process = start(
                [*prefix, sys.executable, *launcher, *program],
                cwd=folder,
                env=inherited | dict(environment or {}),
                stdout=output,
                stderr=output,
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, timeout_s: float = END_S) -> int:
        """The exit code; fails with the output when the end does not come."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:.0f} s:\n{self.text}") from None

    def complete(self) -> None:
        """Wait for the end and require success."""
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.text}"

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """From the moment a fault has made it `PAUSE`, with its files as they are, to the end of the block."""

        def look() -> bool:
            assert self.running(), f"ended before the pause:\n{self.text}"
            return _state(self.process.pid) == "T"

        wait_until(look, what="the pause")
        yield
        self.process.send_signal(signal.SIGCONT)

    def worker(self, rank: int) -> int:
        """Process id of a rank that this job has started."""
        found: list[int] = []

        def look() -> bool:
            for pid in descendants(self.process.pid):
                environment = _environment(pid)
                if rank in (rank_of(pid), int(environment.get("RANK", environment.get("LOCAL_RANK", -1)))):
                    found.append(pid)
            return bool(found)

        wait_until(look, what=f"rank {rank}")
        return found[0]

    def end(self) -> None:
        """Kill what is left of this job."""
        if self.running():
            for pid in (*descendants(self.process.pid), self.process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.wait()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def by_hand(rank: int, port: int, world_size: int = 2) -> dict[str, str]:
    """As srun's tasks have it on as many nodes of one task each: nobody watches over the ranks."""
    numbers = {"RANK": rank, "NODE_RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def descendants(pid: int) -> list[int]:
    """Process ids of everything that `pid` has started, directly or not, the youngest generation last."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[0] != "Z":
            parents[int(status.parent.name)] = int(fields[1])
    found, generation = [], [pid]
    while generation := [child for child, parent in parents.items() if parent in generation]:
        found += generation
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    return _state(pid) not in ("", "Z")


def _state(pid: int) -> str:
    """The kernel's letter for what a process does; "" for one that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_for_end(pids: Iterable[int], *, timeout_s: float) -> None:
    """Until none of `pids` runs."""
    wait_until(lambda: not any(map(alive, pids)), what=f"the end of processes {pids}", timeout_s=timeout_s)


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


class Watched:
    """A tiny run's folder, seen from outside: its steps, sessions and checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = WorkDir(folder / "work")

    def steps_logged(self) -> int:
        """Last step with a whole line in metrics.jsonl; 0 when there is none."""
        try:
            text = (self.work.logs / "metrics.jsonl").read_text()
        except OSError:
            return 0
        lines = text[: text.rfind("\n") + 1].splitlines()
        return json.loads(lines[-1])["step"] if lines else 0

    def sessions(self) -> int:
        """How many processes have begun to train here."""
        try:
            return (self.work.out / "train_log.txt").read_text().count("NEW RUN ")
        except OSError:
            return 0

    def wait_for_steps(self, job: Job, *, sessions: int, step: int) -> None:
        """Until the session after the first `sessions` has logged `step`; fails when the job ends before that."""

        def reached() -> bool:
            assert job.running(), f"ended before step {step}:\n{job.text}"
            return self.sessions() > sessions and self.steps_logged() >= step

        wait_until(reached, what=f"step {step}")

    def newest_checkpoint(self) -> int:
        """Highest step that is saved (0: none), after checking every byte of every checkpoint that has its name."""
        for step in list_steps(self.work.checkpoints):
            verify(checkpoint_path(self.work.checkpoints, step))
        return max(list_steps(self.work.checkpoints), default=0)

    def half_written(self, name: str) -> bool:
        """Whether a save is under way that has `name` on the disk."""
        return any(self.work.checkpoints.glob(f".tmp-step-*/{name}"))

    def result(self) -> dict[str, object]:
        """What equal runs have in common: final weights, optimizer state, every loss, and the books of the run."""
        newest = checkpoint_path(self.work.checkpoints, max(list_steps(self.work.checkpoints)))
        state = json.loads((newest / "state.json").read_text())
        books = ("step", "tokens_seen", "epoch_loss_sum", "epoch_loss_count", "val_loss", "data_fingerprint")
        return fingerprint(self.work.root) | {name: state[name] for name in books}


def new_run(folder: Path, **sections: Any) -> Watched:
    """A tiny run in `folder`, made where it is not there, with changes by section as `tiny_run_config` takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / "run.yaml", tiny_run_config(folder, **sections))
    return Watched(folder)


def stopped_steps(text: str) -> dict[int, int]:
    """{rank: step} of every rank that said it was stopped; rank 0 where the process was alone."""
    matches = re.finditer(r"(?:rank (\d+): )?error: stopped by .* after step (\d+) of", text)
    return {int(match[1] or 0): int(match[2]) for match in matches}
