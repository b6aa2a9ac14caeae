"""The loss mask beside a token file: bits in, bits out, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rwkv_cluster.data.loss_mask import LossMask, LossMaskWriter, mask_path
from rwkv_cluster.errors import DataError
from rwkv_cluster.workdir import sha256_file


def test_bits_written_in_parts_are_read_from_anywhere(tmp_path: Path) -> None:
    trained = np.random.default_rng(0).random(1003) < 0.3
    path = mask_path(tmp_path / "train.v1")
    with LossMaskWriter(path) as writer:
        for start, stop in [(0, 0), (0, 3), (3, 20), (20, 500), (500, 1003)]:
            writer.write(trained[start:stop])
    assert path.name == "train.v1.mask"
    assert (writer.n_tokens, writer.n_trained) == (1003, trained.sum())
    assert writer.digest == (126, sha256_file(path))
    mask = LossMask(path, 1003)
    for start, length in [(0, 1003), (0, 0), (1, 7), (7, 1), (8, 8), (13, 300), (1003, 0)]:
        assert (mask.read(start, length) == trained[start : start + length]).all()
    assert (mask.read_rows([5, 900], 64) == np.stack([trained[5:69], trained[900:964]])).all()
    with pytest.raises(IndexError):
        mask.read(1000, 4)


def test_the_first_token_is_the_least_significant_bit(tmp_path: Path) -> None:
    with LossMaskWriter(tmp_path / "train.mask") as writer:
        writer.write(np.array([1, 0, 0, 1, 0, 0, 0, 0, 0, 1], bool))
    assert (tmp_path / "train.mask").read_bytes() == b"\x09\x02"


@pytest.mark.parametrize("n_tokens", [8, 17])
def test_a_mask_of_another_token_file_is_refused(tmp_path: Path, n_tokens: int) -> None:
    (tmp_path / "train.mask").write_bytes(b"\x01\x01")
    with pytest.raises(DataError):
        LossMask(tmp_path / "train.mask", n_tokens)


def test_a_mask_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        LossMask(tmp_path / "train.mask", 8)
