"""A run with each tokenizer of other programs: trained, resumed bit for bit, sampled, in whole processes' time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_run import fingerprint, tiny_run_config, write_config, write_text
from tokenizer_fixtures import world_file, write_hub_tokenizer

from rwkv_cluster.cli import main
from rwkv_cluster.data.binidx import open_tokens
from rwkv_cluster.data.manifest import load_manifest
from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.tokenizer import GenericTokenizer, create_vocab_file_from_tokens

pytestmark = pytest.mark.system
GENERATE = ["--prompt", "we count", "--tokens", "12", "--seed", "3"]


def config_of(folder: Path, tokenizer: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """run.yaml of a run of 6 steps with checkpoints at 3 and 6."""
    training = {"max_steps": 6, **sections.pop("training", {})}
    config = tiny_run_config(
        folder,
        data={"tokenizer": tokenizer, "n_epochs_duplication": 8},
        training=training,
        checkpoint={"save_interval_steps": 3},
        **sections,
    )
    return write_config(folder / "run.yaml", config)


def resumed(path: Path) -> dict[str, Any]:
    """The fingerprint of a run of 6 steps, and again after it went on from its checkpoint of step 3."""
    work = path.parent / "work"
    assert main(["train", str(path)]) == 0
    whole = fingerprint(work)
    shutil.rmtree(work / "out/checkpoints/step-00000006")
    assert main(["train", str(path)]) == 0
    assert fingerprint(work) == whole
    return whole


@pytest.fixture
def lf_file(tmp_path: Path) -> Path:
    path = tmp_path / "lf.txt"
    path.write_bytes(world_file().read_bytes().replace(b"\r\n", b"\n"))
    return path


def test_world(tmp_path: Path, lf_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_of(tmp_path, {"type": "world"})
    resumed(path)
    work = tmp_path / "work"
    assert load_manifest(work / "data").vocab_size == 65_536
    assert (work / "data/vocab.txt").read_bytes() == lf_file.read_bytes()

    capsys.readouterr()
    assert main(["train", str(path), f"--data.tokenizer.vocab_file={lf_file}", "--training.max_steps=7"]) == 0
    assert "preparing data" not in capsys.readouterr().err, "the other line ending is the same vocabulary"

    alone = tmp_path / "alone.pth"
    shutil.copy(work / "out/rwkv-final.pth", alone)
    said = []
    for source, options in ((work, []), (alone, ["--tokenizer", "world"]), (alone, [])):
        assert main(["generate", str(source), *GENERATE, *options]) == 0
        captured = capsys.readouterr()
        said.append(captured.out)
        assert ("taking the World tokenizer" in captured.err) == (source != work and not options)
    assert said[0].startswith("we count")
    assert said[1] == said[2]


def test_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hub").mkdir()
    write_hub_tokenizer(tmp_path / "hub/tokenizer.json")
    path = config_of(tmp_path, {"type": "hf", "path": str(tmp_path / "hub")}, logging={"sample_tokens": 8})
    resumed(path)
    work = tmp_path / "work"
    shutil.copy(work / "out/rwkv-final.pth", tmp_path / "alone.pth")
    options = ["--tokenizer", "hf", "--vocab-file", str(tmp_path / "hub/tokenizer.json")]
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "alone.pth"), *GENERATE, *options]) == 0
    alone = capsys.readouterr().out
    shutil.rmtree(tmp_path / "hub")
    assert main(["generate", str(work), *GENERATE]) == 0, "by the copy in the work directory"
    assert capsys.readouterr().out == alone
    assert alone.startswith("we count")


def test_added_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_vocab_file_from_tokens([bytes([byte]) for byte in range(256)], tmp_path / "v.txt")
    tokenizer = {"type": "generic", "vocab_file": str(tmp_path / "v.txt"), "added_tokens": ["the ", "river"]}
    path = config_of(tmp_path, tokenizer)
    resumed(path)
    work = tmp_path / "work"
    manifest = load_manifest(work / "data")
    assert manifest.tokenizer["added_tokens"] == ["the ", "river"]
    assert {257, 258} < set(open_tokens(work / "data/train").read(0, manifest.n_tokens).tolist())
    (tmp_path / "v.txt").unlink()
    assert main(["generate", str(work), *GENERATE]) == 0, "by the copy in the work directory"


def test_world_with_added_tokens_from_weights_of_world(tmp_path: Path, lf_file: Path) -> None:
    start = tiny_model("x070", vocab_size=65_536).state_dict()
    save_pth(tmp_path / "start.pth", start)
    chat = [f"<|{n}|>" for n in range(6)] + ["<|im_start|>"]
    lines = write_text(tmp_path / "text.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_text("".join(line.replace('": "', '": "<|im_start|>') for line in lines))
    training = {"init_from": str(tmp_path / "start.pth"), "new_rows": "mean"}
    tokenizer = {"type": "world", "vocab_file": str(lf_file), "added_tokens": chat}
    resumed(config_of(tmp_path, tokenizer, training=training))
    data, began = tmp_path / "work/data", load_pth(tmp_path / "work/out/rwkv-init.pth")
    manifest = load_manifest(data)
    assert (manifest.vocab_size, manifest.dtype) == (65_537, "int32")
    assert 65_536 in open_tokens(data / "train").read(0, manifest.n_tokens)
    pieces = GenericTokenizer(lf_file).encode("<|im_start|>")
    for name in ("emb.weight", "head.weight"):
        assert torch.equal(began[name][:65_530], start[name][:65_530])
        assert torch.equal(began[name][65_536], start[name][pieces].mean(0, dtype=torch.float64).float())
