"""`rwkv-cluster average`: the mean of checkpoints and of weights, rounded once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from tiny_run import state_of

from rwkv_cluster import cli
from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.train.checkpoint.checkpointer import Checkpointer
from rwkv_cluster.workdir import WorkDir

Weights = dict[str, torch.Tensor]


def _weights(seed: int, n_embd: int = 16) -> Weights:
    model = RWKV(ModelConfig(model_type="x070", n_layer=1, n_embd=n_embd, head_size_a=8, vocab_size=9))
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in model.state_dict().items()
    }


@pytest.fixture
def work(tmp_path: Path) -> WorkDir:
    """A run with checkpoints of steps 1, 2 and 3."""
    work = WorkDir(tmp_path / "work")
    work.create()
    saver = Checkpointer(work.checkpoints, 9, background=False, n_bytes=1)
    for step in (1, 2, 3):
        weights = _weights(step)
        saver.save(step, {"weights.pth": weights, "optimizer.pth": weights}, state_of(step))
    return work


def _mean(*seeds: int) -> Weights:
    """In fp64, rounded once to fp32."""
    parts = [_weights(seed) for seed in seeds]
    return {name: (sum(part[name].double() for part in parts) / len(parts)).float() for name in parts[0]}


def _equal(path: Path, expected: Weights) -> bool:
    weights = load_pth(path)
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_all_checkpoints_of_a_run_and_some(work: WorkDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["average", str(work.root)]) == 0
    path = work.out / "average-1-3-of-3.pth"
    assert capsys.readouterr().out.strip() == str(path)
    assert _equal(path, _mean(1, 2, 3))
    assert cli.main(["average", str(work.root), "--steps", "3", "1"]) == 0
    assert _equal(work.out / "average-1-3-of-2.pth", _mean(1, 3))


def test_weights_of_several_places(work: WorkDir, tmp_path: Path) -> None:
    save_pth(tmp_path / "four.pth", _weights(4))
    output = tmp_path / "soup.pth"
    digest = hashlib.sha256((tmp_path / "four.pth").read_bytes()).hexdigest()
    command = ["average", str(tmp_path / "four.pth"), str(work.root), "--steps", "2", "--output", str(output)]
    assert cli.main(command) == 0
    assert _equal(output, _mean(4, 2))
    assert hashlib.sha256((tmp_path / "four.pth").read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["work", "--steps", "7"], 4, "no checkpoint of step 7. Steps that are there: 1, 2, 3"),
        (["work", "--steps", "2"], 2, "alone has no average"),
        (["work", "wide.pth"], 2, "Name a file by --output"),
        (["work", "wide.pth", "--output", "soup.pth"], 4, "hold other models: emb.weight is (9, 32) and (9, 16)"),
        (["wide.pth", "none.pth", "--output", "soup.pth"], 4, "none.pth"),
    ],
)
def test_what_cannot_be_averaged(
    arguments: list[str],
    code: int,
    words: str,
    work: WorkDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_pth(tmp_path / "wide.pth", _weights(4, n_embd=32))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["average", *arguments]) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.rglob("average-*"))
    assert not (tmp_path / "soup.pth").exists()
