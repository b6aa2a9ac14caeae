"""What a run asks for, each by the very call that would refuse it at the start of training."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rwkv_cluster.config import Config
from rwkv_cluster.doctor.checks.software import has_torch
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import Row, note, ok, refused, warning
from rwkv_cluster.errors import DataError, MissingDataError, RWKVClusterError
from rwkv_cluster.runtime import rank_env
from rwkv_cluster.workdir import DATA_MANIFEST, WorkDir

ELSEWHERE = "`rwkv-cluster launch CONFIG --doctor` looks there"


def run_needs(context: CheckContext) -> list[Row]:
    """Tokenizer and data; and where the ranks run here: loggers, devices, strategy, kernels, room on the disk."""
    config = context.config
    if config is None:
        return []
    is_rank_0, tokenizer_row = rank_env.rank() == 0, _tokenizer(config)
    rows = [
        tokenizer_row if isinstance(tokenizer_row, Row) else ok("tokenizer", f"{int(tokenizer_row.vocab_size):,} ids")
    ]
    rows += [_asked("data", partial(_data, config))] if is_rank_0 else []
    if not context.runs_here:
        return [*rows, note("run", f"launch.target is {config.launch.target}: its ranks run elsewhere", ELSEWHERE)]
    if not has_torch():
        return rows
    for name, check in (("GPUs asked for", _gpus), ("loggers", _loggers), ("initial weights", _initial_weights)):
        rows.append(_asked(name, partial(check, config)))
    if isinstance(tokenizer_row, Row):
        return rows
    rows.append(_asked("run", partial(_resolved, config, tokenizer_row)))
    return [*rows, *(_room(config, int(tokenizer_row.vocab_size), context.folder) if is_rank_0 else [])]


def _asked(name: str, check: Callable[[], str]) -> Row:
    """The row of what `check` tells or refuses."""
    try:
        return ok(name, check())
    except RWKVClusterError as error:
        return refused(name, error)


def _tokenizer(config: Config) -> Any:
    """The run's tokenizer, or the row that says why there is none."""
    from rwkv_cluster.tokenizer import build_tokenizer

    try:
        return build_tokenizer(config.data.tokenizer)
    except RWKVClusterError as error:
        return refused("tokenizer", error)


def _data(config: Config) -> str:
    """What data.inputs names is there and can be read, or prepared data is; prepared data is undamaged."""
    from rwkv_cluster.data.inputs.readers import refuse_by_name
    from rwkv_cluster.data.inputs.sources import find_sources
    from rwkv_cluster.data.manifest import load_manifest
    from rwkv_cluster.data.preparation.prepare import prepared_before
    from rwkv_cluster.data.verify import check_files
    from rwkv_cluster.tokenizer import build_tokenizer

    folder = WorkDir(config.work_dir).data
    is_prepared = (folder / DATA_MANIFEST).exists()
    if not config.data.inputs or is_prepared:
        manifest = load_manifest(folder)
        check_files(manifest, folder, manifest.run_files)
    if not config.data.inputs:
        return f"prepared: {manifest.n_tokens:,} tokens"
    try:
        sources = find_sources(config.data)
    except MissingDataError:
        tokenizer, ctx_len = build_tokenizer(config.data.tokenizer), config.model.ctx_len
        if prepared_before(config.data, tokenizer, folder, ctx_len=ctx_len) is None:
            raise
        return f"prepared: {manifest.n_tokens:,} tokens, from inputs that are gone"
    if not is_prepared:
        refuse_by_name(sources)
    files = [path for source in sources for path in source.files()]
    for path in files:
        if not os.access(path, os.R_OK):
            raise DataError(f"{path} cannot be read: permission denied", remedy="Make it readable")
    return f"{len(files):,} file{'s' if len(files) != 1 else ''} in data.inputs"


def _gpus(config: Config) -> str:
    from rwkv_cluster.launch.preflight import check_gpus

    n_gpus = 0 if config.training.accelerator == "cpu" else config.launch.gpus_per_node or 0
    check_gpus(n_gpus, socket.gethostname())
    return f"{n_gpus}, as launch.gpus_per_node says" if n_gpus else "none"


