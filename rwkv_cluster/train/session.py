"""What one session of a run needs before its first step, computed from config, data and work directory."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rwkv_cluster.adapters.base import fingerprint
from rwkv_cluster.adapters.layers import attach, initialize_adapter, load_adapter
from rwkv_cluster.adapters.table import rate_warning
from rwkv_cluster.config import Config, ModelConfig
from rwkv_cluster.config.schema import open_sizes, with_vocabulary
from rwkv_cluster.data.batch_size import accumulation
from rwkv_cluster.data.horizon import Horizon, horizon
from rwkv_cluster.data.preparation.prepare import DataManifest
from rwkv_cluster.data.sampler import SamplePlan, plan_samples
from rwkv_cluster.data.windows import Windows, open_validation, open_windows
from rwkv_cluster.errors import CheckpointError, ConfigError
from rwkv_cluster.interchange.read import peek_weights, read_weights
from rwkv_cluster.interchange.vocabulary_rows import fit_rows
from rwkv_cluster.kernels import loader, native, ops
from rwkv_cluster.kernels.fused import ops as fused
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import fit_state_dict, infer_model_config, load_pth, save_pth
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.checkpoint import resume
from rwkv_cluster.train.checkpoint.initial_weights import INIT_FROM_REMEDY, cannot_start
from rwkv_cluster.train.checkpoint.save_load import Checkpoint, list_steps, newest_verified
from rwkv_cluster.train.checkpoint.state import RunIdentity
from rwkv_cluster.train.guards.early_stop import EarlyStopState
from rwkv_cluster.train.guards.spike_guard import SpikeState
from rwkv_cluster.train.memory.activations import Kernels
from rwkv_cluster.train.memory.grad_cp import choose_grad_cp, with_grad_cp
from rwkv_cluster.train.memory.model_states import Sharding
from rwkv_cluster.train.memory.peak import MemoryModel, Setting
from rwkv_cluster.train.metrics.metrics_file import StepRecord
from rwkv_cluster.train.optimizers.param_groups import freeze
from rwkv_cluster.train.optimizers.selection import RunParameters, run_parameters
from rwkv_cluster.train.optimizers.table import optimizer_of
from rwkv_cluster.train.parallel.strategy import place
from rwkv_cluster.train.placement import DTYPES, Placement, memory_bytes
from rwkv_cluster.workdir import WorkDir

log = logging.getLogger("rwkv_cluster")


@dataclass(frozen=True)
class Session:
    """One process's part of a run. resume_checkpoint: that it continues, None at the beginning.

    spikes, improvement: what the guard against spikes and early stopping know there. group: names the process group;
    rank 0's holds for all. base: fingerprint of the weights below an adapter, on rank 0, where they are there already.
    """

    config: Config
    work: WorkDir
    manifest: DataManifest
    placement: Placement
    sample_plan: SamplePlan
    horizon: Horizon
    accumulate: int
    resume_checkpoint: Checkpoint | None
    spikes: SpikeState
    improvement: EarlyStopState
    base: str | None = None
    group: str = field(default_factory=lambda: uuid.uuid4().hex)

    @cached_property
    def parameters(self) -> RunParameters:
        """What is trained, frozen and saved."""
        return parameters_of(self.config)

    @property
    def start_step(self) -> int:
        return self.resume_checkpoint.step if self.resume_checkpoint else 0

    @property
    def unfinished(self) -> StepRecord | None:
        """The last step's record, where a stop has cut short what follows the step: its validation, or a sample."""
        return self.resume_checkpoint.state.unfinished if self.resume_checkpoint else None

    @property
    def recorded_step(self) -> int:
        """Last step that the record files hold completely."""
        return self.start_step - (self.unfinished is not None)

    @property
    def ended_early(self) -> bool:
        """Whether the validation loss has not improved for too long."""
        return self.improvement.ends(self.config.training.early_stop_patience)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to train."""
        return self.recorded_step == self.horizon.total_steps or self.ended_early

    @property
    def identity(self) -> RunIdentity:
        """What this run must not change on its way."""
        return RunIdentity(
            self.config.model_dump(mode="json"),
            data_fingerprint=self.manifest.fingerprint,
            global_batch_size=self.sample_plan.global_batch_size,
            magic_prime=self.sample_plan.magic_prime,
            order=self.sample_plan.order_name,
            base=self.base,
        )

    def train_windows(self) -> Windows:
        """Windows of the training file."""
        return open_windows(self.manifest, self.work.data, self.config.model.ctx_len)

    def val_windows(self) -> Windows | None:
        """Windows of the validation file; None when it has nothing to predict."""
        return open_validation(self.manifest, self.work.data, self.config.model.ctx_len)


def open_session(config: Config, work: WorkDir, manifest: DataManifest) -> Session:
    """Resolve sizes, find the newest verified checkpoint and check that it belongs to this run.

    Raises ConfigError, DataError or CheckpointError before anything is written.
    """
    config, placement, accumulate = resolve(config, manifest.vocab_size)
    training = config.training
    checkpoint = newest_verified(work.checkpoints)
    if checkpoint is not None:
        accumulate = resume.accumulation_of(checkpoint, training, placement.world_size) or accumulate
    if training.grad_cp == "auto":
        config = with_grad_cp(config, _grad_cp(config, placement, accumulate, checkpoint))
    global_batch_size = training.micro_bsz * placement.world_size * accumulate
    sample_plan = plan_samples(manifest, config.data, config.model.ctx_len, global_batch_size)
    sample_plan = replace(sample_plan, skipped=checkpoint.state.skipped if checkpoint else ())
    end = horizon(sample_plan, training)
    base = base_fingerprint(config, work) if checkpoint is not None and rank() == 0 else None
    session = Session(
        config, work, manifest, placement, sample_plan, end, accumulate, checkpoint, *guard_states(checkpoint), base
    )
    _require_validation(session)
    if rank() == 0 and (warning := rate_warning(config.adapter, training, config.model.model_type)):
        log.warning("%s", warning)
    if checkpoint is not None:
        resume.require_same_run(checkpoint, session.identity, work.initial_weights)
        resume.finished_beyond(checkpoint, end.total_steps)
    return session


def _grad_cp(config: Config, placement: Placement, accumulate: int, checkpoint: Checkpoint | None) -> int:
    """The run's own choice where it has begun, else what the memory here says."""
    model, training = config.model, config.training
    assert model.vocab_size is not None
    began_with = checkpoint.state.config["training"].get("grad_cp") if checkpoint else None
    if began_with in (0, 1):
        return int(began_with)
    setting = Setting(Sharding.of(training, placement.world_size), False, training.micro_bsz, accumulate > 1)
    memory_model = MemoryModel(model, model.vocab_size, training, _kernels(config, placement), config.adapter)
    choice = choose_grad_cp(memory_model, setting, memory_bytes(placement))
    if rank() == 0:
        log.info(str(choice))
    return choice.grad_cp


