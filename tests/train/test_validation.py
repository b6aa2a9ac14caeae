"""Validation during a run, and what follows from it: bits per byte, samples of the model, the early end."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import fingerprint, losses, tiny_run_config, write_config

from rwkv_cluster import cli
from rwkv_cluster.config import Config, TrainingConfig
from rwkv_cluster.data.binidx import open_tokens
from rwkv_cluster.errors import ConfigError, Preempted, TrainingError
from rwkv_cluster.report.run_files import events as read_events
from rwkv_cluster.tokenizer import ByteTokenizer, GenericTokenizer, IntegerTokenizer
from rwkv_cluster.tokenizer.token_bytes import token_bytes
from rwkv_cluster.train.checkpoint.save_load import list_steps
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.guards.early_stop import EarlyStopState
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir

PAIRS = "".join(f"{id_} {token!r} {len(token.encode())}\n" for id_, token in enumerate(["th", "e ", "ä"], start=300))
BYTES = "".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256))


def _records(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (WorkDir(config.work_dir).logs / "metrics.jsonl").read_text().splitlines()]


def test_bytes_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(BYTES + PAIRS)
    tokenizer = GenericTokenizer(tmp_path / "vocab.txt")
    sizes = token_bytes(tokenizer)
    assert sizes is not None
    text = "the ähm thing"
    ids = tokenizer.encode(text)
    assert {300, 301, 302} & set(ids)
    assert sizes[ids].sum() == len(text.encode())
    assert (sizes[0], sizes[299]) == (1, 0)  # a document's end; a number without a token
    byte_sizes = token_bytes(ByteTokenizer())
    assert byte_sizes is not None
    assert byte_sizes.tolist() == [1] * 257
    assert token_bytes(IntegerTokenizer()) is None


def test_bits_per_byte_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vocab.txt").write_text(BYTES + PAIRS)
    tokenizer = {"type": "generic", "vocab_file": str(tmp_path / "vocab.txt")}
    config = tiny_run_config(tmp_path, data={"tokenizer": tokenizer}, training={"max_steps": 2, "val_max_tokens": 100})
    train(config)
    record = _records(config)[-1]
    tokens = open_tokens(WorkDir(config.work_dir).data / "val")
    ids = tokens.read(0, 101).tolist()[1:]  # the targets
    text = GenericTokenizer(tmp_path / "vocab.txt").decodeBytes(ids)
    n_bytes = len(text) + ids.count(0)
    assert len(ids) == 100 < n_bytes + 20
    assert record["val_bits_per_byte"] == pytest.approx(record["val_loss"] * 100 / n_bytes / math.log(2), rel=1e-12)
    assert record["val_perplexity"] == math.exp(record["val_loss"])
    assert "val_perplexity" not in _records(config)[0]

    run_yaml = write_config(tmp_path / "run.yaml", config)
    assert cli.main(["eval", str(run_yaml), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n_tokens"] == tokens.n_tokens - 1
    whole = tokens.read(1, tokens.n_tokens)
    sizes = token_bytes(GenericTokenizer(tmp_path / "vocab.txt"))
    assert sizes is not None
    assert result["n_bytes"] == sizes[whole].sum()
    assert result["bits_per_byte"] == pytest.approx(
        result["loss"] * result["n_tokens"] / result["n_bytes"] / math.log(2)
    )
    (tmp_path / "vocab.txt").unlink()
    assert cli.main(["eval", str(run_yaml)]) == 0  # the work directory has a vocabulary of its own
    assert "bits per byte" in capsys.readouterr().out
    absent = "--data.tokenizer.type=absent:Absent"
    assert cli.main(["eval", str(run_yaml), absent]) == 0  # the loss needs no tokenizer
    found = capsys.readouterr()
    assert "bits per byte" not in found.out
    assert "no bits per byte: tokenizer type is 'absent:Absent'" in found.err


def test_bytes_are_their_own_bits_and_integers_have_none(tmp_path: Path) -> None:
    for name, data in (("bytes", {}), ("integers", {"tokenizer": {"type": "integer"}})):
        folder = tmp_path / name
        folder.mkdir()
        if data:
            np.save(folder / "numbers.npy", np.random.default_rng(0).integers(0, 360, (40, 60)))
            data |= {"inputs": [str(folder / "numbers.npy")]}
        config = tiny_run_config(folder, data=data, training={"max_steps": 1})
        train(config)
        (record,) = _records(config)
        if data:
            assert "val_bits_per_byte" not in record
        else:
            assert record["val_bits_per_byte"] == pytest.approx(record["val_loss"] / math.log(2), rel=1e-12)


@pytest.mark.system
def test_samples_disturb_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fingerprints, states = [], []
    for name, interval in (("without", None), ("with", 3)):
        (tmp_path / name).mkdir()
        records = {"sample_interval_steps": interval, "sample_tokens": 30, "sample_prompt": "the river"}
        config = tiny_run_config(tmp_path / name, logging=records)
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        train(config)
        fingerprints.append(fingerprint(config.work_dir))
        states.append(json.loads((tmp_path / name / "work/out/checkpoints/step-00000008/state.json").read_text()))
    assert fingerprints[0] == fingerprints[1]
    assert states[0]["random_states"] == states[1]["random_states"]
    work = WorkDir(config.work_dir)
    assert sorted(path.name for path in work.samples.iterdir()) == ["step-00000003.txt", "step-00000006.txt"]
    text = (work.samples / "step-00000006.txt").read_text()
    assert text.startswith("the river")
    assert len(text) > len("the river")
    assert "sample of step 6: the river" in caplog.text
    assert [event["step"] for event in read_events(work.events) if event["kind"] == "sample"] == [3, 6]
    assert not (tmp_path / "without/work/logs/samples").exists()


def test_patience_counts_evaluations_without_improvement() -> None:
    found, counts = EarlyStopState.at_start(), []
    for loss in (3.0, 2.0, 1.95, 2.5, 1.8, 1.9):
        found = found.after(loss, min_delta=0.1)
        counts.append((found.best, found.stale))
    assert counts == [(3.0, 0), (2.0, 0), (2.0, 1), (2.0, 2), (1.8, 0), (1.8, 1)]
    assert not found.ends(None)
    assert not found.ends(2)
    assert found.ends(1)


def _ending_early(folder: Path, patience: int | None = 2, **training: Any) -> Config:
    """No loss improves by 100 nats: the evaluation at step 2 is the best, and those at 4 and 6 end the run."""
    folder.mkdir(exist_ok=True)
    training = {"max_steps": 12, "val_interval_steps": 2, "early_stop_min_delta": 100.0} | training
    return tiny_run_config(folder, training={**training, "early_stop_patience": patience})


@pytest.mark.system
def test_an_early_end_is_an_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _ending_early(tmp_path)
    run_yaml = str(write_config(tmp_path / "run.yaml", config))
    assert cli.main(["train", run_yaml]) == 0
    assert re.search(r"done: step 6 of 12 \(early: .*validation loss.*\), ", capsys.readouterr().out)
    work = WorkDir(config.work_dir)
    assert work.final_weights.exists()
    assert list_steps(work.checkpoints)[-1] == 6
    kinds = [event["kind"] for event in read_events(work.events)]
    assert kinds[-4:] == ["early_stop", "export", "save", "end"]
    before = fingerprint(work.root)
    with caplog.at_level("INFO", "rwkv_cluster"):
        again = train(config)
    assert (again.already_complete, again.ended_early, again.step) == (True, True, 6)
    assert "raise training.early_stop_patience to go on" in caplog.text
    assert fingerprint(work.root) == before
    assert train(_ending_early(tmp_path, patience=3)).step == 8
    assert train(_ending_early(tmp_path, patience=None)).step == 12


@pytest.mark.system
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stop_does_not_forget_how_long_it_has_waited(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, stopped = _ending_early(tmp_path / "unbroken"), _ending_early(tmp_path / "stopped")
    train(unbroken)
    monkeypatch.setenv(FAULT_VARIABLE, f"train.step@{stop}:signal=SIGUSR1")
    with pytest.raises(Preempted):
        train(stopped)
    monkeypatch.delenv(FAULT_VARIABLE)
    assert train(stopped).step == 6
    assert len(losses(stopped.work_dir)) == 6
    assert fingerprint(stopped.work_dir) == fingerprint(unbroken.work_dir)


def _validations(config: Config) -> dict[int, float]:
    return {record["step"]: record["val_loss"] for record in _records(config) if "val_loss" in record}


@pytest.mark.parametrize(
    "stops", [*(pytest.param(each, marks=pytest.mark.system) for each in ([2], [4, 4], [6])), [2, 6]]
)
def test_a_validation_that_a_stop_cuts_short_comes_again(
    stops: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one that ends the run early, and one that is cut short twice; each counts once."""
    unbroken, stopped = _ending_early(tmp_path / "unbroken"), _ending_early(tmp_path / "stopped")
    train(unbroken)
    work = WorkDir(stopped.work_dir)
    for step in stops:
        monkeypatch.setenv(FAULT_VARIABLE, f"train.aside@{step}:signal=SIGUSR1")
        with pytest.raises(Preempted, match=f"stopped by SIGUSR1 after step {step} of 12"):
            train(stopped)
        assert max(list_steps(work.checkpoints)) == step
        assert step not in _validations(stopped)
    monkeypatch.delenv(FAULT_VARIABLE)
    assert train(stopped).step == 6
    assert _validations(stopped) == _validations(unbroken)
    assert fingerprint(stopped.work_dir) == fingerprint(unbroken.work_dir)
    log_lines = [(WorkDir(one.work_dir).out / "train_log.txt").read_text().count("\n0 ") for one in (stopped, unbroken)]
    assert log_lines[0] == log_lines[1]


