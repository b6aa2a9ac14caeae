"""A run that begins with weights takes its sizes from them, or from its checkpoint, and no others."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from layout_files import RANKS, in_layout, write_folder
from system.processes import Job
from tiny_models import tiny_model
from tiny_run import fingerprint, losses, tiny_run_config, write_config

from rwkv_cluster import RWKVTrainingPipeline
from rwkv_cluster.cli import main
from rwkv_cluster.config import Config, ModelConfig
from rwkv_cluster.config.loader import dump_yaml, load_config, parse_config
from rwkv_cluster.errors import CheckpointError, MissingCheckpointError
from rwkv_cluster.interchange.layouts import LAYOUTS
from rwkv_cluster.interchange.read import read_weights
from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.train.checkpoint.initial_weights import with_sizes_of_weights
from rwkv_cluster.train.run import train

SIZES = {"model_type": "x070", "n_layer": 2, "n_embd": 128, "head_size_a": 32, "dim_ffn": 512, **RANKS}


def config_of(folder: Path, init_from: str = "m", **model: object) -> Config:
    """A configuration that says of the model what `model` says, and the weights from which it begins."""
    given = tiny_run_config(folder).model_dump(exclude={"model"})
    given["training"] |= {"init_from": str(folder / init_from), "max_steps": 4}
    return Config(**{**given, "model": {"ctx_len": 32, **model}})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of RWKV-7 with 257 rows in flash-linear-attention's layout, in the folder m."""
    model = tiny_model("x070", n_embd=128, head_size_a=32, vocab_size=257, block0_value_residual=False, **RANKS)
    return write_folder(tmp_path / "m", in_layout(model.state_dict(), "fla"))


def test_every_size_is_the_weights(weights: Path, tmp_path: Path) -> None:
    model = with_sizes_of_weights(config_of(tmp_path), 257).model
    assert {name: getattr(model, name) for name in SIZES} == SIZES
    assert (model.ctx_len, model.vocab_size, model.block0_value_residual) == (32, 257, False)
    assert with_sizes_of_weights(config_of(tmp_path, n_layer=2, dim_att=None), 257).model == model
    assert with_sizes_of_weights(config_of(tmp_path), 300).model.vocab_size is None


