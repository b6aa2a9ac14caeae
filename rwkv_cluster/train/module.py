"""The LightningModule: what one optimizer step does, and what is known about it afterwards."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.data.horizon import Horizon
from rwkv_cluster.data.sampler import SamplePlan
from rwkv_cluster.data.windows import TokenBatch
from rwkv_cluster.errors import CheckpointError, TrainingError
from rwkv_cluster.model.loss import target_loss
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.checkpoint import rng_state
from rwkv_cluster.train.checkpoint.save_load import Checkpoint
from rwkv_cluster.train.distributed import collectives
from rwkv_cluster.train.memory.model_states import keeps_copies
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.train.metrics.step_recorder import StepResult
from rwkv_cluster.train.optimizers.low_precision import keep_copies
from rwkv_cluster.train.optimizers.param_groups import build_optimizer, set_learning_rate
from rwkv_cluster.train.optimizers.update_statistics import UpdateStatistics
from rwkv_cluster.train.parallel import strategy
from rwkv_cluster.train.parallel.host_copy import HostCopy, on_device
from rwkv_cluster.train.parallel.state import ModelAndOptimizerState
from rwkv_cluster.train.schedule import learning_rate

SMALLEST_LOSS_SCALE = 1.0  # below it, overflow is no accident of fp16's range
MOST_POSITIONS = 8  # in a message
SPIKE = 10.0  # times the loss, where a test wants a spike


class Votes(NamedTuple):
    """What one rank wants at a step boundary, or what all ranks have agreed on.

    stop, save: after the step; one rank's wish is enough. written: its part of a checkpoint; it takes all ranks.
    """

    stop: bool = False
    save: bool = False
    written: bool = False


class StepObserver(Protocol):
    """What is asked before each optimizer step's update, and told after it. On every rank."""

    def votes(self) -> Votes:
        """This rank's votes for the step boundary that comes."""

    def step_ended(self, result: StepResult, agreed: Votes) -> None:
        """The update of a step is done. agreed: by all ranks."""


