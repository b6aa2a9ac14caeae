"""Tensors cut up among ranks come back as they were, in whatever order and number the pieces are written."""

from __future__ import annotations

import math
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.train.checkpoint.shards import ShardedTensors, shard_key

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3)


def _write(folder: Path, pieces: list[dict[str, torch.Tensor]]) -> list[Path]:
    paths = [folder / f"weights-{rank:05d}-of-{len(pieces):05d}.pth" for rank in range(len(pieces))]
    for path, tensors in zip(paths, pieces, strict=True):
        torch.save(tensors, path)
    return paths


@settings(max_examples=40, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=4), st.integers(1, 9), st.data())
def test_what_any_ranks_wrote_is_put_together_again(
    shapes: list[list[int]], world_size: int, data: st.DataObject
) -> None:
    """Cut anywhere, as ZeRO's flat buffers are: a rank may have nothing of a tensor. Files come in any order."""
    tensors = {f"blocks.{i}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
    tensors |= {f"exp_avg/{name}": torch.randn(tensor.shape) for name, tensor in tensors.items()}
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(world_size)]
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        cuts = data.draw(st.lists(st.integers(0, flat.numel()), min_size=world_size - 1, max_size=world_size - 1))
        ends = [0, *sorted(cuts), flat.numel()]
        for rank, (start, end) in enumerate(pairwise(ends)):
            if end > start:
                files[rank][shard_key(name, start)] = flat[start:end].clone()
    with tempfile.TemporaryDirectory() as folder:
        paths = data.draw(st.permutations(_write(Path(folder), files)))
        found = ShardedTensors(paths, {name: list(tensor.shape) for name, tensor in tensors.items() if "/" not in name})
        assert set(found.keys()) == set(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("change", ["missing", "overlapping", "too long"])
def test_pieces_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    pieces = {"missing": [(0, 4), (8, 12)], "overlapping": [(0, 8), (4, 12)], "too long": [(0, 12)]}[change]
    files = [{shard_key("a", start): whole[start:end].clone()} for start, end in pieces]
    size = 11 if change == "too long" else 12
    found = ShardedTensors(_write(tmp_path, files), {"a": [size]})
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: .* of a do not .* {size} elements"):
        found["a"]


@pytest.mark.parametrize("key", ["a", "a@", "a@-1", "a@x", "b@0", "a@0@zero"])
def test_a_name_that_is_no_piece_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"weights-00000-of-00001\.pth: '{key}' is not a piece"):
        ShardedTensors(_write(tmp_path, [{key: torch.ones(3)}]), {"a": [3]})


def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    files = [{shard_key("a", 2 * rank): torch.tensor([1.0, math.nan if rank else 2.0])} for rank in range(2)]
    found = ShardedTensors(_write(tmp_path, files), {"a": [4]})
    with pytest.raises(CheckpointError, match=r"weights-00001-of-00002\.pth is not usable: a has a NaN"):
        found["a"]
