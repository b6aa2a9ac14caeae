"""Table of the adapters' kinds: what each has beside a matrix. Torch-free, as a plan of a run is.

A further kind is a row here, a file beside this one, and its name in `rwkv_cluster.config.schema.AdapterConfig`. STATE
is no row: it has nothing beside matrices, and its module is `rwkv_cluster.model.own_state`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from rwkv_cluster.config import AdapterConfig, TrainingConfig
from rwkv_cluster.model.name_patterns import fitting
from rwkv_cluster.model.parameter_shapes import own_state_shapes
from rwkv_cluster.model.versions.version import Shapes

STATE = "state"
"""`adapter.kind` of state tuning."""

MOST_STATE_LR = 0.01
"""Learning rate where RWKV-6's recipe for states ends; higher ones are unusual for RWKV-7's, and 1 destroys them."""

PartShapes = Callable[[int, int, int], Shapes]
"""(Rows, columns of the matrix, rank) -> shapes of parts by name."""


def _none(n_out: int, n_in: int, rank: int) -> Shapes:
    return {}


def _low_rank(n_out: int, n_in: int, rank: int) -> Shapes:
    return {"lora_A": (rank, n_in), "lora_B": (n_out, rank)}


def _low_rank_and_length(n_out: int, n_in: int, rank: int) -> Shapes:
    return {**_low_rank(n_out, n_in, rank), "lora_magnitude_vector": (n_out,)}


def _first_low_rank(n_out: int, n_in: int, rank: int) -> Shapes:
    return {"first_A": (rank, n_in), "first_B": (n_out, rank)}


def _block(n_out: int, n_in: int, rank: int) -> Shapes:
    return {"miss_block": (rank, n_out)}


def _rank(n_out: int, n_in: int, rank: int) -> int:
    return rank


def _two_ranks(n_out: int, n_in: int, rank: int) -> int:
    return 2 * rank


def _rank_and_output(n_out: int, n_in: int, rank: int) -> int:
    return rank + n_out


@dataclass(frozen=True)
class AdapterKind:
    """One kind of adapter.

    Attributes:
        name: `adapter.kind` of a configuration.
        module: dotted name of the file with its formulas: `initial`, `product`, `merged`, `in_peft`. Imported
            when it is first used, because it needs torch.
        trained: its trained parts beside a matrix, named below it, as in `blocks.0.att.key.lora_A`.
        kept: parts that are saved with them and not trained.
        hidden: elements of one token that the backward pass needs of it, beside the matrix's own input.
        needs_input: whether it needs that input.
    """

    name: str
    module: str
    trained: PartShapes
    hidden: Callable[[int, int, int], int]
    kept: PartShapes = _none
    needs_input: bool = True

    def functions(self) -> ModuleType:
        """The module with its formulas. Loads torch."""
        return importlib.import_module(self.module)


_ROWS = (
    AdapterKind("lora", "rwkv_cluster.adapters.lora", _low_rank, _rank),
    AdapterKind("dora", "rwkv_cluster.adapters.dora", _low_rank_and_length, _rank_and_output),
    AdapterKind("pissa", "rwkv_cluster.adapters.pissa", _low_rank, _two_ranks, kept=_first_low_rank),
    AdapterKind("miss", "rwkv_cluster.adapters.miss", _block, _rank, needs_input=False),
)
KINDS: dict[str, AdapterKind] = {row.name: row for row in _ROWS}


_PARTS = {part for row in _ROWS for part in row.trained(1, 1, 1)}


def is_adapter_part(name: str) -> bool:
    """Whether a parameter of that name is a trained part of an adapter."""
    return name.rpartition(".")[2] in _PARTS


def rate_warning(adapter: AdapterConfig, training: TrainingConfig, model_type: str) -> str | None:
    """What is to be said of a learning rate that suits states of RWKV-6 and not of RWKV-7; None: nothing."""
    if adapter.kind != STATE or model_type != "x070" or training.lr_init <= MOST_STATE_LR:
        return None
    return (
        f"training.lr_init {training.lr_init:g} is high for a state of RWKV-7: RWKV-PEFT's recipe goes from 1e-3 to "
        "1e-5, and that for RWKV-6, from 1 to 0.01, destroys it"
    )


def targets(adapter: AdapterConfig, shapes: Shapes) -> list[str]:
    """Names of the matrices that get an adapter, such as `blocks.0.att.key`. shapes: of the model's parameters.

    Raises ConfigError for a pattern that fits none.
    """
    matrices = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
    ]
    return fitting(matrices, adapter.targets, "adapter.targets")


def adapter_shapes(adapter: AdapterConfig, shapes: Shapes) -> tuple[Shapes, Shapes]:
    """Shapes of the parts of an adapter, by name: those that are trained, and those that are kept with them.

    Both are empty without an adapter. Raises ConfigError as `targets`.
    """
    if adapter.kind == "none":
        return {}, {}
    if adapter.kind == STATE:
        return own_state_shapes(shapes, with_shifts=adapter.token_shifts), {}
    row = KINDS[adapter.kind]
    names = targets(adapter, shapes)

    def parts(of_matrix: PartShapes) -> Shapes:
        found: dict[str, tuple[int, ...]] = {}
        for name in names:
            n_out, n_in = shapes[f"{name}.weight"]
            found |= {f"{name}.{part}": shape for part, shape in of_matrix(n_out, n_in, adapter.rank).items()}
        return found

    return parts(row.trained), parts(row.kept)


def hidden_elements(adapter: AdapterConfig, shapes: Shapes) -> int:
    """Elements of one token that the backward pass needs of an adapter, the inputs of its matrices included.

    Dropout keeps a mask of a byte, here half an element, and its output in place of the input.
    """
    if adapter.kind in ("none", STATE):
        return 0
    row, elements = KINDS[adapter.kind], 0
    for n_out, n_in in (shapes[f"{name}.weight"] for name in targets(adapter, shapes)):
        elements += row.hidden(n_out, n_in, adapter.rank) + (n_in if row.needs_input else 0)
        elements += n_in // 2 if adapter.dropout else 0
    return elements
