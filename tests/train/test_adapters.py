"""Runs that train a part: an adapter, or parameters by pattern. Their checkpoints, their base, what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import relative_error, some_tokens, tiny_model
from tiny_run import break_off, fingerprint, tiny_run_config, write_config

from rwkv_cluster.adapters.base import MergedTensors
from rwkv_cluster.adapters.base import fingerprint as base_fingerprint
from rwkv_cluster.adapters.layers import attach, load_adapter
from rwkv_cluster.adapters.table import KINDS
from rwkv_cluster.cli import main
from rwkv_cluster.config import AdapterConfig, Config
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import fit_state_dict, infer_model_config, load_pth, save_pth
from rwkv_cluster.train.checkpoint.save_load import Checkpoint, newest_verified
from rwkv_cluster.train.checkpoint.weights import load_model
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir

pytestmark = pytest.mark.system

MODEL = {"model_type": "x070", "n_layer": 2, "n_embd": 32, "head_size_a": 16, "ctx_len": 32}


def _weights(folder: Path, seed: int = 1) -> Path:
    """A released model: dense weights in bf16, for the byte tokenizer."""
    path = folder / f"released-{seed}.pth"
    model = tiny_model("x070", vocab_size=257, noise=0.05 * seed)
    save_pth(path, model.state_dict(), torch.bfloat16)
    return path


def _config(folder: Path, *, training: dict[str, Any] | None = None, **sections: Any) -> Config:
    folder.mkdir(exist_ok=True)
    start = {"init_from": str(_weights(folder)), "precision": "bf16", "lr_init": 1e-2, "lr_final": 1e-3}
    return tiny_run_config(folder, model=MODEL, training={**start, **(training or {})}, **sections)


def _newest(config: Config) -> Checkpoint:
    checkpoint = newest_verified(WorkDir(config.work_dir).checkpoints)
    assert checkpoint is not None
    return checkpoint


def _base(config: Config) -> dict[str, torch.Tensor]:
    return load_pth(WorkDir(config.work_dir).initial_weights)


def _with_adapter(config: Config) -> RWKV:
    """The model of the newest checkpoint in fp32: the base, and the adapter beside it."""
    base = _base(config)
    model = RWKV(infer_model_config(base))
    model.load_state_dict(fit_state_dict(base, model))
    attach(model, config.adapter)
    load_adapter(model, dict(_newest(config).weights()))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_and_saves_the_adapter_alone(kind: str, tmp_path: Path) -> None:
    config = _config(tmp_path, adapter={"kind": kind, "rank": 4, "dropout": 0.1})
    released = hashlib.sha256((tmp_path / "released-1.pth").read_bytes()).digest()
    train(config)
    checkpoint, base = _newest(config), _base(config)
    parts = dict(checkpoint.weights())
    assert not parts.keys() & base.keys()
    assert {name.rpartition(".")[2] for name in parts} == {*KINDS[kind].trained(1, 1, 1), *KINDS[kind].kept(1, 1, 1)}
    trained = {name for name in parts if name.rpartition(".")[2] in KINDS[kind].trained(1, 1, 1)}
    assert {name.partition("/")[2] for name in checkpoint.optimizer()} == trained
    assert all(parts[name].dtype == torch.float32 for name in trained)
    assert checkpoint.state.base == base_fingerprint(base)
    assert hashlib.sha256((tmp_path / "released-1.pth").read_bytes()).digest() == released
    assert base_fingerprint(load_pth(tmp_path / "released-1.pth")) == checkpoint.state.base

    final = load_pth(WorkDir(config.work_dir).final_weights)
    assert {name: (t.shape, t.dtype) for name, t in final.items()} == {
        name: (t.shape, t.dtype) for name, t in base.items()
    }
    adapted = {f"{name.rpartition('.')[0]}.weight" for name in trained}
    for name, tensor in final.items():
        assert torch.equal(tensor, base[name]) == (name not in adapted), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_is_equal_in_every_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row A1. With dropout, whose masks go on where they were, also where blocks are computed anew."""
    adapter = {"kind": kind, "rank": 4, "dropout": 0.2}
    whole, config = (_config(tmp_path / name, training={"grad_cp": 1}, adapter=adapter) for name in ("whole", "broken"))
    train(whole)
    break_off(config, step=6, monkeypatch=monkeypatch)
    assert _newest(config).step == 4
    train(config)
    assert fingerprint(config.work_dir) == fingerprint(whole.work_dir)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_are_those_of_the_adapter(kind: str, tmp_path: Path) -> None:
    config = _config(tmp_path, adapter={"kind": kind, "rank": 4})
    train(config)
    tokens = some_tokens(2, 20, 257)
    with torch.no_grad():
        logits = _with_adapter(config)(tokens)
        assert relative_error(load_model(Path(config.work_dir))(tokens), logits) < 1e-5
        output = tmp_path / "merged.pth"
        assert main(["merge", config.work_dir, "--output", str(output), "--dtype", "fp32"]) == 0
        assert relative_error(load_model(output)(tokens), logits) < 1e-5
    assert main(["merge", config.work_dir, "--output", str(tmp_path / "rounded.pth")]) == 0
    merged, final = load_pth(tmp_path / "rounded.pth"), load_pth(WorkDir(config.work_dir).final_weights)
    assert list(merged) == list(_base(config))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(merged[name], tensor) for name, tensor in final.items())
    precise = load_pth(output)
    assert all(torch.equal(merged[name], precise[name].bfloat16()) for name in merged)  # rounded once


