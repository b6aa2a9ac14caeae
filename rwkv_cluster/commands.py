"""What each verb of the command line does: one call into the library, and its result as text and as data."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv_cluster.config import Config, TokenizerConfig
from rwkv_cluster.config.loader import dump_yaml, parse_config, yaml_text
from rwkv_cluster.config.recipes import FoundConfig, find_config, tokenizer_options
from rwkv_cluster.errors import CheckpointError, ConfigError, RWKVClusterError
from rwkv_cluster.launch.command import Command
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.runtime.terminal.console import print_result
from rwkv_cluster.runtime.terminal.text_safety import visible
from rwkv_cluster.workdir import WorkDir, atomic_write

logger = logging.getLogger("rwkv_cluster")


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Around the import of torch and all that comes with it, which makes no garbage worth a search.

    Searching takes a third of a short run, at the import and again at the end. What has come with it stays to the end.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        with _without_matplotlib():
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _without_matplotlib() -> Iterator[None]:
    """Around Lightning's import: its torchmetrics would load matplotlib wherever that is installed, for nothing here.

    That takes a second, and fails without a home directory or by a notebook's MPLBACKEND.
    """
    from lightning_utilities.core.imports import RequirementCache

    is_met = RequirementCache.__bool__
    RequirementCache.__bool__ = lambda self: self.requirement != "matplotlib" and is_met(self)  # type: ignore[method-assign]
    try:
        yield
    finally:
        RequirementCache.__bool__ = is_met  # type: ignore[method-assign]


@dataclasses.dataclass(frozen=True)
class Report:
    """A verb's result: `text` for people, `data` for `--json`, its exit code, and an error that stands below it."""

    text: str
    data: Any
    code: int = 0
    error: RWKVClusterError | None = None


def run(options: argparse.Namespace, overrides: Sequence[str], extra: Sequence[str]) -> Report:
    """Carry out the parsed command. Raises the library's errors."""
    if options.verb == "generate":
        return generate(
            Path(options.source),
            options.prompt,
            n_tokens=options.tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            output=Path(options.output) if options.output else None,
            tokenizer=_tokenizer(options.tokenizer, options.vocab_file),
        )
    if options.verb == "inspect":
        return inspect(Path(options.path))
    if options.verb == "doctor" and options.config is None:
        if overrides:
            raise ConfigError(f"{overrides[0]} is a field of a run. Name its CONFIG too")
        return doctor(None)
    if options.verb == "bench":
        return bench(options.what, extra)
    if options.verb == "status":
        return status(WorkDir(options.work_dir), verify=options.verify)
    if options.verb == "report":
        return report([WorkDir(one) for one in options.work_dirs], Path(options.output) if options.output else None)
    if options.verb in ("logs", "cancel"):
        return manage(options)
    if options.verb == "launch" and options.target:
        overrides = [*overrides, f"--launch.target={options.target}"]
    if options.verb == "train" and options.profile is not None:
        overrides = [*overrides, f"--logging.profile_steps={options.profile}"]
    found = find_config(options.config, overrides)
    if found.notice:
        logger.info(found.notice)
    if options.verb == "config":
        return config(found)
    if options.verb == "consolidate":  # needs no tokenizer
        return consolidate(found.resolved.config, options.step)
    found.require_own_tokenizer()
    if options.verb == "plan":
        return plan(found.resolved.config, options)
    if options.verb == "launch":
        found.require_own_launch()
        return launch(found.resolved.config, dry_run=options.dry_run, doctor=options.doctor)
    if options.verb == "init":
        return init(found.resolved.config, force=options.force)
    if options.verb == "eval":
        return evaluate(found.resolved.config, Path(options.weights) if options.weights else None)
    verbs: dict[str, Callable[[Config], Report]] = {"prepare": prepare, "train": train, "doctor": doctor}
    return verbs[options.verb](found.resolved.config)


def doctor(config: Config | None) -> Report:
    """What this machine, or the job that this rank is part of, has for training."""
    from rwkv_cluster.doctor import results as rows
    from rwkv_cluster.doctor.run_checks import examine

    found = examine(config)
    problem = None if found.problem is None else str(found.problem)
    data = {"problem": problem, "exit_code": 0 if found.problem is None else found.problem.exit_code}
    return Report(rows.table(found.rows), data | {"rows": rows.data(found.rows)}, error=found.problem)


def plan(config: Config, options: argparse.Namespace) -> Report:
    """What the run will be, from the configuration alone."""
    from rwkv_cluster.planning import formatting
    from rwkv_cluster.planning.options import Assumptions
    from rwkv_cluster.planning.run_plan import plan_run

    names = ("ranks", "tokens_per_s", "mfu", "peak_tflops", "gpu", "gpu_memory_gb")
    assumptions = Assumptions.of(config, **{name: getattr(options, name) for name in names})
    planned = plan_run(config, assumptions)
    return Report(formatting.text(planned), formatting.data(planned))


