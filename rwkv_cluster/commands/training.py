"""prepare, init, train, branch, eval, consolidate and average: the data, weights and steps of a run."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_cluster.commands.loading import importing_torch, named_config, trusted_config
from rwkv_cluster.commands.subcommand import Result, Subcommand
from rwkv_cluster.errors import DataError
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.runtime.terminal.text_safety import visible

if TYPE_CHECKING:
    from rwkv_cluster.config import Config
    from rwkv_cluster.data.manifest import DataManifest

PROFILE_STEPS = 5  # of `train --profile` without a number


def prepare(options: argparse.Namespace) -> Result:
    """Tokenize the data into the work directory."""
    config = trusted_config(options)
    with importing_torch():
        from rwkv_cluster.train.run import prepare_data

    manifest = prepare_data(config)
    amount = f"{manifest.n_tokens:,} tokens in {manifest.n_documents:,} documents ({manifest.dtype})"
    text, data = f"{amount}, in {config.work_dir}/data", manifest.model_dump(mode="json")
    if manifest.packing is not None:
        text += f"\n{manifest.packing.in_words()}"
    if manifest.n_trained is None:
        return Result(text, data)
    share = f"{manifest.n_trained:,} tokens, {manifest.n_trained / manifest.n_tokens:.0%}, are trained on"
    left_out = f"; {manifest.n_bad_lines:,} lines were left out" if manifest.n_bad_lines else ""
    text += f"\n{share}{left_out}\n\nThe first document, with what is trained on in"
    brackets, green = _first_document(config, manifest)
    return Result(f"{text} [[ ]]:\n\n{brackets}", data, coloured=f"{visible(text)} green:\n\n{green}")


def _first_document(config: Config, manifest: DataManifest) -> tuple[str, str]:
    """What is trained on in it in brackets, and in green."""
    from rwkv_cluster.data.conversations.show import BRACKETS, GREEN, first_document
    from rwkv_cluster.data.run_tokenizer import tokenizer_of_run
    from rwkv_cluster.workdir import WorkDir

    data = WorkDir(config.work_dir).data
    tokenizer = tokenizer_of_run(config.data.tokenizer, data)
    prefix = manifest.token_prefix(data)
    return first_document(prefix, tokenizer, BRACKETS), first_document(prefix, tokenizer, GREEN)


PREPARE = Subcommand(
    "prepare",
    "tokenize the data into WORK_DIR/data; needs no GPU",
    prepare,
    config="required",
    runs_on_ranks=True,
)


def _add_init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace weights that exist")


def init(options: argparse.Namespace) -> Result:
    """Write the initial weights."""
    config = trusted_config(options)
    with importing_torch():
        from rwkv_cluster.train.run import initialize

    path = initialize(config, force=options.force)
    return Result(str(path), {"path": str(path)})


INIT = Subcommand(
    "init",
    "write the initial weights, WORK_DIR/out/rwkv-init.pth",
    init,
    _add_init_arguments,
    config="required",
)


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        type=_profile_steps,
        nargs="?",
        const=PROFILE_STEPS,
        metavar="STEPS",
        help="see logging.profile_steps; default 5",
    )


def _profile_steps(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps. Write CONFIG before it") from None


def train(options: argparse.Namespace) -> Result:
    """Train to the end of the run, from wherever it stands."""
    from rwkv_cluster.config.recipes import tokenizer_options
    from rwkv_cluster.launch.command import Command
    from rwkv_cluster.workdir import WorkDir

    profile = [] if options.profile is None else [f"--logging.profile_steps={options.profile}"]
    config = trusted_config(options, profile)
    if rank() == 0:  # before torch is imported, which takes seconds
        WorkDir(config.work_dir).require_free()
    with importing_torch():
        from rwkv_cluster.train.run import train as train_run

    result = train_run(config)
    state = "already complete" if result.already_complete else "done"
    early = " (early: the validation loss did not improve any more)" if result.ended_early else ""
    lines = [f"{state}: step {result.step:,} of {result.total_steps:,}{early}, {result.tokens_seen:,} tokens"]
    losses = {"training loss": result.loss, "validation loss": result.val_loss}
    lines += [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
    if result.sample:
        lines.append(f"\nsample:\n{result.sample}\n")
    tokenizer = tokenizer_options(config.data.tokenizer)
    generate = Command(("rwkv-cluster", "generate", config.work_dir, *_prompt_like_the_data(config), *tokenizer))
    lines += [
        f"weights    {result.final_path}",
        f"everything {config.work_dir}",
        f"next       {generate.shell()}",
    ]
    return Result("\n".join(lines), dataclasses.asdict(result))


def _prompt_like_the_data(config: Config) -> list[str]:
    """The options of `generate` for what the run was trained on: conversations or text."""
    from rwkv_cluster.data.manifest import load_manifest
    from rwkv_cluster.workdir import WorkDir

    try:
        options = load_manifest(WorkDir(config.work_dir).data).options
    except DataError:  # the run does not need its data any more
        options = {}
    if "conversations" in options.get("rows", ""):
        return ["--template", config.data.template, "--prompt", "a question"]
    return ["--prompt", "some text"]


TRAIN = Subcommand(
    "train",
    "prepare and initialise what is missing, then train; the same command again continues",
    train,
    _add_train_arguments,
    config="required",
    runs_on_ranks=True,
    continues=True,
)


def _add_branch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("new_dir", metavar="NEW_DIR", help="work directory of the branch, which is made")
    parser.add_argument("--at", type=int, required=True, metavar="STEP", help="of the trunk's checkpoint")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="the same as --section.field=value"
    )


def branch(options: argparse.Namespace) -> Result:
    """A new run from a checkpoint of another."""
    config = named_config(options, options.set).resolved.config
    with importing_torch():
        from rwkv_cluster.train.checkpoint.branch import branch as make_branch
    from rwkv_cluster.launch.command import Command
    from rwkv_cluster.workdir import WorkDir

    trunk, new = WorkDir(config.work_dir), WorkDir(options.new_dir)
    parent = make_branch(trunk, config.model_copy(update={"work_dir": str(new.root)}), options.at)
    train_it = Command(("rwkv-cluster", "train", str(options.new_dir)))
    text = f"{new.root} begins at step {parent.step:,} of {trunk.root}\nnext       {train_it.shell()}"
    return Result(text, {"work_dir": str(new.root), "parent": dataclasses.asdict(parent)})


BRANCH = Subcommand(
    "branch",
    "make a new run that goes on from a checkpoint of another, with other settings",
    branch,
    _add_branch_arguments,
    config="required",
)


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", metavar="WEIGHTS", help="file or folder to use instead of the run's newest")
    parser.add_argument("--state", metavar="FILE", help="state that each document begins from")


def evaluate(options: argparse.Namespace) -> Result:
    """Loss, perplexity and, for text, bits per byte on the validation file."""
    config = trusted_config(options)
    with importing_torch():
        from rwkv_cluster.train.evaluate import evaluate_run

    weights, state = (Path(name) if name else None for name in (options.weights, options.state))
    result = evaluate_run(config, weights, state)
    bits = f", {result.bits_per_byte:.4f} bits per byte" if result.bits_per_byte is not None else ""
    text = f"validation loss {result.loss:.4f}, perplexity {result.perplexity:.4f}{bits}, {result.n_tokens:,} tokens"
    derived = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    return Result(text, dataclasses.asdict(result) | derived)


EVAL = Subcommand(
    "eval",
    "loss, perplexity and bits per byte on the validation file",
    evaluate,
    _add_eval_arguments,
    config="required",
)


def _add_consolidate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default the newest")


def consolidate(options: argparse.Namespace) -> Result:
    """One weights file, in the training precision, of a checkpoint. Uses no tokenizer."""
    config = named_config(options).resolved.config
    with importing_torch():
        from rwkv_cluster.train.checkpoint import weights
        from rwkv_cluster.train.placement import DTYPES
    from rwkv_cluster.workdir import WorkDir

    path = weights.consolidate(WorkDir(config.work_dir), step=options.step, dtype=DTYPES[config.training.precision])
    return Result(str(path), {"path": str(path)})


CONSOLIDATE = Subcommand(
    "consolidate",
    "write the weights of a checkpoint, by however many ranks it was saved, as one .pth",
    consolidate,
    _add_consolidate_arguments,
    config="required",
)


def _add_average_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", metavar="WORK_DIR_OR_WEIGHTS", nargs="+", help="a run, or weights of any layout")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="of a run's checkpoints; default all that there are",
    )
    parser.add_argument("--output", metavar="PATH", help="default below WORK_DIR/out, where it is one run")


def average(options: argparse.Namespace) -> Result:
    """The mean of several checkpoints or weights as one file."""
    with importing_torch():
        from rwkv_cluster.train.checkpoint import weights

    output = Path(options.output) if options.output else None
    path = weights.average([Path(source) for source in options.sources], steps=options.steps, output=output)
    return Result(str(path), {"path": str(path)})


AVERAGE = Subcommand(
    "average",
    "write the mean of a run's checkpoints, or of other weights, as one .pth",
    average,
    _add_average_arguments,
)