def _kernels(config: Config, placement: Placement) -> Kernels:
    """The forms that a block is computed in here, where a library or a compiler may be missing."""
    model, training = config.model, config.training
    kernels, device = Kernels.of(training, model, placement.accelerator), placement.accelerator
    if native.unavailable(device, DTYPES[training.precision], model.head_size_a) and kernels.is_compiled:
        kernels = replace(kernels, wkv="chunked")
    if device == "cuda" and isinstance(native.find_library(torch.device(device)), loader.Missing):
        kernels = replace(kernels, has_loss=False)
    if kernels.fused == "native" and not fused.has_native(device):
        kernels = replace(kernels, fused="compile" if device == "cuda" else "plain")
    if kernels.fused == "compile" and fused.missing_for_compile(device):
        kernels = replace(kernels, fused="plain")
    return kernels


def guard_states(checkpoint: Checkpoint | None) -> tuple[SpikeState, EarlyStopState]:
    """What the spike guard and early stopping know when `checkpoint`, or a run from its beginning, goes on."""
    spikes = checkpoint.state.spikes if checkpoint else None
    improvement = checkpoint.state.improvement if checkpoint else None
    return spikes or SpikeState.at_start(), improvement or EarlyStopState.at_start()


def _require_validation(session: Session) -> None:
    """Raises ConfigError where early stopping is wanted and there is nothing to judge by."""
    if session.config.training.early_stop_patience is not None and session.val_windows() is None:
        raise ConfigError(
            f"training.early_stop_patience is set, but {session.work.data} has no validation data",
            remedy="Set data.validation_fraction in a new work_dir, or leave training.early_stop_patience out",
        )


def resolve(config: Config, vocab_size: int) -> tuple[Config, Placement, int]:
    """Whatever follows without the data: the vocabulary, the ranks, and the micro batches of an optimizer step.

    Raises ConfigError for what no data could put right, KernelError for a WKV backend that cannot serve.
    """
    training = config.training
    placement = place(training)
    device = torch.device(placement.accelerator)
    ops.require(training.wkv_backend, device, DTYPES[training.precision], config.model.head_size_a)
    fused.require(training.fused, placement.accelerator)
    optimizer_of(training).require_package()
    accumulate = accumulation(
        micro_bsz=training.micro_bsz,
        world_size=placement.world_size,
        accumulate_grad_batches=training.accumulate_grad_batches,
        global_batch_size=training.global_batch_size,
    )
    resolved = with_vocabulary(config, vocab_size)
    if training.init_from is None or not {"model_type", "n_layer"} & set(open_sizes(config)):
        parameters_of(resolved)  # refuses patterns that fit none of the names, where these are known
    return resolved, placement, accumulate


def parameters_of(config: Config) -> RunParameters:
    """Parameters of a run. config: with its vocabulary. Raises ConfigError for a pattern that fits none."""
    assert config.model.vocab_size is not None
    return run_parameters(config.model, config.model.vocab_size, config.training, config.adapter)


def base_fingerprint(config: Config, work: WorkDir) -> str | None:
    """Fingerprint of the run's initial weights, made anew if they are gone; None without an adapter."""
    if config.adapter.kind == "none":
        return None
    return fingerprint(load_pth(ensure_init_file(config, work), mapped=True))


