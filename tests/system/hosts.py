"""Hosts on one machine: namespaces for network, name, processes and mounts, joined by a switch.

Each has its own address and sees the same files, as nodes of a cluster see a shared file system. Nothing leads out.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from system.processes import descendants, wait_until

INTERFACE = "eth0"


@dataclass(frozen=True)
class Host:
    """One of them. init: process that all its processes descend from; the host crashes with it."""

    name: str
    address: str
    namespace: str
    init: int

    @property
    def prefix(self) -> tuple[str, ...]:
        """Runs the command that follows on this host, in its root directory."""
        return ("nsenter", f"--target={self.init}", "--net", "--uts", "--mount", "--pid", "--")

    def crash(self) -> None:
        """Every process ends at once, and nothing answers any more."""
        with suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)


def reason_not_to() -> str | None:
    """Why this machine can have no such hosts; None when it can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    missing = [program for program in ("ip", "nsenter", "setpriv", "unshare") if shutil.which(program) is None]
    if missing:
        return f"hosts need iproute2 and util-linux: {', '.join(missing)} missing"
    try:
        with hosts(["one"]):
            return None
    except (OSError, AssertionError) as error:
        return str(error)


@contextmanager
def hosts(names: Sequence[str], etc: Mapping[str, Path] = MappingProxyType({})) -> Iterator[list[Host]]:
    """Hosts that reach each other by name, all gone after the block. etc: folders that they have in place of /etc's."""
    tag = uuid.uuid4().hex[:6]
    addresses = {name: f"10.78.0.{number}" for number, name in enumerate(names, 1)}
    known = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    switch = f"rs-{tag}"
    with ExitStack() as stack:
        _namespace(switch, stack)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        made = []
        for number, (name, address) in enumerate(addresses.items()):
            namespace, port = f"rs-{tag}-{name}", f"p{number}"
            _namespace(namespace, stack)
            ip("link", "add", INTERFACE, "netns", namespace, "type", "veth", "peer", "name", port, "netns", switch)
            ip("-n", switch, "link", "set", port, "master", "br0")
            ip("-n", switch, "link", "set", port, "up")
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
            ip("-n", namespace, "link", "set", INTERFACE, "up")
            made.append(Host(name, address, namespace, _boot(name, namespace, known, etc, stack)))
        yield made


def _namespace(name: str, stack: ExitStack) -> None:
    ip("netns", "add", name)
    stack.callback(ip, "netns", "delete", name)


def _boot(name: str, namespace: str, known: str, etc: Mapping[str, Path], stack: ExitStack) -> int:
    """Start a host's first process, which reaps what is left to it, and return its id as this machine sees it."""
    folder = Path("/etc/netns") / namespace
    folder.mkdir(parents=True)
    stack.callback(shutil.rmtree, folder)
    (folder / "hosts").write_text(known)
    for place, source in etc.items():
        shutil.copytree(source, folder / place)
    # as `ip netns exec` does it, which also hides the control groups that containers on the host need
    mounts = [f"mount --bind {path} /etc/{path.name}" for path in folder.iterdir()]
    steps = [f"hostname {name}", "mount --make-rprivate /", *mounts, "while :; do sleep 86400 & wait; done"]
    isolate = ["unshare", "--uts", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child"]
    into = ["nsenter", f"--net=/run/netns/{namespace}", *isolate, "bash", "-c", " && ".join(steps)]
    outer = subprocess.Popen(  # ends with these tests however they end
        ["setpriv", "--pdeathsig=KILL", *into],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stack.callback(_end, outer)
    found: list[int] = []

    def booted() -> bool:
        assert outer.poll() is None, f"{name} does not start"
        found[:] = descendants(outer.pid)
        with suppress(OSError):  # a step that has just ended
            return "sleep\n" in [Path(f"/proc/{pid}/comm").read_text() for pid in found]
        return False

    wait_until(booted, what=f"{name} to start", timeout_s=20)
    return found[0]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, f"ip {' '.join(arguments)}: {result.stderr.strip()}"
