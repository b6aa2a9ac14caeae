"""Learning-rate range test: a short training of the run's own model on its own data, at a rate that grows every step.

Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, arXiv 1506.01186, section 3.3. The suggestion is a
tenth of the rate at which the smoothed loss was lowest: at that rate itself training is about to fall apart. It is a
rate for the beginning of a run, found in few steps, and no substitute for a comparison of runs.

Everything is in memory: nothing in the work directory is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.config import Config, TrainingConfig
from rwkv_cluster.config.schema import ranks_per_node
from rwkv_cluster.data.dataset import TokenDataset
from rwkv_cluster.data.horizon import Horizon
from rwkv_cluster.data.manifest import load_manifest
from rwkv_cluster.data.sampler import plan_samples
from rwkv_cluster.data.windows import TokenBatch, open_windows
from rwkv_cluster.errors import ConfigError, TrainingError
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import fit_state_dict
from rwkv_cluster.planning.formatting import picture
from rwkv_cluster.runtime.terminal.time_left import Countdown
from rwkv_cluster.train.checkpoint.initial_weights import with_sizes_of_weights
from rwkv_cluster.train.module import TrainingModule
from rwkv_cluster.train.optimizers.param_groups import build_optimizer, set_learning_rate
from rwkv_cluster.train.placement import DTYPES
from rwkv_cluster.train.session import initial_state, resolve
from rwkv_cluster.workdir import WorkDir

FIRST, LAST, STEPS = 1e-6, 1.0, 100
MOST_STEPS = 1000
SMOOTHING = 0.8  # decay of the loss's exponential mean: it looks back 5 steps
DIVERGED = 2.0  # times the lowest smoothed loss, at which the test ends
_COLUMNS = 64


@dataclass(frozen=True)
class RangeTest:
    """Rates of the steps that were made, and the loss before the update of each."""

    rates: list[float]
    losses: list[float]

    @property
    def smoothed(self) -> list[float]:
        """Exponential mean of the losses, without start-up bias."""
        means, total, weight = [], 0.0, 0.0
        for loss in self.losses:
            total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
            means.append(total / weight)
        return means

    @property
    def lowest_at(self) -> float:
        """The rate at which the smoothed loss was lowest."""
        smoothed = self.smoothed
        return self.rates[smoothed.index(min(smoothed))]

    @property
    def suggestion(self) -> float:
        """A learning rate to begin with, of two digits."""
        return float(f"{self.lowest_at / 10:.1e}")

    def data(self) -> dict[str, Any]:
        """Values for JSON."""
        found = {"lowest_at": self.lowest_at, "suggestion": self.suggestion}
        return {**dataclasses.asdict(self), "smoothed": self.smoothed, **found}

    def text(self) -> str:
        """A picture of the smoothed loss over the logarithm of the rate, and the suggestion."""
        smoothed, last = self.smoothed, len(self.rates) - 1
        columns = min(_COLUMNS, len(smoothed))
        drawn = [smoothed[round(number * last / max(columns - 1, 1))] for number in range(columns)]
        lines = picture(drawn, low=min(drawn) - 0.1 * (max(drawn) - min(drawn)))
        ends = f"{self.rates[0]:.2g}", f"{self.rates[-1]:.2g}"
        return "\n".join(
            [
                f"smoothed loss of {len(self.rates)} steps, learning rate from {ends[0]} to {ends[1]} by one factor",
                *lines,
                f"lowest at {self.lowest_at:.2g}; a tenth of that: --training.lr_init={self.suggestion:g}",
            ]
        )


def run(config: Config, *, first: float = FIRST, last: float = LAST, n_steps: int = STEPS) -> RangeTest:
    """Train `n_steps` steps from the run's initial weights, at rates from `first` to `last`, until the loss diverges.

    Raises ConfigError for rates that are none and for fp16, DataError where the data is not prepared, TrainingError
    where not two steps have a finite loss.
    """
    if not 0 < first < last <= 100 or not 2 <= n_steps <= MOST_STEPS:
        raise ConfigError(
            f"rates from {first:g} to {last:g} in {n_steps} steps are no range",
            remedy=f"Use 0 < --from < --to <= 100 and 2 to {MOST_STEPS:,} --steps",
        )
    training = _of_one_process(config.training)
    work = WorkDir(config.work_dir)
    manifest = load_manifest(work.data, verify=True)  # which remembers nothing on the disk
    ranks = config.launch.num_nodes * ranks_per_node(config) if training.global_batch_size is None else 1
    sized = with_sizes_of_weights(config.model_copy(update={"training": training}), manifest.vocab_size)
    sized, placement, accumulate = resolve(sized, manifest.vocab_size)
    if training.num_threads is not None:
        torch.set_num_threads(training.num_threads)
    global_batch_size = training.micro_bsz * accumulate * ranks
    samples = plan_samples(manifest, sized.data, sized.model.ctx_len, global_batch_size)
    model = RWKV(
        sized.model,
        grad_cp=training.grad_cp == 1 or (training.grad_cp == "auto" and placement.accelerator == "cuda"),
        wkv_backend=training.wkv_backend,
        fused=training.fused,
    )
    model.load_state_dict(fit_state_dict(initial_state(sized), model))
    model.compute_dtype = DTYPES[training.precision]
    horizon = Horizon(n_steps, n_steps * samples.tokens_per_step, samples.order.n_windows, global_batch_size)
    module = TrainingModule(model, training, samples, horizon).to(placement.accelerator)
    dataset = TokenDataset(open_windows(manifest, work.data, sized.model.ctx_len), samples)
    return _climb(module, dataset, [first * (last / first) ** (step / (n_steps - 1)) for step in range(n_steps)])


def _of_one_process(training: TrainingConfig) -> TrainingConfig:
    """The same optimisation without ranks and averages. Raises ConfigError for fp16, which needs loss scaling."""
    if training.precision == "fp16":
        raise ConfigError("lr-find computes in bf16 or fp32", remedy="Add --training.precision=bf16")
    alone = {"strategy": "auto", "zero_stage": None, "offload_optimizer": False, "offload_parameters": False}
    return training.model_copy(update={**alone, "devices": 1, "ema_decay": None})


def _climb(module: TrainingModule, dataset: TokenDataset, rates: Sequence[float]) -> RangeTest:
    """Train a step at each rate until the loss diverges."""
    samples, training = module.sample_plan, module.training_config
    optimizer = build_optimizer(module.model, module.model.config.model_type, training)
    test = RangeTest([], [])
    with Countdown("testing learning rates", len(rates), "steps") as left:
        for step, rate in enumerate(rates):
            batches = samples.rank_samples(step, rank=0, world_size=1, micro_bsz=training.micro_bsz)
            losses = [_backward(module, dataset.__getitems__(numbers), len(batches)) for numbers in batches]
            loss = float(torch.stack(losses).mean())
            if not math.isfinite(loss):
                break
            test.rates.append(rate)
            test.losses.append(loss)
            if test.smoothed[-1] > DIVERGED * min(test.smoothed):
                break
            torch.nn.utils.clip_grad_norm_(module.model.parameters(), training.gradient_clip_val or math.inf)
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()
            left.advance(1)
    if len(test.rates) < 2:
        raise TrainingError(f"the loss is not finite at a learning rate of {rates[0]:g}", remedy="Use a smaller --from")
    return test


def _backward(module: TrainingModule, batch: TokenBatch, n_batches: int) -> Tensor:
    """Loss of one of the micro batches of a step, whose gradient is added to the others'."""
    parts: dict[str, Any] = {
        name: part.to(module.device) for name, part in batch._asdict().items() if isinstance(part, Tensor)
    }
    loss: Tensor = module(batch._replace(**parts))
    (loss / n_batches).backward()
    return loss.detach()
