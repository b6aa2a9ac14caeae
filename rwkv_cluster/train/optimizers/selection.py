"""Which parameters a run trains, keeps and saves, and by which share of the learning rate. Torch-free, as its plan."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from rwkv_cluster.adapters.table import adapter_shapes, hidden_elements
from rwkv_cluster.config import AdapterConfig, ModelConfig, TrainingConfig
from rwkv_cluster.model import parameter_shapes
from rwkv_cluster.model.name_patterns import fitting
from rwkv_cluster.model.versions.version import Shapes


@dataclass(frozen=True)
class RunParameters:
    """Shapes of a run's parameters, by name.

    Attributes:
        model: those of a weights file.
        trained: those with a gradient, masters and moments.
        frozen: the others that are in memory.
        saved: what a checkpoint holds: the adapter alone, or else all.
        is_partial: whether some are frozen by the configuration; `frozen` then has the training precision.
        quant: how the dense matrices among the frozen are held, `adapter.quant`.
        adapter_hidden: elements of one token that the backward pass needs of an adapter.
    """

    model: Shapes
    trained: Shapes
    frozen: Shapes
    saved: Shapes
    is_partial: bool
    adapter_hidden: int = 0
    quant: str = "none"

    @property
    def freezes_model(self) -> bool:
        """Whether none of the model's own parameters is trained."""
        return not self.trained.keys() & self.model.keys()

    @property
    def in_memory(self) -> Shapes:
        """All of them."""
        return self.model if not self.is_partial else {**self.trained, **self.frozen}


def run_parameters(
    model: ModelConfig, vocab_size: int, training: TrainingConfig, adapter: AdapterConfig
) -> RunParameters:
    """Parameters of a run with `vocab_size` rows in emb and head.

    Raises ConfigError for a pattern of training.train, training.lr_multipliers or adapter.targets that fits none.
    """
    shapes = parameter_shapes.parameter_shapes(model, vocab_size)
    own, kept = adapter_shapes(adapter, shapes)
    trained = own or _chosen(shapes, training)
    fitting(trained, training.lr_multipliers, "training.lr_multipliers")
    frozen = {**{name: shape for name, shape in shapes.items() if name not in trained}, **kept}
    saved = {**own, **kept} if own else shapes
    is_partial = bool(own) or training.train != "all"
    return RunParameters(shapes, trained, frozen, saved, is_partial, hidden_elements(adapter, shapes), adapter.quant)


def _chosen(shapes: Shapes, training: TrainingConfig) -> Shapes:
    """Those of the model itself that training.train chooses."""
    used = parameter_shapes.trained(shapes)
    if training.train == "all":
        return used
    return {name: used[name] for name in fitting(used, training.train, "training.train")}


def lr_multiplier(name: str, training: TrainingConfig) -> float:
    """The multiplier that training.lr_multipliers has for one parameter; 1 where no pattern fits."""
    fits = (value for pattern, value in training.lr_multipliers.items() if fnmatchcase(name, pattern))
    return next(fits, 1.0)
