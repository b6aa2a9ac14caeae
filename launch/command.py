"""A command as data: argv, environment and directory. The only place that quotes for a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from rwkv_cluster.errors import LaunchError
from rwkv_cluster.runtime.terminal.plain_text import hidden_character

# Before the name of a file, in an argument: the launch directory, which is known where the agent runs.
IN_LAUNCH_FOLDER = "@launch/"
ALL_GPUS_VARIABLE = "RWKV_CLUSTER_ALL_GPUS"  # set in a container that has all of its node's GPUs, whatever the job has
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Words that bash reads as grammar when they stand first and are not quoted.
_RESERVED = re.compile("if|then|else|elif|fi|case|esac|for|select|while|until|do|done|in|function|time|coproc")


@dataclass(frozen=True)
class Command:
    """What to run, checked once: nothing in it can end a line or hide from the person who reads it.

    Attributes:
        argv: program and arguments, each passed on as exactly one literal argument.
        env: variables that are added to the environment.
        cwd: directory to run in; None: where the caller stands.

    Raises LaunchError for an empty program, a malformed variable name or a control character anywhere.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    cwd: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.argv, str):
            raise TypeError("argv is a tuple of arguments, not one string")
        object.__setattr__(self, "argv", tuple(self.argv))
        object.__setattr__(self, "env", MappingProxyType(dict(self.env)))
        if not self.argv or not self.argv[0] or self.argv[0].startswith(("-", "%")):
            raise LaunchError(f"the command {list(self.argv)!a} names no program")
        for position, argument in enumerate(self.argv):
            refuse_control_characters(argument, f"argument {position} of the command")
        for name, value in self.env.items():
            if not _VARIABLE.fullmatch(name):
                raise LaunchError(
                    f"{name!a} is not the name of an environment variable", remedy="Use letters, digits and _"
                )
            refuse_control_characters(value, f"environment variable {name}")
        if self.cwd is not None:
            refuse_control_characters(self.cwd, "the directory of the command")
            if not self.cwd:
                raise LaunchError("the directory of the command is an empty name", remedy="Leave it out or name one")

    def shell(self) -> str:
        """One line for bash or sh that does the same: `cd DIR && NAME=value program argument ...`."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        words += [_quote_program(self.argv[0]), *map(shlex.quote, self.argv[1:])]
        if self.cwd is None:
            return " ".join(words)
        # With ./ in front, CDPATH is not searched and `-` is a name.
        directory = self.cwd if self.cwd.startswith("/") else f"./{self.cwd}"
        return f"cd {shlex.quote(directory)} && {' '.join(words)}"


def refuse_control_characters(text: str, what: str) -> None:
    """Raise LaunchError, naming `what`, where `text` holds a control, invisible or undecodable character."""
    if (character := hidden_character(text)) is not None:
        raise LaunchError(
            f"{what} has {character}", remedy="Control and invisible characters are not passed to a shell"
        )


def _quote_program(program: str) -> str:
    quoted = shlex.quote(program)
    grammar = "=" in program or _RESERVED.fullmatch(program)
    return f"'{program}'" if grammar and quoted == program else quoted
