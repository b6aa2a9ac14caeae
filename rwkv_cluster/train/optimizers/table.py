"""Table of the optimizers: what each keeps for a parameter, and where it is built. Torch-free, as a plan of a run is.

A further optimizer is a row here, its name in `config.schema.OptimizerName`, and a file beside this one. Checkpoints,
ZeRO, disk space and the plan read the row.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from rwkv_cluster.config import TrainingConfig

EMA = "ema"
"""Name, among the moments, of the average that training.ema_decay adds to any optimizer, see `train.optimizers.ema`."""

MOMENTUM = "momentum"


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes:
        name: as people call it.
        module: dotted name of the file with its parameter groups, `group_of`, and `build`. Imported when it is first
            used, because it needs torch.
        moments: names of the tensors that it keeps for each trained parameter, in torch's state of it and in a
            checkpoint's `<moment>/<parameter name>`. Each is fp32 and has the parameter's shape.
        matrix_moments: those of the matrices of the blocks, where it keeps others for them.
    """

    name: str
    module: str
    moments: tuple[str, ...]
    matrix_moments: tuple[str, ...] | None = None

    @property
    def keeps_ema(self) -> bool:
        """Whether the average of the masters is among its tensors."""
        return EMA in self.moments

    def with_ema(self) -> Optimizer:
        """The same optimizer, which also keeps the average."""
        matrices = self.matrix_moments
        return replace(self, moments=(*self.moments, EMA), matrix_moments=matrices and (*matrices, EMA))

    def moments_of(self, name: str, shape: Sequence[int]) -> tuple[str, ...]:
        """The moments of one parameter."""
        if self.matrix_moments is not None and _is_block_matrix(name, shape):
            return self.matrix_moments
        return self.moments

    def moment_elements(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Elements of all moments of parameters with `shapes`."""
        return sum(len(self.moments_of(name, shape)) * math.prod(shape) for name, shape in shapes.items())

    def functions(self) -> ModuleType:
        """The module with `group_of` and `build`. Loads torch."""
        return importlib.import_module(self.module)


def _is_block_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a dense matrix of a block, and none of a LoRA: those have no .weight in their names."""
    return name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2 and min(shape) > 1


ADAMW = Optimizer(name="AdamW", module="rwkv_cluster.train.optimizers.adamw", moments=("exp_avg", "exp_avg_sq"))
LION = Optimizer(name="Lion", module="rwkv_cluster.train.optimizers.lion", moments=(MOMENTUM,))
MUON = Optimizer(
    name="Muon",
    module="rwkv_cluster.train.optimizers.muon",
    moments=ADAMW.moments,
    matrix_moments=(MOMENTUM,),
)

OPTIMIZERS = {"adamw": ADAMW, "lion": LION, "muon": MUON}
"""Rows by the name of `training.optimizer`."""


def optimizer_of(training: TrainingConfig) -> Optimizer:
    """The row that `training` asks for, with the average where it wants one."""
    row = OPTIMIZERS[training.optimizer]
    return row if training.ema_decay is None else row.with_ema()
