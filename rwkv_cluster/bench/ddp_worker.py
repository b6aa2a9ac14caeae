"""One rank of one contender of `rwkv-cluster bench ddp`: trains a prepared run and writes what it took and held.

`python -m rwkv_cluster.bench.ddp_worker CONFIG RESULTS WARMUP`, alone or under torchrun. The configuration's first
WARMUP steps are not counted, nor are its last two, in which collectives are counted and the memory is looked at. What
DDP's reduction costs is measured after them.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import profiler
from torch.nn.parallel import DistributedDataParallel

from rwkv_cluster.bench.ddp_exchange import UNCOUNTED_STEPS, Overlap, collectives, measure_overlap
from rwkv_cluster.bench.ddp_memory import held
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.data.preparation.prepare import load_manifest
from rwkv_cluster.data.windows import TokenBatch
from rwkv_cluster.runtime.malloc import keep_freed_memory, peak_memory_mb
from rwkv_cluster.runtime.rank_env import die_with_launcher, rank
from rwkv_cluster.train.callbacks.ddp_fixes import StableBuckets
from rwkv_cluster.train.distributed.collectives import leaving_group
from rwkv_cluster.train.metrics.step_recorder import StepResult
from rwkv_cluster.train.module import TrainingModule, Votes
from rwkv_cluster.train.session import build_model, open_session
from rwkv_cluster.train.trainer import build_datamodule, build_trainer
from rwkv_cluster.workdir import WorkDir


class Meter(Callback):
    """When each step ended, in seconds of a clock; the collectives of the last but one, and the bytes held in the last.

    From end to end there is nothing between two steps that is not counted, and nothing to synchronise on a GPU.
    """

    def __init__(self, total_steps: int, warmup: int) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.held: dict[str, int] = {}
        self.exchange: dict[str, dict[str, float]] = {}
        self.overlap: Overlap | None = None
        self._total_steps = total_steps
        self._counted_steps = total_steps - warmup - UNCOUNTED_STEPS
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
        assert isinstance(module, TrainingModule)
        if module.step == self._total_steps - UNCOUNTED_STEPS:
            self._profile = profiler.profile(activities=[profiler.ProfilerActivity.CPU], record_shapes=True)
            self._profile.start()

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(module, TrainingModule)
        if module.step == self._total_steps - 1:
            self.held = held(module)

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
        if module.step == self._total_steps and isinstance(model, DistributedDataParallel):
            self.overlap = measure_overlap(model, batch, self._counted_steps)


def main(config_path: Path, results: Path, warmup: int) -> None:
    """Train as the configuration says, without checkpoints, and write results/<rank>.json."""
    die_with_launcher()
    config = load_config(config_path)
    work = WorkDir(config.work_dir)
    # These ranks have no rank 0 that tells them the name of their process group: all of one turn meet under one name.
    session = replace(open_session(config, work, load_manifest(work.data)), group="bench")
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    if session.placement.accelerator == "cpu":
        keep_freed_memory()
    model = build_model(session)
    sizes = [parameter.numel() for parameter in model.parameters()]
    meter = Meter(session.horizon.total_steps, warmup)
    module = TrainingModule(model, config.training, session.sample_plan, session.horizon, observer=meter)
    with leaving_group():
        build_trainer(session, [StableBuckets(), meter]).fit(module, datamodule=build_datamodule(session))
        persistent = [getattr(parameter, "ds_persist", False) for parameter in model.parameters()]
    steps = [after - before for before, after in zip(meter.ends, meter.ends[1:], strict=False)]
    figures = {
        "parameters": sum(sizes),
        "parameters_kept_whole": sum(size for size, whole in zip(sizes, persistent, strict=True) if whole),
        "step_s": steps[warmup - 1 : -UNCOUNTED_STEPS],
        "losses": meter.losses,
        "held": meter.held,
        "exchange": meter.exchange,
        "overlap": None if meter.overlap is None else asdict(meter.overlap),
        "peak_mb": peak_memory_mb(module.device),
    }
    (results / f"{rank()}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
