"""DeepSpeed ZeRO under Lightning, on CUDA and on CPUs; and the masters and moments that each rank keeps of it.

    stage 0   DeepSpeed's own data parallelism: every rank keeps everything, in fp32
    stage 1   each rank keeps its part of the fp32 masters and of the optimizer's moments
    stage 2   and of the gradients
    stage 3   and of the parameters, which are gathered where they are used

From stage 1 on the parameters have the training precision; the masters, which the optimizer updates, are fp32.
Activation checkpointing, order of samples, saving and resuming are this package's own, not DeepSpeed's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from rwkv_cluster.adapters.layers import saved_names
from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.model.parameter_shapes import unused_names
from rwkv_cluster.train.checkpoint.save_load import Checkpoint, Files
from rwkv_cluster.train.checkpoint.shards import shard_key
from rwkv_cluster.train.distributed import collectives
from rwkv_cluster.train.optimizers.muon import Muon
from rwkv_cluster.train.optimizers.param_groups import has_ema
from rwkv_cluster.train.optimizers.table import EMA
from rwkv_cluster.train.parallel.state import replaced
from rwkv_cluster.train.parallel.teardown import tear_down

MASTER = "master"


def require_deepspeed(training: TrainingConfig, accelerator: str) -> None:
    """Raise ConfigError where the configuration wants DeepSpeed on "cpu" or "cuda" and it cannot be had."""
    if training.deepspeed_stage is None:
        return
    if accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported
    try:
        import deepspeed.ops
    except Exception as error:  # its import looks for compilers and devices, and fails in many ways
        raise ConfigError(
            f"ZeRO stage {training.deepspeed_stage} needs the package deepspeed, which cannot be imported: {error}",
            remedy="Install it with `pip install deepspeed`, or set training.strategy to ddp and zero_stage to null",
        ) from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile when the process group is made


def deepspeed_config(training: TrainingConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration for ZeRO; Lightning adds precision and accumulation."""
    stage, bucket = training.deepspeed_stage, training.ds_bucket_mb * 1_000_000
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": True,
        "contiguous_gradients": True,
    }
    if training.offloads_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if training.offloads_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast on a CPU and needs no compiler
        "gradient_clipping": training.gradient_clip_val
        if stage
        else 0.0,  # at stage 0 gradients are whole: ReplicatedState
        "train_micro_batch_size_per_gpu": training.micro_bsz,
    }
    if training.communication_dtype is not None:
        config["communication_data_type"] = training.communication_dtype
    return config


def zero_strategy(training: TrainingConfig, accelerator: str, group: str) -> ZeroStrategy:
    """The strategy of a run with DeepSpeed on "cpu" or "cuda". group: see `distributed.join_group`."""
    backend = "nccl" if accelerator == "cuda" else "gloo"
    timeout = timedelta(seconds=training.timeout_s)
    return ZeroStrategy(group, config=deepspeed_config(training), process_group_backend=backend, timeout=timeout)


