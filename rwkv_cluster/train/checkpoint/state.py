"""What a checkpoint says beside its tensors: `state.json`, written and read here alone.

Torch-free, because `status` and `verify` read it on a login node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter

from rwkv_cluster.runtime.counts import Count
from rwkv_cluster.train.guards.early_stop import EarlyStopState
from rwkv_cluster.train.guards.spike_guard import SpikeState
from rwkv_cluster.train.metrics.metrics_file import OPTIONAL_COLUMNS, StepRecord

_REQUIRED_SECTIONS = ("model", "training")
_SECTIONS = (*_REQUIRED_SECTIONS, "data", "launch")


def _require_sections(config: dict[str, Any]) -> dict[str, Any]:
    """Refuse a configuration without the sections that `checkpoint.resume` compares. Fields may be of any version."""
    for name in _SECTIONS:
        if not isinstance(config.get(name, None if name in _REQUIRED_SECTIONS else {}), dict):
            raise ValueError(f"its section {name} is missing or is none")
    return config


@dataclass(frozen=True)
class RngState:
    """The random generators of one rank, as plain JSON values, so that no pickle is ever read back."""

    python: tuple[int, list[int], float | None]
    """Version, internal state and cached gauss of `random`."""

    numpy: tuple[str, list[int], int, int, float]
    """Kind, keys, position, whether a gauss is cached, and that gauss, of numpy's global generator."""

    torch: str
    """The state of torch's CPU generator, in hexadecimal."""

    cuda: str | None = None
    """That of this rank's CUDA generator; None, and absent in the file, where there is no CUDA."""


@dataclass(frozen=True)
class RunIdentity:
    """What a run must not change on its way: see the fields of the same names in `CheckpointState`."""

    config: Mapping[str, Any]
    data_fingerprint: str
    global_batch_size: int
    magic_prime: int
    order: str | None = None
    base: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The fields of `state.json`, in the order in which they are written. A default is for files from before a field.

    On ranks other than 0 `random_states` is empty: rank 0 writes the file.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    config: Annotated[dict[str, Any], AfterValidator(_require_sections)]
    """The resolved configuration of the run, by section."""

    data_fingerprint: str
    """Of the data that it is trained on, see `DataManifest.fingerprint`."""

    global_batch_size: Annotated[int, Field(ge=1)]
    """Samples of an optimizer step, of all ranks together."""

    magic_prime: Count
    """The prime that fixes RWKV-LM's order of the samples, see `SamplePlan`; 0 in another."""

    step: Count
    """Optimizer steps done."""

    tokens_seen: Count
    """Tokens trained on."""

    epoch_loss_sum: float
    """Sum of the losses of the epoch under way."""

    epoch_loss_count: Count
    """Steps that this is the sum of."""

    loss: float | None
    """Of the last step; None before this session's first."""

    val_loss: float | None
    """Of this session's last evaluation; None before its first."""

    optimizer_updates: Count
    """Updates that the optimizer has made: fewer than steps where fp16's loss scaling has skipped some."""

    shapes: dict[str, list[Count]] | None = None
    """Shapes of the parameters where files hold shards of them; None where they hold them whole."""

    skipped: tuple[tuple[Count, Count], ...] = ()
    """Batches that rollbacks have left out, from the first on and up to the second, see `SamplePlan.skipped`."""

    spikes: SpikeState | None = None
    """What the spike guard has to know."""

    improvement: EarlyStopState | None = None
    """What early stopping has to know."""

    loss_scale: dict[str, float | int] | None = None
    """State of fp16's loss scaling, torch's `GradScaler.state_dict`; None in the other precisions."""

    torch: str
    """Version of torch that wrote the checkpoint."""

    random_states: Annotated[list[RngState], Field(min_length=1)]
    """The random generators of each rank, by rank."""

    unfinished: StepRecord | None = None
    """Numbers of the last step, where a stop has cut short what follows it: its validation, or a sample."""

    order: str | None = None
    """What fixes another order than RWKV-LM's, see `SamplePlan.order_name`; None for that, and absent in the file."""

    base: str | None = None
    """Fingerprint of the weights below an adapter; None, and absent in the file, where there is no adapter."""

    def to_json(self) -> str:
        """The content of `state.json`."""
        values = asdict(self)
        for rng_state in values["random_states"]:
            if rng_state["cuda"] is None:
                del rng_state["cuda"]
        for name in ("order", "base"):
            if values[name] is None:
                del values[name]
        if (unfinished := values["unfinished"]) is not None:
            values["unfinished"] = {
                name: value for name, value in unfinished.items() if value is not None or name not in OPTIONAL_COLUMNS
            }
        return json.dumps(values, indent=1)

    @staticmethod
    def from_json(content: bytes) -> CheckpointState:
        """The inverse of `to_json`, for files of this and of earlier versions. Raises pydantic's ValidationError."""
        return _adapter().validate_json(content)


@cache
def _adapter() -> TypeAdapter[CheckpointState]:
    return TypeAdapter(CheckpointState)
