"""new: a file for a run, with the reason for every choice."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from rwkv_cluster.commands.subcommand import Result, Subcommand
from rwkv_cluster.errors import ConfigError, DataError, MissingCheckpointError

TASKS = "sft, lora, state, continue or pretrain"
QUESTIONS = {
    "task": f"task, one of {TASKS}",
    "base": "weights to begin from, a file or folder; for pretrain a released size such as 0.4b",
    "data": "data, a file or folder",
    "gpu": "GPU, such as rtx-4090 or h100",
}
"""What has to be known, in the order in which it is asked for."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _add_new_arguments(parser: argparse.ArgumentParser) -> None:
    for name, words in QUESTIONS.items():
        parser.add_argument(f"--{name}", help=words)
    parser.add_argument("--nodes", default="1", metavar="N", help="machines; default 1")
    parser.add_argument("--gpus", default="1", metavar="N", help="GPUs on each; default 1")
    parser.add_argument("--time", metavar="T", help="when the run is to be over, such as 12h or 2d")
    parser.add_argument("--output", default="run.yaml", metavar="FILE", help="default run.yaml")


def new(options: argparse.Namespace) -> Result:
    """A commented YAML file of a run that fits the GPU."""
    from rwkv_cluster.planning.new_run import Choice, new_run
    from rwkv_cluster.workdir import write_output

    output = Path(options.output)
    if output.exists():
        raise ConfigError(f"{output} exists", remedy="Name another file by --output")
    answers = {name: getattr(options, name) or _asked(name) for name in QUESTIONS}
    if not Path(answers["data"]).exists():
        raise DataError(f"--data is {answers['data']}, and there is no such file or folder", remedy="Correct the path")
    if answers["task"] != "pretrain" and not Path(answers["base"]).exists():
        raise MissingCheckpointError(
            f"--base is {answers['base']}, and there is no such file or folder",
            remedy="Name downloaded weights; only pretrain takes a size alone",
        )
    choice = Choice(
        **answers,
        nodes=_count("--nodes", options.nodes),
        gpus=_count("--gpus", options.gpus),
        time_s=_seconds(options.time),
        work_dir=f"work/{output.stem}",
    )
    text, found = new_run(choice)
    write_output(output, text)
    verb = "launch" if choice.nodes > 1 else "train"
    lines = [f"{output}: {found.winner.name}", f"next       rwkv-cluster {verb} {output}"]
    return Result("\n".join(lines), {"path": str(output), "fit": found.data()})


def _asked(name: str) -> str:
    """The user's answer on a terminal. Raises ConfigError where there is none to ask."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError(f"--{name} is not given", remedy=f"Name the {QUESTIONS[name]}")
    print(f"{QUESTIONS[name]}: ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip()
    if not answer:
        raise ConfigError(f"--{name} is not given", remedy=f"Name the {QUESTIONS[name]}")
    return answer


def _count(option: str, text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise ConfigError(f"{option} is {text[:40]!a}, expected an integer from 1 to 9,999")
    return int(text)


def _seconds(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text)
    if match is None:
        raise ConfigError(f"--time is {text[:40]!a}, expected a number with its unit, such as 90m, 12h or 2d")
    return int(match[1]) * _UNITS[match[2]]


NEW = Subcommand(
    "new",
    "write a run's file for weights, data and a GPU, with a reason for every choice",
    new,
    _add_new_arguments,
)
