"""What NCCL is told where the environment does not say it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.runtime import nccl_shared_memory
from rwkv_cluster.train.parallel import nccl_environment
from rwkv_cluster.train.parallel.nccl_environment import Version, missing_variables, version_of
from rwkv_cluster.train.parallel.strategy import trainer_arguments
from rwkv_cluster.train.placement import Placement

DUMPS = Path("/run/logs/hang")
FILE = "/run/logs/hang/nccl_trace_rank_"
NEW = {
    "TORCH_NCCL_HIGH_PRIORITY": "1",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_DUMP_TEMP_FILE": FILE,
}
OLD = {
    "TORCH_NCCL_HIGH_PRIORITY": "1",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": FILE,
}


@pytest.mark.parametrize(
    ("torch_version", "expected"),
    [
        ((2, 6, 0), OLD | {"TORCH_NCCL_USE_COMM_NONBLOCKING": "0"}),
        ((2, 7, 0), OLD | {"TORCH_NCCL_USE_COMM_NONBLOCKING": "0"}),
        ((2, 7, 1), OLD),
        ((2, 8, 0), NEW),
        ((2, 13, 0), NEW),
    ],
)
def test_each_torch_is_told_in_its_own_words(torch_version: Version, expected: dict[str, str]) -> None:
    assert missing_variables({"PATH": "/bin"}, DUMPS, torch_version) == expected


@pytest.mark.parametrize("torch_version", [(2, 7, 1), (2, 13, 0)])
@pytest.mark.parametrize("value", ["", "0", "1"])
@pytest.mark.parametrize("name", sorted({*NEW, *OLD}))
def test_what_the_user_has_set_is_not_set_by_any_name(name: str, value: str, torch_version: Version) -> None:
    found = missing_variables({name: value}, DUMPS, torch_version)
    others = (OLD if torch_version < (2, 8, 0) else NEW).keys() - {name}
    twins = (
        {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"},
        {
            "TORCH_FR_DUMP_TEMP_FILE",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
        },
    )
    for pair in twins:
        others -= pair if name in pair else set()
    if value == "0" and name in twins[0]:  # nothing is recorded, and so nothing to write
        others = {"TORCH_NCCL_HIGH_PRIORITY"}
    assert found.keys() == others


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.7.1+cu126", (2, 7, 1)), ("2.13.0", (2, 13, 0)), ("2.6.0a0+git1", (2, 6, 0)), ("2.9.1.post1", (2, 9, 1))],
)
def test_the_number_of_a_version(text: str, version: Version) -> None:
    assert version_of(text) == version


@pytest.mark.parametrize(
    ("placement", "rank", "is_set", "says"),
    [
        (Placement("cuda", 2, 2, 1), 0, True, True),
        (Placement("cuda", 2, 1, 2), 1, True, False),
        (Placement("cuda", 1, 1, 1), 0, False, False),
        (Placement("cpu", 2, 2, 1), 0, False, False),
    ],
    ids=["two GPUs", "one GPU of each of two machines", "one GPU", "CPUs"],
)
def test_only_several_gpus_need_it(
    placement: Placement,
    rank: int,
    is_set: bool,
    says: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": str(rank), "WORLD_SIZE": "2", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"})
    monkeypatch.setattr(nccl_shared_memory, "WANTED_BYTES", 0)
    with caplog.at_level(logging.INFO, logger="rwkv_cluster"):
        trainer_arguments(TrainingConfig(strategy="ddp"), placement, "group", tmp_path / "hang")
    assert ("TORCH_NCCL_HIGH_PRIORITY" in os.environ) == is_set
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert (tmp_path / "hang").is_dir() == is_set
    assert ("NCCL is used with TORCH_NCCL_HIGH_PRIORITY=1, " in caplog.text) == says
    assert nccl_environment.DUMP_PREFIX in os.environ.get("TORCH_FR_DUMP_TEMP_FILE", "") or not is_set
