"""The command line: argv -> one command -> its result on stdout, and an exit code.

stdout is for results, stderr for people. An error of ours is one sentence and its exit code; any other
exception keeps its traceback and says that it is a bug. Nothing heavy is imported before the command is known.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO

from rwkv_cluster.commands import COMMANDS
from rwkv_cluster.commands.subcommand import Subcommand
from rwkv_cluster.errors import EXIT_CODES, ConfigError, Interrupted, Preempted, RWKVClusterError
from rwkv_cluster.runtime.exit_report import loses_exit_codes, redirect_output_to_rank_log, report_exit
from rwkv_cluster.runtime.interrupt import listening
from rwkv_cluster.runtime.own_file import reason
from rwkv_cluster.runtime.rank_env import die_with_launcher, message_prefix, rank
from rwkv_cluster.runtime.terminal.console import log_to_stderr, print_result
from rwkv_cluster.runtime.terminal.nearest import suggestion
from rwkv_cluster.runtime.terminal.text_safety import visible

TOP_LEVEL_FIELDS = ("work_dir",)  # fields outside every section; sections' fields are known by their dot

INTERRUPTED = 130  # as a shell reports SIGINT
BROKEN_PIPE = 141  # as a shell reports SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` is without the program's name. Returns the exit code and never raises."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    arguments = list(sys.argv[1:] if argv is None else argv)

    def on_end(error: Interrupted) -> int:
        code, message = _interrupted(error, arguments)
        report_exit(code, message)
        return code

    try:
        with listening(on_end):
            code, failure = _guarded(arguments)
    except Interrupted as error:
        code, failure = _interrupted(error, arguments)
    report_exit(code, failure)
    for stream in (sys.stdout, sys.stderr):
        _settle(stream)
    return code


def _interrupted(error: Interrupted, argv: list[str]) -> tuple[int, str]:
    """Exit code and sentence. A run that a signal has ended before its steps is preempted, like one in them."""
    command = _command(argv)
    continues = command is not None and command.continues
    preempted = continues and not error.insisted
    message = f"{error}. The same command again continues" if continues else str(error)
    _complain(message)
    return (Preempted.exit_code if preempted else error.exit_code), message


def _open_closed_streams() -> None:
    """Put nothing where the caller has closed stdin, stdout or stderr.

    A file of the run would get the free number otherwise, and what a library says on stderr would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _guarded(argv: list[str]) -> tuple[int, RWKVClusterError | str]:
    """Exit code, and why it is not 0."""
    try:
        die_with_launcher()
        command = _command(argv)
        if command is not None and command.runs_on_ranks:
            redirect_output_to_rank_log()
        with log_to_stderr():
            return _run(argv), ""
    except SystemExit as error:  # argparse: --help or a malformed command line
        return error.code if isinstance(error.code, int) else 1, ""
    except RWKVClusterError as error:
        _complain(f"error: {error}")
        if isinstance(error, Preempted) and rank() == 0 and loses_exit_codes():
            _complain("torchrun makes exit code 1 of this 75. `rwkv-cluster launch --target torchrun` passes it on")
        return error.exit_code, error
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED, "interrupted"
    except BrokenPipeError:  # `rwkv-cluster config x.yaml | head`
        return BROKEN_PIPE, ""
    except Exception as error:
        if isinstance(error, PermissionError) and error.filename is not None:
            message = f"{reason(error)}. Ask for access, or name another place"
            _complain(f"error: {message}")
            return ConfigError.exit_code, message
        with contextlib.suppress(OSError):
            sys.stderr.write(visible(traceback.format_exc()))
        _complain("this is a bug in rwkv-cluster: please report it with the text above")
        return 1, f"{type(error).__name__}: {error}"


def _command(argv: Sequence[str]) -> Subcommand | None:
    """The command that comes first in `argv`; None where something else does."""
    return COMMANDS.get(argv[0]) if argv else None


