"""Config and launcher -> where and how Lightning runs: the one place that knows accelerators and strategies."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime import nccl_shared_memory, rank_env
from rwkv_cluster.train.distributed.collectives import join_group, leaving_group
from rwkv_cluster.train.parallel import nccl_environment
from rwkv_cluster.train.parallel.cluster_environment import RankEnvironment
from rwkv_cluster.train.parallel.state import ModelAndOptimizerState, ReplicatedState
from rwkv_cluster.train.parallel.teardown import tear_down
from rwkv_cluster.train.parallel.zero import (
    ZeroShardedState,
    ZeroStrategy,
    leave_group,
    require_deepspeed,
    zero_strategy,
)
from rwkv_cluster.train.placement import Placement

log = logging.getLogger("rwkv_cluster")

DDP_OPTIONS: dict[str, Any] = {
    "gradient_as_bucket_view": True,  # gradients lie in the buckets: once in memory, and summed in place
    "broadcast_buffers": False,  # the model has none
    "find_unused_parameters": False,  # each trained parameter is in every graph; a search for others costs each step
    # Non-reentrant checkpoints do not need a static graph, which would save nothing; torch 2.13 fails, or sums no
    # gradient, where the first backward pass is under no_sync (pytorch issue 143580, pull request 187732).
    "static_graph": False,
}
"""Arguments of DistributedDataParallel. bucket_cap_mb stays torch's 25 MiB: another size changes the order of the sums
and, without figures of GPUs and their links, would be a guess."""


class ScaledFp16(MixedPrecision):
    """Loss scaling for fp16 without autocast: the model casts for itself."""

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        yield


def place(training: TrainingConfig) -> Placement:
    """Ranks and devices from the launcher's environment, else from the configuration.

    Raises ConfigError for a precision or accelerator that this machine does not have, and for variables of a launcher
    that contradict each other.
    """
    cuda = torch.cuda.is_available()
    if training.accelerator == "cuda" and not cuda:
        raise ConfigError(
            "training.accelerator is cuda, but torch finds no CUDA device here",
            remedy="Use training.accelerator cpu, or look at `nvidia-smi` and at the torch build",
        )
    accelerator = "cuda" if cuda and training.accelerator != "cpu" else "cpu"
    if accelerator == "cpu" and training.precision == "fp16":
        raise ConfigError(
            "training.precision is fp16, which needs a CUDA device, and this run is on a CPU", remedy="Use fp32 or bf16"
        )
    require_deepspeed(training, accelerator)
    world_size = rank_env.launched_world_size() or training.devices
    devices = rank_env.launched_local_world_size() or min(training.devices, world_size)
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise ConfigError(
            f"{devices} ranks were asked for on this machine, which has {torch.cuda.device_count()} CUDA devices",
            remedy=f"Use training.devices {torch.cuda.device_count()}",
        )
    if world_size > 1 and rank_env.launched():
        rank_env.require_meeting_point()
    return Placement(accelerator, world_size, devices, world_size // devices)


def require_script(training: TrainingConfig) -> None:
    """Raises ConfigError where this process cannot start the other ranks: each runs its script from the beginning."""
    devices = training.devices
    if devices == 1 or rank_env.launched():
        return
    if getattr(sys.modules.get("__main__"), "__file__", None) is None:
        raise ConfigError(
            f"training.devices is {devices}, and a notebook, an interactive session or `python -c` has no script that "
            "the other ranks could run",
            remedy="Write one, use `rwkv-cluster train`, or set training.devices to 1",
        )


class ReplicaStrategy(DDPStrategy):
    """Lightning's DDP in a process group of its own name. group: see `distributed.join_group`."""

    def __init__(self, group: str, training: TrainingConfig, accelerator: str) -> None:
        super().__init__(
            process_group_backend="nccl" if accelerator == "cuda" else "gloo",
            timeout=timedelta(seconds=training.timeout_s),
            **DDP_OPTIONS,
        )
        self._group = group

    def setup_distributed(self) -> None:
        if self.world_size > 1:
            assert self._timeout is not None
            join_group(self._get_process_group_backend(), self._group, self._timeout, self.root_device)
        super().setup_distributed()

    def teardown(self) -> None:
        tear_down(self)


