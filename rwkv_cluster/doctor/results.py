"""A row of the table: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rwkv_cluster import errors
from rwkv_cluster.errors import RWKVClusterError

State = Literal["ok", "note", "warning", "problem"]
_KINDS: dict[int, type[RWKVClusterError]] = {
    kind.exit_code: kind
    for kind in (
        errors.ConfigError,
        errors.DataError,
        errors.CheckpointError,
        errors.KernelError,
        errors.LaunchError,
    )
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    state: ok; note, where something is missing that nothing asks for; warning, where training works but worse;
    problem, where it does not. remedy: what to do. exit_code: of a problem, else 0. figure: of a measurement, larger
    is better. where: the ranks that found it, where ranks differ.
    """

    name: str
    state: State
    text: str
    remedy: str = ""
    exit_code: int = 0
    figure: float | None = None
    where: str = ""

    @property
    def sentence(self) -> str:
        """Text and remedy in one sentence, as an error says it."""
        place = f"{self.where}: " if self.where else ""
        return place + ". ".join(filter(None, (self.text, self.remedy)))


def ok(name: str, text: str, figure: float | None = None) -> Row:
    return Row(name, "ok", text, figure=figure)


def note(name: str, text: str, remedy: str = "") -> Row:
    return Row(name, "note", text, remedy)


def warning(name: str, text: str, remedy: str, figure: float | None = None) -> Row:
    return Row(name, "warning", text, remedy, figure=figure)


def problem(name: str, text: str, remedy: str, kind: type[RWKVClusterError]) -> Row:
    return Row(name, "problem", text, remedy, kind.exit_code)


def refused(name: str, error: RWKVClusterError) -> Row:
    """The problem that an error of ours describes."""
    place = f"{error.where}: " if error.where else ""
    return Row(name, "problem", f"{place}{error.what}", error.remedy, error.exit_code)


def first_problem(rows: Sequence[Row]) -> RWKVClusterError | None:
    """What is to be fixed first; None where training can start."""
    for row in rows:
        if row.state == "problem":
            return _KINDS.get(row.exit_code, RWKVClusterError)(row.text, where=row.where, remedy=row.remedy)
    return None


def table(rows: Sequence[Row]) -> str:
    """The rows for people; what to do stands below what was found."""
    width = max((len(row.name) for row in rows), default=0)
    lines = []
    for row in rows:
        place = f"{row.where}: " if row.where else ""
        lines.append(f"{row.state:<7}  {row.name:<{width}}  {place}{row.text}")
        if row.remedy:
            lines.append(f"{'':<7}  {'':<{width}}  do: {row.remedy}")
    return "\n".join(lines)


def data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for --json."""
    return [asdict(row) for row in rows]
