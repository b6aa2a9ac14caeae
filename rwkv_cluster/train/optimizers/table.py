"""Table of the optimizers: what each keeps for a parameter, and where it is built. Torch-free, as a plan of a run is.

A further optimizer is a row here, its name in `config.schema.OptimizerName`, and a file beside this one. Checkpoints,
ZeRO, disk space and the plan read the row.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.errors import ConfigError

EMA = "ema"
"""Name, among the moments, of the average that training.ema_decay adds to any optimizer, see `train.optimizers.ema`."""

MOMENTUM = "momentum"

SCALE = "_scale"
"""End of the names of the fp32 scales of a moment in 8 bits, which has the name without it."""

BLOCK = 256
"""Elements of a moment in 8 bits that share a scale."""

_SMALLEST_IN_8_BITS = 4096  # elements, as torchao and bitsandbytes
_FP32 = 4  # bytes


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
        in_8_bits: those that are a byte an element, with scales beside them, of large parameters but the embedding.
        package: what it needs installed, an extra of this package.
    """

    name: str
    module: str
    moments: tuple[str, ...]
    matrix_moments: tuple[str, ...] | None = None
    in_8_bits: tuple[str, ...] = ()
    package: str | None = None

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
        if self.in_8_bits and _fits_8_bits(name, shape):
            return (*self.moments, *(moment + SCALE for moment in self.in_8_bits))
        return self.moments

    def moment_bytes(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """Bytes of all moments of parameters with `shapes`."""
        return sum(math.prod(shape) * self._element_bytes(name, shape) for name, shape in shapes.items())

    def _element_bytes(self, name: str, shape: Sequence[int]) -> float:
        moments = self.moments_of(name, shape)
        n_scales = sum(moment.endswith(SCALE) for moment in moments)
        return n_scales * (1 + _FP32 / BLOCK) + (len(moments) - 2 * n_scales) * _FP32

    def require_package(self) -> None:
        """Raise ConfigError where its package cannot be imported. Loads torch."""
        if self.package is None:
            return
        logging.disable(logging.WARNING)  # it tells of each compiled part that is for other devices
        try:
            importlib.import_module(self.package)
        except Exception as error:  # it looks for compiled parts, and fails in many ways
            raise ConfigError(
                f"{self.name} needs the package {self.package}, which cannot be imported: {error}",
                remedy=f"`pip install 'rwkv-cluster[{self.package}]'` installs it",
            ) from error
        finally:
            logging.disable(logging.NOTSET)

    def functions(self) -> ModuleType:
        """The module with `group_of` and `build`. Loads torch."""
        return importlib.import_module(self.module)


def copied_matrices(shapes: Mapping[str, Sequence[int]], loras: Sequence[tuple[str, str]]) -> int:
    """Elements of the blocks' matrices among `shapes`: dense ones and those of `loras`, as a version's row has them."""
    of_loras = {f"att.{name}" for pair in loras for name in pair}
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if _is_block_matrix(name, shape) or name.split(".", 2)[-1] in of_loras
    )


def _is_block_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a dense matrix of a block, and none of a LoRA: those have no .weight in their names."""
    return name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2 and min(shape) > 1


def _fits_8_bits(name: str, shape: Sequence[int]) -> bool:
    elements = math.prod(shape)
    return name != "emb.weight" and elements >= _SMALLEST_IN_8_BITS and elements % BLOCK == 0


ADAMW = Optimizer(name="AdamW", module="rwkv_cluster.train.optimizers.adamw", moments=("exp_avg", "exp_avg_sq"))
ADAMW_8_BIT = Optimizer(
    name="8-bit AdamW",
    module="rwkv_cluster.train.optimizers.adamw8bit",
    moments=ADAMW.moments,
    in_8_bits=ADAMW.moments,
    package="torchao",
)
LION = Optimizer(name="Lion", module="rwkv_cluster.train.optimizers.lion", moments=(MOMENTUM,))
MUON = Optimizer(
    name="Muon",
    module="rwkv_cluster.train.optimizers.muon",
    moments=ADAMW.moments,
    matrix_moments=(MOMENTUM,),
)

OPTIMIZERS = {"adamw": ADAMW, "adamw8bit": ADAMW_8_BIT, "lion": LION, "muon": MUON}
"""Rows by the name of `training.optimizer`."""


def optimizer_of(training: TrainingConfig) -> Optimizer:
    """The row that `training` asks for, with the average where it wants one."""
    row = OPTIMIZERS[training.optimizer]
    return row if training.ema_decay is None else row.with_ema()
