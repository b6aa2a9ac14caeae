"""One rank of one contender of `rwkv-cluster bench ddp`: trains a prepared run and writes what it took and held.

What DDP's reduction costs is measured after the training.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import profiler
from torch.nn.parallel import DistributedDataParallel

from rwkv_cluster.bench.ddp_exchange import Overlap, collectives, measure_network, measure_overlap
from rwkv_cluster.bench.ddp_memory import bucket_bytes, held
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.data.preparation.prepare import load_manifest
from rwkv_cluster.data.windows import TokenBatch
from rwkv_cluster.runtime.malloc import keep_freed_memory, peak_memory_mb
from rwkv_cluster.runtime.rank_env import die_with_parent
from rwkv_cluster.train.callbacks.ddp_fixes import StableBuckets
from rwkv_cluster.train.distributed.collectives import leaving_group
from rwkv_cluster.train.metrics.step_recorder import StepResult
from rwkv_cluster.train.module import TrainingModule, Votes
from rwkv_cluster.train.session import build_model, open_session
from rwkv_cluster.train.trainer import build_datamodule, build_trainer
from rwkv_cluster.workdir import WorkDir


@dataclass(frozen=True)
class Job:
    """What a rank is to do. results: folder for RANK.json, and RANK.txt with all that it prints.

    The configuration's first `warmup` steps do not count. looks: nor does its last, in which collectives are counted
    and the memory is looked at. environment: variables of a launcher.
    """

    config: Path
    results: Path
    rank: int
    warmup: int
    looks: bool
    environment: dict[str, str]


class Meter(Callback):
    """When each step ended, in seconds of a clock; collectives and bytes held of the last, where it is looked into.

    From end to end there is nothing between two steps that is not counted, and nothing to synchronise on a GPU.
    """

    def __init__(self, total_steps: int, *, looks: bool) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.held: dict[str, int] = {}
        self.exchange: dict[str, dict[str, float]] = {}
        self.overlap: Overlap | None = None
        self.network: Overlap | None = None
        self._total_steps = total_steps
        self._looks = looks
        self._buckets = 0
        self._profile: profiler.profile | None = None

    def votes(self) -> Votes:
        """No wishes: nothing is stopped or saved."""
        return Votes()

    def step_ended(self, result: StepResult, agreed: Votes) -> None:
        """Note the step's loss."""
        self.losses.append(result.loss)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: TokenBatch, batch_idx: int
    ) -> None:
        if self._looks_at(module):
            self._profile = profiler.profile(activities=[profiler.ProfilerActivity.CPU], record_shapes=True)
            self._profile.start()
            # At one of the last gradients: DeepSpeed allocates its buckets for the first.
            first = next(parameter for parameter in module.parameters() if parameter.requires_grad)
            first.register_hook(lambda gradient: self._see_buckets(module))

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._looks_at(module):
            assert isinstance(module, TrainingModule)
            self.held = held(module)
            self.held["buckets"] = max(self.held["buckets"], self._buckets)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: TokenBatch, batch_idx: int
    ) -> None:
        assert isinstance(module, TrainingModule)
        self.ends.append(time.perf_counter())
        module.step += 1
        if self._profile is not None:
            self._profile.stop()
            self.exchange = collectives(self._profile.events() or (), trainer.world_size)
            self._profile = None
        model = trainer.strategy.model
        is_last = module.step == self._total_steps
        if is_last and isinstance(model, DistributedDataParallel) and trainer.world_size > 1:
            self.overlap = measure_overlap(model, batch, rounds=1)
            if module.device.type == "cpu":
                self.network = measure_network(model, batch, 1, self.overlap.without_s / 2)

    def _looks_at(self, module: LightningModule) -> bool:
        assert isinstance(module, TrainingModule)
        return self._looks and module.step == self._total_steps - 1

    def _see_buckets(self, module: LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        self._buckets = bucket_bytes(module)


def main(job: Job) -> None:
    """Train as the job says, in a process of its own, and write its figures."""
    die_with_parent()
    with open(job.results / f"{job.rank}.txt", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(job.environment)
    config = load_config(job.config)
    work = WorkDir(config.work_dir)
    # These ranks have no rank 0 that tells them the name of their process group: all of one turn meet under one name.
    session = replace(open_session(config, work, load_manifest(work.data)), group="bench")
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    if session.placement.accelerator == "cpu":
        keep_freed_memory()
    model = build_model(session)
    sizes = [parameter.numel() for parameter in model.parameters()]
    meter = Meter(session.horizon.total_steps, looks=job.looks)
    module = TrainingModule(model, config.training, session.sample_plan, session.horizon, observer=meter)
    with leaving_group():
        build_trainer(session, [StableBuckets(), meter]).fit(module, datamodule=build_datamodule(session))
        persistent = [getattr(parameter, "ds_persist", False) for parameter in model.parameters()]
    steps = [after - before for before, after in zip(meter.ends, meter.ends[1:], strict=False)]
    figures = {
        "parameters": sum(sizes),
        "parameters_kept_whole": sum(size for size, whole in zip(sizes, persistent, strict=True) if whole),
        "step_s": steps[job.warmup - 1 : len(steps) - job.looks],
        "losses": meter.losses,
        "held": meter.held,
        "exchange": meter.exchange,
        "overlap": None if meter.overlap is None else asdict(meter.overlap),
        "network": None if meter.network is None else asdict(meter.network),
        "peak_mb": peak_memory_mb(module.device),
    }
    (job.results / f"{job.rank}.json").write_text(json.dumps(figures))
