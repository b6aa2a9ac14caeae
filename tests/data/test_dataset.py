"""Training samples and validation windows as tensors: the right tokens, once each, for every number of ranks."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_cluster.data.binidx import IndexedTokens, TokenFileWriter, open_tokens
from rwkv_cluster.data.dataset import MicroBatches, TokenDataset, validation_batches
from rwkv_cluster.data.sampler import CubicOrder, SamplePlan
from rwkv_cluster.data.windows import FlatWindows
from rwkv_cluster.errors import DataError

N_TOKENS = 1003


@pytest.fixture
def tokens(tmp_path: Path) -> IndexedTokens:
    """A file whose token at place i is i."""
    with TokenFileWriter(tmp_path / "train", np.dtype(np.uint16)) as writer:
        writer.write(np.arange(N_TOKENS, dtype=np.uint16), np.array([N_TOKENS]))
    return open_tokens(tmp_path / "train")


def test_a_sample_is_the_slice_at_its_offset(tokens: IndexedTokens) -> None:
    plan = SamplePlan(ctx_len=10, order=CubicOrder(89), global_batch_size=4)
    batch = TokenDataset(FlatWindows(tokens, 10), plan).__getitems__([1, 7, 500])
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.tolist() == [list(range(plan.offset(j), plan.offset(j) + 10)) for j in (1, 7, 500)]
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert (batch.starts, batch.trained, batch.n_trained) == (None, None, None)


def _pair(folder: Path, values: list[list[int]], dtype: str) -> Path:
    with TokenFileWriter(folder / "pair", np.dtype(dtype)) as writer:
        for document in values:
            writer.write(np.array(document, dtype), np.array([len(document)]))
    return folder / "pair"


@pytest.mark.parametrize(
    ("dtype", "bad"), [("uint16", 300), ("uint16", 65535), ("int32", 300), ("int32", -1), ("int64", 2**40)]
)
def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path, dtype: str, bad: int) -> None:
    prefix = _pair(tmp_path, [[1] * 50, [2] * 30 + [bad] + [3] * 40, [299] * 60], dtype)
    plan = SamplePlan(ctx_len=10, order=CubicOrder(17), global_batch_size=4)
    told = rf"pair\.bin: document 1, token 30: id {bad} .* 0 to 299"
    tokens = pickle.loads(pickle.dumps(open_tokens(prefix, 300)))
    assert tokens.read(121, 181).tolist() == [299] * 60
    with pytest.raises(DataError, match=told):
        TokenDataset(FlatWindows(tokens, 10), plan).__getitems__(range(1, 18))
    with pytest.raises(DataError, match=told):
        list(validation_batches(FlatWindows(tokens, 10), batch_size=4, max_tokens=10**9))
    assert len(open_tokens(prefix).read(0, 181)) == 181  # who asks for no vocabulary may look at anything


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_micro_batches_of_all_ranks_are_the_steps(world_size: int) -> None:
    plan = SamplePlan(ctx_len=10, order=CubicOrder(89), global_batch_size=8)
    ranks = [
        MicroBatches(plan, start_step=3, total_steps=6, rank=rank, world_size=world_size, micro_bsz=2)
        for rank in range(world_size)
    ]
    assert all(len(list(batches)) == len(batches) == 3 * 8 // (2 * world_size) for batches in ranks)
    seen = sorted(sample for batches in ranks for batch in batches for sample in batch)
    assert seen == list(range(1 + 3 * 8, 1 + 6 * 8))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("max_tokens", [7, 100, 995, 10**9])
def test_validation_predicts_each_token_once(tokens: IndexedTokens, max_tokens: int, world_size: int) -> None:
    targets, turns = [], []
    for rank in range(world_size):
        batches = list(
            validation_batches(
                FlatWindows(tokens, 10), batch_size=3, max_tokens=max_tokens, rank=rank, world_size=world_size
            )
        )
        turns.append(len(batches))
        assert all(batch is not None for batch in batches[:-1])
        for batch in batches:
            if batch is None:
                continue
            assert torch.equal(batch.targets, batch.inputs + 1)
            targets += batch.targets.flatten().tolist()
    assert sorted(targets) == list(range(1, 1 + min(N_TOKENS - 1, max_tokens)))
    assert len(set(turns)) == 1


def test_a_file_that_shrinks_under_the_run_is_said(tokens: IndexedTokens, tmp_path: Path) -> None:
    os.truncate(tmp_path / "train.bin", 100)
    with pytest.raises(DataError, match=r"train\.bin has become shorter"):
        TokenDataset(
            FlatWindows(tokens, 10), SamplePlan(ctx_len=10, order=CubicOrder(89), global_batch_size=4)
        ).__getitems__(range(1, 90))