@pytest.mark.parametrize(("kind", "quant"), [("lora", "nf4"), ("dora", "int8")])
def test_a_quantised_base_is_made_again_and_merged_into_as_its_file_has_it(
    kind: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"kind": kind, "rank": 4, "quant": quant}
    training = {"samples_per_epoch": 8}
    whole, config = (_config(tmp_path / name, adapter=adapter, training=training) for name in ("whole", "broken"))
    train(whole)
    break_off(config, step=6, monkeypatch=monkeypatch)
    train(config)
    assert fingerprint(config.work_dir) == fingerprint(whole.work_dir)

    checkpoint, base, work = _newest(config), _base(config), WorkDir(config.work_dir)
    assert {name.rpartition(".")[2] for name in dict(checkpoint.weights())} == {*KINDS[kind].trained(1, 1, 1)}
    assert (
        checkpoint.state.base
        == base_fingerprint(base)
        == base_fingerprint(load_pth(tmp_path / "broken/released-1.pth"))
    )
    assert main(["merge", config.work_dir, "--output", str(tmp_path / "merged.pth")]) == 0
    merged, final = load_pth(tmp_path / "merged.pth"), load_pth(work.final_weights)
    assert list(final) == list(base)
    assert all(torch.equal(merged[name], tensor) for name, tensor in final.items())
    parts = dict(checkpoint.weights())
    expected = MergedTensors(base, parts, config.adapter)["blocks.0.att.key.weight"].bfloat16()
    assert torch.equal(final["blocks.0.att.key.weight"], expected)
    assert (work.out / "rwkv-0-peft/adapter_model.safetensors").exists()
    longer = _config(tmp_path / "broken", training={"max_steps": 10, **training}, adapter={**adapter, "quant": "none"})
    with pytest.raises(ConfigError, match=f"adapter.quant: {quant} -> none"):
        train(longer)


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    config = _config(tmp_path, training={"max_steps": 4}, adapter={"kind": "lora", "rank": 4})
    train(config)
    known = _newest(config).state.base
    other = _weights(tmp_path, seed=2)
    initial = WorkDir(config.work_dir).initial_weights
    initial.write_bytes(other.read_bytes())
    found = base_fingerprint(load_pth(other))
    longer = _config(tmp_path, training={"max_steps": 8}, adapter={"kind": "lora", "rank": 4})
    with pytest.raises(ConfigError, match=rf"base \(fingerprint\): {known} -> {found}"):
        train(longer)
    assert main(["merge", config.work_dir, "--output", str(tmp_path / "x.pth")]) == 4
    initial.unlink()  # made again from training.init_from
    assert train(longer).step == 8


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"rank": 8}, "adapter.rank: 4 -> 8"),
        ({"kind": "dora"}, "adapter.kind: lora -> dora"),
        ({"kind": "none"}, "adapter.kind: lora -> none"),
        ({"targets": ["*.att.key"]}, "adapter.targets: .*"),
    ],
)
def test_another_adapter_is_refused(changed: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    adapter = {"kind": "lora", "rank": 4}
    train(_config(tmp_path, training={"max_steps": 4}, adapter=adapter))
    with pytest.raises(ConfigError, match=sentence):
        train(_config(tmp_path, training={"max_steps": 8}, adapter={**adapter, **changed}))


def test_export_says_what_a_run_with_an_adapter_has(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path, adapter={"kind": "lora", "rank": 4})
    train(config)
    assert main(["export", config.work_dir, "--format", "pth"]) == 2
    sentence = "has an adapter beside its weights. Add --merged for both in one, or use --format peft"
    assert sentence in capfd.readouterr().err
    assert main(["export", config.work_dir, "--format", "safetensors", "--merged"]) == 0
    assert main(["export", config.work_dir, "--format", "peft"]) == 0
    assert main(["export", config.work_dir, "--format", "peft", "--merged"]) == 2
    plain = tmp_path / "released-1.pth"
    assert main(["export", str(plain), "--format", "safetensors", "--merged"]) == 2
    assert main(["export", str(plain), "--format", "peft"]) == 4


def test_each_epoch_leaves_the_adapter_as_peft_reads_it(tmp_path: Path) -> None:
    training = {"max_steps": 4, "samples_per_epoch": 8}
    config = _config(tmp_path, training=training, adapter={"kind": "lora", "rank": 4})
    train(config)
    out = WorkDir(config.work_dir).out
    folders = sorted(path.name for path in out.glob("rwkv-*-peft"))
    assert folders == ["rwkv-0-peft", "rwkv-1-peft"]
    assert sorted(path.name for path in out.glob("rwkv-*.pth")) == ["rwkv-final.pth", "rwkv-init.pth"]
    settings = json.loads((out / "rwkv-1-peft/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8.0)


def test_patterns_train_what_they_name_and_nothing_else(tmp_path: Path) -> None:
    chosen = ["blocks.1.*", "head.weight"]
    config = _config(tmp_path, training={"train": chosen, "lr_multipliers": {"head.weight": 0.1}, "weight_decay": 0})
    train(config)
    checkpoint, base = _newest(config), _base(config)
    weights = dict(checkpoint.weights())
    trained = {name for name in weights if name.startswith("blocks.1.") or name == "head.weight"}
    assert {name.partition("/")[2] for name in checkpoint.optimizer()} == trained
    assert {name for name in weights if not torch.equal(weights[name], base[name].float())} == trained
    assert checkpoint.state.base is None
    moved = {
        name: (weights[name] - base[name].float()).abs().max() for name in ("head.weight", "blocks.1.ffn.key.weight")
    }
    assert moved["head.weight"] < 0.2 * moved["blocks.1.ffn.key.weight"]
    with pytest.raises(ConfigError, match=r"training.train: \['blocks.1.\*', 'head.weight'\] -> all"):
        train(_config(tmp_path, training={"max_steps": 10}))


def test_a_part_that_is_trained_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"train": ["blocks.*.ffn.*"], "grad_cp": 1}
    whole, config = (_config(tmp_path / name, training=training) for name in ("whole", "broken"))
    train(whole)
    break_off(config, step=6, monkeypatch=monkeypatch)
    train(config)
    assert fingerprint(config.work_dir) == fingerprint(whole.work_dir)


def test_a_run_without_either_leaves_no_new_field_in_its_checkpoint(tmp_path: Path) -> None:
    config = tiny_run_config(tmp_path, training={"max_steps": 1})
    train(config)
    assert "base" not in json.loads((_newest(config).path / "state.json").read_text())


def test_the_rwkv_package_computes_the_merged_logits(tmp_path: Path) -> None:
    """In a process of its own, because the package reads its settings when it is imported. Heads of 64, as it wants."""
    pytest.importorskip("rwkv")
    sizes = {**MODEL, "n_embd": 128, "head_size_a": 64}
    save_pth(tmp_path / "released.pth", tiny_model("x070", vocab_size=257, n_embd=128, head_size_a=64).state_dict())
    training = {"init_from": str(tmp_path / "released.pth"), "lr_init": 1e-2}
    config = tiny_run_config(tmp_path, model=sizes, training=training, adapter={"kind": "lora", "rank": 4})
    train(config)
    assert main(["merge", config.work_dir, "--output", str(tmp_path / "merged.pth")]) == 0
    tokens = some_tokens(1, 20, 257)
    program = (
        "import sys, torch\nfrom rwkv.model import RWKV\n"
        f"model = RWKV(model={str(tmp_path / 'merged')!r}, strategy='cpu fp32')\n"
        f"logits, _ = model.forward({tokens[0].tolist()}, None, full_output=True)\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    flags = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **flags}, check=True, timeout=120)
    with torch.no_grad():
        assert relative_error(torch.load(tmp_path / "logits.pt"), _with_adapter(config)(tokens)[0]) < 2e-5


def test_config_files_take_an_adapter(tmp_path: Path) -> None:
    config = _config(tmp_path, adapter={"kind": "miss", "rank": 4})
    path = write_config(tmp_path / "run.yaml", config)
    assert main(["plan", str(path)]) == 0
    assert AdapterConfig(**config.adapter.model_dump()) == config.adapter