class OneDeviceStrategy(SingleDeviceStrategy):
    """Lightning's strategy for one process, which leaves what it trained where it is; see `tear_down`."""

    def teardown(self) -> None:
        tear_down(self)


def trainer_arguments(training: TrainingConfig, placement: Placement, group: str, hang: Path) -> dict[str, Any]:
    """Arguments of `pytorch_lightning.Trainer` that follow from strategy, precision and placement.

    group: name of the process group, see `distributed.join_group`. hang: folder for what ranks leave that do not go on.
    """
    if placement.accelerator == "cuda" and placement.world_size > 1:
        _set_nccl_variables(hang)
    if placement.accelerator == "cuda" and placement.devices > 1:
        notice = nccl_shared_memory.disable_nccl_shm_if_small()
        if notice and rank_env.local_rank() == 0:
            log.warning(notice)
    arguments: dict[str, Any] = {
        "accelerator": placement.accelerator,
        "devices": placement.devices,
        "num_nodes": placement.num_nodes,
        "strategy": _strategy(training, placement, group),
        "plugins": [RankEnvironment(placement.world_size, placement.devices)],
    }
    if training.precision == "fp16":
        arguments["plugins"].append(ScaledFp16("16-mixed", placement.accelerator))
    if training.precision == "bf16" and training.deepspeed_stage:  # stage 0 keeps fp32 parameters, as DDP
        arguments["precision"] = "bf16-mixed"
    return arguments


def _set_nccl_variables(hang: Path) -> None:
    """Tell NCCL's process group, which is about to be made, what `nccl_environment` has reasons for."""
    variables = nccl_environment.missing_variables(os.environ, hang, nccl_environment.version_of(torch.__version__))
    os.environ.update(variables)
    with suppress(OSError):  # torch says so when it cannot write there
        hang.mkdir(parents=True, exist_ok=True)
    if variables and rank_env.rank() == 0:
        log.info(
            "NCCL is used with %s; docs/clusters.md says why, and what the environment has set stays",
            ", ".join(f"{name}={value}" for name, value in variables.items()),
        )


def leaving(training: TrainingConfig) -> AbstractContextManager[None]:
    """Context of all that trains with `trainer_arguments`; the process group is gone after it."""
    return leaving_group() if training.deepspeed_stage is None else leaving_group(leave_group)


@contextmanager
def sums_in_fp32() -> Iterator[None]:
    """Let no GPU add partial sums of a matrix product in bf16 or fp16, as torch allows by default.

    A weight's gradient is a sum over all tokens of a micro batch, which cuBLAS may cut up: rounded in between, it would
    depend on how. Afterwards the process has its own setting again.
    """
    products = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(products, name) for name in names}
    try:
        for name in names:
            setattr(products, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(products, name, value)


def train_state(trainer: Trainer, model: nn.Module) -> ModelAndOptimizerState:
    """What this rank holds of `model`, once `trainer` has set it up."""
    if isinstance(trainer.strategy, ZeroStrategy) and trainer.strategy.stage > 0:
        return ZeroShardedState(model, trainer.strategy.deepspeed_engine)
    (optimizer,) = trainer.optimizers
    return ReplicatedState(model, optimizer, keeps_gradients=accumulates_in_buckets(trainer))


def accumulates_in_buckets(trainer: Trainer) -> bool:
    """Whether the micro batches of a step add their gradients up where DDP exchanges them.

    They do as long as gradients are set to 0 and not dropped: new ones would lie beside the buckets until the last
    micro batch of a step, 4 more bytes for each trained parameter.
    """
    return isinstance(trainer.strategy, ReplicaStrategy) and trainer.accumulate_grad_batches > 1


def completes_step(trainer: Trainer) -> bool:
    """Whether an update follows the backward pass that has just ended."""
    return not isinstance(trainer.strategy, ZeroStrategy) or trainer.strategy.completes_step()


def _strategy(training: TrainingConfig, placement: Placement, group: str) -> Strategy | str:
    if training.deepspeed_stage is not None:
        return zero_strategy(training, placement.accelerator, group)
    if placement.world_size == 1 and training.strategy == "auto":
        return OneDeviceStrategy("cuda:0" if placement.accelerator == "cuda" else "cpu")
    return ReplicaStrategy(group, training, placement.accelerator)
