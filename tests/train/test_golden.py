"""A hundred steps whose losses are written down: a change that should not alter numbers must not alter these.

`pytest --update-golden` renews them after an intended change.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_files import Golden
from tiny_run import losses, tiny_run_config

from rwkv_cluster.train.run import train


def _curve(folder: Path, model_type: str) -> list[float]:
    config = tiny_run_config(
        folder,
        model={"model_type": model_type, "n_embd": 64},
        data={"validation_fraction": 0.0, "write_jsonl": False},
        training={"max_steps": 100, "micro_bsz": 2, "lr_init": 3e-4, "lr_final": 3e-5},
        checkpoint={"save_interval_steps": 100},
    )
    train(config)
    return losses(config.work_dir)


@pytest.mark.parametrize("model_type", ["x052", "x060", "x070"])
def test_loss_curve(model_type: str, golden: Golden, tmp_path: Path) -> None:
    """Between CPUs only the order of sums differs: 3e-7 from SSE4 to AVX-512 at this learning rate."""
    golden.check_numbers("losses.json", model_type, _curve(tmp_path, model_type), rel=1e-5)