def leave_group() -> None:
    """End the process group, also for DeepSpeed, which would take it up again in this process's next run."""
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy without its refusal of CPUs and its second division by the accumulation.

    Its parent, for DDP, sets the processes up for any device. DeepSpeed's engine divides a loss by the number of micro
    batches, which Lightning has done already.
    """

    def __init__(self, group: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._group = group

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if self.world_size > 1:
            assert self._timeout is not None
            collectives.join_group(self._get_process_group_backend(), self._group, self._timeout, self.root_device)
        if self.root_device.type == "cuda":
            super().setup_distributed()
        else:  # the parent validates indices, which CPUs do not have
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    def teardown(self) -> None:
        tear_down(self)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(closure_loss, *args, scale_wrt_gas=False, **kwargs)

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        """Set up DeepSpeed without what the parent hands over: the number of the device, which CPUs do not have."""
        import deepspeed

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._fit_buckets(sum(parameter.numel() for parameter in trained))
        engine, wrapped, _, _ = deepspeed.initialize(
            config=self.config, model=model, model_parameters=trained, optimizer=optimizer, dist_init_required=False
        )
        return engine, wrapped

    def _fit_buckets(self, n_parameters: int) -> None:
        """DeepSpeed allocates a bucket at its full size, also for a model that would fill a small part of it."""
        assert isinstance(self.config, dict)
        zero = self.config["zero_optimization"]
        for name in ("reduce_bucket_size", "allgather_bucket_size"):
            zero[name] = min(zero[name], n_parameters)

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        assert isinstance(self.config, dict)
        return int(self.config["zero_optimization"]["stage"])

    def completes_step(self) -> bool:
        """Whether the micro batch under way is the last of an optimizer step."""
        return bool(self.deepspeed_engine.is_gradient_accumulation_boundary())


@dataclass(frozen=True)
class Fragment:
    """Elements start.. of the flattened parameter `name` that this rank keeps; size 0 where it keeps none.

    They lie at at.. in this rank's flat tensor of number `flat`.
    """

    name: str
    shape: tuple[int, ...]
    flat: int
    at: int
    start: int
    size: int

    def of(self, values: Tensor) -> Tensor:
        """A view of the elements in a tensor like the flat one."""
        return values[self.at : self.at + self.size]


class ZeroShardedState:
    """ZeRO's state on this rank, stages 1 to 3. engine: DeepSpeed's, around a module that contains `model`."""

    clips_in_update = True

    def __init__(self, model: nn.Module, engine: Any) -> None:
        self._model = model
        self._engine = engine
        self._zero = engine.optimizer
        groups = self._zero.optimizer.param_groups
        self._group_of = {name: number for number, group in enumerate(groups) for name in group["names"]}
        self._moments_of_groups: list[tuple[str, ...]] = [group["moments"] for group in groups]
        if isinstance(self._zero.optimizer, Muon):
            self._zero.optimizer.of_whole_matrices = self._of_whole_matrices

    def clip_gradients(self, limit: float) -> Tensor:
        raise NotImplementedError("DeepSpeed clips in its update")

    def skips_update(self, unusable: Tensor) -> bool:
        return False

    def grad_norm(self) -> float:
        return float(self._engine.get_global_grad_norm())

    def release_gradients(self) -> None:
        """Nothing: DeepSpeed has done it in its update."""

    def update_count(self) -> int:
        return int(next(iter(self._zero.optimizer.state.values()))["step"])

    def masters(self) -> Iterable[tuple[str, Tensor]]:
        flats = self._flats
        return ((fragment.name, fragment.of(flats[fragment.flat])) for fragment in self._kept())

    def files(self) -> Files:
        weights, moments = {}, {}
        for fragment in self._kept():
            for key, tensor in self._tensors(fragment).items():
                if key == MASTER:
                    weights[shard_key(fragment.name, fragment.start)] = tensor
                else:
                    moments[shard_key(f"{key}/{fragment.name}", fragment.start)] = tensor
        weights |= self._frozen()
        rank, world_size = collectives.position()
        suffix = f"{rank:05d}-of-{world_size:05d}.pth"
        return {f"weights-{suffix}": weights, f"optimizer-{suffix}": moments}

    def shapes(self) -> dict[str, list[int]] | None:
        return {name: list(_shape(parameter)) for name, parameter in self._saved()}

    def restore(self, checkpoint: Checkpoint) -> None:
        masters, moments = checkpoint.weights(), checkpoint.optimizer()
        self._make_moments(checkpoint.state.optimizer_updates)
        begins_ema = not has_ema(moments)
        for fragment in self._kept():
            for key, target in self._tensors(fragment).items():
                is_master = key == MASTER or (key == EMA and begins_ema)
                whole = masters[fragment.name] if is_master else moments[f"{key}/{fragment.name}"]
                target.copy_(whole.flatten()[fragment.start : fragment.start + fragment.size])

    def weights(self) -> dict[str, Tensor] | None:
        rank, _ = collectives.position()
        gathered = {}
        for name, parameter in self._model.named_parameters():
            whole = self._gathered(parameter)
            if rank == 0:
                gathered[name] = whole
        return gathered if rank == 0 else None

    def ema_weights(self) -> dict[str, Tensor] | None:
        averages = {name: average.cpu() for name, average in self._averages()}
        whole = self.weights()
        return None if whole is None else {**whole, **averages}

    def with_ema(self) -> AbstractContextManager[bool]:
        if self._is_stage_3:  # its parameters are never whole together
            return nullcontext(False)
        dtypes = {name: parameter.dtype for name, parameter in self._model.named_parameters()}
        return replaced(self._model, {name: average.to(dtypes[name]) for name, average in self._averages()})

    def _averages(self) -> Iterator[tuple[str, Tensor]]:
        """Whole fp32 averages of the trained parameters, on every rank. Collective; one is in memory at a time."""
        averages = [self._zero.optimizer.state[flat][EMA] for flat in self._flats]
        for fragment in self._fragments():
            yield fragment.name, self._whole(fragment, averages[fragment.flat])

    def _of_whole_matrices(self, flat: Tensor, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of each whole matrix of which `values` has pieces as `flat` has: its values in the same pieces.

        Collective; one matrix is in memory at a time. A rank that has nothing of one leaves the computing to others.
        """
        results = torch.zeros_like(values)
        (number,) = (number for number, own in enumerate(self._flats) if own is flat)
        for fragment in self._fragments():
            if fragment.flat == number:
                whole = self._whole(fragment, values)
                if fragment.size > 0:
                    result = function(whole).flatten()[fragment.start : fragment.start + fragment.size]
                    fragment.of(results).copy_(result)
        return results

    def _whole(self, fragment: Fragment, values: Tensor) -> Tensor:
        """The parameter of which `values`, like a flat tensor, has this rank's elements. Collective."""
        whole = torch.zeros(math.prod(fragment.shape), device=self._engine.device)
        whole[fragment.start : fragment.start + fragment.size] = fragment.of(values)
        return collectives.sum_over_ranks(whole).view(fragment.shape)

    @property
    def _is_stage_3(self) -> bool:
        return bool(self._engine.zero_optimization_partition_weights())

    @property
    def _flats(self) -> list[Tensor]:
        """This rank's fp32 masters, one flat tensor for each group that the optimizer updates."""
        name = "fp32_partitioned_groups_flat" if self._is_stage_3 else "single_partition_of_fp32_groups"
        return list(getattr(self._zero, name))

    def _moments(self, flat: int) -> tuple[str, ...]:
        """Names of what the optimizer keeps beside the masters of that flat tensor."""
        return self._moments_of_groups[self._zero.sub_group_to_group_id[flat] if self._is_stage_3 else flat]

    def _make_moments(self, updates: int) -> None:
        """Moments of zero, as after `updates` updates, in place of what the optimizer would make at its first."""
        for number, flat in enumerate(self._flats):
            moments = {moment: torch.zeros_like(flat, requires_grad=False) for moment in self._moments(number)}
            self._zero.optimizer.state[flat] = {"step": torch.tensor(float(updates), device=flat.device), **moments}

    def _tensors(self, fragment: Fragment) -> dict[str, Tensor]:
        """Views of the fragment's fp32 master and moments."""
        flat = self._flats[fragment.flat]
        state = self._zero.optimizer.state[flat]
        whole = {MASTER: flat.detach(), **{moment: state[moment] for moment in self._moments(fragment.flat)}}
        return {key: fragment.of(tensor) for key, tensor in whole.items()}

    def _kept(self) -> Iterator[Fragment]:
        """Fragments that this rank has anything of."""
        return (fragment for fragment in self._fragments() if fragment.size > 0)

    def _fragments(self) -> Iterator[Fragment]:
        """A fragment of every trained parameter, in the same order on every rank.

        What is read below is DeepSpeed's own: in which flat tensor of a stage a part lies, and where in the parameter.
        """
        parameter: Any  # with what DeepSpeed adds to it
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            flat, at, start, size = self._group_of[name], 0, 0, 0
            if self._is_stage_3:
                flat, at, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = size * collectives.position()[0]
                size = max(min(size, parameter.ds_numel - start), 0)  # the rest is padding
            elif (held := parameter._hp_mapping) is not None:
                start = held.lp_fragment_address.start
                at, size = held.hp_fragment_address.start, held.hp_fragment_address.numel
            yield Fragment(name, _shape(parameter), flat, at, start, size)

    def _frozen(self) -> dict[str, Tensor]:
        """Saved parameters that are not trained and so have no master, each in one piece; on rank 0. Collective."""
        pieces, unused = {}, unused_names()
        for name, parameter in self._saved():
            if not parameter.requires_grad:
                whole = self._gathered(parameter).flatten()
                pieces[shard_key(name, 0)] = whole.float() if name in unused else whole
        return pieces if collectives.position()[0] == 0 else {}

    def _saved(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that a checkpoint holds."""
        names = saved_names(self._model)
        return ((name, parameter) for name, parameter in self._model.named_parameters() if name in names)

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        """The whole of one parameter. Collective in stage 3, where it is a copy in the host's memory."""
        if not self._is_stage_3:
            return parameter.detach()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's own shape, also while ZeRO-3 has it in pieces."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
