"""Writing a checkpoint together: every rank its files, in the background if wanted; rank 0 commits when all are there.

begin      collective: a folder under a temporary name; each rank copies its tensors and starts to write them
written    whether this rank's part is done; the ranks tell each other with the vote of every step
finish     collective: commits what all ranks have written, or removes it and raises on every rank
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.runtime.disk_errors import WriteFailure
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.checkpoint import save_load
from rwkv_cluster.train.checkpoint.disk_space import STAGING_BYTES, require_disk_space
from rwkv_cluster.train.checkpoint.save_load import Files
from rwkv_cluster.train.checkpoint.state import CheckpointState
from rwkv_cluster.train.distributed import collectives
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.workdir import TEMPORARY_PREFIX

log = logging.getLogger("rwkv_cluster")


@dataclass
class _Part:
    """This rank's part of a checkpoint. entries: of the manifest, by file; refusal: why it could not be written."""

    step: int
    temporary: Path
    state: CheckpointState
    entries: dict[str, Any]
    refusal: WriteFailure | None = None
    done: bool = False
    waited_s: float = 0.0
    thread: threading.Thread | None = None


class Checkpointer:
    """Checkpoints of a run, newest `keep_last` kept. Every rank has one and calls the same methods at the same step.

    background: write while training goes on, from a copy in the host's memory. n_bytes: about the size of a whole
    checkpoint, see `train.checkpoint.disk_space`. reach_steps: see `prune`. events: where a commit is told.
    """

    def __init__(
        self,
        directory: Path,
        keep_last: int,
        *,
        background: bool,
        n_bytes: int,
        reach_steps: int = 0,
        events: Events | None = None,
    ) -> None:
        self.waited_s = 0.0
        """Seconds that training has waited for saving since `take_waited_s` was called last."""
        self.committed_step: int | None = None
        """Of the newest checkpoint that this session has committed."""
        self._directory = directory
        self._keep_last = keep_last
        self._reach_steps = reach_steps
        self._n_bytes = n_bytes
        self._events = events or Events(None)
        self.background = background
        self._host_copies = HostCopies()
        self._part: _Part | None = None

    def save(self, step: int, files: Files, state: CheckpointState) -> None:
        """Begin, and finish at once. Collective; raises as `finish`."""
        self.begin(step, files, state)
        self.finish()

    def begin(self, step: int, files: Files, state: CheckpointState) -> None:
        """Start to write the checkpoint of `step`; one under way is finished first.

        files: this rank's. state: rank 0's counts.

        Raises CheckpointError on every rank when there is no room or the folder cannot be made. Without `background`
        all is written when this returns.
        """
        self.finish()
        began = time.perf_counter()
        temporary = self._make_folder(step)
        contents = {
            name: self._host_copies.of(tensors) if self.background else tensors for name, tensors in files.items()
        }
        part = self._part = _Part(step, temporary, state, {})
        if self.background:
            part.thread = threading.Thread(target=_write, args=(part, contents), name=f"checkpoint of step {step}")
            part.thread.start()
        else:
            _write(part, contents)
        self._count_wait(part, began)

    def written(self) -> bool:
        """Whether a save is under way of which this rank's part is done."""
        return self._part is not None and self._part.done

    def finish(self) -> None:
        """Commit the save under way, if there is one. Collective.

        Raises CheckpointError on every rank when one of them could not write; nothing of it is left then, and earlier
        checkpoints are untouched.
        """
        part, self._part = self._part, None
        if part is None:
            return
        began = time.perf_counter()
        if part.thread is not None:
            part.thread.join()
        parts = collectives.gather_objects((part.entries, part.refusal))
        fault = None if parts is None else self._complete(part, parts)
        fault = collectives.broadcast_object(fault)
        if fault is not None:
            raise CheckpointError(fault)
        self._count_wait(part, began)
        self.committed_step = part.step
        if rank() == 0:
            log.info("checkpoint of step %d is saved; training waited %.2f s for it", part.step, part.waited_s)
            path = save_load.checkpoint_path(self._directory, part.step)
            self._events.add("save", part.step, path=path, waited_s=part.waited_s)

    def _count_wait(self, part: _Part, began: float) -> None:
        seconds = time.perf_counter() - began
        part.waited_s += seconds
        self.waited_s += seconds

    def take_waited_s(self) -> float:
        """`waited_s` so far; starts anew."""
        waited, self.waited_s = self.waited_s, 0.0
        return waited

    def abandon(self) -> None:
        """Leave a save under way unfinished: a run that ends by an error waits for no other rank."""
        part, self._part = self._part, None
        if part is not None and part.thread is not None:
            part.thread.join()
            if rank() == 0:
                shutil.rmtree(part.temporary, ignore_errors=True)

    def _make_folder(self, step: int) -> Path:
        """The folder to write into, made by rank 0. Raises CheckpointError on every rank."""
        fault, path = None, ""
        if rank() == 0:
            folder = self._directory / f"{TEMPORARY_PREFIX}step-{step:08d}-{uuid.uuid4().hex[:8]}"
            path = str(folder)
            try:
                require_disk_space(self._directory, self._n_bytes, f"the checkpoint of step {step}")
                folder.mkdir()
            except CheckpointError as error:
                fault = str(error)
            except OSError as error:
                fault = self._sentence(step, WriteFailure.of(error))
        path, fault = collectives.broadcast_object((path, fault))
        if fault is not None:
            raise CheckpointError(fault)
        return Path(path)

    def _complete(self, part: _Part, parts: list[tuple[dict[str, Any], WriteFailure | None]]) -> str | None:
        """Commit on rank 0, or remove what was written and say why."""
        refusals = [
            replace(refusal, reason=f"rank {number}: {refusal.reason}") if len(parts) > 1 else refusal
            for number, (_, refusal) in enumerate(parts)
            if refusal is not None
        ]
        try:
            if not refusals:
                files = {name: entry for entries, _ in parts for name, entry in entries.items()}
                path = save_load.checkpoint_path(self._directory, part.step)
                save_load.commit(part.temporary, path, part.step, state=part.state, files=files)
                prune(self._directory, self._keep_last, self._reach_steps)
        except OSError as error:
            refusals = [WriteFailure.of(error)]
        if refusals:
            shutil.rmtree(part.temporary, ignore_errors=True)
            return self._sentence(part.step, *refusals)
        return None

    def _sentence(self, step: int, *refusals: WriteFailure) -> str:
        """The free bytes in it are those that it finds after a failed attempt has been removed."""
        whole = replace(refusals[0], reason="; ".join(refusal.reason for refusal in refusals))
        return f"checkpoint {whole.sentence(save_load.checkpoint_path(self._directory, step), self._n_bytes)}"


