"""Table of the ways to hold frozen matrices in fewer bits. Torch-free, as a plan of a run is.

A further kind is a row here, a file beside this one, and its name in `rwkv_cluster.config.schema.AdapterConfig`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from rwkv_cluster.model.versions.version import Shapes

BLOCK = 64
"""Elements, in the order of a matrix's memory, that share a scale in nf4."""


@dataclass(frozen=True)
class Quantization:
    """One kind.

    Attributes:
        name: `adapter.quant` of a configuration.
        module: dotted name of the file with its formulas, `quantize` and `dequantize`. Imported when it is first used,
            because it needs torch.
        code_bytes: (rows, columns) -> bytes of a matrix's codes.
        scales: (rows, columns) -> number of its scales, which have the training precision.
    """

    name: str
    module: str
    code_bytes: Callable[[int, int], int]
    scales: Callable[[int, int], int]

    def functions(self) -> ModuleType:
        """The module with its formulas. Loads torch."""
        return importlib.import_module(self.module)


def _blocks(n_out: int, n_in: int) -> int:
    return -(-n_out * n_in // BLOCK)


_ROWS = (
    Quantization(
        "int8", "rwkv_cluster.adapters.quantized.int8", lambda n_out, n_in: n_out * n_in, lambda n_out, n_in: n_out
    ),
    Quantization(
        "nf4", "rwkv_cluster.adapters.quantized.nf4", lambda n_out, n_in: _blocks(n_out, n_in) * BLOCK // 2, _blocks
    ),
)
QUANTIZATIONS: dict[str, Quantization] = {row.name: row for row in _ROWS}


def quantized_bytes(quant: str, shapes: Shapes, item: int) -> dict[str, int]:
    """Bytes of the matrices that are held in fewer bits, by name: all dense ones of the blocks; "none": none.

    shapes: of the model's parameters. item: bytes of an element in the training precision.
    """
    if quant == "none":
        return {}
    row = QUANTIZATIONS[quant]
    return {
        name: row.code_bytes(shape[0], shape[1]) + item * row.scales(shape[0], shape[1])
        for name, shape in shapes.items()
        if is_quantized(name, shape)
    }


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of the model is a dense matrix of a block. LoRAs of the architecture itself are none."""
    return name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
