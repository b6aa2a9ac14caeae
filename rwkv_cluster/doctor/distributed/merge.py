"""One table from those of all ranks: what is the same stands once, what differs says where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rwkv_cluster.doctor.checks.host import numbers
from rwkv_cluster.doctor.results import Row


@dataclass(frozen=True)
class Report:
    """What one rank found on its machine."""

    host: str
    rows: list[Row]


def merged(reports: Mapping[int, Report]) -> list[Row]:
    """The rows of all ranks, by name in the order of rank 0's. Of measurements alike but for the figure, the least."""
    names = dict.fromkeys(row.name for rank in sorted(reports) for row in reports[rank].rows)
    return [row for name in names for row in _of_name(name, reports)]


def who(ranks: Sequence[int], reports: Mapping[int, Report]) -> str:
    """`rank 3 on node2`, or `ranks 2-3 on node1, node2`."""
    hosts = ", ".join(dict.fromkeys(reports[rank].host for rank in ranks))
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers(list(ranks))} on {hosts}"


def _of_name(name: str, reports: Mapping[int, Report]) -> list[Row]:
    groups: dict[tuple[str, ...], dict[int, list[Row]]] = {}
    for rank in sorted(reports):
        for row in reports[rank].rows:
            if row.name == name:
                alike = (row.state, row.remedy, row.text if row.figure is None else "")
                groups.setdefault(alike, {}).setdefault(rank, []).append(row)
    merged_rows = []
    for by_rank in groups.values():
        every = [(row.figure or 0.0, rank, row) for rank, rows in by_rank.items() for row in rows]
        _, least, row = min(every, key=lambda entry: entry[:2])
        if row.figure is not None and len(every) > 1:
            row = replace(row, text=f"{row.text} (the least of {len(every)}: {who([least], reports)})")
        merged_rows.append(row if len(groups) == 1 else replace(row, where=who(list(by_rank), reports)))
    return merged_rows
