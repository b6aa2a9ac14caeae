"""Processes that begin with their libraries already imported.

The first 4 to 10 CPU seconds of a rank are Python importing torch, Lightning and DeepSpeed, the same in each of the
several hundred processes that these tests start. Here a server, a Python that has imported them once, forks for whoever
asks. What it forks is a process like any other from there on: it has arguments, an environment, a folder, outputs and a
process id of its own, runs `python -m MODULE` or a script from the first line, and ends as an interpreter ends. Nothing
of rwkv_cluster is imported beforehand.

torchrun is started likewise and is the real one, but that its ranks come from a server too: its child, which ends with
it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

LIBRARIES = ("numpy", "pydantic", "yaml", "torch._dynamo", "pytorch_lightning", "deepspeed", "torch.distributed.run")
LIBRARIES += ("deepspeed.runtime.zero.muon.muon_optimizer",)  # which deepspeed.initialize imports, with all of inductor
READ_AT_IMPORT = ("PYTHON", "LD_", "OMP_", "TORCH", "DS_")  # variables by which libraries are imported otherwise
TORCHRUN = "torch.distributed.run"
LARGEST = 1 << 17  # bytes of a message: arguments and environment


class Process:
    """A process that a server forks; the part of `subprocess.Popen` that these tests and torchrun use.

    server: the address that `start_server` has returned. args: the words after "python" are what it runs.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        server: bytes,
        env: Mapping[str, str],
        cwd: Path | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = args
        self.returncode: int | None = None
        request = {"words": args[1:], "env": dict(env), "cwd": str(cwd or Path.cwd()), "session": start_new_session}
        outputs = [stream.fileno() if stream else usual for stream, usual in ((stdout, 1), (stderr, 2))]
        self._server = _socket()
        self._server.connect(server)
        socket.send_fds(self._server, [json.dumps(request).encode()], outputs)
        self.pid = int(self._server.recv(LARGEST))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._server.settimeout(timeout)
            try:
                code = self._server.recv(LARGEST)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            assert code, "the server has ended before what it has forked"
            self.returncode = int(code)
            self._server.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serves(environment: Iterable[str]) -> bool:
    """Whether a process with these variables can be forked: none of them matters to an import."""
    return not any(name.startswith(READ_AT_IMPORT) for name in environment)


@functools.cache
def start_server() -> bytes:
    """Address of a server of this process, which ends with it."""
    listener = _listener()
    held, end = os.pipe()
    subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno()), str(held)],
        pass_fds=(listener.fileno(), held),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    os.close(held)
    os.set_inheritable(end, False)
    address: bytes = listener.getsockname()
    listener.close()
    return address


def rank_of(pid: int) -> int | None:
    """The rank that a forked process was started as; None for any other process."""
    try:
        name, _, number = Path(f"/proc/{pid}/comm").read_text().strip().partition(" ")
    except OSError:
        return None
    return int(number) if name == "rank" else None


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _listener() -> socket.socket:
    listener = _socket()
    listener.bind("")  # the kernel finds a name, which no file bears
    listener.listen()
    return listener


def _serve(listener: socket.socket, asker: int) -> dict[str, Any] | None:
    """Fork for whoever connects, and tell them how it ended, until the asker has closed its end of a pipe.

    Returns what it was asked for in each forked process, and None in the server itself at the end.
    """
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(asker, selectors.EVENT_READ)
    forked: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor that becomes readable when one has ended
    while True:
        for key, _ in selector.select():
            if key.fd == asker:
                return None
            if key.fd in forked:
                selector.unregister(key.fd)
                os.close(key.fd)
                pid, connection = forked.pop(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError), connection:  # nobody may wait for it any more
                    connection.send(str(code).encode())
                continue
            connection, _ = listener.accept()
            message, outputs, *_ = socket.recv_fds(connection, LARGEST, 2)
            if not (pid := os.fork()):
                selector.close()
                for inherited in (listener, connection, *(other for _, other in forked.values())):
                    inherited.close()
                for descriptor in (asker, *forked):
                    os.close(descriptor)
                return {**json.loads(message), "outputs": outputs}
            for output in outputs:
                os.close(output)
            ended = os.pidfd_open(pid)
            forked[ended] = pid, connection
            selector.register(ended, selectors.EVENT_READ)
            connection.send(str(pid).encode())


def _become(request: dict[str, Any]) -> bool:
    """Take the place of a Python that starts with what was asked for. Whether it runs a module, and no script."""
    for number, output in enumerate(request["outputs"], start=1):
        os.dup2(output, number)
        os.close(output)
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if "RANK" in os.environ:
        Path("/proc/self/comm").write_text(f"rank {os.environ['RANK']}")
    words = request["words"]
    if words[0] == "-u":
        words = words[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    sys.path[0] = request["cwd"] if module else str(Path(words[0]).parent)
    return module


def _main() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # the libraries' objects stay where they are: no process copies them to count them
    listener, asker = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    while request := _serve(listener, asker):
        module = _become(request)
        if sys.argv[0] != TORCHRUN:
            if module:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
            return
        listener = _listener()
        asker, end = os.pipe()
        if os.fork():
            os.close(asker)
            _run_torchrun(listener.getsockname())
            return
        os.close(end)


def _run_torchrun(server: bytes) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = functools.partial(Process, server=server)  # type: ignore[assignment,misc]
    run.main()


if __name__ == "__main__":
    _main()
