"""What a rank tells the others of itself, and how messages name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from rwkv_cluster.runtime.heartbeat import Watch

_WHEN_SET = {"written": "when set"}  # fields that are absent in the file while they are None


@dataclass(frozen=True)
class SessionStart:
    """What rank 0 has found for all ranks to train on."""

    data: str
    """Fingerprint of the data."""

    step: int
    """Step of the checkpoint that is continued, 0 at the beginning."""

    group: str
    """Name of the process group."""

    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `model`, as rank 0 has resolved them."""

    grad_cp: int = 1
    """training.grad_cp, as rank 0 has resolved it: under ZeRO-3 all ranks gather parameters as often."""


@dataclass(frozen=True)
class RankRecord:
    """One rank's record. Fields are None where another rank's file does not say them, or is not there."""

    host: str | None = None
    """Name of the machine."""

    machine: str | None = None
    """The running kernel, see `heartbeat.machine`."""

    container: str | None = None
    """The set of process ids that the process sees."""

    pid: int | None = None
    """Process id in that set."""

    started: str | None = None
    """The kernel's tick at which the process started."""

    parent: str | None = None
    """Process id and tick of the process that started it."""

    id: str | None = None
    """Drawn anew by each process, so that no two records are alike."""

    rank: int | None = None

    step: int | None = None
    """Optimizer steps done; None before training."""

    state: Literal["running", "ended", "failed"] | None = None

    doing: str | None = None
    """The activity of the main thread: "computing"."""

    beats: int = 0
    """Counts seconds, so that the file of a living process changes."""

    session: str | None = None
    """What all ranks do together, and for which time in this process: "train 1"."""

    data: str | None = field(default=None, metadata=_WHEN_SET)
    """Rank 0, after a preparation: fingerprint of the data."""

    initialized: bool | None = field(default=None, metadata=_WHEN_SET)
    """Rank 0: whether the initial weights are written."""

    begins: SessionStart | None = field(default=None, metadata=_WHEN_SET)
    """Rank 0, before training."""

    error: str | None = field(default=None, metadata=_WHEN_SET)
    """Name of the error's class, where the rank has failed."""

    message: str | None = field(default=None, metadata=_WHEN_SET)
    """The error's sentence."""

    quotes: int | None = field(default=None, metadata=_WHEN_SET)
    """Number of the rank whose error it repeats, where it repeats one."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> RankRecord:
        """The record in a file's content, which is empty where there is no file."""
        values = {known.name: facts[known.name] for known in fields(cls) if known.name in facts}
        if isinstance(begins := values.get("begins"), dict):
            values["begins"] = SessionStart(**begins)
        return cls(**values)

    def facts(self) -> dict[str, Any]:
        """The inverse of `of`: the content of the file."""
        left_out = {known.name for known in fields(self) if known.metadata and getattr(self, known.name) is None}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @property
    def name(self) -> str:
        """Rank, host and process, as the beginning of a sentence."""
        return f"rank {self.rank} on {self.host}, process {self.pid},"

    @property
    def name_and_step(self) -> str:
        """The name with the last finished step, where there is one."""
        return self.name + (f" last finished step {self.step}," if self.step is not None else "")


def record_of(watch: Watch) -> RankRecord:
    """The record that a watch has read last."""
    return RankRecord.of(watch.record)


def describe_dead(watch: Watch) -> str:
    """What is said of a rank whose process is gone."""
    return f"{record_of(watch).name_and_step} exited without reporting an error. See its log and `dmesg`"


def describe_silent(watch: Watch) -> str:
    """What is said of a rank whose record does not change."""
    return f"{record_of(watch).name_and_step} has not updated its heartbeat for {watch.still_s:.0f} s"


def describe_late(watch: Watch) -> str:
    """What is said of a rank that lives and keeps the others waiting."""
    record = record_of(watch)
    return f"{record.name_and_step} is running but has not reached the next collective: it is {record.doing}"
