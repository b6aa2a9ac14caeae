"""Fifty examples of an answer's format, learnt by a state alone: what the weights know is then said in that format."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tiny_run import tiny_run_config

from rwkv_cluster.data.conversations.template import load_template
from rwkv_cluster.model.weights_file import load_pth
from rwkv_cluster.tokenizer import ByteTokenizer
from rwkv_cluster.train.checkpoint.weights import load_model
from rwkv_cluster.train.run import train
from rwkv_cluster.train.sample import answer

pytestmark = [pytest.mark.system, pytest.mark.slow]

FACTS, EXAMPLES = 60, 50
MODEL = {"n_layer": 2, "n_embd": 64, "head_size_a": 64, "ctx_len": 128}


def _facts() -> dict[str, str]:
    draw = random.Random(0)
    names = {"".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(2)) for _ in range(400)}
    return {f"Who is {number}?": name for number, name in zip(range(10, 10 + FACTS), sorted(names), strict=False)}


def _rows(path: Path, conversations: list[tuple[str, str, str]]) -> str:
    """Conversations of what the system, the user and the assistant say."""
    lines = []
    for system, question, said in conversations:
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    return str(path)


def test_a_state_alone_learns_a_format(tmp_path: Path) -> None:
    facts = _facts()
    taught = [(system, q, form.format(a)) for q, a in facts.items() for system, form in (("", "{}"), ("tag", "<{}>"))]
    base = tiny_run_config(
        tmp_path,
        work_dir=str(tmp_path / "base"),
        model=MODEL,
        data={"inputs": [_rows(tmp_path / "taught.jsonl", taught)], "validation_fraction": 0.0},
        training={"max_steps": None, "num_epochs": 40, "micro_bsz": 4, "lr_init": 5e-3, "lr_final": 1e-4},
        checkpoint={"save_interval_steps": 10_000},
    )
    weights = train(base).final_path
    tokenizer, template = ByteTokenizer(), load_template("g1")
    options = {"n_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0}

    def answers(source: Path) -> dict[str, str]:
        model = load_model(source)
        return {question: answer(model, tokenizer, template.ask(question), **options) for question in facts}

    assert answers(weights) == facts

    examples = [("", question, f"<{name}>") for question, name in list(facts.items())[:EXAMPLES]]
    tuned = tiny_run_config(
        tmp_path,
        work_dir=str(tmp_path / "tuned"),
        model=MODEL,
        data={"inputs": [_rows(tmp_path / "examples.jsonl", examples)], "validation_fraction": 0.0},
        training={
            **{"max_steps": None, "num_epochs": 20, "micro_bsz": 4, "lr_init": 5e-2, "lr_final": 1e-3},
            "init_from": str(weights),
        },
        adapter={"kind": "state"},
        checkpoint={"save_interval_steps": 10_000},
    )
    train(tuned)
    assert answers(Path(tuned.work_dir)) == {question: f"<{name}>" for question, name in facts.items()}
    before, after = load_pth(weights), load_pth(Path(tuned.work_dir) / "out/rwkv-init.pth")
    assert all((before[name] == tensor).all() for name, tensor in after.items())
