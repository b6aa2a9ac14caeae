"""RWKV-LM's `out/train_log.txt`: a header for each session, then a line for each epoch."""

from __future__ import annotations

import datetime
import math

from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.train.metrics.metrics_file import appending, keep_lines
from rwkv_cluster.workdir import WorkDir


class TrainLog:
    """Appends to `train_log.txt`. Only rank 0 has one.

    start_epoch: the first whose end is still to come; lines of later ones go. header: JSON of the configuration.
    """

    def __init__(self, work: WorkDir, *, start_epoch: int, header: str) -> None:
        self._path = work.epoch_log
        self._start_epoch = start_epoch
        with writing(self._path, len(header)):
            keep_lines(self._path, lambda line: not line[:1].isdigit() or int(line.split()[0]) < start_epoch)
        self._append(f"NEW RUN {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}\n{header}\n")

    def epoch(self, epoch: int, mean_loss: float, lr: float) -> None:
        """Write RWKV-LM's line: index, mean loss, its exponential, lr of the last step, time, epoch of this session.

        Raises CheckpointError when the disk refuses it.
        """
        perplexity = math.exp(mean_loss) if mean_loss < 700 else math.inf
        self._append(
            f"{epoch} {mean_loss:.6f} {perplexity:.4f} {lr:.8f} {datetime.datetime.now()} {epoch - self._start_epoch}\n"
        )

    def _append(self, text: str) -> None:
        with writing(self._path, len(text)), appending(self._path) as handle:
            handle.write(text)
