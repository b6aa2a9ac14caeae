"""What a command of `rwkv-cluster` consists of, and what it answers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rwkv_cluster.errors import RWKVClusterError


@dataclass(frozen=True)
class Result:
    """Answer of a command.

    Attributes:
        text: for people; empty prints nothing.
        data: the same for `--json`.
        code: exit code.
        error: raised once text or data is printed.
        coloured: what a terminal gets in place of text; nothing in it commands a terminal but its colours.
    """

    text: str
    data: Any
    code: int = 0
    error: RWKVClusterError | None = None
    coloured: str = ""


def add_nothing(parser: ArgumentParser) -> None:
    """Leave the parser of a command without arguments of its own as it is."""


@dataclass(frozen=True)
class Subcommand:
    """One command.

    Attributes:
        name: as the user types it.
        help: one line of `rwkv-cluster --help`; with a full stop, the description of the command's own help.
        run: carries the command out. The options also hold `overrides`, the `section.field=value` of the command
            line, and `extra`, arguments that the parser does not know. Raises the library's errors.
        add_arguments: gives the parser what is the command's own, besides --json and CONFIG.
        config: whether the command takes a CONFIG, and overrides with it.
        runs_on_ranks: whether a launcher starts it as ranks; any other command is rank 0's alone.
        continues: whether the same command continues what a signal has ended before its first step.
        takes_extra: whether arguments that the parser does not know are the command's own.
    """

    name: str
    help: str
    run: Callable[[Namespace], Result]
    add_arguments: Callable[[ArgumentParser], None] = add_nothing
    config: Literal["none", "optional", "required"] = "none"
    runs_on_ranks: bool = False
    continues: bool = False
    takes_extra: bool = False

    @property
    def takes_config(self) -> bool:
        """Whether CONFIG, and overrides of its fields, may be given."""
        return self.config != "none"
