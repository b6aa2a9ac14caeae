"""Table of the optimizers: what each keeps for a parameter, and where it is built. Torch-free, as a plan of a run is.

A further optimizer is a row here and a file beside this one; checkpoints, ZeRO, disk space and the plan read the row.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from types import ModuleType

from rwkv_cluster.config import TrainingConfig

EMA = "ema"
"""Name, among the moments, of the average that training.ema_decay adds to any optimizer, see `train.optimizers.ema`."""


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes:
        name: as people call it.
        module: dotted name of the file with its parameter groups, `group_of`, and `build`. Imported when it is first
            used, because it needs torch.
        moments: names of the tensors that it keeps for each trained parameter, in torch's state of it and in a
            checkpoint's `<moment>/<parameter name>`. Each is fp32 and has the parameter's shape.
    """

    name: str
    module: str
    moments: tuple[str, ...]

    @property
    def keeps_ema(self) -> bool:
        """Whether the average of the masters is among its tensors."""
        return EMA in self.moments

    @property
    def tensors_saved(self) -> int:
        """Number of fp32 tensors that a checkpoint has of a trained parameter: its master and its moments."""
        return 1 + len(self.moments)

    def functions(self) -> ModuleType:
        """The module with `group_of` and `build`. Loads torch."""
        return importlib.import_module(self.module)


ADAMW = Optimizer(name="AdamW", module="rwkv_cluster.train.optimizers.adamw", moments=("exp_avg", "exp_avg_sq"))


def optimizer_of(training: TrainingConfig) -> Optimizer:
    """The row that `training` asks for, with the average where it wants one."""
    return ADAMW if training.ema_decay is None else replace(ADAMW, moments=(*ADAMW.moments, EMA))
