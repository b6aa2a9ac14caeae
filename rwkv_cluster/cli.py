"""The command line: argv -> one verb -> its result on stdout, and an exit code.

stdout is for results, stderr for people. An error of ours is one sentence and its exit code; any other
exception keeps its traceback and says that it is a bug. Nothing heavy is imported before the verb is known.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO

from rwkv_cluster.errors import EXIT_CODES, ConfigError, Interrupted, Preempted, RWKVClusterError
from rwkv_cluster.runtime.exit_report import loses_exit_codes, redirect_output_to_rank_log, report_exit
from rwkv_cluster.runtime.interrupt import listening
from rwkv_cluster.runtime.own_file import reason
from rwkv_cluster.runtime.rank_env import die_with_launcher, message_prefix, rank
from rwkv_cluster.runtime.terminal.console import log_to_stderr, print_result
from rwkv_cluster.runtime.terminal.text_safety import visible

VERBS: dict[str, str] = {
    "prepare": "tokenize the data into WORK_DIR/data; needs no GPU",
    "init": "write the initial weights, WORK_DIR/out/rwkv-init.pth",
    "train": "prepare and initialise what is missing, then train; the same command again continues",
    "launch": "start the run on its target: here, torchrun, deepspeed, a container or Slurm",
    "status": "what a run is doing: who holds it, its step, losses, checkpoint, time left and launch",
    "report": "one HTML page and pictures of what a run, or several, have done",
    "logs": "what the newest launch of a work directory says",
    "cancel": "end the newest launch of a work directory after a checkpoint",
    "generate": "continue a text with a trained model",
    "eval": "loss, perplexity and bits per byte on the validation file",
    "consolidate": "write the weights of a checkpoint, by however many ranks it was saved, as one .pth",
    "inspect": "architecture and sizes of an RWKV .pth file",
    "config": "the resolved configuration, and where each value came from",
    "plan": "parameters, steps, memory, disk and time of a run, before anything runs; needs no GPU",
    "doctor": "what this machine or job has for training, and the first thing to fix",
    "bench": "measure this machine: data, wkv, step or ddp",
}
CONFIG_VERBS = ("prepare", "init", "train", "launch", "eval", "consolidate", "config", "plan", "doctor")
RANK_VERBS = ("prepare", "train", "doctor")  # that a launcher starts as ranks
TOP_LEVEL_FIELDS = ("work_dir",)  # fields outside every section; sections' fields are known by their dot

PROFILE_STEPS = 5  # of `train --profile` without a number

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
            code, message = _guarded(arguments)
    except Interrupted as error:
        code, message = _interrupted(error, arguments)
    report_exit(code, message)
    for stream in (sys.stdout, sys.stderr):
        _settle(stream)
    return code


def _interrupted(error: Interrupted, argv: list[str]) -> tuple[int, str]:
    """Exit code and sentence. A `train` that a signal has ended before its steps is preempted, like one in them."""
    preempted = argv[:1] == ["train"] and not error.insisted
    message = f"{error}. The same command again continues" if argv[:1] == ["train"] else str(error)
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


def _guarded(argv: list[str]) -> tuple[int, str]:
    """Exit code, and for an error of ours its sentence."""
    try:
        die_with_launcher()
        if argv[:1] and argv[0] in RANK_VERBS:
            redirect_output_to_rank_log()
        with log_to_stderr():
            return _run(argv), ""
    except SystemExit as error:  # argparse: --help or a malformed command line
        return error.code if isinstance(error.code, int) else 1, ""
    except RWKVClusterError as error:
        _complain(f"error: {error}")
        if isinstance(error, Preempted) and rank() == 0 and loses_exit_codes():
            _complain("torchrun makes exit code 1 of this 75. `rwkv-cluster launch --target torchrun` passes it on")
        return error.exit_code, str(error)
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


def _run(argv: list[str]) -> int:
    verb = argv[0] if argv else ""
    if verb and not verb.startswith("-") and verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        nearest = f"Nearest: {near[0]}" if near else f"Verbs: {', '.join(VERBS)}"
        raise ConfigError(f"'{verb}' is not a verb. {nearest}")
    argv, overrides = split_overrides(argv) if verb in CONFIG_VERBS else (argv, [])
    options, extra = build_parser().parse_known_args(argv)
    if options.version:
        from rwkv_cluster import __version__

        print_result(f"rwkv-cluster {__version__}")
        return 0
    if not options.verb:
        raise ConfigError(f"no verb given. Verbs: {', '.join(VERBS)}; --help explains them")
    if extra and options.verb != "bench":
        raise ConfigError(_unknown_option(extra[0], options.verb))
    if rank() > 0 and options.verb not in RANK_VERBS:
        logging.getLogger("rwkv_cluster").info("%s is rank 0's alone: nothing to do here", options.verb)
        return 0
    from rwkv_cluster import commands

    report = commands.run(options, overrides, extra)
    if rank() == 0 and (report.text or options.json):
        text = visible(report.text.rstrip("\n"))
        print_result(json.dumps(report.data, indent=2, default=str) if options.json else text)
    if report.error is not None:
        raise report.error
    return report.code


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
    """The parser of everything but overrides. Importing nothing heavy, it answers `--help` at once."""
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
    by_verb = {
        verb: subparsers.add_parser(verb, help=text, description=f"{text}.", allow_abbrev=False)
        for verb, text in VERBS.items()
    }
    for verb, subparser in by_verb.items():
        subparser.add_argument("--json", action="store_true", help="print the result as JSON")
        if verb in CONFIG_VERBS:
            count = "?" if verb == "doctor" else None
            what = "YAML file, shipped recipe, or WORK_DIR"
            subparser.add_argument("config", metavar="CONFIG", nargs=count, help=what)
            subparser.epilog = "Any field may be set with --section.field=value."
    plan = by_verb["plan"]
    plan.add_argument("--ranks", metavar="N", help="instead of those that launch or training.devices give")
    plan.add_argument("--gpu", metavar="NAME", help="its memory and peak, such as h100, a100-80gb or rtx-4090")
    plan.add_argument("--gpu-memory-gb", metavar="G", help="say what fits into so many 10^9 bytes")
    plan.add_argument("--tokens-per-s", metavar="X", help="speed of all ranks together")
    plan.add_argument("--mfu", metavar="F", help="speed as a share of the peak, such as 0.4")
    plan.add_argument("--peak-tflops", metavar="P", help="10^12 operations per second of one GPU, dense bf16")
    launch = by_verb["launch"]
    launch.add_argument("--target", metavar="T", help="instead of the file's launch.target")
    launch.add_argument("--dry-run", action="store_true", help="print the script, start and write nothing")
    launch.add_argument("--doctor", action="store_true", help="start `rwkv-cluster doctor` there instead of training")
    for verb in ("status", "logs", "cancel"):
        by_verb[verb].add_argument("work_dir", metavar="WORK_DIR", help="the directory of the run")
    by_verb["status"].add_argument(
        "--verify", action="store_true", help="read every byte of newest checkpoint and data"
    )
    by_verb["report"].add_argument("work_dirs", nargs="+", metavar="WORK_DIR", help="one, or several to compare")
    by_verb["report"].add_argument("--output", metavar="DIR", help="default: WORK_DIR/report, of the first")
    by_verb["logs"].add_argument("-f", "--follow", action="store_true", help="until the launch has ended")
    by_verb["logs"].add_argument("--rank", type=int, metavar="N", help="only what this rank says")
    by_verb["cancel"].add_argument("--now", action="store_true", help="without waiting for a checkpoint")
    by_verb["train"].add_argument(
        "--profile",
        type=_profile_steps,
        nargs="?",
        const=PROFILE_STEPS,
        metavar="STEPS",
        help="see logging.profile_steps; default 5",
    )
    by_verb["init"].add_argument("--force", action="store_true", help="replace weights that exist")
    by_verb["eval"].add_argument("--weights", metavar="PTH", help="weights to use instead of the run's newest")
    by_verb["consolidate"].add_argument("--step", type=int, metavar="N", help="of the checkpoint; default the newest")
    by_verb["inspect"].add_argument("path", metavar="PTH", help="an RWKV weights file")
    generate = by_verb["generate"]
    generate.add_argument("source", metavar="WORK_DIR_OR_PTH", help="a run's directory, or a weights file in one")
    generate.add_argument("--prompt", default="", help="text to continue")
    generate.add_argument("--tokens", type=int, default=200, metavar="N", help="at most N tokens (default 200)")
    generate.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest (default 1)")
    generate.add_argument("--top-p", type=float, default=0.85, help="share of likely tokens kept (default 0.85)")
    generate.add_argument("--tokenizer", metavar="TYPE", help="of a weights file outside a work directory")
    generate.add_argument("--vocab-file", metavar="PATH", help="vocabulary of --tokenizer generic")
    generate.add_argument("--output", metavar="FILE", help="write the text as it is, instead of showing it")
    generate.add_argument("--seed", type=int, default=0, help="seed of the choice (default 0)")
    by_verb["bench"].add_argument("what", metavar="{data,wkv,step,ddp}", choices=("data", "wkv", "step", "ddp"))
    by_verb["bench"].epilog = "Further arguments go to the benchmark."
    return parser


def _profile_steps(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps. Write CONFIG before it") from None


def _unknown_option(argument: str, verb: str) -> str:
    name = argument.removeprefix("--").partition("=")[0]
    if verb in CONFIG_VERBS and argument.startswith("--"):
        from rwkv_cluster.config import Config
        from rwkv_cluster.config.field_types import unknown_field

        sentence = unknown_field(Config, "", name.replace("-", "_")).partition(". ")[2]
        return f"{argument} is not an option of {verb}. {sentence}"
    return f"{argument} is not an argument of {verb}. See rwkv-cluster {verb} --help"


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