@pytest.mark.system
@pytest.mark.parametrize("kind", ["validation", "sample"])
def test_what_follows_the_last_step_comes_again_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose steps are all done is not complete before its last validation, nor its last sample."""
    configs = []
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
        data = {} if kind == "validation" else {"validation_fraction": 0.0}
        samples = {"sample_interval_steps": 8, "sample_tokens": 4}
        configs.append(tiny_run_config(tmp_path / name, data=data, logging=samples if kind == "sample" else {}))
    unbroken, stopped = configs
    train(unbroken)
    monkeypatch.setenv(FAULT_VARIABLE, "train.aside@8:signal=SIGUSR1")
    with pytest.raises(Preempted, match="after step 8 of 8"):
        train(stopped)
    assert not WorkDir(stopped.work_dir).final_weights.exists()
    monkeypatch.delenv(FAULT_VARIABLE)
    result = train(stopped)
    assert (result.step, result.already_complete) == (8, False)
    assert _validations(stopped) == _validations(unbroken)
    assert fingerprint(stopped.work_dir) == fingerprint(unbroken.work_dir)
    samples = [{path.name: path.read_text() for path in WorkDir(one.work_dir).samples.glob("*")} for one in configs]
    assert samples[0] == samples[1]
    assert train(stopped).already_complete


@pytest.mark.system
def test_a_kill_after_a_validation_that_came_again_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint on the disk still says that it is to come, and the step has its line already."""
    unbroken, stopped = _ending_early(tmp_path / "unbroken"), _ending_early(tmp_path / "stopped")
    train(unbroken)
    for fault, error in (("train.aside@4:signal=SIGUSR1", Preempted), ("train.loss@5:hit", TrainingError)):
        monkeypatch.setenv(FAULT_VARIABLE, fault)
        with pytest.raises(error):
            train(stopped)
    monkeypatch.delenv(FAULT_VARIABLE)
    assert train(stopped).step == 6
    assert _validations(stopped) == _validations(unbroken)
    assert fingerprint(stopped.work_dir) == fingerprint(unbroken.work_dir)


def test_early_stopping_without_validation_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stop_patience is set, but .* has no validation data"):
        train(tiny_run_config(tmp_path, data={"validation_fraction": 0.0}, training={"early_stop_patience": 3}))
    assert not list_steps(WorkDir(tmp_path / "work").checkpoints)


def test_off_by_default() -> None:
    assert TrainingConfig().early_stop_patience is None