def prepare(config: Config) -> Report:
    """Tokenize the data into the work directory."""
    with _importing():
        from rwkv_cluster.train.run import prepare_data

    manifest = prepare_data(config)
    amount = f"{manifest.n_tokens:,} tokens in {manifest.n_documents:,} documents ({manifest.dtype})"
    return Report(f"{amount}, in {config.work_dir}/data", manifest.model_dump(mode="json"))


def init(config: Config, *, force: bool) -> Report:
    """Write the initial weights."""
    with _importing():
        from rwkv_cluster.train.run import initialize

    path = initialize(config, force=force)
    return Report(str(path), {"path": str(path)})


def train(config: Config) -> Report:
    """Train to the end of the run, from wherever it stands."""
    if rank() == 0:  # before torch is imported, which takes seconds
        WorkDir(config.work_dir).require_free()
    with _importing():
        from rwkv_cluster.train.run import train as train_run

    result = train_run(config)
    state = "already complete" if result.already_complete else "done"
    early = " (early: the validation loss did not improve any more)" if result.ended_early else ""
    lines = [f"{state}: step {result.step:,} of {result.total_steps:,}{early}, {result.tokens_seen:,} tokens"]
    losses = {"training loss": result.loss, "validation loss": result.val_loss}
    lines += [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
    lines += [f"\nsample:\n{result.sample}\n"] if result.sample else []
    options = tokenizer_options(config.data.tokenizer)
    following = Command(("rwkv-cluster", "generate", config.work_dir, "--prompt", "some text", *options))
    lines += [
        f"weights    {result.final_path}",
        f"everything {config.work_dir}",
        f"next       {following.shell()}",
    ]
    return Report("\n".join(lines), dataclasses.asdict(result))


def launch(config: Config, *, dry_run: bool, doctor: bool) -> Report:
    """Start the run, or `doctor`, on its target, or show what that would be."""
    from rwkv_cluster.launch import plan as launching
    from rwkv_cluster.launch.submit import launch_folder, submit

    planned = launching.plan(config, Path.cwd(), "doctor" if doctor else "train")
    if dry_run:
        folder = launch_folder(planned.config.work_dir, time.time())
        commands = [command.shell() for command in planned.commands]
        logger.info("would run in %s: %s", folder, "; ".join(commands))
        plans = (planned, *planned.members)
        scripts = [text for one in plans for name, text in one.files.items() if name.endswith(".sh")]
        data = {"folder": folder, "files": dict(planned.files), "commands": commands}
        data |= {"runs": [dict(member.files) for member in planned.members]} if planned.members else {}
        return Report("".join(scripts), data)
    launched = submit(planned)
    data = {"folder": launched.folder, "jobs": launched.jobs, "exit_code": launched.code}
    rows = {"launch": str(launched.folder)}
    if launched.jobs:
        rows = {"job": " after ".join(reversed(launched.jobs)), **rows, "log": f"{launched.folder}/job.log"}
        rows |= {"ranks": f"{launched.folder}/rank-N.log"}
    if launched.members:
        rows |= {"log": f"{launched.folder}/sweep-N-job.log", "ranks": f"{launched.members[0]}/rank-N.log"}
        rows |= {"runs": f"{config.work_dir}/sweep/N, N from 0 to {len(launched.members) - 1}"}
    for verb in ("status", "logs", "cancel") if launched.jobs else ():
        rows[verb] = Command(("rwkv-cluster", verb, config.work_dir, *(["-f"] if verb == "logs" else []))).shell()
    return Report("\n".join(f"{name:<7} {value}" for name, value in rows.items()), data, launched.code or 0)


CANCEL_GRACE_S = 120.0  # for a checkpoint


def manage(options: argparse.Namespace) -> Report:
    """logs and cancel of the newest launch in a work directory."""
    from rwkv_cluster.launch import jobs

    folder = jobs.newest(WorkDir(options.work_dir).root)
    if options.verb == "logs" and options.follow:
        for text in jobs.follow(folder, options.rank):
            print_result(visible(text), end="")
        return Report("", {"folder": folder})
    if options.verb == "logs":
        text = jobs.logs(folder, options.rank)
        return Report(text, {"folder": folder, "text": text})
    found = jobs.cancel(folder, grace_s=0 if options.now else CANCEL_GRACE_S)
    text = f"{found.state}  {found.target}, {found.detail}\nlaunch {found.folder}"
    return Report(text, dataclasses.asdict(found))


def status(work: WorkDir, *, verify: bool) -> Report:
    """What a run is doing."""
    from rwkv_cluster.report import status

    found = status.read_status(work, verify=verify)
    data = dataclasses.asdict(found) | {"data": found.data and found.data.model_dump(mode="json")}
    return Report(status.format(found), data)


def report(works: Sequence[WorkDir], output: Path | None) -> Report:
    """One page about one run or several."""
    from rwkv_cluster.report.write import write

    written = write(works, output)
    n_missing = sum(map(len, written.missing.values()))
    lines = [
        str(written.page),
        *(f"{n_missing} things are not shown, the page says why" for _ in range(min(n_missing, 1))),
    ]
    return Report("\n".join(lines), dataclasses.asdict(written))


def generate(
    source: Path,
    prompt: str,
    *,
    n_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    output: Path | None,
    tokenizer: TokenizerConfig | None,
) -> Report:
    """Continue `prompt` with the model in a work directory or .pth. Raises ConfigError for a bad number.

    output: file that takes the text as it is, with what would command a terminal.
    """
    rules = {
        f"--tokens is {n_tokens}, expected an integer >= 1": n_tokens >= 1,
        f"--temperature is {temperature:g}, expected a number >= 0": 0 <= temperature < float("inf"),
        f"--top-p is {top_p:g}, expected a number > 0 and <= 1": 0 < top_p <= 1,
        f"--seed is {seed}, expected an integer >= 0 and <= 2^63 - 1": 0 <= seed < 2**63,
    }
    for message, holds in rules.items():
        if not holds:
            raise ConfigError(message)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("--prompt is not UTF-8 text. Check the terminal's encoding") from error
    with _importing():
        from rwkv_cluster.train.sample import generate_text

    text = generate_text(
        source,
        prompt,
        n_tokens=n_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        tokenizer=tokenizer,
    )
    data = {"prompt": prompt, "text": text}
    if output is None:
        return Report(text, data)
    try:
        atomic_write(output.absolute(), text.encode(errors="backslashreplace"))
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror}. Name another file") from error
    return Report(str(output), data)


