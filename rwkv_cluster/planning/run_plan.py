"""A configuration -> everything that is known about its run before it starts. Reads the manifest, writes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rwkv_cluster.config import Config
from rwkv_cluster.config.schema import with_vocabulary
from rwkv_cluster.data.manifest import DataManifest, load_manifest
from rwkv_cluster.errors import MissingDataError
from rwkv_cluster.model.flops import FlopsPerToken, flops_per_token
from rwkv_cluster.model.parameter_shapes import by_part, count
from rwkv_cluster.model.versions.version import Shapes
from rwkv_cluster.planning.options import Assumptions
from rwkv_cluster.planning.recommend import change, shardings
from rwkv_cluster.planning.run_length import Length, learning_rate_curve, learning_rates, length
from rwkv_cluster.runtime.control_group import memory_bytes
from rwkv_cluster.runtime.disk_errors import free_bytes
from rwkv_cluster.tokenizer import build_tokenizer
from rwkv_cluster.train.checkpoint.disk_space import STAGING_BYTES, checkpoint_bytes_of, weights_bytes
from rwkv_cluster.train.memory.activations import Kernels
from rwkv_cluster.train.memory.grad_cp import GradCpChoice, choose_grad_cp
from rwkv_cluster.train.memory.model_states import FP32, ITEM_BYTES, Sharding
from rwkv_cluster.train.memory.peak import Memory, MemoryModel, Setting, needed
from rwkv_cluster.train.optimizers.selection import RunParameters
from rwkv_cluster.train.optimizers.table import optimizer_of
from rwkv_cluster.workdir import WorkDir

CURVE_POINTS = 64  # columns of the picture of the learning rate


@dataclass(frozen=True)
class Row:
    """One setting in the table of memory. fits: None where no GPU was named."""

    setting: Setting
    memory: Memory
    is_configured: bool
    fits: bool | None


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk. checkpoints: those kept and the one being written. exports: .pth files, None where unknown."""

    checkpoint: int
    weights: int
    checkpoints: int
    exports: int | None
    data: int | None
    free: int


