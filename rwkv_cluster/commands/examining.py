"""inspect, config, plan, lr-find, doctor and bench: what a file, a configuration or a machine is and can do."""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_cluster.commands.loading import importing_torch, named_config, trusted_config
from rwkv_cluster.commands.subcommand import Result, Subcommand
from rwkv_cluster.errors import CheckpointError, ConfigError, MissingCheckpointError

if TYPE_CHECKING:
    from rwkv_cluster.config.loader import ResolvedConfig

logger = logging.getLogger("rwkv_cluster")


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="WEIGHTS", help="an RWKV weights file, or a folder of the Hub")


def inspect(options: argparse.Namespace) -> Result:
    """Architecture, sizes and digest of weights. Raises CheckpointError where they are none."""
    path = Path(options.path)
    with importing_torch():
        from rwkv_cluster.interchange import checkpoint_info
        from rwkv_cluster.interchange.read import open_weights
        from rwkv_cluster.interchange.tokenizer_file import tokenizer_file

    weights = open_weights(path)
    facts = checkpoint_info.describe(weights)
    if "detection_error" in facts:
        raise CheckpointError(f"{path}: these are not weights of RWKV-5, 6 or 7: {facts['detection_error']}")
    del facts["detected_config"]  # all of it is in sizes, but for ctx_len, which weights do not say
    facts["sha256"] = checkpoint_info.digests(weights)
    rows = {"file": str(path), "layout": facts["layout"], "size": f"{facts['file_size_mb']:.1f} MB"}
    rows |= {"parameters": f"{facts['num_parameters']:,}", "dtype": ", ".join(facts["dtypes"])} | facts["sizes"]
    rows |= {f"sha256 of {name}" if path.is_dir() else "sha256": value for name, value in facts["sha256"].items()}
    if path.is_dir():
        file = tokenizer_file(path)
        rows["tokenizer"] = facts["tokenizer"] = file.name if file else "none in the folder"
    width = max(len(name) for name in rows)
    return Result("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()), facts)


INSPECT = Subcommand(
    "inspect", "layout, sizes and digest of RWKV weights, a file or a folder", inspect, _add_inspect_arguments
)


def config(options: argparse.Namespace) -> Result:
    """The resolved configuration; as text it is a YAML file whose comments name the sources."""
    from rwkv_cluster.config.loader import dump_yaml

    resolved = named_config(options).resolved
    if resolved.config.training.init_from is not None:
        resolved = _with_sizes(resolved)
    data = {"config": resolved.config.model_dump(mode="json"), "sources": resolved.sources}
    return Result(dump_yaml(resolved.config, resolved.sources), data)


def _with_sizes(resolved: ResolvedConfig) -> ResolvedConfig:
    """The configuration with the sizes of the weights that it begins with, unless these are on another machine."""
    from rwkv_cluster.config.loader import ResolvedConfig
    from rwkv_cluster.config.schema import open_sizes

    with importing_torch():
        from rwkv_cluster.train.checkpoint.initial_weights import with_sizes_of_weights

    try:
        config = with_sizes_of_weights(resolved.config)
    except MissingCheckpointError as error:
        logger.info("sizes of the model are not known here: %s", error)
        return resolved
    sources = dict(resolved.sources)
    for name in open_sizes(resolved.config):
        sources[f"model.{name}"] = f"{config.training.init_from}"
    return ResolvedConfig(config, sources)


CONFIG = Subcommand(
    "config",
    "the resolved configuration, and where each value came from",
    config,
    config="required",
)


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", metavar="N", help="instead of those that launch or training.devices give")
    parser.add_argument("--gpu", metavar="NAME", help="its memory and peak, such as h100, a100-80gb or rtx-4090")
    parser.add_argument("--gpu-memory-gb", metavar="G", help="say what fits into so many 10^9 bytes")
    parser.add_argument("--tokens-per-s", metavar="X", help="speed of all ranks together")
    parser.add_argument("--mfu", metavar="F", help="speed as a share of the peak, such as 0.4")
    parser.add_argument("--peak-tflops", metavar="P", help="10^12 operations per second of one GPU, dense bf16")
    parser.add_argument("--gpus", metavar="N", help="GPUs on each node, instead of those of launch or training.devices")
    parser.add_argument("--nodes", metavar="N", help="nodes, instead of launch.num_nodes")
    parser.add_argument("--fit", action="store_true", help="the fastest setting that fits --gpu NAME, and others")
    parser.add_argument("--step-time", action="store_true", help="predict the time of a step by part, for --gpu NAME")


def plan(options: argparse.Namespace) -> Result:
    """What the run will be, from the configuration alone."""
    from rwkv_cluster.config.loader import yaml_value
    from rwkv_cluster.config.recipes import find_config
    from rwkv_cluster.planning import formatting
    from rwkv_cluster.planning.fit import fit, placement
    from rwkv_cluster.planning.options import Assumptions
    from rwkv_cluster.planning.run_plan import plan_run

    if (options.gpus or options.nodes or options.fit) and options.ranks:
        raise ConfigError("--ranks is given beside --gpus, --nodes or --fit", remedy="Give --gpus and --nodes alone")
    config = trusted_config(options)
    if fields := placement(config, options.gpus, options.nodes):
        placed = [f"{name}={yaml_value(value)}" for name, value in fields.items()]
        config = find_config(options.config, [*options.overrides, *placed]).resolved.config
    if options.fit:
        found = fit(config, options.gpu)
        return Result(found.text(fields), found.data())
    names = ("ranks", "tokens_per_s", "mfu", "peak_tflops", "gpu", "gpu_memory_gb")
    assumptions = Assumptions.of(config, **{name: getattr(options, name) for name in names})
    planned = plan_run(config, assumptions)
    text, data = formatting.text(planned), formatting.data(planned)
    if options.step_time:
        from rwkv_cluster.planning.step_time import predict

        prediction = predict(planned, options.gpu)
        text, data = f"{text}\n\n{prediction.text()}", {**data, "step_time": prediction.data()}
    return Result(text, data)


PLAN = Subcommand(
    "plan",
    "parameters, steps, memory, disk and time of a run, before anything runs; needs no GPU",
    plan,
    _add_plan_arguments,
    config="required",
)


def _add_lr_find_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="first", type=float, metavar="LR", help="first learning rate; default 1e-6")
    parser.add_argument("--to", dest="last", type=float, metavar="LR", help="last learning rate; default 1")
    parser.add_argument("--steps", dest="n_steps", type=int, metavar="N", help="optimizer steps; default 100")


