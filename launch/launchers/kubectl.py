"""kubectl: what it is asked about a launch, and what it says of pods."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster.config import Config
from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.launch_folder import KUBERNETES
from rwkv_cluster.launch.launchers.kubernetes_manifests import MAIN, RESOURCES, RUN_LABEL, object_name
from rwkv_cluster.runtime.own_file import read_own
from rwkv_cluster.workdir import atomic_write

TIMEOUT_S = 60
OVERLAP_S = 60  # by which two reads of the logs overlap, for lines that come late
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,252}")
_CONTEXT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@-]{0,252}")
_LINE = re.compile(r"\[pod/([^/\]]+)/[^\]]+\] (\S+) ?(.*)")
_KLOG = re.compile(r"[IWEF]\d{4} ")  # the client library's own log
_RANK = re.compile(r"\[rank (\d+)\] ")


@dataclass(frozen=True)
class Workload:
    """The object that a launch has made. context, namespace: None where they are kubectl's own."""

    kind: str
    name: str
    context: str | None = None
    namespace: str | None = None

    @classmethod
    def of(cls, config: Config) -> Workload:
        """That of a configuration."""
        kubernetes = config.launch.kubernetes
        return cls(kubernetes.kind, object_name(config), kubernetes.context, kubernetes.namespace)

    @classmethod
    def read(cls, folder: Path) -> Workload:
        """That of a launch directory. Raises LaunchError where there is none, or no sound one."""
        path = folder / KUBERNETES
        try:
            found = cls(**json.loads(read_own(path)))
        except FileNotFoundError:
            raise LaunchError(f"{folder}: nothing was submitted from here") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise LaunchError(f"{path} cannot be read: it is not what a launch has left there") from error
        names = ((found.name, _NAME), (found.context or "x", _CONTEXT), (found.namespace or "x", _NAME))
        sound = all(isinstance(text, str) and pattern.fullmatch(text) for text, pattern in names)
        if found.kind not in RESOURCES or not sound:
            raise LaunchError(f"{path} does not say what was submitted")
        return found

    def write(self, folder: Path) -> None:
        """Leave it in a launch directory."""
        atomic_write(folder / KUBERNETES, json.dumps(asdict(self)).encode())

    @property
    def resource(self) -> str:
        """Type of the object, as kubectl has it."""
        return RESOURCES[self.kind]

    @property
    def pods(self) -> str:
        """Option that selects what the launch has made."""
        return f"--selector={RUN_LABEL}={self.name}"

    def argv(self, *words: str) -> tuple[str, ...]:
        """kubectl with these words, in the cluster and the namespace."""
        where = [f"--context={self.context}"] if self.context else []
        where += [f"--namespace={self.namespace}"] if self.namespace else []
        return ("kubectl", *where, *words)

    def kubectl(self, *words: str, folder: Path | None = None) -> str:
        """What kubectl prints. folder: to run in. Raises LaunchError where it is not here, is refused or fails."""
        try:
            done = subprocess.run(
                self.argv(*words), cwd=folder, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
            )
        except OSError:
            raise LaunchError("kubectl is not here", remedy="Install it, or use a machine that has it") from None
        except subprocess.TimeoutExpired:
            raise LaunchError(f"kubectl {words[0]} gave no answer for {TIMEOUT_S} s", remedy=_CLUSTER) from None
        if done.returncode:
            said = " ".join(line for line in done.stderr.splitlines() if not _KLOG.match(line)).split()
            answer = " ".join(said)[:800].rstrip(".") or f"exit code {done.returncode}"
            raise LaunchError(f"kubectl {words[0]} failed: {answer}", remedy=_CLUSTER)
        return done.stdout

    def get(self) -> dict[str, Any] | None:
        """The object as the cluster has it; None where it has none. Raises LaunchError."""
        text = self.kubectl("get", self.resource, self.name, "--ignore-not-found", "--output=json")
        return dict(json.loads(text)) if text.strip() else None

    def phases(self) -> tuple[Counter[str], list[str]]:
        """How many pods are in which phase, and what is to be said of single ones. Raises LaunchError."""
        pods = json.loads(self.kubectl("get", "pods", self.pods, "--output=json"))["items"]
        phases = Counter(str(pod.get("status", {}).get("phase", "Unknown")) for pod in pods)
        return phases, sorted(remark for pod in pods if (remark := _remark(pod)))


_CLUSTER = "If that is not the cluster that you mean, look at launch.kubernetes.context and namespace"


def _remark(pod: Mapping[str, Any]) -> str:
    """Why a pod waits, or how its container failed; empty where all is well."""
    status = pod.get("status", {})
    remarks = []
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            remarks.append(str(condition.get("message") or condition.get("reason")))
    for container in status.get("containerStatuses", []):
        state = container.get("state", {})
        if reason := state.get("waiting", {}).get("reason"):
            remarks.append(str(reason))
        if (ended := state.get("terminated")) and ended.get("exitCode"):
            last = (str(ended.get("message") or "").strip().splitlines() or [""])[-1]
            remarks.append(f"exit code {ended['exitCode']}" + (f", {last[:300]}" if last else ""))
    return " ".join(f"{pod['metadata']['name']}: {'; '.join(remarks)}".split()) if remarks else ""


class PodLogs:
    """What the pods of a launch say: of one rank, or the first rank and the launchers of all."""

    def __init__(self, workload: Workload, rank: int | None) -> None:
        self._workload = workload
        self._rank = rank
        self._seen: dict[str, str] = {}  # pod -> time of its newest line
        self._read_at = 0.0

    def read(self) -> Iterator[str]:
        """New lines, pod by pod. Raises LaunchError."""
        container = MAIN[self._workload.kind]
        options = [f"--container={container}", "--prefix", "--timestamps", "--tail=-1", "--ignore-errors"]
        if self._seen:
            options.append(f"--since={time.monotonic() - self._read_at + OVERLAP_S:.0f}s")
        self._read_at = time.monotonic()
        for line in self._workload.kubectl("logs", self._workload.pods, *options).splitlines():
            match = _LINE.fullmatch(line)
            if match is None or match[2] <= self._seen.get(match[1], ""):
                continue
            pod, said_at, text = match.groups()
            self._seen[pod] = said_at
            rank = _RANK.match(text)
            if rank is None and self._rank is None:
                yield f"{text}\n"
            elif rank is not None and int(rank[1]) == (self._rank or 0):
                yield f"{text[rank.end() :]}\n"
