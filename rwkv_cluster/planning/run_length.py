"""How long a run is: tokens, steps, epochs and the learning rate along it, as far as that is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_cluster.config import Config
from rwkv_cluster.data.batch_size import accumulation
from rwkv_cluster.data.horizon import Horizon, horizon
from rwkv_cluster.data.manifest import DataManifest
from rwkv_cluster.data.sampler import CubicOrder, SamplePlan, plan_samples
from rwkv_cluster.train.schedule import learning_rate, turning_steps

UNKNOWN = (
    "unknown: one epoch is one pass over the data, which is not prepared. Run `rwkv-cluster prepare CONFIG`, or set "
    "--training.max_steps=N or --training.max_tokens=N"
)


@dataclass(frozen=True)
class Length:
    """Tokens, steps and epochs of a run.

    accumulate: micro batches per optimizer step. horizon: None where it depends on data that is not there.

    is_upper_bound: the data, once it is there, may end the run earlier. epochs: None where unknown.
    """

    accumulate: int
    global_batch_size: int
    tokens_per_step: int
    horizon: Horizon | None
    is_upper_bound: bool
    epochs: float | None


def length(config: Config, ranks: int, manifest: DataManifest | None) -> Length:
    """Length of a run on `ranks` ranks, with the data of `manifest` where it is prepared.

    Raises ConfigError for a batch that the ranks cannot share, DataError for too little data.
    """
    training, ctx_len = config.training, config.model.ctx_len
    accumulate = accumulation(
        micro_bsz=training.micro_bsz,
        world_size=ranks,
        accumulate_grad_batches=training.accumulate_grad_batches,
        global_batch_size=training.global_batch_size,
    )
    batch = training.micro_bsz * ranks * accumulate
    unknown = SamplePlan(ctx_len, CubicOrder(0), batch)
    plan = plan_samples(manifest, config.data, ctx_len, batch) if manifest else unknown
    needs_data = not manifest and training.samples_per_epoch is None
    run_horizon = _horizon(config, plan, needs_data=needs_data)
    epochs = None if run_horizon is None or needs_data else run_horizon.total_steps * batch / run_horizon.epoch_samples
    bounded_by_data = needs_data and training.num_epochs is not None
    return Length(
        accumulate=accumulate,
        global_batch_size=batch,
        tokens_per_step=batch * ctx_len,
        horizon=run_horizon,
        is_upper_bound=bounded_by_data and run_horizon is not None,
        epochs=epochs,
    )


def _horizon(config: Config, plan: SamplePlan, *, needs_data: bool) -> Horizon | None:
    training = config.training
    if needs_data and training.max_steps is None and training.max_tokens is None:
        return None
    return horizon(plan, training.model_copy(update={"num_epochs": None}) if needs_data else training)


def learning_rates(config: Config, run: Length) -> dict[int, float]:
    """Learning rate by step (from 0), without a group's multiplier: first, where it turns, quarters, last."""
    if run.horizon is None:
        return {}
    last = run.horizon.total_steps - 1
    turns = turning_steps(config.training, run.tokens_per_step, run.horizon.tokens)
    steps = sorted({0, *(min(step, last) for step in turns), last // 4, last // 2, 3 * last // 4, last})
    return {step: _rate(config, run, run.horizon, step) for step in steps}


def learning_rate_curve(config: Config, run: Length, n_points: int) -> list[float]:
    """Learning rates of `n_points` steps at equal distances, the first and the last of the run among them."""
    if run.horizon is None:
        return []
    last = run.horizon.total_steps - 1
    return [_rate(config, run, run.horizon, round(number * last / (n_points - 1))) for number in range(n_points)]


def _rate(config: Config, run: Length, end: Horizon, step: int) -> float:
    return learning_rate(step, training=config.training, tokens_per_step=run.tokens_per_step, horizon_tokens=end.tokens)
