"""Windows as tensors: inputs, targets, where documents begin and what is trained on, against loops over positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.binidx import TokenFileWriter, open_tokens
from rwkv_cluster.data.dataset import MicroBatches, TokenDataset, validation_batches
from rwkv_cluster.data.loss_mask import LossMask, LossMaskWriter
from rwkv_cluster.data.preparation.pack import pack
from rwkv_cluster.data.sampler import SamplePlan, ShuffledOrder
from rwkv_cluster.data.windows import FlatWindows, PackedWindows, Windows

CTX_LEN = 16
LENGTHS = np.random.default_rng(0).integers(1, 30, 60)
N_TOKENS = int(LENGTHS.sum())
BITS = np.random.default_rng(1).random(N_TOKENS) < 0.3


@pytest.fixture(params=[False, True], ids=["all trained", "masked"])
def mask(request: pytest.FixtureRequest, tmp_path: Path) -> LossMask | None:
    """The mask of the token file, or none."""
    with TokenFileWriter(tmp_path / "t", np.int32) as writer:
        writer.write(np.arange(1, 1 + N_TOKENS, dtype=np.int32), LENGTHS)
    if not request.param:
        return None
    with LossMaskWriter(tmp_path / "t.mask") as bits:
        bits.write(BITS)
    return LossMask(tmp_path / "t.mask", N_TOKENS)


def _packed(folder: Path, mask: LossMask | None) -> PackedWindows:
    mask_file = folder / "t.mask" if mask is not None else None
    pack(folder / "t", folder / "w", DataConfig(), CTX_LEN, mask_file)
    return PackedWindows(open_tokens(folder / "t"), open_tokens(folder / "w"), CTX_LEN, mask)


def test_a_packed_window_holds_its_documents_and_padding(tmp_path: Path, mask: LossMask | None) -> None:
    windows = _packed(tmp_path, mask)
    spans = open_tokens(tmp_path / "w")
    numbers = list(range(len(spans)))[::-1]
    batch = windows.read(numbers)
    assert batch.starts is not None
    assert batch.trained is not None
    is_trained = torch.zeros(batch.inputs.numel(), dtype=torch.bool)
    is_trained[batch.trained] = True
    assert bool((batch.trained.diff() > 0).all())
    for row, number in enumerate(numbers):
        expected: list[tuple[int, int, bool, bool]] = []
        for first, size in spans[number].reshape(-1, 2).tolist():
            for place in range(first, first + size):
                trained = mask is None or bool(BITS[place + 1])
                expected.append((1 + place, 2 + place, place == first, trained))
        padding = CTX_LEN - len(expected)
        expected += [(0, 0, index == 0, False) for index in range(padding)]
        found = zip(
            batch.inputs[row].tolist(),
            batch.targets[row].tolist(),
            batch.starts[row].tolist(),
            is_trained.view(len(numbers), CTX_LEN)[row].tolist(),
            strict=True,
        )
        assert list(found) == expected
        assert windows.count_trained(number) == sum(trained for *_, trained in expected) > 0


def test_a_slice_knows_what_is_trained_on(tmp_path: Path, mask: LossMask | None) -> None:
    windows = FlatWindows(open_tokens(tmp_path / "t"), CTX_LEN, mask)
    batch = windows.read([3, 0])
    assert batch.starts is None
    assert batch.inputs.tolist() == [list(range(1 + start, 1 + start + CTX_LEN)) for start in (3 * CTX_LEN, 0)]
    assert torch.equal(batch.targets, batch.inputs + 1)
    if mask is None:
        assert batch.trained is None
        assert windows.count_trained(3) == CTX_LEN
    else:
        bits = np.concatenate([BITS[start + 1 : start + 1 + CTX_LEN] for start in (3 * CTX_LEN, 0)])
        assert batch.trained is not None
        assert batch.trained.tolist() == np.flatnonzero(bits).tolist()
        assert windows.count_trained(3) == BITS[3 * CTX_LEN + 1 : 4 * CTX_LEN + 1].sum()


@pytest.mark.parametrize("kind", ["packed", "flat"])
def test_each_rank_counts_the_trained_targets_of_the_whole_step(
    tmp_path: Path, mask: LossMask | None, kind: str
) -> None:
    windows: Windows = (
        _packed(tmp_path, mask) if kind == "packed" else FlatWindows(open_tokens(tmp_path / "t"), 16, mask)
    )
    plan = SamplePlan(CTX_LEN, ShuffledOrder(20, 0), 8, is_packed=kind == "packed").without(1, 1)
    steps = range(4)
    for world_size, micro_bsz in ((1, 8), (2, 2), (4, 1)):
        seen = [0] * len(steps)
        told: list[set[int | None]] = [set() for _ in steps]
        for rank in range(world_size):
            dataset = TokenDataset(windows, plan)
            batches = MicroBatches(plan, 0, len(steps), rank, world_size, micro_bsz)
            per_step = 8 // world_size // micro_bsz
            for index, samples in enumerate(batches):
                batch = dataset.__getitems__(samples)
                told[index // per_step].add(batch.n_trained)
                seen[index // per_step] += len(batch.trained) if batch.trained is not None else 0
        expected = [{None}] * len(steps) if kind == "flat" and mask is None else [{count} for count in seen]
        assert told == expected


def test_validation_by_document_reads_every_document(tmp_path: Path, mask: LossMask | None) -> None:
    windows = _packed(tmp_path, mask)
    for world_size in (1, 2):
        targets = []
        for rank in range(world_size):
            options = {"batch_size": 3, "max_tokens": 10**9, "rank": rank, "world_size": world_size}
            for batch in validation_batches(windows, **options):
                if batch is not None:
                    targets += batch.targets.flatten()[batch.trained].tolist()
        ends = np.cumsum(LENGTHS)
        first = {1 + start for start in (ends - LENGTHS).tolist()}
        expected = [1 + place for place in range(N_TOKENS) if (mask is None or BITS[place]) and 1 + place not in first]
        assert sorted(targets) == expected
    assert len(list(validation_batches(windows, batch_size=2, max_tokens=1))) == 1