def test_a_size_that_is_given_and_differs(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(a_lora_rank 16, this run has 32\)\. Leave model.a_lora_rank out"):
        with_sizes_of_weights(config_of(tmp_path, n_layer=2, a_lora_rank=32))


def test_weights_that_are_not_on_this_machine(tmp_path: Path) -> None:
    given = config_of(tmp_path, n_layer=2, n_embd=128)
    assert with_sizes_of_weights(given) is given
    with pytest.raises(MissingCheckpointError, match="no such weights file"):
        with_sizes_of_weights(config_of(tmp_path, n_layer=2))


def test_without_weights_nothing_is_changed(tmp_path: Path) -> None:
    config = tiny_run_config(tmp_path)
    assert with_sizes_of_weights(config) is config


def test_a_file_that_is_written_leaves_open_what_the_weights_say(weights: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, n_layer=2)
    again = parse_config(dump_yaml(config).encode(), "x").config
    assert again == config
    assert "n_embd" not in dump_yaml(config)
    assert with_sizes_of_weights(again) == with_sizes_of_weights(config)
    sized = with_sizes_of_weights(config)
    assert parse_config(dump_yaml(sized).encode(), "x").config.model == sized.model
    assert "decay_lora_rank: 8" in dump_yaml(sized)


def test_replacing_a_field_sets_no_other(tmp_path: Path) -> None:
    assert ModelConfig(n_layer=2).__replace__(ctx_len=8).model_fields_set == {"n_layer", "ctx_len"}


def test_config_and_plan_say_the_real_sizes(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    path = str(write_config(tmp_path / "run.yaml", config_of(tmp_path)))
    assert re.search(rf"decay_lora_rank: 8 +# {weights}\n", said("config", path))
    n_parameters = sum(tensor.numel() for tensor in read_weights(weights).values())
    assert json.loads(said("plan", path, "--json"))["parameters"]["total"] == n_parameters
    weights.rename(tmp_path / "elsewhere")
    assert "decay_lora_rank" not in said("config", path)


@pytest.mark.system
def test_training_on_from_any_layout_is_training_on_from_the_native_file(tmp_path: Path) -> None:
    model = tiny_model("x070", n_embd=128, head_size_a=32, vocab_size=257, block0_value_residual=False, **RANKS)
    native = model.state_dict()
    save_pth(tmp_path / "native.pth", native)
    names = ["native.pth"]
    for layout in ("native", *(name for name, layout in LAYOUTS.items() if "x070" in layout.versions)):
        names.append(write_folder(tmp_path / layout, in_layout(native, layout), n_files=2).name)
    results = []
    for name in names:
        config = config_of(tmp_path, name).model_copy(update={"work_dir": str(tmp_path / f"work-{name}")})
        train(config)
        results.append(fingerprint(config.work_dir))
    assert all(result == results[0] for result in results)


@pytest.mark.system
@pytest.mark.parametrize("model_type", ["x052", "x060"])
def test_training_on_from_safetensors_of_the_older_versions(model_type: str, tmp_path: Path) -> None:
    native = tiny_model(model_type, vocab_size=257, n_layer=3).state_dict()
    save_pth(tmp_path / "native.pth", native)
    write_folder(tmp_path / "folder", native)
    curves = []
    for name in ("native.pth", "folder"):
        config = config_of(tmp_path, name).model_copy(update={"work_dir": str(tmp_path / f"work-{name}")})
        train(config)
        curves.append(losses(config.work_dir))
        assert load_config(tmp_path / f"work-{name}/configs/config.yaml").model.n_layer == 3
    assert curves[0] == curves[1]


@pytest.mark.system
def test_a_resume_needs_the_weights_no_more(weights: Path, tmp_path: Path) -> None:
    for work, fault in (("whole", None), ("cut", "checkpoint.after_commit@2:signal=SIGKILL")):
        config = config_of(tmp_path).model_copy(update={"work_dir": str(tmp_path / work)})
        config = config.model_copy(
            update={"checkpoint": config.checkpoint.model_copy(update={"save_interval_steps": 2})}
        )
        path = write_config(tmp_path / f"{work}.yaml", config)
        job = Job(tmp_path, config=path.name, fault=fault)
        assert job.wait() == (-signal.SIGKILL if fault else 0), job.text
    weights.rename(tmp_path / "elsewhere")
    train(load_config(path))
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    # the file in the work directory, which says every size, continues it too
    assert train(load_config(tmp_path / "cut/configs/config.yaml")).already_complete


@pytest.mark.system
def test_two_ranks_where_the_second_does_not_see_the_weights(weights: Path, tmp_path: Path) -> None:
    """Rank 0 tells it the sizes."""
    config = config_of(tmp_path)
    path = write_config(tmp_path / "run.yaml", config)
    command = f"""
import sys
from pathlib import Path
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.checkpoint import initial_weights
if rank() > 0:
    def unseen(path): raise AssertionError("looked")
    initial_weights.peek_weights = unseen
from rwkv_cluster.cli import main
sys.exit(main(["train", {str(path)!r}]))
"""
    (tmp_path / "rank.py").write_text(command)
    Job(tmp_path, ranks=2, script=tmp_path / "rank.py").complete()
    assert load_pth(tmp_path / "work/out/rwkv-final.pth")["blocks.0.att.w1"].shape == (128, 8)


@pytest.mark.system
def test_a_pipeline_takes_its_sizes_from_the_weights_too(weights: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    training = config.training.thawed()
    for _ in range(2):  # the second reads what the first has stored
        pipeline = RWKVTrainingPipeline(tmp_path / "work", training_config=training, tokenizer="byte")
        pipeline.model_config.ctx_len = 32
        pipeline.prepare_data_from_file(tmp_path / "text.jsonl")
    result = pipeline.train()
    assert load_pth(result.final_path)["blocks.0.att.w1"].shape == (128, 8)
