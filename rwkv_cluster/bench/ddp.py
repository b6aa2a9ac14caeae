"""Tokens/s and bytes per rank of every ZeRO stage, beside plain DDP on the same number of ranks in the same run.

Each contender trains through this package's module, strategies and data, without checkpoints, in processes of its own.
On CPUs these are forks of one that has loaded the libraries. The contenders take turns, so that a machine whose speed
drifts treats all alike; ratios are taken turn by turn. What is counted as weights, gradients and so on:
`bench.ddp_memory`; the theory: `train.memory.model_states`; what the ranks exchange: `bench.ddp_exchange`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.bench import ddp_worker
from rwkv_cluster.bench.ddp_exchange import Overlap, table
from rwkv_cluster.bench.ddp_memory import KINDS
from rwkv_cluster.config import Config, TrainingConfig
from rwkv_cluster.config.loader import dump_yaml, parse_config, yaml_text
from rwkv_cluster.errors import ConfigError, LaunchError
from rwkv_cluster.launch.preflight import free_port
from rwkv_cluster.runtime.terminal.time_left import Countdown
from rwkv_cluster.train.memory.model_states import Sharding, model_states, theory
from rwkv_cluster.train.optimizers.table import optimizer_of

STRATEGIES = ("single", "ddp", "deepspeed_stage_0", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
"""single: one process without a process group, on one rank only."""

BASELINE = "ddp"
PRELOADED = [ddp_worker.__name__, "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]
"""What each fork would import for itself otherwise; the last makes torch's compiler ready, which takes two seconds."""

