"""`new`: its files are read, fit their GPU and give every reason; what is missing is asked for, or told."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from stub_weights import write_stub
from tiny_models import tiny_model

from rwkv_cluster.cli import main
from rwkv_cluster.commands.creating import TASKS
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.config.recipes import find_config
from rwkv_cluster.model.weights_file import save_pth
from rwkv_cluster.planning import run_plan
from rwkv_cluster.planning.new_run import RECIPES, released_sizes
from rwkv_cluster.planning.options import Assumptions
from rwkv_cluster.planning.run_plan import RunPlan, plan_run
from rwkv_cluster.runtime.gpu_specs import GPUS

CARDS = ("rtx-4090", "rtx-5090", "a100-40gb", "l40s", "h100")
FROM_WEIGHTS = ("sft", "lora", "state", "continue")


@pytest.fixture(autouse=True)
def _a_folder_with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The World vocabulary is not read: it takes a second, and only its number of rows is used."""
    monkeypatch.chdir(tmp_path)
    Path("chat.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setattr(run_plan, "_vocabulary", lambda config, manifest: 257)


def made(options: str, output: str = "run.yaml") -> str:
    assert main(["new", "--data", "chat.jsonl", "--output", output, *options.split()]) == 0
    return Path(output).read_text()


def planned(gpu: str, path: str = "run.yaml") -> RunPlan:
    config = load_config(path)
    return plan_run(config, Assumptions.of(config, gpu=gpu))


def unexplained(text: str) -> list[str]:
    """Fields without a sentence above them, by line."""
    lines = text.splitlines()
    fields = [number for number, line in enumerate(lines) if re.match(r"\s*\w+: \S|\s+\w+:$", line)]
    sections = ("  tokenizer:",)
    return [lines[n] for n in fields if lines[n] not in sections and not lines[n - 1].lstrip().startswith("# ")]


@pytest.mark.system
@pytest.mark.parametrize(
    "size",
    [size if size == "0.4b" else pytest.param(size, marks=pytest.mark.slow) for size in released_sizes()],
)
def test_every_size_and_task_fits_five_cards(size: str, tmp_path: Path) -> None:
    base = str(write_stub(tmp_path / f"{size}.safetensors", size))
    n_layer = find_config(f"sizes/{size}.yaml").resolved.config.model.n_layer
    for task in FROM_WEIGHTS:
        for card in CARDS:
            text = made(f"--base {base} --task {task} --gpu {card}", f"{task}-{card}.yaml")
            plan = planned(card, f"{task}-{card}.yaml")
            assert plan.configured.fits, (task, card)
            assert plan.config.model.n_layer == n_layer
            assert unexplained(text) == []


@pytest.mark.parametrize("task", FROM_WEIGHTS)
def test_a_file_from_weights(task: str, tmp_path: Path) -> None:
    base = str(write_stub(tmp_path / "base.safetensors", "0.4b"))
    text = made(f"--base {base} --task {task} --gpu RTX4090")
    plan = planned("rtx-4090")
    config = plan.config
    assert plan.configured.fits
    assert unexplained(text) == []
    assert (config.training.init_from, config.data.inputs, config.work_dir) == (base, ["chat.jsonl"], "work/run")
    assert config.data.tokenizer.type == "world"
    assert config.adapter.kind == {"lora": "lora", "state": "state"}.get(task, "none")
    assert config.data.format == ("auto" if task == "continue" else "conversations")


def test_the_sentence_of_a_field_is_missed() -> None:
    assert unexplained("# why\nwork_dir: w\n\nmodel:\n  n_layer: 2\n") == ["  n_layer: 2"]


def test_a_size_from_nothing_on_several_machines_until_a_time() -> None:
    text = made("--base 0.4b --task pretrain --gpu h100 --nodes 2 --gpus 8 --time 36h")
    plan = planned("h100")
    training, launch = plan.config.training, plan.config.launch
    assert plan.configured.fits
    sizes = ["n_layer", "n_embd", "vocab_size", "head_size_a", *(f"{x}_lora_rank" for x in ("decay", "a", "v", "gate"))]
    assert [line.split(":")[0].strip() for line in unexplained(text)] == sizes, "below one sentence for all"
    assert (plan.config.model.n_embd, plan.config.model.gate_lora_rank, training.init_from) == (1024, 128, None)
    assert (launch.target, launch.num_nodes, launch.gpus_per_node, launch.time) == ("sbatch", 2, 8, "1-12:00:00")
    assert training.global_batch_size == 128
    assert training.max_tokens == 20 * 400_000_000
    shorter = made("--base 0.4b --task pretrain --gpu h100 --nodes 2 --gpus 8 --time 10m", output="b.yaml")
    short = load_config("b.yaml")
    assert short.training.max_tokens is not None
    assert short.training.max_tokens < training.max_tokens / 10
    assert "of the given time" in shorter


def test_several_gpus_of_this_machine_and_weights_of_ones_own() -> None:
    save_pth(Path("own.pth"), tiny_model("x070", vocab_size=257).state_dict())
    text = made("--base own.pth --task sft --gpu rtx-3090 --gpus 3")
    config = load_config("run.yaml")
    assert (config.training.devices, config.data.tokenizer.type) == (3, "byte")
    assert config.training.global_batch_size == 15
    assert "16 cannot be shared by 3 ranks" in text


def test_what_is_missing_is_asked_for_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO("pretrain\n0.1b\nh100\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    made("")
    asked = capsys.readouterr().err
    assert [asked.index(word) for word in ("task, one of", "weights to begin from", "GPU, such as")]
    assert planned("h100").config.model.n_embd == 768


def test_nothing_is_asked_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "--task", "sft", "--data", "chat.jsonl", "--gpu", "h100"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rwkv-cluster: error: --base is not given. Name the weights to begin from")
    assert not Path("run.yaml").exists()


def test_the_tasks_of_the_help_are_those_that_there_are() -> None:
    assert re.split(r", | or ", TASKS) == list(RECIPES)
    assert set(CARDS) <= set(GPUS)