def _loggers(config: Config) -> str:
    from rwkv_cluster.train.metrics.loggers import require_packages

    require_packages(config.logging)
    asked = {"TensorBoard": config.logging.tensorboard, "Weights & Biases": config.logging.wandb_project}
    return ", ".join(name for name, wanted in asked.items() if wanted) or "none asked for"


def _resolved(config: Config, tokenizer: Any) -> str:
    """Precision, accelerator, DeepSpeed, kernels and batch, as training resolves them."""
    from rwkv_cluster.train.checkpoint.initial_weights import with_sizes_of_weights
    from rwkv_cluster.train.sample import require_sample_prompt
    from rwkv_cluster.train.session import require_init_from, resolve

    require_sample_prompt(config.logging, tokenizer)
    vocab_size = int(tokenizer.vocab_size)
    resolved, placement, accumulate = resolve(with_sizes_of_weights(config, vocab_size), vocab_size)
    require_init_from(resolved, WorkDir(config.work_dir))
    training, stage = config.training, config.training.deepspeed_stage
    zero = "" if stage is None else f", ZeRO stage {stage}"
    batch = training.micro_bsz * placement.world_size * accumulate
    place = f"{placement.world_size} rank{'s' if placement.world_size > 1 else ''} on {placement.accelerator}{zero}"
    return f"{place}, {training.precision}, wkv_backend {training.wkv_backend}, {batch:,} samples a step"


def _initial_weights(config: Config) -> str:
    from rwkv_cluster.interchange.read import peek_weights

    path = config.training.init_from
    if path is None:
        return "made when training starts"
    weights = peek_weights(Path(path))
    return f"{path}, in {weights.title}"


def _room(config: Config, vocab_size: int, folder: Path) -> list[Row]:
    """Room for what is written first, and for all that is kept; without the data, whose size is not known yet."""
    from rwkv_cluster.config.schema import with_vocabulary
    from rwkv_cluster.train.checkpoint import disk_space
    from rwkv_cluster.train.checkpoint.initial_weights import with_sizes_of_weights
    from rwkv_cluster.train.checkpoint.save_load import list_steps
    from rwkv_cluster.train.optimizers.selection import run_parameters
    from rwkv_cluster.train.optimizers.table import optimizer_of
    from rwkv_cluster.train.placement import DTYPES

    optimizer = optimizer_of(config.training)
    try:
        sized = with_vocabulary(with_sizes_of_weights(config, vocab_size), vocab_size)
        rows = sized.model.vocab_size or vocab_size
        parameters = run_parameters(sized.model, rows, config.training, config.adapter)
        work = WorkDir(config.work_dir)
        world_size = rank_env.launched_world_size() or config.training.devices
        begins = not (work.initial_weights.exists() or list_steps(work.checkpoints))
        item_bytes = DTYPES[config.training.precision].itemsize
        first = disk_space.bytes_needed_next(parameters, item_bytes, world_size, optimizer, begins=begins)
        disk_space.require_disk_space(folder, first, "the next checkpoint and the weights beside it")
    except RWKVClusterError as error:
        return [refused("room", error)]
    size = disk_space.checkpoint_bytes_of(parameters, world_size, optimizer)
    there = len(list_steps(work.checkpoints))
    # the oldest goes after the newest came
    kept = max(0, config.checkpoint.keep_last + 1 - there) * size + first - size
    free = shutil.disk_usage(folder).free
    sizes = (f"{n_bytes / 1e9:,.3g} GB" for n_bytes in (size, kept, free))
    text = "{} a checkpoint, {} for all still to be kept, {} free".format(*sizes)
    if kept * disk_space.SPARE > free:
        remedy = "Make room, keep fewer (checkpoint.keep_last), or choose another work_dir"
        return [warning("room", f"{text}: later checkpoints will not fit", remedy)]
    return [ok("room", text)]
