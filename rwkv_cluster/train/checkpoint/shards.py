"""Tensors that several ranks saved in pieces, put together again whatever the number of ranks that reads them.

A piece is a run of elements of a flattened tensor, named `<tensor>@<first element>`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.weights_file import check_finite, load_pth


def shard_key(name: str, start: int) -> str:
    """Name of the piece of tensor `name` that begins with element `start`."""
    return f"{name}@{start}"


class ShardedTensors:
    """Whole tensors by name, each assembled when it is asked for; the files are mapped, not read, until then.

    paths: every rank's file. shapes: of the parameters, by name; a moment has its parameter's shape.
    """

    def __init__(self, paths: Iterable[Path], shapes: Mapping[str, list[int]]) -> None:
        paths = list(paths)
        self._shapes = shapes
        self._folder = paths[0].parent
        self._pieces: dict[str, list[tuple[int, Tensor, Path]]] = {}
        for path in paths:
            for key, piece in load_pth(path, mapped=True).items():
                name, _, start = key.rpartition("@")
                if not start.isdecimal() or name.rpartition("/")[2] not in shapes:
                    raise CheckpointError(
                        f"{path}: {key!r:.80} is not a piece of a parameter", remedy="Use an earlier checkpoint"
                    )
                self._pieces.setdefault(name, []).append((int(start), piece, path))

    def keys(self) -> Iterator[str]:
        return iter(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor.

        Raises CheckpointError for a name that is not there, and where pieces are missing or not finite.
        """
        if name not in self._pieces:
            raise CheckpointError(f"{self._folder}: it has no {name}", remedy="Use an earlier checkpoint")
        shape = self._shapes[name.rpartition("/")[2]]
        parts, size = sorted(self._pieces[name], key=lambda part: part[0]), math.prod(shape)
        ends = [0, *(start + piece.numel() for start, piece, _ in parts)]
        if [start for start, _, _ in parts] != ends[:-1] or ends[-1] != size:
            raise CheckpointError(
                f"{parts[0][2].parent}: the pieces of {name} do not make up its {size} elements: they end at {ends[1:]}"
            )
        for _, piece, path in parts:
            check_finite({name: piece}, f"{path} is not usable")
        return torch.cat([piece for _, piece, _ in parts]).view(shape)