class TrainingModule(LightningModule):
    """RWKV with its loss, optimizer and schedule.

    resume_checkpoint: to continue, or None at the beginning; its weights are in `model` already.
    observer: follows the steps; None where nobody does. events: where values that are not finite are told.
    """

    def __init__(
        self,
        model: RWKV,
        training: TrainingConfig,
        sample_plan: SamplePlan,
        horizon: Horizon,
        *,
        resume_checkpoint: Checkpoint | None = None,
        observer: StepObserver | None = None,
        events: Events | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.training_config = training
        self.sample_plan = sample_plan
        self.horizon = horizon
        self.step = resume_checkpoint.step if resume_checkpoint else 0
        self.should_stop = False
        self.state: ModelAndOptimizerState
        self._resume_checkpoint = resume_checkpoint
        self._observer = observer
        self._agreed = Votes()
        self._events = events or Events(None)
        self._micro_losses: list[Tensor] = []
        self._gradient_sum = torch.zeros(())  # of this rank alone, before any exchange
        self._is_watched = False
        for part in (model.emb, *model.blocks):
            part.register_forward_hook(self._watch_gradient)
        self._numbers: HostCopy | None = None  # of the step whose update is due, see `_numbers_of_step`
        self._loss: float | None = None  # of that step, once its numbers are read
        self._grad_norm = math.nan  # the same
        self._n_trained: int | None = None  # of that step
        self._statistics: UpdateStatistics | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.model.config.model_type, self.training_config)

    def on_train_start(self) -> None:
        self.state = strategy.train_state(self.trainer, self.model)
        accumulates, precision = self.trainer.accumulate_grad_batches > 1, self.training_config.precision
        stage = self.training_config.deepspeed_stage
        if keeps_copies(precision, stage, accumulates=accumulates, grad_cp=self.model.grad_cp):
            keep_copies(self.model, self.optimizer)
        if self._resume_checkpoint is None and self.model.preserve_rng_state:  # dropout: each rank its own masks
            torch.manual_seed(max(self.training_config.random_seed, 0) + rank())
        if self._resume_checkpoint is not None:
            rng_state.restore(self._resume_checkpoint.state.random_states, rank())
            self.state.restore(self._resume_checkpoint)
            if self.scaler is not None and (scale := self._resume_checkpoint.state.loss_scale) is not None:
                _restore_scale(self.scaler, scale)
        if (interval := self.training_config.statistics_interval_steps) is not None:
            batch, micro_bsz = self.sample_plan.global_batch_size, self.training_config.micro_bsz
            self._statistics = UpdateStatistics(
                self.model, self.state.masters, interval, batch=batch, micro_bsz=micro_bsz
            )

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """fp16's loss scaling; None in the other precisions."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one optimizer, without Lightning's wrapper."""
        (optimizer,) = self.trainer.optimizers
        return optimizer

    def on_train_batch_start(self, batch: TokenBatch, batch_idx: int) -> int | None:
        """-1 ends the loop: what the step before had left undone is done, and nothing follows it."""
        if self.should_stop or self.step == self.horizon.total_steps:
            return -1
        set_learning_rate(self.optimizer, self.current_lr)
        if self._statistics is not None:
            self._statistics.begin(self.step)
        return None

    @property
    def current_lr(self) -> float:
        """Rate of the step under way, before a group's multiplier."""
        return learning_rate(
            self.step,
            training=self.training_config,
            tokens_per_step=self.sample_plan.tokens_per_step,
            horizon_tokens=self.horizon.tokens,
        )

    def forward(self, batch: TokenBatch) -> Tensor:
        """Scalar fp32 loss of predicting each target of `batch`: its mean over those that are trained on.

        Of a micro batch whose step has n trained targets in all, the sum is divided by n / (number of micro batches):
        the mean over ranks and micro batches is then the mean over all n, however unevenly they lie.
        """
        self._is_watched = False
        divisor = None
        if batch.n_trained is not None:
            divisor = max(batch.n_trained, 1) * len(batch.inputs) / self.sample_plan.global_batch_size
        return target_loss(
            self.model,
            batch.inputs,
            batch.targets,
            self.training_config.l2wrap,
            starts=batch.starts,
            trained=batch.trained,
            divisor=divisor,
        )

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Scalar fp32 loss of this micro batch, see `forward`."""
        loss = self.forward(batch)
        self._n_trained = batch.n_trained
        if collectives.fault_point("train.loss", step=self.step):
            loss = loss * math.nan
        if collectives.fault_point("train.spike", step=self.sample_plan.batch(self.step)):
            loss = loss * SPIKE
        if collectives.fault_point("train.gradient", step=self.step):
            loss.register_hook(lambda gradient: gradient * math.nan)
        self._micro_losses.append(loss.detach())
        return loss

    def _watch_gradient(self, part: nn.Module, arguments: Any, output: Any) -> None:
        """Sum what reaches the lowest activations that have a gradient, those of `emb` unless it is frozen.

        A value that is not finite anywhere above arrives there. Parameters' gradients are exchanged while they are
        computed, after which all ranks have the NaN of one.
        """
        activations: Tensor = output if isinstance(output, Tensor) else output[0]
        if self._is_watched or not activations.requires_grad:
            return
        self._is_watched = True

        def add(gradient: Tensor) -> None:
            self._gradient_sum = self._gradient_sum.to(gradient.device) + gradient.sum(dtype=torch.float32)

        activations.register_hook(add)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Agree with the other ranks, guard and clip, between a step's last backward pass and its update.

        DeepSpeed asks after every micro batch. The step's numbers are read before the update, unless the device can
        leave it out by itself: then it is computing the update while the host reads.
        """
        if not strategy.completes_step(self.trainer):
            return
        if self._statistics is not None:
            self._statistics.before_update(self.scaler.get_scale() if self.scaler is not None else 1.0)
        numbers = self._numbers_of_step()
        self._numbers = HostCopy(numbers)
        if not self.state.skips_update(numbers[:2].isfinite().all().logical_not()):
            self._read_numbers()

    def _numbers_of_step(self) -> Tensor:
        """[6] fp64, the same on every rank: norm before clipping (0 where it is not known yet), sums of ranks' losses,
        of ones and of their votes; by one small all-reduce.
        """
        self._local_loss = torch.stack(self._micro_losses).double().mean()
        self._micro_losses.clear()
        votes = self._observer.votes() if self._observer is not None else Votes()
        others = on_device([1.0, *votes, 0.0], self._local_loss.device)
        ballot = collectives.sum_over_ranks(torch.cat([self._local_loss[None], others[:-1]]))
        norm = others[-1]
        if not self.state.clips_in_update:
            norm = self.state.clip_gradients(self.training_config.gradient_clip_val or math.inf)
        return torch.cat([norm.double()[None], ballot])

    def _read_numbers(self) -> None:
        """What the ranks have agreed on. Raises TrainingError on every rank for values that are not finite."""
        assert self._numbers is not None
        self._grad_norm, total, ranks, stop, save, written = self._numbers.tolist()
        self._numbers, self._loss = None, total / ranks
        self._agreed = Votes(stop > 0, save > 0, written == ranks)
        self.should_stop = self._agreed.stop
        self._require_finite(self._grad_norm)

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        """Update with one micro batch under DeepSpeed, else with all of a step; tell of a step that is complete."""
        super().optimizer_step(*arguments, **named)
        if self._numbers is not None:
            self._read_numbers()
        if self._loss is not None:
            grad_norm = self._grad_norm
            if self.state.clips_in_update:  # which leaves everything as it was when the norm is not finite
                grad_norm = self.state.grad_norm()
                self._require_finite(grad_norm)
            statistics = self._statistics.after_update(grad_norm) if self._statistics is not None else {}
            self.state.release_gradients()
            result = StepResult(self.step, self._loss, grad_norm, self.current_lr, self._n_trained, statistics)
            self._loss = None
            self._gradient_sum = torch.zeros_like(self._gradient_sum)
            if self._observer is not None:
                self._observer.step_ended(result, self._agreed)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing but under ZeRO: `optimizer_step` has released the gradients.

        Lightning asks between a step's first forward pass and its backward pass, until when those of the step before
        would be held.
        """
        if self.state.clips_in_update:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _require_finite(self, grad_norm: float) -> None:
        """Raises TrainingError on every rank for values that are not finite, with which there is no update."""
        assert self._loss is not None
        if math.isfinite(self._loss) and (math.isfinite(grad_norm) or self._may_overflow()):
            return
        losses = collectives.all_gather_floats(float(self._local_loss), self.device)
        gradients = collectives.all_gather_floats(float(self._gradient_sum), self.device)
        what, values = ("gradient", gradients) if all(map(math.isfinite, losses)) else ("loss", losses)
        bad = [rank for rank, value in enumerate(values) if not math.isfinite(value)]
        samples = self.sample_plan.samples(self.step)
        suspects = [number for rank in bad for number in samples[rank :: len(values)]] or list(samples)
        place, begin = ("windows", "are windows") if self.sample_plan.is_packed else ("positions", "begin at token")
        of_sample = self.sample_plan.window if self.sample_plan.is_packed else self.sample_plan.offset
        positions = [of_sample(number) for number in suspects]
        facts = {"what": what, "ranks": bad, "losses": losses, "grad_norm": grad_norm, place: positions}
        self._events.add("nonfinite", self.step, **facts, samples=suspects)
        ranks = f" on rank {', '.join(map(str, bad))}" if bad else ""
        raise TrainingError(
            f"step {self.step}: the {what} is not finite{ranks} (losses {losses}, gradient norm "
            f"{grad_norm}). Samples {samples.start} to {samples.stop - 1} of the token file were not applied; those"
            f"{ranks} {begin} {_shown(positions)}",
            remedy="The same command starts again from the newest checkpoint; lower training.lr_init or look at the "
            "data",
        )

    def _may_overflow(self) -> bool:
        """Whether it is fp16's accident of now and then, for which its loss scaling skips the update and goes down."""
        return self.scaler is not None and self.scaler.get_scale() > SMALLEST_LOSS_SCALE


def _restore_scale(scaler: torch.amp.GradScaler, state: dict[str, Any]) -> None:
    """Raises CheckpointError for a state that is none."""
    try:
        scaler.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the loss scale in the checkpoint is damaged or of another version: {error!r}",
            remedy="Move that checkpoint away to go on from the one before",
        ) from error


def _shown(positions: list[int]) -> str:
    """The first of many, for a sentence."""
    shown = ", ".join(map(str, positions[:MOST_POSITIONS]))
    rest = len(positions) - MOST_POSITIONS
    return f"{shown} and {rest} more, listed in logs/events.jsonl" if rest > 0 else shown
