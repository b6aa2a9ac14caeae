"""What a run saves, and when: its checkpoints, and its weights in RWKV-LM's format."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from rwkv_cluster.adapters.base import MergedTensors
from rwkv_cluster.adapters.peft_folder import TrainedAdapter, folder_parts
from rwkv_cluster.adapters.table import STATE, adapter_shapes
from rwkv_cluster.config import Config
from rwkv_cluster.data.horizon import is_due
from rwkv_cluster.interchange.export.publish import publish
from rwkv_cluster.interchange.state_file import write_state
from rwkv_cluster.model.own_state import as_file
from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.checkpoint import rng_state
from rwkv_cluster.train.checkpoint.checkpointer import Checkpointer
from rwkv_cluster.train.checkpoint.save_load import Files
from rwkv_cluster.train.checkpoint.state import CheckpointState, RunIdentity
from rwkv_cluster.train.distributed import collectives
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.train.placement import DTYPES
from rwkv_cluster.workdir import FINAL, WorkDir


class Saver:
    """Checkpoints and exported weights of a run. Every rank has one and calls the same methods at the same step.

    identity: what a checkpoint says of the run itself.
    """

    def __init__(
        self, config: Config, work: WorkDir, identity: RunIdentity, checkpointer: Checkpointer, events: Events
    ) -> None:
        self.checkpointer = checkpointer
        self.identity = identity
        self._config = config
        self._work = work
        self._events = events
        self._saved_at = time.monotonic()

    def is_overdue(self) -> bool:
        """Whether checkpoint.save_interval_s has passed, by the clock of rank 0."""
        interval = self._config.checkpoint.save_interval_s
        return rank() == 0 and interval is not None and time.monotonic() - self._saved_at > interval

    def is_due(self, step: int, *, epoch_ends: bool) -> bool:
        """Whether a checkpoint is wanted after so many steps."""
        return is_due(step, self._config.checkpoint.save_interval_steps, epoch_ends=epoch_ends)

    def exports_epoch(self, epoch: int) -> bool:
        """Whether the weights at the end of `epoch` (from 0) are wanted as a file of their own."""
        return (epoch + 1) % self._config.training.epoch_save == 0

    def save(self, files: Files, state: CheckpointState, *, is_last: bool) -> None:
        """Write a checkpoint. Collective. is_last: the session ends, and nothing may be left in the background.

        files: this rank's. state: the random states in it are replaced by those of all ranks.

        Raises CheckpointError on every rank when one of them cannot write.
        """
        random_states = collectives.gather_objects(rng_state.capture()) or []
        self.checkpointer.begin(state.step, files, replace(state, random_states=random_states))
        if is_last or not self.checkpointer.background:
            self.checkpointer.finish()
        self._saved_at = time.monotonic()

    def export(self, weights: Mapping[str, Tensor] | None, step: int, label: str) -> None:
        """Write RWKV-LM's flat file out/rwkv-<label>.pth, in the training precision. weights: None but on rank 0.

        An adapter is merged into the final one; before, it alone is written, as peft reads it. Of state tuning it is
        always the state alone, in fp32.
        """
        if weights is None:
            return
        path, dtype, adapter = self._work.weights(label), DTYPES[self._config.training.precision], self._config.adapter
        if adapter.kind == "none":
            save_pth(path, weights, dtype)
        elif adapter.kind == STATE:
            write_state(path, as_file(weights, self._config.model.model_type))
        else:
            # of a quantised base there are codes alone, and the file has what they were made of
            whole = weights if adapter.quant == "none" else load_pth(self._work.initial_weights, mapped=True)
            names = adapter_shapes(adapter, {name: tuple(tensor.shape) for name, tensor in whole.items()})
            parts = {name: weights[name] for shapes in names for name in shapes}
            base = {name: tensor for name, tensor in whole.items() if name not in parts}
            if label == FINAL:
                merged = MergedTensors(base, parts, adapter)
                save_pth(path, {name: merged[name].to(dtype) for name in base})  # rounded once
            else:
                path = self._work.adapter(label)
                publish(path, folder_parts(self._trained(parts), "peft"))
        self._events.add("export", step, path=path)

    def _trained(self, parts: Mapping[str, Tensor]) -> TrainedAdapter:
        """The adapter as it is now."""
        config, base = self._config, self.identity.base
        assert base is not None
        base_name = config.training.init_from or str(self._work.initial_weights)
        return TrainedAdapter(config.adapter, parts, config.model.model_type, base, base_name)
