"""Forty conversations learned by heart: answers come back word for word, from `generate` and the `rwkv` package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prepared_files import write_rows
from tiny_run import tiny_run_config

from rwkv_cluster.data.conversations.template import load_template
from rwkv_cluster.tokenizer import ByteTokenizer
from rwkv_cluster.train import sample
from rwkv_cluster.train.checkpoint.weights import load_model
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir

pytestmark = [pytest.mark.system, pytest.mark.slow]

ANSWERS = {f"What is number {n}?": f"It is {n * 37 % 101}, of course." for n in range(10, 50)}
BYTES = ByteTokenizer()
PROGRAM = """
import json, sys
from rwkv.model import RWKV

model, answers = RWKV(model=sys.argv[1], strategy="cpu fp32"), []
for prompt in json.load(sys.stdin):
    logits, state = model.forward(prompt, None)
    ids = []
    while len(ids) < 40 and (token := int(logits.argmax())):
        ids.append(token)
        logits, state = model.forward([token], state)
    answers.append(ids)
print(json.dumps(answers))
"""


def test_answers_come_back_word_for_word(tmp_path: Path) -> None:
    pytest.importorskip("rwkv")
    path = write_rows(tmp_path / "chat.jsonl", *({"prompt": q, "completion": a} for q, a in ANSWERS.items()))
    config = tiny_run_config(
        tmp_path,
        model={"n_embd": 64, "head_size_a": 64, "ctx_len": 64},
        data={"inputs": [str(path)], "validation_fraction": 0.0},
        training={"micro_bsz": 10, "max_steps": 280, "lr_init": 5e-3, "lr_final": 5e-4},
        checkpoint={"save_interval_steps": 280},
    )
    result = train(config)
    weights = WorkDir(config.work_dir).final_weights
    assert result.loss < 0.01
    model, questions = load_model(weights), {question: load_template("g1").ask(question) for question in ANSWERS}
    options = {"n_tokens": 40, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert {question: sample.answer(model, BYTES, asked, **options) for question, asked in questions.items()} == ANSWERS
    prompts = json.dumps([BYTES.encode(asked.prompt) for asked in questions.values()])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(weights.with_suffix(""))],
        env={**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"},
        input=prompts, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    answers = [BYTES.decode(ids).removeprefix(" ") for ids in json.loads(run.stdout.splitlines()[-1])]
    assert answers == list(ANSWERS.values())
