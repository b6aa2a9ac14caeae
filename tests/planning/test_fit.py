"""`plan --fit`: the fastest setting that fits, which its options give; the batch stays; transfers are counted."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run_config, write_config

from rwkv_cluster import cli
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.model.parameter_shapes import count
from rwkv_cluster.planning import fit as fitting
from rwkv_cluster.planning.fit import Fit, fit
from rwkv_cluster.planning.run_plan import RunPlan
from rwkv_cluster.planning.transfers import HOST_MEMORY_GB_PER_S, LINK_SHARE, NODE_GB_PER_S, transfer_seconds
from rwkv_cluster.runtime.gpu_specs import GPUS, find_gpu
from rwkv_cluster.train.memory.model_states import Sharding
from rwkv_cluster.train.memory.peak import needed

Capture = pytest.CaptureFixture[str]
MODEL = {"model_type": "x070", "n_layer": 24, "n_embd": 2048, "head_size_a": 64, "vocab_size": 65536, "ctx_len": 4096}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    training = {"precision": "bf16", "micro_bsz": 16, "max_steps": 10, "grad_cp": "auto"}
    return write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, model=MODEL, training=training))


def printed(path: Path, *options: str, capsys: Capture) -> dict[str, Any]:
    assert cli.main(["plan", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "options",
    [
        ("--gpu", "h100"),
        ("--gpu", "rtx4090"),
        ("--gpu", "RTX-4090", "--gpus", "8"),
        ("--gpu", "a100-80gb", "--gpus", "4", "--nodes", "2", "--launch.target=sbatch"),
        ("--gpu", "h100", "--training.strategy=deepspeed_stage_2_offload"),
    ],
)
def test_the_options_that_are_printed_give_the_setting(options: tuple[str, ...], path: Path, capsys: Capture) -> None:
    asked = printed(path, *options, capsys=capsys)["global_batch_size"]
    assert cli.main(["plan", str(path), "--fit", *options]) == 0
    text = capsys.readouterr().out
    overrides = text.splitlines()[-1].split()
    (path.parent / "lines.yaml").write_text(text.partition("as options:\n")[2].rpartition("\n\n")[0])
    found = printed(path, "--fit", *options, capsys=capsys)
    first = found["settings"][0]
    target = [option for option in options if option.startswith("--launch")]
    taken = printed(path, "--gpu", options[1], *target, *overrides, capsys=capsys)
    (row,) = [row for row in taken["memory"] if row["configured"]]
    assert row["fits"]
    assert taken["global_batch_size"] == found["global_batch_size"] == asked
    same = ("zero_stage", "offload_optimizer", "offload_parameters", "micro_bsz", "grad_cp", "needed")
    assert [row[name] for name in same] == [first[name] for name in same]
    lines = load_config(path.parent / "lines.yaml", [option.removeprefix("--") for option in target])
    assert (lines.training.micro_bsz, lines.training.global_batch_size) == (first["micro_bsz"], asked)


def test_the_winner_is_as_fast_as_any_and_the_others_follow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = []
    original = fitting._candidate
    monkeypatch.setattr(fitting, "_candidate", lambda *args: every.append(original(*args)) or every[-1])
    found = fit(load_config(path), "rtx-4090")
    assert len(every) > len(found.candidates) > 3
    assert found.winner.seconds <= fitting.AS_FAST * min(candidate.seconds for candidate in every)
    assert all(needed(candidate.memory) <= 24e9 for candidate in found.candidates)
    assert all(first.seconds <= second.seconds for first, second in pairwise(found.candidates[1:]))
    groups = [(candidate.setting.sharding, candidate.setting.grad_cp) for candidate in found.candidates]
    assert len(groups) == len(set(groups))


def test_a_larger_gpu_is_never_slower_and_more_of_them_faster(path: Path) -> None:
    config = load_config(path)
    small, large = fit(config, "a100-40gb"), fit(config, "a100-80gb")
    assert large.winner.seconds <= small.winner.seconds
    eight = fit(load_config(path, ["training.devices=8", "training.global_batch_size=16"]), "a100-80gb")
    assert eight.winner.seconds < large.winner.seconds / 4


def test_a_global_batch_that_the_ranks_cannot_share_is_said(path: Path, capsys: Capture) -> None:
    options = ["--gpu", "h100", "--gpus", "3", "--training.global_batch_size=16"]
    found = printed(path, "--fit", *options, capsys=capsys)
    assert (found["asked_batch_size"], found["global_batch_size"]) == (16, 15)
    assert cli.main(["plan", str(path), "--fit", *options]) == 0
    assert "16 samples cannot be shared by 3 ranks: 15" in capsys.readouterr().out


def test_the_fastest_setting_needs_no_change(path: Path, capsys: Capture) -> None:
    assert cli.main(["plan", str(path), "--fit", "--gpu", "h100"]) == 0
    overrides = capsys.readouterr().out.splitlines()[-1].split()
    assert cli.main(["plan", str(path), "--fit", "--gpu", "h100", *overrides]) == 0
    assert "has the fastest setting already" in capsys.readouterr().out


def test_names_of_gpus_need_no_dashes() -> None:
    assert find_gpu("RTX4090") == find_gpu("rtx-4090") == GPUS["rtx-4090"]


@pytest.fixture
def planned(path: Path) -> Fit:
    return fit(load_config(path, ["training.devices=4", "training.micro_bsz=4"]), "h100")


def _with(planned: Fit, sharding: Sharding, micro_bsz: int = 4, grad_cp: bool = False) -> RunPlan:
    setting = replace(planned.winner.setting, sharding=sharding, micro_bsz=micro_bsz, grad_cp=grad_cp)
    return fitting._with_setting(planned.plan, setting, planned.winner.memory)


@pytest.mark.parametrize(
    ("sharding", "micro_bsz", "grad_cp", "of_trained", "of_all"),
    [
        (Sharding(4), 4, False, 8, 0),
        (Sharding(4), 1, True, 8, 0),
        (Sharding(4, 1), 1, False, 4, 0),
        (Sharding(4, 2), 4, False, 4, 0),
        (Sharding(4, 2), 1, False, 10, 0),
        (Sharding(4, 3), 4, False, 2, 4),
        (Sharding(4, 3), 1, True, 8, 24),
    ],
)
def test_transfers_between_ranks(
    sharding: Sharding, micro_bsz: int, grad_cp: bool, of_trained: int, of_all: int, planned: Fit
) -> None:
    """Bytes for each parameter that is trained, and for each in memory; three quarters leave a rank of four."""
    gpu, plan = GPUS["h100"], _with(planned, sharding, micro_bsz, grad_cp)
    sent = 3 / 4 * (of_trained * count(plan.parameters.trained) + of_all * count(plan.parameters.in_memory))
    assert transfer_seconds(plan, gpu, 1) == pytest.approx(sent / (450e9 * LINK_SHARE))
    assert transfer_seconds(plan, gpu, 2) == pytest.approx(sent / (NODE_GB_PER_S * 1e9 * LINK_SHARE))


def test_transfers_to_the_host(planned: Fit) -> None:
    gpu, P = GPUS["h100"], count(planned.plan.parameters.trained)
    without = transfer_seconds(_with(planned, Sharding(4, 1)), gpu, 1)
    offloaded = transfer_seconds(_with(planned, Sharding(4, 1, True)), gpu, 1)
    update = 36 * P / 4 / (HOST_MEMORY_GB_PER_S * 1e9)
    assert offloaded - without == pytest.approx(2 * 2 * P / 4 / (64e9 * LINK_SHARE) + update)


def test_a_rank_alone_sends_nothing(path: Path) -> None:
    alone = fit(load_config(path), "h100")
    assert transfer_seconds(alone.plan, GPUS["h100"], 1) == 0
