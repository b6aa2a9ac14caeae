"""Batches that are read one ahead: the same ones at the same time for whoever trains on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import fingerprint, tiny_run_config
from torch.utils.data import DataLoader

from rwkv_cluster.errors import Preempted
from rwkv_cluster.train.datamodule import OneAhead, TokenDataModule
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.run import train


class _Rows(torch.utils.data.IterableDataset[int]):
    """0, 1, 2, and what ends them. read: how many were."""

    read = 0

    def __iter__(self) -> Iterator[int]:
        for number in range(3):
            self.read += 1
            yield number
        raise OSError("the disk is gone")


def test_one_is_read_ahead_and_what_fails_is_told_in_its_turn() -> None:
    rows = _Rows()
    batches = iter(OneAhead(DataLoader(rows, batch_size=None), torch.device("cpu")))
    assert rows.read == 0
    for number in range(3):
        assert next(batches) == number
        assert rows.read <= number + 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_run_that_reads_ahead_is_stopped_and_continued_at_the_same_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = []
    for name in ("plain", "ahead"):
        (tmp_path / name).mkdir()
        training = {"micro_bsz": 2, "global_batch_size": 4}
        configs.append(tiny_run_config(tmp_path / name, model={"n_layer": 1}, training=training))
    train(configs[0])
    plain = TokenDataModule.train_dataloader
    monkeypatch.setattr(TokenDataModule, "train_dataloader", lambda self: OneAhead(plain(self), torch.device("cpu")))
    monkeypatch.setenv(FAULT_VARIABLE, "data.batch@5:signal=SIGUSR1")
    with pytest.raises(Preempted, match="after step 6 of 8"):
        train(configs[1])
    monkeypatch.delenv(FAULT_VARIABLE)
    train(configs[1])
    assert fingerprint(configs[0].work_dir) == fingerprint(configs[1].work_dir)
