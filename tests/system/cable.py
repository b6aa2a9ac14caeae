"""Two hosts on one machine: network namespaces, joined by a cable in user space that can delay, lose and cut.

It forwards Ethernet frames between two tap interfaces, so it needs root, iproute2 and /dev/net/tun, and no module of
the kernel's for traffic control or packet filters.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from system.hosts import ip

TUNSETIFF = 0x400454CA  # linux/if_tun.h
TAP_WITHOUT_HEADER = 0x0002 | 0x1000
FRAME_BYTES = 65536


@dataclass(frozen=True)
class Host:
    """One end of the cable: a namespace with one interface."""

    namespace: str
    interface: str
    address: str


def reason_not_to() -> str | None:
    """Why this machine can have no such hosts; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    try:
        with two_hosts():
            return None
    except (OSError, AssertionError) as error:
        return str(error)


class Cable:
    """Forwards frames between two taps. delay_s: of every frame; loss: share of frames that vanish; 1.0 cuts it.

    lost: how many have vanished so far.
    """

    def __init__(self, taps: list[int]) -> None:
        self.delay_s = 0.0
        self.loss = 0.0
        self.lost = 0
        self._taps = taps
        self._draw = random.Random(0)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._forward, daemon=True)

    def __enter__(self) -> Cable:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _forward(self) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []  # due, number, tap, frame
        number = 0
        while not self._end.is_set():
            wait_s = min(0.1, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.1
            for tap in select.select(self._taps, [], [], wait_s)[0]:
                frame = os.read(tap, FRAME_BYTES)
                if self._draw.random() < self.loss:
                    self.lost += 1
                else:
                    other = self._taps[1 - self._taps.index(tap)]
                    heapq.heappush(under_way, (time.monotonic() + self.delay_s, number, other, frame))
                    number += 1
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, tap, frame = heapq.heappop(under_way)
                os.write(tap, frame)


@contextmanager
def two_hosts() -> Iterator[tuple[list[Host], Cable]]:
    """Hosts that reach nothing but each other."""
    tag = uuid.uuid4().hex[:6]
    hosts = [Host(f"rc-{tag}-{n}", f"rc{tag}{n}", f"10.77.0.{n + 1}") for n in range(2)]
    with ExitStack() as stack:
        taps = []
        for host in hosts:
            ip("netns", "add", host.namespace)
            stack.callback(ip, "netns", "delete", host.namespace)
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, tap)
            fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", host.interface.encode(), TAP_WITHOUT_HEADER))
            ip("link", "set", host.interface, "netns", host.namespace)
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            ip("-n", host.namespace, "link", "set", host.interface, "up")
            taps.append(tap)
        with Cable(taps) as cable:
            yield hosts, cable
