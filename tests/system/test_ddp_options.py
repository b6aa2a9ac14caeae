"""DDP's options on two ranks: other options, the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ddp_options import STEPS, train_as_rank

pytestmark = pytest.mark.system


def test_no_option_changes_a_bit(tmp_path: Path) -> None:
    """Also with what is frozen, with activation checkpointing, and with gradients that become 0 and not None."""
    mp.spawn(train_as_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    for case, tensors in ranks[0].items():
        part, grad_cp, _ = case
        assert all(map(torch.equal, tensors, ranks[0][part, grad_cp, "torch's own"])), case
        assert all(map(torch.equal, tensors[STEPS:], ranks[1][case][STEPS:])), case
        assert not torch.equal(tensors[0], ranks[1][case][0]), case
