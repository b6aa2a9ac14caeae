"""Every example does what it says, on little data and for a few steps."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from tiny_run import losses, write_text

from rwkv_cluster.cli import main
from rwkv_cluster.model.weights_file import save_pth

pytestmark = pytest.mark.system

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weights() -> str:
    save_pth(Path("released.pth"), tiny_model("x070", vocab_size=257).state_dict())
    return "released.pth"


def example(name: str) -> dict[str, Any]:
    """The functions of a script."""
    return runpy.run_path(str(EXAMPLES / name))


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text() + (Path(__file__).parent / "test_recipes.py").read_text()
    assert all(path.name in text for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh"))


def test_integers_and_the_numbers_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("train_integers.py")["main"](steps=3) == losses("work/angles")[-1]
    assert main(["report", "work/angles"]) == 0
    capsys.readouterr()
    read = example("read_report.py")
    read["main"](Path("work/angles"))
    printed = capsys.readouterr().out
    assert [f"step {step:>6}" in printed for step in (1, 2, 3)] == [True] * 3
    assert read["charts"](Path("work/angles"))["loss"]["value"] == pytest.approx(losses("work/angles"))


def test_weights_are_trained_further(weights: str) -> None:
    write_text(Path("text.jsonl"), 4000)
    final = example("continue_checkpoint.py")["main"](weights, "text.jsonl", "byte", steps=2)
    assert Path(final).is_file()
    assert len(losses("work/continued")) == 2


def test_a_fine_tuning_and_a_question(weights: str) -> None:
    rows = [{"prompt": f"After {number}?", "completion": f"{number + 1}, as ever."} for number in range(60)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ["--model.ctx_len=32", "--training.micro_bsz=1", "--training.global_batch_size=2", "--training.max_steps=2"]
    command = ["sh", str(EXAMPLES / "finetune_and_chat.sh"), weights, "chat.jsonl", "rtx-4090", "After 3?", *few]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "done: step 2 of 2" in done.stdout
    assert done.stdout.rpartition("next       ")[2].count("\n") >= 2  # the answer, whatever an untrained model says
