"""Commands that take weights of any layout, a file or a folder, and name what is none."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from layout_files import RANKS, four_ranks, in_layout, write_folder
from safetensors.torch import save_file
from tiny_models import tiny_model
from tiny_run import tiny_run_config, write_config

from rwkv_cluster.cli import main
from rwkv_cluster.model.weights_file import save_pth
from rwkv_cluster.train.run import prepare_data

BYTES = ["--tokenizer", "byte", "--tokens", "5", "--prompt", "ab"]


def test_inspect_prints_the_architecture_or_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pth(tmp_path / "m.pth", tiny_model("x070", v_lora_rank=24).state_dict(), torch.bfloat16)
    assert main(["inspect", str(tmp_path / "m.pth")]) == 0
    text, digest = capsys.readouterr().out, hashlib.sha256((tmp_path / "m.pth").read_bytes()).hexdigest()
    rows = {
        "layout": "RWKV-LM's names",
        "dtype": "bfloat16",
        "model_type": "x070",
        "v_lora_rank": "24",
        "sha256": digest,
    }
    assert all(re.search(rf"^{name} +{value}$", text, re.MULTILINE) for name, value in rows.items())
    assert "ctx_len" not in text
    folder = write_folder(tmp_path / "m", in_layout(four_ranks(), "fla"), n_files=2)
    (folder / "rwkv_vocab_v20230424.txt").write_text("1 'a' 1\n")
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layout"], facts["tokenizer"]) == ("flash-linear-attention's names", "rwkv_vocab_v20230424.txt")
    assert {name: facts["sizes"][name] for name in RANKS} == RANKS
    assert len(facts["sha256"]) == 2
    save_pth(tmp_path / "x.pth", {"a": torch.ones(2)})
    assert main(["inspect", str(tmp_path / "x.pth")]) == 4
    assert re.search(r"x\.pth: .*not those of an RWKV", capsys.readouterr().err)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_generate_takes_any_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tiny_model("x070", n_embd=128, head_size_a=32, vocab_size=257, block0_value_residual=False, **RANKS)
    save_pth(tmp_path / "m.pth", weights.state_dict())
    save_file(in_layout(weights.state_dict(), "rwkv-rs"), tmp_path / "m.safetensors")
    folder = write_folder(tmp_path / "m", in_layout(weights.state_dict(), "fla"), n_files=2)
    texts = {
        said(capsys, "generate", str(path), *BYTES) for path in (tmp_path / "m.pth", tmp_path / "m.safetensors", folder)
    }
    assert len(texts) == 1
    lines = (f"{id} {bytes([id - 1])!r} 1" for id in range(1, 257))
    (folder / "rwkv_vocab_v20230424.txt").write_text("\n".join(lines) + "\n")
    for path in (folder, folder / "model.safetensors.index.json"):
        assert said(capsys, "generate", str(path), *BYTES[2:]) in texts


def test_generate_names_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/adapter_config.json").write_text("{}")
    assert main(["generate", str(tmp_path / "m"), "--prompt", "a"]) == 4
    assert "folder of an adapter" in capsys.readouterr().err
    save_pth(tmp_path / "m.pth", four_ranks())
    assert main(["generate", str(tmp_path / "m.pth"), *BYTES]) == 2
    assert re.search(r"m\.pth has 50 vocabulary rows.*\(257\)", capsys.readouterr().err)


def test_eval_takes_any_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run_config(tmp_path)
    prepare_data(config)
    path = str(write_config(tmp_path / "run.yaml", config))
    weights = tiny_model("x070", vocab_size=257, block0_value_residual=False).state_dict()
    save_pth(tmp_path / "m.pth", weights)
    folder = write_folder(tmp_path / "m", in_layout(weights, "transformers"))
    found = {said(capsys, "eval", path, "--weights", str(weights)) for weights in (tmp_path / "m.pth", folder)}
    assert len(found) == 1
