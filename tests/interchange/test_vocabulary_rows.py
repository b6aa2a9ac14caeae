"""New rows of emb and head: by their definition, nothing else touched, and refused where the vocabulary is another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VERSIONS, tiny_model
from tiny_run import losses, tiny_run_config
from torch import Tensor

from rwkv_cluster.config import Config
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.interchange.vocabulary_rows import NAMES, NewRows, fit_rows, with_new_rows
from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.tokenizer import create_vocab_file_from_tokens
from rwkv_cluster.train.run import initialize, train

ADDED = ["<|x|>", "ab", "é"]


def by_definition(rows: Tensor, n_rows: int, pieces: dict[int, list[int]], how: NewRows) -> list[list[float]]:
    """Each row by itself, in Python's numbers."""
    old = rows.double().tolist()
    wanted = []
    for token_id in range(n_rows):
        if token_id < len(old) and token_id not in pieces:
            wanted.append(old[token_id])
            continue
        of = [old[piece] for piece in pieces.get(token_id, [])] or old
        wanted.append([sum(column) / len(of) if how == "mean" else 0.0 for column in zip(*of, strict=True)])
    return wanted


@pytest.mark.parametrize("how", ["mean", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_follow_the_definition(how: NewRows, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in tiny_model("x070").state_dict().items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    pieces = {48: [3, 4, 4], 50: [7], 51: []}
    grown = with_new_rows(weights, 53, pieces, how)
    for name in NAMES:
        wanted = torch.tensor(by_definition(weights[name], 53, pieces, how), dtype=torch.float64)
        assert torch.equal(grown[name][:48], weights[name][:48])
        torch.testing.assert_close(grown[name], wanted.to(dtype), rtol=2e-7 if dtype == torch.float32 else 0, atol=0)
    assert list(grown) == list(weights)
    assert all(torch.equal(weights[name], before[name]) for name in weights), "the given weights are not written to"
    assert all(grown[name] is weights[name] for name in weights if name not in NAMES)
    assert {grown[name].dtype for name in NAMES} == {dtype}


def config_of(folder: Path, **training: object) -> Config:
    """A run on bytes and three added tokens, of which the file has none."""
    create_vocab_file_from_tokens([bytes([byte]) for byte in range(256)], folder / "v.txt")
    tokenizer = {"type": "generic", "vocab_file": str(folder / "v.txt"), "added_tokens": ADDED}
    return tiny_run_config(
        folder,
        data={"tokenizer": tokenizer},
        training={"init_from": str(folder / "start.pth"), "max_steps": 2, **training},
        model={"vocab_size": 264},
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_begins_with_them(version: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, new_rows="mean")
    config = config.model_copy(update={"model": config.model.__replace__(model_type=version)})
    start = tiny_model(version, vocab_size=258).state_dict()
    save_pth(tmp_path / "start.pth", start)
    began = load_pth(initialize(config))
    emb = start["emb.weight"]
    assert began["emb.weight"].shape == began["head.weight"].shape == (264, 32)
    assert torch.equal(began["emb.weight"][:257], emb[:257])
    for row, text in zip((257, 258, 259), ADDED, strict=True):
        wanted = emb[[byte + 1 for byte in text.encode()]].mean(0, dtype=torch.float64).float()
        assert torch.equal(began["emb.weight"][row], wanted)
    assert torch.equal(began["head.weight"][263], start["head.weight"].mean(0, dtype=torch.float64).float())


@pytest.mark.system
def test_a_run_with_them_trains_and_is_the_same_again(tmp_path: Path) -> None:
    save_pth(tmp_path / "start.pth", tiny_model("x070", vocab_size=258).state_dict())
    config = config_of(tmp_path, new_rows="mean")
    assert train(config).step == 2
    again = config.model_copy(update={"work_dir": str(tmp_path / "again")})
    assert train(again).step == 2
    assert losses(tmp_path / "again") == losses(tmp_path / "work")
    assert load_pth(tmp_path / "work/out/rwkv-final.pth")["emb.weight"].shape == (264, 32)


def test_weights_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, new_rows="zero")
    fewer = tiny_model("x070", vocab_size=256).state_dict()
    with pytest.raises(CheckpointError, match=r"256 vocabulary rows.* 257 ids"):
        fit_rows(fewer, config)
    more = tiny_model("x070", vocab_size=265).state_dict()
    assert fit_rows(more, config)["emb.weight"] is more["emb.weight"], "whoever compares the shapes says so"