def _run(argv: list[str]) -> int:
    verb, command = argv[0] if argv else "", _command(argv)
    if verb and not verb.startswith("-") and command is None:
        raise ConfigError(f"'{verb}' is not a verb", remedy=suggestion(verb, COMMANDS, "Verbs"))
    overrides: list[str] = []
    if command is not None and command.takes_config:
        argv, overrides = split_overrides(argv)
    options, extra = build_parser().parse_known_args(argv, argparse.Namespace(overrides=overrides))
    if options.version:
        from rwkv_cluster import __version__

        print_result(f"rwkv-cluster {__version__}")
        return 0
    if not options.verb:
        raise ConfigError("no verb given", remedy=f"Verbs: {', '.join(COMMANDS)}; --help explains them")
    return _dispatch(COMMANDS[options.verb], options, extra)


def _dispatch(command: Subcommand, options: argparse.Namespace, extra: list[str]) -> int:
    """Run `command` and print its result. Returns the exit code."""
    if extra and not command.takes_extra:
        raise ConfigError(_unknown_option(extra[0], command))
    if rank() > 0 and not command.runs_on_ranks:
        logging.getLogger("rwkv_cluster").info("%s is rank 0's alone: nothing to do here", command.name)
        return 0
    options.extra = extra
    result = command.run(options)
    if rank() == 0 and (result.text or options.json):
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        text = (result.coloured if on_terminal else "") or visible(result.text.rstrip("\n"))
        print_result(json.dumps(result.data, indent=2, default=str) if options.json else text)
    if result.error is not None:
        raise result.error
    return result.code


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments without the overrides, and the overrides as `section.field=value`.

    An override is `--section.field=value` or `--section.field value`, or the same for a top-level field.
    Raises ConfigError for an override without a value.
    """
    rest: list[str] = []
    overrides: list[str] = []
    remaining = iter(argv)
    for argument in remaining:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--":
            rest += [argument, *remaining]
        elif not argument.startswith("--") or ("." not in name and name not in TOP_LEVEL_FIELDS):
            rest.append(argument)
        elif equals:
            overrides.append(f"{name}={value}")
        else:
            following = next(remaining, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name}=VALUE")
            overrides.append(f"{name}={following}")
    return rest, overrides


def build_parser() -> argparse.ArgumentParser:
    """Parser of everything but overrides, made from the commands' rows."""
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="rwkv-cluster",
        description="Train RWKV-5, RWKV-6 and RWKV-7 from one YAML file.",
        epilog="Overrides, anywhere after a verb that takes CONFIG: --section.field=value, as in the file;\n"
        f"lists as '[a, b]'. WORK_DIR stands for its configs/config.yaml.\n\nexit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for command in COMMANDS.values():
        subparser = subparsers.add_parser(
            command.name, help=command.help, description=f"{command.help}.", allow_abbrev=False
        )
        subparser.add_argument("--json", action="store_true", help="print the result as JSON")
        if command.takes_config:
            count = "?" if command.config == "optional" else None
            what = "YAML file, shipped recipe, or WORK_DIR"
            subparser.add_argument("config", metavar="CONFIG", nargs=count, help=what)
            subparser.epilog = "Any field may be set with --section.field=value."
        command.add_arguments(subparser)
    return parser


def _unknown_option(argument: str, command: Subcommand) -> str:
    name = argument.removeprefix("--").partition("=")[0]
    if command.takes_config and argument.startswith("--"):
        from rwkv_cluster.config import Config
        from rwkv_cluster.config.field_types import nearest_field

        nearest = nearest_field(Config, "", name.replace("-", "_"))
        return f"{argument} is not an option of {command.name}. {nearest}"
    return f"{argument} is not an argument of {command.name}. See rwkv-cluster {command.name} --help"


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr any more: the exit code still tells
        print(f"rwkv-cluster: {visible(message_prefix() + message)}", file=sys.stderr, flush=True)


def _settle(stream: TextIO) -> None:
    """Flush; where that fails, let the interpreter's last flush go nowhere: it would report the failure once more."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
