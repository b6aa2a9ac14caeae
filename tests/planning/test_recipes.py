"""Every recipe can be read and planned, fits its card, and says of itself what `plan` says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rwkv_cluster.config import Config
from rwkv_cluster.config.recipes import find_config
from rwkv_cluster.config.shipped import PARTS, shipped_file, shipped_recipes
from rwkv_cluster.planning import run_plan
from rwkv_cluster.planning.fit import fit
from rwkv_cluster.planning.options import Assumptions
from rwkv_cluster.planning.run_plan import RunPlan, plan_run
from rwkv_cluster.planning.step_time import step_time
from rwkv_cluster.planning.transfers import transfer_seconds
from rwkv_cluster.runtime.gpu_specs import GPUS
from rwkv_cluster.train.memory.peak import needed

CARDS = {"24gb": 24, "80gb": 80, "8x80gb": 80, "4x8x80gb": 80}
RANKS = {"24gb": 1, "80gb": 1, "8x80gb": 8, "4x8x80gb": 32}
SIZED = [name for name in shipped_recipes() if re.search(r"b-[\dx]*gb\.yaml$", name)]
CLAIM = re.compile(
    r"# By `plan --fit --gpu (\S+)`: ([\d.]+) GB of a card(?:, (\d+) GB of the host)?, ([\d,]+) tokens/s"
)


@pytest.fixture(autouse=True)
def _vocabularies_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The World vocabulary takes a second to read, and a plan wants its number of rows alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_plan, "_vocabulary", lambda config, manifest: min(config.model.vocab_size or 257, 65536))


def config_of(recipe: str) -> Config:
    return find_config(recipe).resolved.config


def planned(recipe: str) -> tuple[RunPlan, str]:
    """The plan on the card that the recipe names, and that card."""
    claim = CLAIM.search(shipped_file(recipe).decode())
    assert claim is not None, recipe
    config = config_of(recipe)
    return plan_run(config, Assumptions.of(config, gpu=claim[1])), claim[1]


@pytest.mark.parametrize("recipe", SIZED)
def test_a_recipe_fits_its_card_and_says_what_it_needs(recipe: str) -> None:
    machine = recipe.rpartition("-")[2].removesuffix(".yaml")
    plan, name = planned(recipe)
    gpu, configured = GPUS[name], plan.configured
    assert gpu.memory_gb == CARDS[machine]
    assert plan.assumptions.ranks == RANKS[machine]
    assert configured.fits
    claim = CLAIM.search(shipped_file(recipe).decode())
    nodes = plan.config.launch.num_nodes
    speed = plan.length.tokens_per_step / (step_time(plan, gpu).total + transfer_seconds(plan, gpu, nodes))
    host = configured.memory.host * plan.assumptions.ranks / nodes
    shown_host = f", {host / 1e9:.0f} GB of the host" if host else ""
    said = f"# By `plan --fit --gpu {name}`: {needed(configured.memory) / 1e9:.1f} GB of a card{shown_host}, "
    assert claim is not None
    assert claim[0] == f"{said}{speed:,.0f} tokens/s"


@pytest.mark.parametrize("recipe", [name for name in shipped_recipes() if name not in SIZED])
def test_a_recipe_without_a_card_and_what_recipes_include_can_be_planned(recipe: str) -> None:
    config = config_of(recipe)
    assert plan_run(config, Assumptions.of(config)).rows


def test_a_recipe_names_itself_its_command_and_its_own_work_directory() -> None:
    runs = [name for name in shipped_recipes() if name.partition("/")[0] not in PARTS]
    folders = [config_of(name).work_dir for name in runs]
    assert len(set(folders)) == len(runs)
    for name in runs:
        text = shipped_file(name).decode()
        assert text.startswith("# "), name
        assert name == "quickstart.yaml" or f" {name}" in text.partition("work_dir")[0], name
    assert len(runs) > 40


def test_sizes_are_the_released_ones() -> None:
    """Parameters of the published files, in millions."""
    millions = {"0.1b": 191, "0.4b": 450, "1.5b": 1527, "2.9b": 2948, "7.2b": 7199, "13.3b": 13269}
    for size, number in millions.items():
        config = config_of(f"sizes/{size}.yaml")
        plan = plan_run(config, Assumptions.of(config))
        assert round(sum(plan.parts.values()) / 1e6) == pytest.approx(number, abs=1)


@pytest.mark.system
@pytest.mark.parametrize("recipe", SIZED)
def test_nothing_that_fits_is_faster(recipe: str) -> None:
    found = fit(config_of(recipe), planned(recipe)[1])
    assert found.changes == {}