@dataclass(frozen=True)
class RunPlan:
    """All that is known about a run before it starts.

    config: with the vocabulary's size. grad_cp: what training.grad_cp auto becomes, where that is known.
    parameters: shapes by name, of the model and of what is trained. manifest: of the data, None where it is not
    prepared. seconds, tokens_per_s: None where no speed was given, or no end is known.

    lr_curve: learning rates at equal distances from the first step to the last; empty where no end is known.
    to_fit: where a GPU was named, the setting with the fewest changes that fits it, None where none does.
    host_copy: bytes that a rank needs in the host's memory while a checkpoint is written in the background.
    """

    config: Config
    grad_cp: GradCpChoice | None
    assumptions: Assumptions
    parameters: RunParameters
    flops: FlopsPerToken
    length: Length
    learning_rates: dict[int, float]
    lr_curve: list[float]
    manifest: DataManifest | None
    kernels: Kernels
    rows: list[Row]
    to_fit: Setting | None
    host_copy: float
    disk: Disk
    tokens_per_s: float | None
    seconds: float | None

    @property
    def shapes(self) -> Shapes:
        """Shapes of the model's own parameters."""
        return self.parameters.model

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part."""
        return by_part(self.shapes)

    @property
    def configured(self) -> Row:
        """The row of the configuration itself."""
        return next(row for row in self.rows if row.is_configured)


def plan_run(config: Config, assumptions: Assumptions) -> RunPlan:
    """Plan of the run of `config`. Raises ConfigError or DataError for a configuration that could not run."""
    work = WorkDir(config.work_dir)
    manifest = _manifest(work)
    vocab_size = _vocabulary(config, manifest)
    config = with_vocabulary(_sized(config, vocab_size), vocab_size)
    model, training = config.model, config.training
    assert model.vocab_size is not None
    if manifest is not None and manifest.packing is not None and manifest.packing.ctx_len != model.ctx_len:
        manifest = None  # the run will prepare it again
    run = length(config, assumptions.ranks, manifest)
    kernels = Kernels.of(training, model, "cpu" if training.accelerator == "cpu" else "cuda")
    memory_model = MemoryModel(model, model.vocab_size, training, kernels, config.adapter)
    parameters = memory_model.parameters
    sharding = Sharding.of(training, assumptions.ranks)
    configured = Setting(sharding, training.grad_cp != 0, training.micro_bsz, run.accumulate > 1)
    gpu_bytes = None if assumptions.gpu_memory_gb is None else assumptions.gpu_memory_gb * 1e9
    available = gpu_bytes
    if training.accelerator == "cpu":
        available = memory_bytes() / math.ceil(assumptions.ranks / config.launch.num_nodes)
    choice = None
    if training.grad_cp == "auto" and available is not None:
        choice = choose_grad_cp(memory_model, configured, available)
    configured = replace(configured, grad_cp=bool(choice.grad_cp)) if choice else configured
    flops = flops_per_token(model)
    speed = _speed(assumptions, flops)
    tokens = run.horizon.total_steps * run.tokens_per_step if run.horizon else None
    return RunPlan(
        config=config,
        grad_cp=choice,
        assumptions=assumptions,
        parameters=parameters,
        flops=flops,
        length=run,
        learning_rates=learning_rates(config, run),
        lr_curve=learning_rate_curve(config, run, CURVE_POINTS),
        manifest=manifest,
        kernels=kernels,
        rows=_rows(memory_model, configured, gpu_bytes),
        to_fit=None if gpu_bytes is None else change(memory_model, configured, gpu_bytes),
        host_copy=_host_copy(config, parameters, sharding, kernels.device),
        disk=_disk(config, work, parameters, assumptions.ranks, run, manifest),
        tokens_per_s=speed,
        seconds=tokens / speed if tokens is not None and speed is not None else None,
    )


def _host_copy(config: Config, parameters: RunParameters, sharding: Sharding, device: str) -> float:
    """Bytes of what a rank has to save, which the host's memory holds while a checkpoint is written; and of the buffer
    through which they come from a GPU.
    """
    states = parameters.trained
    whole = FP32 * count(states) + optimizer_of(config.training).moment_bytes(states)
    return whole / (sharding.ranks if sharding.stage else 1) + (STAGING_BYTES if device == "cuda" else 0)


def _manifest(work: WorkDir) -> DataManifest | None:
    """Manifest of the prepared data; None where there is none. Raises DataError where that is damaged."""
    try:
        return load_manifest(work.data)
    except MissingDataError:
        return None


def _vocabulary(config: Config, manifest: DataManifest | None) -> int:
    return manifest.vocab_size if manifest else int(build_tokenizer(config.data.tokenizer).vocab_size)


def _sized(config: Config, vocab_size: int) -> Config:
    if config.training.init_from is None:
        return config
    from rwkv_cluster.train.checkpoint.initial_weights import with_sizes_of_weights  # loads torch

    return with_sizes_of_weights(config, vocab_size)


def _rows(memory_model: MemoryModel, configured: Setting, gpu_bytes: float | None) -> list[Row]:
    """Every sharding, with and without checkpointing, at the configured micro batch."""
    candidates = shardings(configured.sharding.ranks, memory_model.training)
    if configured.sharding not in candidates:  # parameters offloaded without the optimizer
        candidates.append(configured.sharding)
    rows = []
    for setting in (
        replace(configured, sharding=sharding, grad_cp=cp) for sharding in candidates for cp in (False, True)
    ):
        memory = memory_model.memory(setting)
        fits = None if gpu_bytes is None else needed(memory) <= gpu_bytes
        rows.append(Row(setting, memory, setting == configured, fits))
    return rows


def _disk(
    config: Config, work: WorkDir, parameters: RunParameters, ranks: int, run: Length, manifest: DataManifest | None
) -> Disk:
    optimizer = optimizer_of(config.training)
    checkpoint = checkpoint_bytes_of(parameters, ranks, optimizer)
    weights = weights_bytes(parameters.model, ITEM_BYTES[config.training.precision])
    exports = None
    if run.epochs is not None:  # rwkv-init, rwkv-final, each epoch that epoch_save names, and the last
        epochs = -(-int(-(-run.epochs // 1)) // config.training.epoch_save)
        of_epoch = weights if config.adapter.kind == "none" else weights_bytes(parameters.saved, FP32)
        trained = weights + epochs * of_epoch
        exports = weights + trained * (1 + optimizer.keeps_ema)
    existing = next(folder for folder in (work.root, *work.root.parents) if folder.exists())
    return Disk(
        checkpoint=checkpoint,
        weights=weights,
        checkpoints=(config.checkpoint.keep_last + 1) * checkpoint,
        exports=exports,
        data=sum(record.bytes for record in manifest.files.values()) if manifest else None,
        free=free_bytes(existing),
    )


def _speed(assumptions: Assumptions, flops: FlopsPerToken) -> float | None:
    """Tokens per second of all ranks; by MFU: its share of the ranks' peak over 6 N."""
    if assumptions.mfu is None or assumptions.peak_tflops is None:
        return assumptions.tokens_per_s
    return assumptions.mfu * assumptions.peak_tflops * 1e12 * assumptions.ranks / flops.six_n