def prune(directory: Path, keep_last: int, reach_steps: int = 0) -> None:
    """Delete all but the newest `keep_last` checkpoints, and those by which one can go back.

    reach_steps: how far, 0 for not at all. Steps are split into windows of so many, and the first checkpoint of each of
    the last 3 windows is kept, so that one is always at least `reach_steps` old.
    """
    steps = save_load.list_steps(directory)
    firsts = {step // reach_steps: step for step in reversed(steps)} if reach_steps else {}
    kept_steps = {firsts[window] for window in sorted(firsts)[-3:]} | set(steps[-keep_last:])
    for step in steps:
        if step not in kept_steps:
            save_load.remove(save_load.checkpoint_path(directory, step))


def _write(part: _Part, files: Files) -> None:
    """Write this rank's files; a refusal is kept for `Checkpointer.finish`, which all ranks reach."""
    try:
        for name, tensors in files.items():
            part.entries[name] = save_load.write_tensors(part.temporary / name, tensors)
            collectives.fault_point(f"checkpoint.after_{name.partition('.')[0].partition('-')[0]}", step=part.step)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        part.refusal = WriteFailure.of(error)
    finally:
        part.done = True


class HostCopies:
    """Copies of tensors in the host's memory, for which what a GPU has goes through one pinned buffer.

    The buffer has two halves: while the device fills one, the host empties the other. Pinning takes a second for every
    1 to 3 GB, and torch keeps what it has pinned, so that copies that were themselves pinned would cost both.

    half_bytes: of one half. The buffer is made when it is first needed, and kept.
    """

    def __init__(self, half_bytes: int = STAGING_BYTES // 2) -> None:
        self._half_bytes = half_bytes
        self._halves: Tensor | None = None  # uint8 [2, half_bytes]

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies that training does not touch, by the same names. They are complete when this returns."""
        copies: dict[str, Tensor] = {}
        staged: list[tuple[Tensor, Tensor]] = []
        for name, tensor in tensors.items():
            if tensor.is_cpu:
                copies[name] = tensor.detach().clone()
            else:
                copies[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
                staged.append((tensor, copies[name]))
        self.stage(staged)
        return copies

    def stage(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy each first tensor, all of one device, into the second, contiguous on the CPU and of its shape and dtype.

        The copies are complete when this returns.
        """
        filled: _Filled | None = None
        for number, pieces in enumerate(_in_batches(pairs, self._half_bytes)):
            following = _Filled(self._half(number % 2, pieces[0][0].device), pieces)
            if filled is not None:
                filled.empty()
            filled = following
        if filled is not None:
            filled.empty()

    def _half(self, number: int, device: torch.device) -> Tensor:
        """uint8 [half_bytes]."""
        if self._halves is None:
            pinned = device.type == "cuda"
            self._halves = torch.empty(2, self._half_bytes, dtype=torch.uint8, pin_memory=pinned)
        return self._halves[number]


class _Filled:
    """Half of a staging buffer into which copies of the device's `pieces` are queued. Pieces: see `_in_batches`."""

    def __init__(self, half: Tensor, pieces: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []  # of the half, and where it belongs
        begin = 0
        for source, target in pieces:
            part = half[begin : begin + len(source)]
            part.copy_(source, non_blocking=True)
            self._parts.append((part, target))
            begin += len(source)
        self._copied: torch.cuda.Event | None = None
        if pieces[0][0].is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def empty(self) -> None:
        """Wait for the device, and copy what it has filled to where it belongs."""
        if self._copied is not None:
            self._copied.synchronize()
        for part, target in self._parts:
            target.copy_(part)


def _in_batches(pairs: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The bytes of all `pairs`, in order, as pieces of uint8 [n], in batches of `size` bytes at most."""
    pieces: list[tuple[Tensor, Tensor]] = []
    left = size
    for pair in pairs:
        source, target = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in pair)
        while len(source) > 0:
            n_bytes = min(left, len(source))
            pieces.append((source[:n_bytes], target[:n_bytes]))
            source, target, left = source[n_bytes:], target[n_bytes:], left - n_bytes
            if left == 0:
                yield pieces
                pieces, left = [], size
    if pieces:
        yield pieces
