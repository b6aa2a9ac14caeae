"""What the launcher's variables say of a process, and that nothing else is taken for a launcher."""

from __future__ import annotations

import os
import sys
import types

import pytest

from rwkv_cluster import cli
from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime import rank_env
from rwkv_cluster.train.parallel.cluster_environment import RankEnvironment
from rwkv_cluster.train.parallel.strategy import place, require_script

LAUNCHED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without a launcher's variables."""
    for name in (*LAUNCHED, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def launch(environment: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in (LAUNCHED | changes).items():
        if value is not None:
            environment.setenv(name, value)


def test_a_launched_process(environment: pytest.MonkeyPatch) -> None:
    launch(environment)
    assert (rank_env.launched(), rank_env.rank(), rank_env.local_rank(), rank_env.launched_world_size()) == (
        True,
        3,
        1,
        4,
    )
    assert rank_env.message_prefix() == "rank 3: "


def test_a_process_that_lightning_has_started_has_a_local_rank_only(environment: pytest.MonkeyPatch) -> None:
    launch(environment, RANK=None)
    assert (rank_env.launched(), rank_env.rank(), rank_env.message_prefix()) == (True, 1, "rank 1: ")


def test_a_plain_process(environment: pytest.MonkeyPatch) -> None:
    assert (rank_env.launched(), rank_env.rank(), rank_env.launched_world_size(), rank_env.message_prefix()) == (
        False,
        0,
        None,
        "",
    )


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "two", "-1", "1.0", "²", " 1"])
def test_a_variable_that_is_no_number_is_named(name: str, value: str, environment: pytest.MonkeyPatch) -> None:
    launch(environment, **{name: value})
    with pytest.raises(ConfigError, match=f"{name} is '{value}', .*>= 0"):
        place(TrainingConfig(precision="fp32", accelerator="cpu"))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"WORLD_SIZE": None}, "rank 3, .*WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "3"}, "rank 3, .*WORLD_SIZE is 3"),
        ({"RANK": None, "LOCAL_RANK": None}, "WORLD_SIZE is 4, .*RANK nor LOCAL_RANK"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
    ],
)
def test_variables_that_contradict_each_other(
    changes: dict[str, str | None], found: str, environment: pytest.MonkeyPatch
) -> None:
    launch(environment, **changes)
    with pytest.raises(ConfigError, match=found):
        place(TrainingConfig(precision="fp32", accelerator="cpu"))


def test_several_devices_where_no_script_can_be_run_again(environment: pytest.MonkeyPatch) -> None:
    """A notebook's main module has no file."""
    environment.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    with pytest.raises(ConfigError, match=r"training\.devices is 2, and a notebook"):
        require_script(TrainingConfig(precision="fp32", accelerator="cpu", devices=2))
    require_script(TrainingConfig(precision="fp32", accelerator="cpu"))
    launch(environment)
    require_script(TrainingConfig(precision="fp32", accelerator="cpu", devices=2))


def test_lightning_is_told_of_the_launcher_and_nothing_else(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SLURM_NTASKS", "8")
    alone = RankEnvironment(world_size=1, devices=1)
    assert alone.creates_processes_externally  # there are none to start, and no variables to set
    assert not RankEnvironment(world_size=2, devices=2).creates_processes_externally
    launch(environment)
    third = RankEnvironment(world_size=4, devices=2)
    assert third.creates_processes_externally
    assert (third.global_rank(), third.local_rank(), third.node_rank(), third.world_size()) == (3, 1, 1, 4)
    third.teardown()
    assert os.environ["WORLD_SIZE"] == "4"


def test_the_environment_is_left_as_it_was(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("KEPT", "before")
    with rank_env.unchanged_environment():
        os.environ.update(LAUNCHED | {"KEPT": "after"})
    assert not rank_env.launched()
    assert os.environ["KEPT"] == "before"


def test_ranks_that_rank_0_starts_know_its_start_by_the_same_name(environment: pytest.MonkeyPatch) -> None:
    with rank_env.unchanged_environment():
        rank_env.name_this_launch()
        name = rank_env.launch_id()
        launch(environment)  # as Lightning and DeepSpeed set them in rank 0 later on
        rank_env.name_this_launch()
        assert rank_env.launch_id() == name


def test_a_verb_that_is_no_work_of_ranks_is_done_by_rank_0_alone(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(environment)
    assert cli.main(["config", "quickstart"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("config is rank 0's alone")
    assert printed.err.count("\n") == 1