Contender = tuple[str, int]
"""(strategy, ranks)."""


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="rwkv-cluster bench ddp", description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to measure")
    arguments.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    arguments.add_argument("--model-type", default="x070", choices=["x052", "x060", "x070"])
    arguments.add_argument("--n-layer", type=int, default=6)
    arguments.add_argument("--n-embd", type=int, default=256)
    arguments.add_argument("--head-size", type=int, default=64)
    arguments.add_argument("--vocab-size", type=int, default=256)
    arguments.add_argument("--ctx-len", type=int, default=256)
    arguments.add_argument("--micro-bsz", type=int, default=4, help="samples of a rank in a step")
    arguments.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    arguments.add_argument("--grad-cp", type=int, default=0, choices=[0, 1])
    arguments.add_argument("--ds-bucket-mb", type=int, default=200, help="training.ds_bucket_mb")
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads of each rank")
    arguments.add_argument("--steps", type=int, default=2, help="counted steps of a turn")
    arguments.add_argument("--warmup", type=int, default=1, help="steps before them that are not counted")
    arguments.add_argument("--repeats", type=int, default=2, help="turns of each contender")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--timeout-s", type=float, default=900.0, help="longest that one turn may take")
    return arguments


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure as the arguments say.

    Returns:
        {"settings", "torch", "deepspeed", "parameters", "cases": [{"strategy", "ranks", "step_s", "tokens_per_s",
        "ratio", "peak_mb", "loss", "bytes", "exchange", "overlap", "network"}]}. step_s, tokens_per_s and ratio
        (tokens/s over DDP's on as many ranks, or None without it) are {"min", "median", "max"} of the turns' medians;
        bytes has, for each kind of `ddp_memory.KINDS`, {"measured", "theory", "ratio"}: the most that a rank held, what
        theory gives and the first over the second, each None where there is none. exchange has the fields of
        `ddp_exchange.Collectives` for each kind of collective of a step on rank 0. overlap, None without DDP and on one
        rank, has those of `ddp_exchange.Overlap` and hidden, spread as step_s is; network, None on GPUs too, the same
        with a `ddp_exchange.Network` in place of the reduction. loss is that of the first turn's last step.

    Raises:
        ConfigError: an argument is wrong, or this machine has no such device.
        LaunchError: a contender failed or took too long.
    """
    options = parser().parse_args(arguments)
    _require_counts(options)
    contenders = [
        (strategy, ranks)
        for ranks in options.ranks
        for strategy in options.strategies
        if strategy != "single" or ranks == 1
    ]
    turns: list[dict[Contender, list[dict[str, Any]]]] = []
    with (
        tempfile.TemporaryDirectory(prefix="rwkv-cluster-bench-") as folder,
        Countdown("measuring", options.repeats * len(contenders), "trainings") as left,
    ):
        _prepare(contenders, options, Path(folder))
        for number in range(options.repeats):
            turns.append({})
            for contender in contenders:
                turns[-1][contender] = _turn(contender, options, Path(folder), looks=number == 0)
                left.advance(1)
    return _summary(vars(options), turns)


def _require_counts(options: argparse.Namespace) -> None:
    counts = {"ranks": min(options.ranks), **{name: getattr(options, name) for name in ("steps", "warmup", "repeats")}}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"--{name} is {value}, expected an integer >= 1")
    if not options.timeout_s > 0:
        raise ConfigError(f"--timeout-s is {options.timeout_s:g}, expected a number > 0")
    if options.vocab_size < 2:
        raise ConfigError(f"--vocab-size is {options.vocab_size}, expected an integer >= 2")
    if set(options.strategies) == {"single"} and 1 not in options.ranks:
        raise ConfigError("--strategies single is for one rank", remedy="Add another strategy, or --ranks 1")


def _config(options: argparse.Namespace, contender: Contender, folder: Path, *, looks: bool = False) -> Config:
    """The run of one contender; all have one work directory. Raises ConfigError, as for a file.

    looks: whether a last step is looked into, see `ddp_worker.Meter`.
    """
    strategy, ranks = contender
    fields: dict[str, Any] = {
        "model.model_type": options.model_type,
        "model.n_layer": options.n_layer,
        "model.n_embd": options.n_embd,
        "model.head_size_a": options.head_size,
        "model.ctx_len": options.ctx_len,
        "data.tokenizer.type": "integer",
        "data.tokenizer.max_value": options.vocab_size - 2,  # ids are value + 1, and 0 ends a document
        "data.n_epochs_duplication": 1,
        "data.write_jsonl": "false",
        "data.num_workers": 1,
        "training.strategy": "auto" if strategy == "single" else strategy,
        "training.precision": options.precision,
        "training.grad_cp": options.grad_cp,
        "training.micro_bsz": options.micro_bsz,
        "training.ds_bucket_mb": options.ds_bucket_mb,
        "training.accelerator": options.device,
        "training.devices": ranks,
        "training.num_threads": options.threads,
        "training.max_steps": options.warmup + options.steps + looks,
    }
    overrides = [f"{name}={value}" for name, value in fields.items()]
    return parse_config(f"work_dir: {yaml_text(str(folder))}\n".encode(), "rwkv-cluster bench ddp", overrides).config


def _prepare(contenders: Sequence[Contender], options: argparse.Namespace, folder: Path) -> None:
    """Data and initial weights for all, and whatever can be refused before the first contender starts."""
    from rwkv_cluster.train.parallel.strategy import place
    from rwkv_cluster.train.run import initialize, prepare_data

    configs = [_config(options, contender, folder) for contender in contenders]
    for config in configs:
        place(config.training)
    rows = np.random.default_rng(0).integers(0, options.vocab_size - 1, (64, 4 * options.ctx_len))
    prepare_data(configs[0], arrays=[rows])
    initialize(configs[0])


def _turn(contender: Contender, options: argparse.Namespace, folder: Path, *, looks: bool) -> list[dict[str, Any]]:
    """One training: every rank's figures, in rank order. Raises LaunchError when it fails or takes too long."""
    strategy, ranks = contender
    path = folder / f"{strategy}-{ranks}.yaml"
    path.write_text(dump_yaml(_config(options, contender, folder, looks=looks)))
    port = free_port()
    context = _context(options.device)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        processes = []
        for rank in range(ranks):
            environment = {} if strategy == "single" else _environment(rank, ranks, port)
            job = ddp_worker.Job(path, Path(name), rank, options.warmup, looks, environment)
            processes.append(context.Process(target=ddp_worker.main, args=(job,)))
        _complete(processes, f"{strategy} on {ranks} rank(s)", Path(name), options.timeout_s)
        return [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(ranks)]


def _context(device: str) -> ForkServerContext | SpawnContext:
    """How processes start: a process that has used a GPU cannot be forked, and importing a library may be using it."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Variables as a launcher sets them."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {**{name: str(value) for name, value in values.items()}, "MASTER_ADDR": "127.0.0.1"}


def _complete(processes: Sequence[BaseProcess], name: str, results: Path, timeout_s: float) -> None:
    """Start `processes` and wait for their end; the first that fails ends the others. Raises LaunchError."""
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.start()
        while running := [process for process in processes if process.exitcode is None]:
            ended = wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
            if not ended:
                remedy = "Raise --timeout-s, or lower --steps"
                raise LaunchError(f"{name} took more than {timeout_s:g} s", remedy=remedy)
            for rank, process in enumerate(processes):
                if process.exitcode:
                    output = (results / f"{rank}.txt").read_text(errors="replace")[-4000:]
                    remedy = f"The end of its output:\n{output}"
                    raise LaunchError(f"{name} ended with code {process.exitcode}", remedy=remedy)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _summary(settings: dict[str, Any], turns: list[dict[Contender, list[dict[str, Any]]]]) -> dict[str, Any]:
    from importlib.metadata import version

    speeds = [{who: _tokens_per_s(who, figures, settings) for who, figures in turn.items()} for turn in turns]
    first = next(iter(turns[0].values()))
    return {
        "settings": settings,
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "parameters": first[0]["parameters"],
        "cases": [_case(who, [turn[who] for turn in turns], speeds, settings) for who in turns[0]],
    }


def _tokens_per_s(who: Contender, figures: list[dict[str, Any]], settings: dict[str, Any]) -> float:
    return who[1] * settings["micro_bsz"] * settings["ctx_len"] / statistics.median(figures[0]["step_s"])


def _case(
    who: Contender,
    turns: list[list[dict[str, Any]]],
    speeds: list[dict[Contender, float]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    strategy, ranks = who
    baseline = (BASELINE, ranks)
    every = [figures for turn in turns for figures in turn]
    measured = {kind: max(figures["held"][kind] for figures in turns[0]) for kind in KINDS}
    return {
        "strategy": strategy,
        "ranks": ranks,
        "step_s": _spread([statistics.median(turn[0]["step_s"]) for turn in turns]),
        "tokens_per_s": _spread([turn[who] for turn in speeds]),
        "ratio": _spread([turn[who] / turn[baseline] for turn in speeds]) if baseline in speeds[0] else None,
        "peak_mb": max(figures["peak_mb"] for figures in every),
        "loss": every[0]["losses"][-1],
        "bytes": _beside_theory(measured, every[0], who, settings),
        "exchange": every[0]["exchange"],
        "overlap": _overlap([turn[0]["overlap"] for turn in turns]),
        "network": _overlap([turn[0]["network"] for turn in turns]),
    }


def _overlap(turns: list[dict[str, float] | None]) -> dict[str, dict[str, float]] | None:
    measured = [Overlap(**turn) for turn in turns if turn is not None]
    fields = ("with_s", "without_s", "alone_s", "hidden")
    return {name: _spread([getattr(turn, name) for turn in measured]) for name in fields} if measured else None


def _beside_theory(
    measured: dict[str, int], figures: dict[str, Any], who: Contender, settings: dict[str, Any]
) -> dict[str, dict[str, float | None]]:
    (strategy, ranks), precision, optimizer = who, settings["precision"], optimizer_of(TrainingConfig())
    stage = int(strategy[-1]) if strategy.startswith("deepspeed") else None
    predicted = theory(figures["parameters"], ranks, stage, precision, optimizer)
    if stage == 3:
        predicted["whole"] = figures["parameters_kept_whole"] * (4.0 if precision == "fp32" else 2.0)
    if stage:
        shapes, elements = {"": (figures["parameters"],)}, settings["ds_bucket_mb"] * 1_000_000
        predicted["buckets"] = model_states(shapes, Sharding(ranks, stage), precision, elements, optimizer).buckets
    seen: dict[str, float | None] = {**measured}
    if not stage:  # DDP's buckets are the gradients, and stage 0 has one for as long as an all-reduce takes
        seen["buckets"] = None
    return {
        kind: {
            "measured": seen[kind],
            "theory": predicted.get(kind),
            "ratio": measured[kind] / predicted[kind] if predicted.get(kind) else None,
        }
        for kind in KINDS
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def format(result: dict[str, Any]) -> str:
    """The figures as three tables: speed, megabytes on each rank as measured / by theory, and what is exchanged."""
    s = result["settings"]
    lines = [
        f"{s['model_type']} L{s['n_layer']} C{s['n_embd']} T{s['ctx_len']} micro_bsz {s['micro_bsz']}, "
        f"{result['parameters']:,} parameters, {s['precision']}, {s['device']}, {s['threads']} thread(s) a rank; "
        f"{s['repeats']} turn(s) of {s['steps']} steps, medians; torch {result['torch']}, "
        f"deepspeed {result['deepspeed']}",
        f"{'ranks strategy':24}{'tokens/s':>10}{'min':>9}{'max':>9}{'s/step':>9}{'x ddp':>8}{'min':>7}{'max':>7}"
        f"{'peak MB':>9}",
    ]
    lines += [_speed_row(case) for case in result["cases"]]
    lines += ["", f"{'MB on a rank':24}" + "".join(f"{kind:>17}" for kind in KINDS)]
    lines += [
        _name(case) + "".join(f"{_bytes_cell(case['bytes'][kind]):>17}" for kind in KINDS) for case in result["cases"]
    ]
    lines += ["measured / theory; without a theory: measured. Kinds: rwkv_cluster/bench/ddp_memory.py", ""]
    return "\n".join([*lines, *table(result["cases"], _name, s["device"])])


def _name(case: dict[str, Any]) -> str:
    return f"{case['ranks']:>5} {case['strategy']:18}"


def _speed_row(case: dict[str, Any]) -> str:
    speed, ratio = case["tokens_per_s"], case["ratio"]
    ratios = (
        f"{ratio['median']:>8.2f}{ratio['min']:>7.2f}{ratio['max']:>7.2f}" if ratio else f"{'-':>8}{'-':>7}{'-':>7}"
    )
    return (
        f"{_name(case)}{speed['median']:>10,.0f}{speed['min']:>9,.0f}{speed['max']:>9,.0f}"
        f"{case['step_s']['median']:>9.3f}{ratios}{case['peak_mb']:>9,.0f}"
    )


def _bytes_cell(row: dict[str, float | None]) -> str:
    if row["measured"] is None:
        return "-"
    measured = f"{row['measured'] / 1e6:,.2f}"
    return measured if row["theory"] is None else f"{measured} / {row['theory'] / 1e6:,.2f}"
