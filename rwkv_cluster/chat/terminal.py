"""The conversation in a terminal: questions from stdin, answers on stdout as they come, commands that begin with /."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

from rwkv_cluster.chat.session import ChatSession, Thinking
from rwkv_cluster.data.inputs.bad_lines import BadLine
from rwkv_cluster.errors import ConfigError, DataError, RWKVClusterError
from rwkv_cluster.interchange.state_file import write_state
from rwkv_cluster.runtime.interrupt import listening
from rwkv_cluster.runtime.terminal.console import print_result
from rwkv_cluster.runtime.terminal.text_safety import visible

log = logging.getLogger("rwkv_cluster")

HELP = """/reset              forget what was said
/save FILE          keep the conversation as a state, from which chat --state FILE goes on
/think on|off|auto  begin answers with thinking, without, or as the model likes
/exit               end; Ctrl-D does too
Ctrl-C stops an answer. A line that ends with \\ goes on in the next."""
WHY = {
    "too long": "the answer has as many tokens as --tokens allows",
    "nothing": "no answer; the question is forgotten",
}
"""What is told of an answer that did not end by itself."""


def converse(session: ChatSession) -> None:
    """Ask what is read from stdin until it ends, or /exit. Ctrl-C stops an answer; other signals end the command."""
    Terminal(session).run()


class Terminal:
    """One conversation at a terminal, or with a program that writes lines."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._is_reading = self._is_stopped = self._is_over = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/save": self._save,
            "/think": self._think,
            "/help": lambda _: log.info(HELP),
            "/exit": self._exit,
        }

    def run(self) -> None:
        """Read and answer until the end."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is told then
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 -- input() edits lines with it
            log.info("/help lists commands, Ctrl-C stops an answer, Ctrl-D ends")
        with listening() as listener:
            listener.answer_interrupts(self._interrupt)
            try:
                while not self._is_over:
                    self._next()
            finally:
                listener.answer_interrupts(None)

    def _next(self) -> None:
        try:
            line = self._read()
            if line.startswith("/"):
                self._command(line)
            elif line.strip():
                self._answer(line)
        except EOFError:
            self._is_over = True
            if sys.stdin.isatty():
                print_result("")
        except KeyboardInterrupt:
            self._is_reading = False
            print_result("")
            log.info("/exit or Ctrl-D ends")
        except BadLine as error:
            log.warning("the question %s. %s", error, error.remedy)
        except (DataError, ConfigError) as error:
            log.warning("%s", error)

    def _interrupt(self) -> None:
        if self._is_reading:
            raise KeyboardInterrupt  # nothing else ends the wait for a line
        self._is_stopped = True

    def _read(self) -> str:
        """One question or command. Raises EOFError where there are no more, KeyboardInterrupt."""
        self._is_reading = True
        try:
            return _read_line()
        finally:
            self._is_reading = False

    def _answer(self, question: str) -> None:
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise DataError("the question is no UTF-8 text", remedy="Check the terminal's encoding") from error
        self._is_stopped = False
        for part in self._session.ask(question, lambda: self._is_stopped):
            print_result(visible(part), end="")
        print_result("\n" if sys.stdin.isatty() else "")
        if reason := WHY.get(self._session.ended):
            log.info("(%s)", reason)

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        if name not in self._commands:
            raise ConfigError(f"{name} is no command", remedy=f"There are {', '.join(self._commands)}")
        self._commands[name](argument.strip())

    def _reset(self, _: str) -> None:
        self._session.reset()
        log.info("forgotten")

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs the name of a file")
        try:
            write_state(Path(name).expanduser(), self._session.named_state())
        except RWKVClusterError as error:
            log.warning("%s", error)
        else:
            log.info("saved: rwkv-cluster chat ... --state %s goes on from here", name)

    def _think(self, choice: str) -> None:
        if choice not in get_args(Thinking):
            raise ConfigError(f"/think is '{choice}', expected one of: {', '.join(get_args(Thinking))}")
        self._session.set_thinking(cast(Thinking, choice))

    def _exit(self, _: str) -> None:
        self._is_over = True


def _read_line() -> str:
    """Lines of stdin that belong together. Raises EOFError where there are no more."""
    lines = [_read_part("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_read_part(". "))
    return "\n".join(lines)


def _read_part(prompt: str) -> str:
    if sys.stdin.isatty():
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
