"""Runs that train a state alone: what is saved, what stays as it was, and where generations begin."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VERSIONS, relative_error, some_tokens, tiny_model
from tiny_run import break_off, fingerprint, losses, tiny_run_config, write_config

from rwkv_cluster.adapters.base import fingerprint as base_fingerprint
from rwkv_cluster.adapters.table import adapter_shapes, rate_warning
from rwkv_cluster.cli import main
from rwkv_cluster.config import AdapterConfig, Config, TrainingConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.interchange.state_file import load_state
from rwkv_cluster.model.own_state import add_own_state, file_shapes, own_state
from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.train.checkpoint.save_load import newest_verified
from rwkv_cluster.train.checkpoint.weights import load_model
from rwkv_cluster.train.evaluate import evaluate_run
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir


def _config(folder: Path, model_type: str = "x070", **sections: Any) -> Config:
    """A run of eight steps over packed documents from a model that exists."""
    folder.mkdir(exist_ok=True)
    path = folder / "released.pth"
    save_pth(path, tiny_model(model_type, vocab_size=257).state_dict(), torch.bfloat16)
    training = {"init_from": str(path), "precision": "bf16", "lr_init": 5e-3, "lr_final": 1e-3}
    sections["training"] = {**training, **sections.get("training", {})}
    data, adapter = {"documents": "reset"}, {"kind": "state", **sections.pop("adapter", {})}
    return tiny_run_config(folder, model={"model_type": model_type}, data=data, adapter=adapter, **sections)


@pytest.mark.parametrize("with_shifts", [False, True])
@pytest.mark.parametrize("model_type", VERSIONS)
def test_names_and_shapes_are_those_that_the_table_says(model_type: str, with_shifts: bool) -> None:
    model = tiny_model(model_type)
    base = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    trained, kept = adapter_shapes(AdapterConfig(kind="state", token_shifts=with_shifts), base)
    add_own_state(model, with_shifts=with_shifts)
    whole = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert (whole, kept) == ({**base, **trained}, {})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "state", "rank": 8}, "rank is set, but a state has no matrices"),
        ({"kind": "state", "targets": ["*.att.key"]}, "targets is set, but a state has no matrices"),
        ({"kind": "lora", "token_shifts": True}, "token_shifts is set, and kind is lora"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        AdapterConfig(**fields)


def test_a_rate_for_states_of_the_version_before_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state, rate = AdapterConfig(kind="state"), TrainingConfig(lr_init=1.0)
    assert "is high for a state of RWKV-7" in str(rate_warning(state, rate, "x070"))
    assert rate_warning(state, rate, "x060") is None
    assert rate_warning(state, TrainingConfig(lr_init=1e-3), "x070") is None
    assert rate_warning(AdapterConfig(), rate, "x070") is None
    path = str(write_config(tmp_path / "run.yaml", _config(tmp_path / "run", training={"lr_init": 1.0})))
    assert main(["plan", path]) == 0
    assert "is high for a state of RWKV-7" in capsys.readouterr().out


@pytest.mark.system
@pytest.mark.parametrize("model_type", VERSIONS)
def test_a_run_trains_and_saves_the_state_alone(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(tmp_path, model_type, adapter={"token_shifts": True})
    with caplog.at_level(logging.WARNING, "rwkv_cluster"):
        train(config)
    assert "is high for a state" not in caplog.text
    work = WorkDir(config.work_dir)
    base, final = load_pth(work.initial_weights), load_pth(work.final_weights)
    checkpoint = newest_verified(work.checkpoints)
    assert checkpoint is not None
    parts = dict(checkpoint.weights())
    assert all(".own_state." in name and tensor.dtype == torch.float32 for name, tensor in parts.items())
    assert {name.partition("/")[2] for name in checkpoint.optimizer()} == parts.keys()
    assert checkpoint.state.base == base_fingerprint(base) == base_fingerprint(load_pth(tmp_path / "released.pth"))
    shapes = {name: tuple(tensor.shape) for name, tensor in final.items()}
    assert shapes == file_shapes(tiny_model(model_type, vocab_size=257), with_shifts=True)
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in final.values())

    model, tokens = load_model(work.root), some_tokens(1, 20, 257)
    assert all(torch.equal(own_state(model)[name], tensor) for name, tensor in final.items())
    other = load_model(tmp_path / "released.pth")
    plain = other(tokens)
    load_state(other, work.final_weights)
    assert relative_error(other(tokens), model(tokens)) < 1e-6
    assert relative_error(plain, model(tokens)) > 1e-4
    by_run, by_file = evaluate_run(config), evaluate_run(config, tmp_path / "released.pth", work.final_weights)
    assert by_run == by_file
    assert by_run.loss < evaluate_run(config, tmp_path / "released.pth").loss


@pytest.mark.system
@pytest.mark.parametrize("documents", ["reset", "continue"])
def test_a_resume_is_equal_in_every_bit(documents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, config = (_config(tmp_path / name, training={"grad_cp": 1}) for name in ("whole", "broken"))
    whole, config = (
        each.model_copy(update={"data": each.data.__replace__(documents=documents)}) for each in (whole, config)
    )
    train(whole)
    break_off(config, step=6, monkeypatch=monkeypatch)
    train(config)
    assert fingerprint(config.work_dir) == fingerprint(whole.work_dir)
    assert len(losses(config.work_dir)) == 8


@pytest.mark.system
def test_what_a_state_is_no_part_of_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path, training={"max_steps": 2})
    train(config)
    capsys.readouterr()
    for options in (["--format", "pth"], ["--format", "fla", "--merged"], ["--format", "peft"]):
        assert main(["export", config.work_dir, *options]) == 2
        assert f"The state is {config.work_dir}/out/rwkv-final.pth" in capsys.readouterr().err
    assert main(["consolidate", config.work_dir]) == 0
    both = load_pth(Path(capsys.readouterr().out.strip()))
    assert (
        both.keys()
        == load_pth(tmp_path / "released.pth").keys() | load_pth(WorkDir(config.work_dir).final_weights).keys()
    )
    assert main(["generate", config.work_dir, "--prompt", "the", "--tokens", "3"]) == 0