def lr_find(options: argparse.Namespace) -> Result:
    """A learning-rate range test, of which nothing stays."""
    config = trusted_config(options)
    with importing_torch():
        from rwkv_cluster.bench import lr_range

    given = {name: getattr(options, name) for name in ("first", "last", "n_steps")}
    test = lr_range.run(config, **{name: value for name, value in given.items() if value is not None})
    return Result(test.text(), test.data())


LR_FIND = Subcommand(
    "lr-find",
    "train some steps at growing learning rates, and suggest one; leaves nothing behind",
    lr_find,
    _add_lr_find_arguments,
    config="required",
)


def doctor(options: argparse.Namespace) -> Result:
    """What this machine, or the job that this rank is part of, has for training."""
    if options.config is None and options.overrides:
        raise ConfigError(f"{options.overrides[0]} is a field of a run", remedy="Name its CONFIG too")
    config = None if options.config is None else trusted_config(options)
    from rwkv_cluster.doctor import results
    from rwkv_cluster.doctor.run_checks import examine

    examination = examine(config)
    problem = examination.problem
    data = {
        "problem": None if problem is None else str(problem),
        "exit_code": 0 if problem is None else problem.exit_code,
        "rows": results.data(examination.rows),
    }
    return Result(results.table(examination.rows), data, error=problem)


DOCTOR = Subcommand(
    "doctor",
    "what this machine or job has for training, and the first thing to fix",
    doctor,
    config="optional",
    runs_on_ranks=True,
)


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="{data,wkv,step,ddp}", choices=("data", "wkv", "step", "ddp"))
    parser.epilog = "Further arguments go to the benchmark."


def bench(options: argparse.Namespace) -> Result:
    """Run a benchmark with its own arguments."""
    module = importlib.import_module(f"rwkv_cluster.bench.{options.what}")
    result = module.run(list(options.extra))
    return Result(module.format(result), result)


BENCH = Subcommand(
    "bench", "measure this machine: data, wkv, step or ddp", bench, _add_bench_arguments, takes_extra=True
)
