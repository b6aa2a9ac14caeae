"""Launching on this machine: processes, perhaps in a container, that the launching process follows to their end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rwkv_cluster.config import Config
from rwkv_cluster.errors import Interrupted, LaunchError
from rwkv_cluster.launch.command import Command
from rwkv_cluster.launch.launch_folder import CONTAINER_ID, EXIT, JOB_LOG, PROCESS
from rwkv_cluster.launch.launchers import container
from rwkv_cluster.launch.launchers.launcher import Launched, Plan, Tool, with_record
from rwkv_cluster.launch.launchers.rank_command import interpreter
from rwkv_cluster.launch.launchers.script import CONFIG, HEAD, environment
from rwkv_cluster.launch.logs import FileLogs, Tail
from rwkv_cluster.runtime.exit_report import rank_log
from rwkv_cluster.runtime.heartbeat import machine, start_tick, this_process
from rwkv_cluster.runtime.interrupt import Listener, listening
from rwkv_cluster.runtime.own_file import read_own
from rwkv_cluster.runtime.terminal.text_safety import visible
from rwkv_cluster.workdir import atomic_write

POLL_S = 0.1


def no_files(config: Config) -> dict[str, str]:
    """No files besides the script."""
    return {}


def no_tools(config: Config) -> tuple[Tool, ...]:
    """No programs besides Python."""
    return ()


@dataclass(frozen=True)
class Local:
    """Launcher of the targets local, torchrun, deepspeed, docker and podman.

    A launch is running, ended or, seen from another machine, unknown.

    Attributes:
        start: command that starts the ranks, from the configuration, the interpreter and the directory.
        files: further files of the launch directory, name -> text.
        needs: programs that have to work here.
        engine: the container that all runs in; None: that of launch.container.runtime.
    """

    start: Callable[[Config, str, str], Command]
    files: Callable[[Config], dict[str, str]] = no_files
    needs: Callable[[Config], tuple[Tool, ...]] = no_tools
    engine: Literal["docker", "podman"] | None = None

    end_states: Collection[str] = ("ended",)
    end_s: float = 10.0
    poll_s: float = 0.2

    @property
    def runs_here(self) -> bool:
        """Whether the ranks run outside a container."""
        return self.engine is None

    def tools(self, config: Config) -> tuple[Tool, ...]:
        """The container engine, or what starts the ranks."""
        return (Tool((self.engine, "version")),) if self.engine else self.needs(config)

    def require(self) -> None:
        """Accept every Python."""

    def script(self, config: Config, cwd: Path, verb: str) -> Plan:
        """One script, run by bash. Raises LaunchError."""
        engine = self.engine or config.launch.container.runtime
        command = self.start(config, interpreter(config, engine), str(cwd))
        if engine != "none":
            command = container.wrap(config, command, str(cwd), engine, has_id_file=self.engine is not None)
        lines = ["#!/bin/bash", HEAD, "set -u", *environment(config), f"exec {command.shell()} {verb} {CONFIG}"]
        files = {"job.sh": "\n".join(lines) + "\n", **self.files(config)}
        return with_record(config, cwd, files, [Command(("bash", "job.sh"))])

    def submit(self, plan: Plan, folder: Path, members: Sequence[Path]) -> Launched:
        """Run the script to its end.

        The first rank's log goes to stdout, what the launchers say to stderr, and signals reach the ranks. Raises
        Interrupted when the job was to end at once, after it has, and LaunchError.
        """
        (command,) = plan.commands
        with open(folder / JOB_LOG, "ab") as output, listening() as listener:
            listener.defer("asking the run for a checkpoint and its end")
            try:
                process = subprocess.Popen(
                    command.argv,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise LaunchError(f"{command.argv[0]} cannot be started: {error.strerror}") from None
            try:
                record = {"launcher": this_process(), **this_process()}
                record |= {"pid": process.pid, "started": start_tick(process.pid)}
                atomic_write(folder / PROCESS, json.dumps(record).encode())
                code = self._follow(process, folder, listener)
            except Interrupted:
                self._kill(folder, process.pid)
                atomic_write(folder / EXIT, f"{_exit_code(process.wait())}\n".encode())
                raise
            listener.obey()
        atomic_write(folder / EXIT, f"{code}\n".encode())
        return Launched(folder, code=code)

    def state(self, folder: Path) -> tuple[str, str]:
        """running, ended or unknown, from the exit code or the process."""
        if (folder / EXIT).exists():
            return "ended", f"exit code {read_own(folder / EXIT).decode(errors='replace').strip()[:20]}"
        record = _process(folder)
        if record["machine"] != machine():
            return "unknown", f"it was started on {record['host']}, which is another machine"
        for process in (record, record["launcher"]):  # which has yet to write the exit code
            if start_tick(process["pid"]) == process["started"] is not None:
                return "running", f"process {record['pid']} on {record['host']}"
        return "ended", "exit code unknown: the launching process was killed"

    def logs(self, folders: Sequence[Path], rank: int | None) -> FileLogs:
        """The files of the launch directory."""
        return FileLogs(folders, rank)

    def cancel(self, folder: Path, *, now: bool) -> None:
        """Signal the agent, or kill container and processes. Raises LaunchError for those of another machine."""
        state, detail = self.state(folder)
        if state == "unknown":
            raise LaunchError(f"{folder}: {detail}", remedy="Cancel it there")
        record = _process(folder)
        if not now:
            self._ask_to_stop(folder, record["pid"])
        else:
            self._kill(folder, record["pid"] if start_tick(record["pid"]) == record["started"] else None)

    def _follow(self, process: subprocess.Popen[bytes], folder: Path, listener: Listener) -> int:
        """Exit code of the job, while its logs are shown and what this process receives is passed on."""
        streams = ((Tail(rank_log(folder, 0)), sys.stdout), (Tail(folder / JOB_LOG), sys.stderr))
        passed = 0
        while True:
            ended = process.poll() is not None
            for tail, stream in streams:
                stream.write(visible(tail.read()))
                stream.flush()
            if ended:
                return _exit_code(process.returncode)
            if listener.count > passed:
                passed = listener.count
                self._ask_to_stop(folder, process.pid)
            time.sleep(POLL_S)

    def _ask_to_stop(self, folder: Path, pid: int) -> None:
        """Ask the agent for a checkpoint and the end."""
        if not self._signal_container(folder, "--signal=USR1") and start_tick(pid) is not None:
            os.kill(pid, signal.SIGUSR1)

    def _kill(self, folder: Path, pid: int | None) -> None:
        """Kill the job. pid: of its first process, None where that is gone."""
        self._signal_container(folder)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # a session of its own; ranks elsewhere end with their parent

    def _signal_container(self, folder: Path, *options: str) -> bool:
        """Send a signal, SIGKILL if none is named, to the job's container. False where there is none.

        Raises LaunchError where the launch's files name no container.
        """
        path = folder / CONTAINER_ID
        if not path.exists():
            return False
        number = read_own(path).decode(errors="replace").strip()
        if self.engine is None or not re.fullmatch(r"[0-9a-f]{8,64}", number):
            raise LaunchError(f"{path} holds {number[:80]!r}, expected the id of a container")
        subprocess.run((self.engine, "kill", *options, number), check=False, capture_output=True, timeout=60)
        return True


def _process(folder: Path) -> dict[str, Any]:
    """Record of the process that a launch has started. Raises LaunchError where there is none, or no sound one."""
    try:
        record = json.loads(read_own(folder / PROCESS))
        pids = (record["pid"], record["launcher"]["pid"])
        facts = (record["host"], record["machine"], record["started"], record["launcher"]["started"])
    except FileNotFoundError:
        raise LaunchError(f"{folder}: no process was started from here") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LaunchError(f"{folder / PROCESS} cannot be read: it is not what a launch has left there") from error
    if not all(isinstance(pid, int) and pid > 1 for pid in pids) or not all(isinstance(f, str | None) for f in facts):
        raise LaunchError(f"{folder / PROCESS} does not say which process was started")
    return dict(record)


def _exit_code(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode
