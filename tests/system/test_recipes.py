"""Recipes, scaled down, train two steps in this process: here one of each task, all of them among the slow tests."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tiny_run import losses, write_text

from rwkv_cluster.cli import main
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.config.recipes import find_config
from rwkv_cluster.config.shipped import PARTS, shipped_recipes
from rwkv_cluster.model.weights_file import save_pth
from rwkv_cluster.train.run import train

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
ALL = [name for name in shipped_recipes() if name.partition("/")[0] not in PARTS]
REPRESENTATIVES = """
    pretrain/7.2b-4x8x80gb.yaml continue/0.1b-24gb.yaml sft/13.3b-8x80gb.yaml lora/2.9b-24gb.yaml state/7.2b-24gb.yaml
    long/2.9b-8x80gb.yaml integers/codec-tokens.yaml integers/midi-events.yaml integers/time-series.yaml
""".split()  # noqa: SIM905 -- a list of words reads better
ONE_PROCESS = ["training.devices=1", "training.strategy=auto", "training.zero_stage=null", "training.max_steps=2",
               "training.offload_optimizer=false", "training.num_threads=1", "training.warmup_steps=1",
               "training.num_epochs=null", "training.val_interval_steps=null", "logging.sample_tokens=0"]  # fmt: skip
SMALL = [*ONE_PROCESS, "model.n_layer=2", "model.n_embd=32", "model.head_size_a=16", "model.ctx_len=32"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, conversations, integers, and weights of the scaled-down size."""
    folder = tmp_path_factory.mktemp("inputs")
    write_text(folder / "text.jsonl")
    rows = [{"prompt": f"After {number}?", "completion": f"{number + 1}, as ever."} for number in range(60)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_pth(folder / "released.pth", tiny_model("x070", vocab_size=257).state_dict())
    runpy.run_path(str(ROOT / "examples/integer_data.py"))["main"](folder / "data")
    return folder


def scaled_down(recipe: str, inputs: Path) -> list[str]:
    """Overrides that make a run of two steps of it: a small model and small batches, all else as it stands there."""
    task = recipe.partition("/")[0]
    if task == "integers":
        (data,) = find_config(recipe).resolved.config.data.inputs
        return [*SMALL, f"data.inputs=[{inputs / data}]"]
    overrides = [*SMALL, "data.tokenizer.type=byte", "model.vocab_size=257", "training.micro_bsz=1"]
    overrides += ["training.global_batch_size=2", "training.max_tokens=null"]
    conversations = task in ("sft", "lora", "state") or task.endswith("-g1.yaml")
    overrides.append(f"data.inputs=[{inputs / ('chat.jsonl' if conversations else 'text.jsonl')}]")
    if "/" in recipe:
        overrides += [f"model.{name}_lora_rank=null" for name in ("decay", "a", "v", "gate")]
    return overrides if task == "pretrain" else [*overrides, f"training.init_from={inputs / 'released.pth'}"]


@pytest.mark.parametrize("task", ["sft", "lora", "state", "continue"])
def test_two_steps_of_a_new_file(task: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own model and settings; shorter samples, fewer of them."""
    monkeypatch.chdir(tmp_path)
    data = inputs / ("text.jsonl" if task == "continue" else "chat.jsonl")
    named = ["--base", str(inputs / "released.pth"), "--data", str(data), "--gpu", "rtx-4090"]
    assert main(["new", "--task", task, *named]) == 0
    few = ["model.ctx_len=32", "training.micro_bsz=1", "training.global_batch_size=2"]
    assert train(load_config("run.yaml", [*ONE_PROCESS, *few])).step == 2


@pytest.mark.parametrize(
    "recipe",
    [*REPRESENTATIVES, *(pytest.param(name, marks=pytest.mark.slow) for name in ALL if name not in REPRESENTATIVES)],
)
def test_two_steps(recipe: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = find_config(recipe, scaled_down(recipe, inputs)).resolved.config
    assert train(config).step == 2
    assert len(losses(config.work_dir)) == 2
