"""The LightningModule: what one optimizer step does, and what is known about it afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.data.sampler import Horizon, SamplePlan
from rwkv_cluster.errors import TrainingError
from rwkv_cluster.model.loss import head_loss
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.train import distributed
from rwkv_cluster.train.checkpoint import Checkpoint
from rwkv_cluster.train.optimizer import build_optimizer, restore_optimizer, set_learning_rate
from rwkv_cluster.train.schedule import learning_rate

SMALLEST_LOSS_SCALE = 1.0  # below it, overflow is no accident of fp16's range


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. loss: mean over micro batches and ranks, without L2Wrap.

    grad_norm: before clipping; infinite where fp16's loss scaling skipped the update.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float


class TrainingModule(LightningModule):
    """RWKV with its loss, optimizer and schedule.

    found: the checkpoint to continue, or None at the beginning; its weights are in `model` already.
    votes: whether this rank wants to (stop, save) after the step; asked on every rank at every step. One vote is
    enough: the step's one small all-reduce makes every rank see the same answer.
    """

    def __init__(
        self,
        model: RWKV,
        training: TrainingConfig,
        plan: SamplePlan,
        horizon: Horizon,
        *,
        found: Checkpoint | None = None,
        votes: Callable[[], tuple[bool, bool]] = lambda: (False, False),
    ) -> None:
        super().__init__()
        self.model = model
        self.training_config = training
        self.plan = plan
        self.horizon = horizon
        self.step = found.step if found else 0
        self.should_stop = False
        self.should_save = False
        self.result: StepResult | None = None
        self._found = found
        self._votes = votes
        self._micro_losses: list[Tensor] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.model, self.model.config.model_type, self.training_config)
        if self._found is not None:
            restore_optimizer(optimizer, self._found.optimizer(), self._found.state["optimizer_updates"])
            if self.scaler is not None:
                self.scaler.load_state_dict(self._found.state["loss_scale"])
        return optimizer

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """fp16's loss scaling; None in the other precisions."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one optimizer, without Lightning's wrapper."""
        (optimizer,) = self.trainer.optimizers
        return optimizer

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        set_learning_rate(self.optimizer, self.current_lr)

    @property
    def current_lr(self) -> float:
        """Rate of the step under way, before a group's multiplier."""
        return learning_rate(
            self.step,
            training=self.training_config,
            tokens_per_step=self.plan.tokens_per_step,
            horizon_tokens=self.horizon.tokens,
        )

    def forward(self, batch: Tensor) -> Tensor:
        """batch [b, T + 1] int64 -> scalar fp32 loss of predicting each next token."""
        hidden = self.model.hidden(batch[:, :-1])  # [b, T, C]
        return head_loss(
            hidden.flatten(0, 1),
            self.model.head.weight,
            batch[:, 1:].flatten(),
            l2wrap=self.training_config.l2wrap,
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """batch [b, T + 1] int64 -> scalar fp32 loss of this micro batch."""
        loss = self.forward(batch)
        if distributed.fault_point("train.loss", step=self.step):
            loss = loss * math.nan
        self._micro_losses.append(loss.detach())
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """After the last backward pass of a step and before its update: agree on the loss, guard, clip."""
        local_loss = torch.stack(self._micro_losses).double().mean()
        self._micro_losses.clear()
        ballot = torch.tensor([0.0, 1.0, *self._votes()], dtype=torch.float64, device=local_loss.device)
        ballot[0] = local_loss
        total, ranks, stop, save = distributed.sum_over_ranks(ballot).tolist()
        loss, self.should_stop, self.should_save = total / ranks, stop > 0, save > 0
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        limit = self.training_config.gradient_clip_val or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        # fp16 overflows now and then: its loss scaling then skips the update and lowers the scale
        may_skip = self.scaler is not None and self.scaler.get_scale() > SMALLEST_LOSS_SCALE
        if not (math.isfinite(loss) and (math.isfinite(grad_norm) or may_skip)):
            self._refuse_update(float(local_loss), grad_norm)
        self.result = StepResult(self.step, loss, grad_norm, self.current_lr)

    def _refuse_update(self, local_loss: float, grad_norm: float) -> None:
        losses = distributed.all_gather_floats(local_loss, self.device)
        bad = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
        ranks = f"on rank {', '.join(map(str, bad))}" if bad else "in the gradient only"
        samples = self.plan.samples(self.step)
        raise TrainingError(
            f"step {self.step}: the loss or gradient is not finite {ranks} (losses {losses}, gradient norm "
            f"{grad_norm}). Samples {samples.start} to {samples.stop - 1} of the token file were not applied. "
            "The same command starts again from the newest checkpoint; lower training.lr_init or look at the data"
        )