def _tokenizer(kind: str | None, vocab_file: str | None) -> TokenizerConfig | None:
    """The tokenizer that the command line names, or None where it names none. Raises ConfigError."""
    if kind is None and vocab_file is None:
        return None
    fields = [f"type={yaml_text(kind or 'generic')}"]
    fields += [f"vocab_file={yaml_text(vocab_file)}"] if vocab_file else []
    overrides = [f"data.tokenizer.{field}" for field in fields]
    return parse_config(b"work_dir: none", "command line", overrides).config.data.tokenizer


def evaluate(config: Config, weights: Path | None) -> Report:
    """Loss, perplexity and, for text, bits per byte on the validation file."""
    with _importing():
        from rwkv_cluster.train.evaluate import evaluate_run

    result = evaluate_run(config, weights)
    bits = f", {result.bits_per_byte:.4f} bits per byte" if result.bits_per_byte is not None else ""
    text = f"validation loss {result.loss:.4f}, perplexity {result.perplexity:.4f}{bits}, {result.n_tokens:,} tokens"
    derived = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    return Report(text, dataclasses.asdict(result) | derived)


def consolidate(config: Config, step: int | None) -> Report:
    """One weights file, in the training precision, of a checkpoint."""
    with _importing():
        from rwkv_cluster.train.checkpoint import weights
        from rwkv_cluster.train.parallel.precision import DTYPES

    path = weights.consolidate(WorkDir(config.work_dir), step=step, dtype=DTYPES[config.training.precision])
    return Report(str(path), {"path": str(path)})


def inspect(path: Path) -> Report:
    """Architecture of a weights file. Raises CheckpointError where it is none."""
    with _importing():
        from rwkv_cluster.model.checkpoint_info import inspect_rwkv_checkpoint

    facts = inspect_rwkv_checkpoint(path)
    if "detection_error" in facts:
        raise CheckpointError(f"{path}: this is not an RWKV-5, 6 or 7 weights file: {facts['detection_error']}")
    rows = {"file": facts["checkpoint_path"], "size": f"{facts['file_size_mb']:.1f} MB"}
    facts["detected_config"].pop("ctx_len", None)  # a default: weights do not say what they were trained with
    rows |= {"parameters": f"{facts['num_parameters']:,}"} | facts["detected_config"]
    width = max(len(name) for name in rows)
    return Report("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()), facts)


def config(found: FoundConfig) -> Report:
    """The resolved configuration; as text it is a YAML file whose comments name the sources."""
    resolved = found.resolved
    data = {"config": resolved.config.model_dump(mode="json"), "sources": resolved.sources}
    return Report(dump_yaml(resolved.config, resolved.sources), data)


def bench(what: str, arguments: Sequence[str]) -> Report:
    """Run a benchmark with its own arguments."""
    module = importlib.import_module(f"rwkv_cluster.bench.{what}")
    result = module.run(list(arguments))
    return Report(module.format(result), result)
