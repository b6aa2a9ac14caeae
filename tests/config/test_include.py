"""`include`: what is merged, who wins, where each value is said to come from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_cluster.cli import main
from rwkv_cluster.config.loader import dump_yaml, load_config, parse_config, resolve_config
from rwkv_cluster.config.recipes import find_config
from rwkv_cluster.errors import ConfigError


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bases").mkdir()
    Path("bases/small.yaml").write_text(
        "model: {n_layer: 2, n_embd: 64}\ndata: {inputs: [a, b]}\nlaunch:\n  env: {A: '1', B: '2'}\n"
    )
    Path("bases/fast.yaml").write_text("\n\nmodel:\n  n_layer: 7\ntraining: {max_steps: 5}\n")


def written(text: str, name: str = "run.yaml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def test_own_fields_win_over_the_later_file_and_that_over_the_earlier() -> None:
    own = "include: [bases/small.yaml, bases/fast.yaml]\ndata:\n  inputs: [c]\nlaunch: {env: {B: '3'}}\ntraining:\n"
    found = resolve_config(written(own), ["model.ctx_len=32"])
    config, sources = found.config, found.sources
    assert (config.model.n_layer, config.model.n_embd, config.model.ctx_len) == (7, 64, 32)
    assert config.training.max_steps == 5  # the section of which every line is commented out changes nothing
    assert (config.data.inputs, config.launch.env) == (["c"], {"A": "1", "B": "3"})
    assert sources["model.n_embd"] == "bases/small.yaml:1"
    assert sources["model.n_layer"] == "bases/fast.yaml:4"
    assert sources["data.inputs"] == "run.yaml:3"
    assert sources["model.ctx_len"] == "--model.ctx_len=32"
    assert parse_config(dump_yaml(config, sources).encode(), "kept").config == config


def test_a_file_is_found_beside_the_one_that_names_it_and_else_among_the_recipes(tmp_path: Path) -> None:
    written("include: small.yaml\n", "bases/run.yaml")
    assert load_config("bases/run.yaml").model.n_embd == 64
    assert load_config(tmp_path / "bases/run.yaml").model.n_embd == 64
    assert resolve_config(written("include: sizes/0.4b.yaml\n")).sources["model.n_embd"].startswith("sizes/0.4b.yaml:")
    Path("sizes").mkdir()
    written("model: {n_embd: 128}\n", "sizes/0.4b.yaml")
    assert load_config("run.yaml").model.n_embd == 128
    assert (
        find_config("lora/0.4b-24gb.yaml").resolved.config.model.n_embd == 1024
    )  # a recipe takes those of the package


def test_config_shows_the_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(written("include: bases/fast.yaml\n"))]) == 0
    assert any("n_layer: 7" in line and "bases/fast.yaml:4" in line for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("include: bases/none.yaml", "run.yaml:1: include names bases/none.yaml, which is neither a file nor a recipe"),
        ("include: sizes/3b.yaml", "run.yaml:1: include names sizes/3b.yaml, which is neither a file nor a recipe"),
        ("include: 5", "run.yaml:1: include is no path of a file"),
        ("include: [bases/fast.yaml, 5]", "run.yaml:1: include is no path of a file"),
        ("include:", "run.yaml:1: include is no path of a file"),
        ("include: bases", "bases: this is a folder"),
        ("include: bases/list.yaml", "bases/list.yaml:1: expected `name: value` lines"),
        ("include: bases/deep.yaml", "bases/deep.yaml:2: an included file includes another"),
        ("include: bases/wrong.yaml", "bases/wrong.yaml:2: model.n_layer is 'six', expected an integer"),
        ("include: bases/unknown.yaml", "bases/unknown.yaml:1: the configuration has no field 'modell'"),
    ],
)
def test_what_is_refused(text: str, sentence: str) -> None:
    written("- 1\n", "bases/list.yaml")
    written("work_dir: w\ninclude: fast.yaml\n", "bases/deep.yaml")
    written("model:\n  n_layer: six\n", "bases/wrong.yaml")
    written("modell: {}\n", "bases/unknown.yaml")
    with pytest.raises(ConfigError) as error:
        load_config(written(text))
    assert str(error.value).startswith(sentence)


def test_an_empty_file_is_no_base_and_no_fault() -> None:
    written("# nothing yet\n---\n", "bases/empty.yaml")
    assert load_config(written("include: bases/empty.yaml\nwork_dir: w\n")).work_dir == "w"


def test_the_file_of_a_work_directory_includes_nothing() -> None:
    """It would bring in what the check of foreign files does not see."""
    Path("work/configs").mkdir(parents=True)
    written("include: bases/small.yaml\n", "work/configs/config.yaml")
    with pytest.raises(ConfigError) as error:
        find_config("work")
    assert str(error.value).startswith("work/configs/config.yaml:1: include is for a file that you name")
