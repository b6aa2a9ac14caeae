"""Verbs and methods of the Python face on several ranks, started apart in either order: each ends, and they agree."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from system.processes import Job, Watched, by_hand, free_port, wait_until
from tiny_run import tiny_run_config, write_config

pytestmark = pytest.mark.system

SCRIPT = """
import os
import numpy as np
from rwkv_cluster import ModelConfig, RWKVTrainingPipeline, TrainingConfig

def say(*words):
    print("said by", os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")), *words, flush=True)

def training(max_steps):
    return TrainingConfig(precision="fp32", max_steps=max_steps, micro_bsz=2, devices={devices}, zero_stage={stage})

model = ModelConfig(model_type="x070", n_layer=1, n_embd=64, ctx_len=16)
data = np.random.default_rng(0).integers(0, 360, (60, 64))
pipeline = RWKVTrainingPipeline("work", model, training(2))
say("prepared", pipeline.prepare_data(data)["total_tokens"])
say("prepared again", pipeline.prepare_data(data)["total_tokens"])
say("initialized", pipeline.initialize_model().name)
say("trained to", pipeline.train(data).step)
pipeline.training_config = training(4)
say("trained on to", pipeline.train().step)
say("complete:", pipeline.train().already_complete)
other = RWKVTrainingPipeline("other", model, training(3))
other.prepare_data(data)
say("from weights to", other.train_from_checkpoint("work/out/rwkv-final.pth").step)
"""
SAID = [
    "complete: True",
    "from weights to 3",
    "initialized rwkv-init.pth",
    "prepared 11700",
    "prepared again 11700",
    "trained on to 4",
    "trained to 2",
]


@pytest.mark.parametrize(
    ("launched", "ranks", "stage"),
    [
        (True, 2, 2),
        (False, 2, None),
        pytest.param(True, 2, None, marks=pytest.mark.slow),
        pytest.param(True, 3, None, marks=pytest.mark.slow),
        pytest.param(False, 1, 2, marks=pytest.mark.slow),
        pytest.param(False, 3, None, marks=pytest.mark.slow),
    ],
)
def test_every_method_of_the_python_face(
    launched: bool, ranks: int, stage: int | None, tmp_path: Path, start: Callable[..., Job]
) -> None:
    """Some twice in one process. Without a launcher rank 0 starts the others when it trains."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(devices=1 if launched else ranks, stage=stage))
    job = start(tmp_path, script=script, ranks=ranks if launched else None)
    job.complete()
    for rank in range(ranks):
        assert sorted(re.findall(rf"^said by {rank} (.*)$", job.text, re.MULTILINE)) == SAID, job.text


def _run(folder: Path, **training: object) -> Watched:
    write_config(folder / "run.yaml", tiny_run_config(folder, training={"max_steps": 2, "micro_bsz": 2, **training}))
    return Watched(folder)


@pytest.mark.parametrize("verb", [pytest.param("prepare", marks=pytest.mark.slow), "train"])
def test_ranks_that_start_after_rank_0_has_ended(verb: str, tmp_path: Path, start: Callable[..., Job]) -> None:
    """Rank 0 has nothing left to say, and what it has made is enough: prepared data, or a run that is complete."""
    run = _run(tmp_path)
    if verb == "train":
        start(tmp_path, ranks=3).complete()
    port = free_port()
    for rank in range(3):
        job = start(tmp_path, verb=verb, environment=by_hand(rank, port, 3))
        job.complete()
        assert ("tokens in" in job.text) == (rank == 0 and verb == "prepare"), job.text
    assert run.newest_checkpoint() == (2 if verb == "train" else 0)


@pytest.mark.parametrize("verb", [pytest.param("prepare", marks=pytest.mark.slow), "train"])
def test_ranks_that_start_before_rank_0(verb: str, tmp_path: Path, start: Callable[..., Job]) -> None:
    """They wait for it where nothing is prepared, and train waits for it in any case."""
    run = _run(tmp_path)
    port = free_port()
    others = [start(tmp_path, verb=verb, environment=by_hand(rank, port, 3)) for rank in (1, 2)]
    for job in others:
        wait_until(lambda job=job: "waits for the preparation" in job.text, what="a wait")
    start(tmp_path, verb=verb, environment=by_hand(0, port, 3)).complete()
    for job in others:
        job.complete()
    assert run.newest_checkpoint() == (2 if verb == "train" else 0)


def test_inputs_that_only_rank_0_can_read(tmp_path: Path, start: Callable[..., Job]) -> None:
    """Its word is enough then, as long as it lives."""
    run = _run(tmp_path)
    port = free_port()
    other = start(tmp_path, verb="prepare", environment=by_hand(1, port), arguments=["--data.inputs=[absent.jsonl]"])
    wait_until(lambda: "waits for the preparation" in other.text, what="a wait")
    start(tmp_path, verb="prepare", environment=by_hand(0, port)).complete()
    other.complete()
    assert (run.work.data / "manifest.json").exists()


def test_a_verb_of_rank_0_alone(tmp_path: Path, start: Callable[..., Job]) -> None:
    _run(tmp_path)
    start(tmp_path).complete()
    job = start(tmp_path, verb="eval", ranks=2)
    job.complete()
    assert job.text.count("validation loss") == 1
    assert job.text.count("eval is rank 0's alone") == 1


def test_an_allocation_does_not_change_a_plain_command(tmp_path: Path, start: Callable[..., Job]) -> None:
    """Two devices: Lightning starts the other rank itself, whatever the batch system's variables say."""
    variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}
    variables |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "n[1-2]", "SLURM_JOB_NAME": "run"}
    variables |= {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    run = _run(tmp_path, devices=2)
    start(tmp_path, environment=variables).complete()
    assert run.newest_checkpoint() == 2