def build_model(session: Session) -> RWKV:
    """The model with this session's starting weights, as fp32 masters; what is frozen is in the training precision.

    At the beginning of a run rank 0 alone reads or makes them: DDP gives its parameters to all ranks.
    """
    training, adapter, checkpoint = session.config.training, session.config.adapter, session.resume_checkpoint
    initial = None
    if checkpoint is None and rank() == 0:  # before the model, which it needs beside it otherwise
        initial = ensure_init_file(session.config, session.work, force=training.init_from is not None)
    elif checkpoint is not None and adapter.kind != "none":
        initial = session.work.initial_weights
    model = RWKV(
        session.config.model,
        grad_cp=training.grad_cp == 1,
        wkv_backend=training.wkv_backend,
        fused=training.fused,
    )
    if initial is not None:
        model.load_state_dict(fit_state_dict(load_pth(initial, mapped=True), model))
    elif checkpoint is not None:
        model.load_state_dict(fit_state_dict(dict(checkpoint.weights()), model))
    model.compute_dtype = DTYPES[training.precision]
    if session.parameters.is_partial:
        freeze(model, session.parameters.trained, model.compute_dtype)
    if adapter.kind != "none":
        attach(model, adapter)
        if checkpoint is not None:
            load_adapter(model, dict(checkpoint.weights()))
        elif initial is not None:
            initialize_adapter(model, max(training.random_seed, 0))
    return model


def ensure_init_file(config: Config, work: WorkDir, *, force: bool = False) -> Path:
    """Write out/rwkv-init.pth in the training precision unless a fitting one is there.

    Raises CheckpointError when the file that is there, or training.init_from, is damaged or of another shape.
    """
    path = work.initial_weights
    if path.exists() and not force:
        _fitting(
            path,
            _shapes_alone(config.model),
            "Run `rwkv-cluster init --force` to make it anew, or choose another work_dir",
        )
        log.info("initial weights: %s (already there)", path)
        return path
    save_pth(path, initial_state(config), DTYPES[config.training.precision])
    return path


def initial_state(config: Config) -> dict[str, Tensor]:
    """Weights that a run begins with. Raises CheckpointError for those of training.init_from, as `ensure_init_file`."""
    if config.training.init_from is not None:
        return _fitting(Path(config.training.init_from), _shapes_alone(config.model), INIT_FROM_REMEDY, config)
    model = RWKV(config.model)
    initialize(model, max(config.training.random_seed, 0))
    return model.state_dict()


def require_init_from(config: Config, work: WorkDir) -> None:
    """A run that will begin with training.init_from finds weights of its model there. Costs milliseconds for any size.

    Raises CheckpointError, before hours of preparation, for all but damaged values. config: with its vocabulary.
    """
    init_from = config.training.init_from
    if init_from is None or list_steps(work.checkpoints):
        return
    path = Path(init_from)
    with cannot_start(path, INIT_FROM_REMEDY):
        shapes = {name: tensor.to("meta") for name, tensor in peek_weights(path).tensors.items()}
        _require_same_model(fit_rows(shapes, config), _shapes_alone(config.model))


def _shapes_alone(config: ModelConfig) -> RWKV:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return RWKV(config)


def _fitting(path: Path, model: RWKV, remedy: str, config: Config | None = None) -> dict[str, Tensor]:
    """Weights in a file or folder as `model` wants them. remedy: what to do about one that holds none.

    config: that says which rows are new; None: none are.
    """
    with cannot_start(path, remedy):
        weights = read_weights(path, mapped=True)
        if config is not None and config.training.new_rows is not None:
            log.info("new rows of emb and head are made by training.new_rows: %s", config.training.new_rows)
            weights = fit_rows(weights, config)
        _require_same_model(weights, model)
        return fit_state_dict(weights, model)


def _require_same_model(weights: dict[str, Tensor], model: RWKV) -> None:
    """Raises CheckpointError that lists what differs."""
    own, expected = infer_model_config(weights), infer_model_config(model.state_dict())
    if not (other := _differences(own, expected)):
        return
    rows, used = own.vocab_size or 0, expected.vocab_size or 0
    if len(other) == 1 and rows != used:
        fewer = (
            f"fewer than the tokenizer has ids ({used:,}): use the tokenizer that the weights were trained with, or "
            "set training.new_rows"
        )
        more = f"of which the tokenizer uses {used:,}. Set model.vocab_size={rows}"
        raise CheckpointError(f"it has {rows:,} vocabulary rows, {more if rows > used else fewer}")
    raise CheckpointError(f"it holds another model ({'; '.join(other)})")


def _differences(own: ModelConfig, expected: ModelConfig) -> list[str]:
    """Fields that differ, as far as tensors tell. RWKV-LM's optional tensors of block 0 do not count."""
    values = own.model_dump(exclude={"block0_value_residual"})
    return [
        f"{name} {value}, this run has {getattr(expected, name)}"
        for name, value in values.items()
        if value != getattr(expected, name)
    ]
