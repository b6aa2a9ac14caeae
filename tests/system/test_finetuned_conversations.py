"""Forty conversations learnt by heart: each answer comes back word for word, here and from the package `rwkv`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import tiny_run_config

from rwkv_cluster.data.conversations.template import load_template
from rwkv_cluster.tokenizer import ByteTokenizer
from rwkv_cluster.train.checkpoint.weights import load_model
from rwkv_cluster.train.run import train
from rwkv_cluster.train.sample import answer

pytestmark = pytest.mark.system

OTHER_READER = """
import json, sys
from rwkv.model import RWKV
path, prompts = sys.argv[1], json.load(sys.stdin)
model, answers = RWKV(model=path, strategy="cpu fp32"), []
for tokens in prompts:
    logits, state = model.forward(tokens, None)
    ids = []
    while len(ids) < 40 and (token := int(logits.argmax())) != 0:
        ids.append(token)
        logits, state = model.forward([token], state)
    answers.append(ids)
print(json.dumps(answers))
"""


def _conversations() -> dict[str, str]:
    """Answers by question, all of them different and none to be guessed."""
    draw = random.Random(0)
    answers = ["".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(4)) for _ in range(40)]
    assert len(set(answers)) == 40
    return {f"Who is {number}?": name.capitalize() for number, name in enumerate(answers, 10)}


def test_forty_conversations_come_back_word_for_word(tmp_path: Path) -> None:
    conversations = _conversations()
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": name}]}
        for question, name in conversations.items()
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = tiny_run_config(
        tmp_path,
        model={"n_layer": 2, "n_embd": 64, "head_size_a": 64, "ctx_len": 128},
        data={"inputs": [str(tmp_path / "chat.jsonl")], "validation_fraction": 0.0},
        training={"max_steps": None, "num_epochs": 60, "micro_bsz": 4, "lr_init": 5e-3, "lr_final": 1e-4},
        checkpoint={"save_interval_steps": 10_000},
    )
    result = train(config)
    model, tokenizer, template = load_model(result.final_path), ByteTokenizer(), load_template("g1")
    options = {"n_tokens": 40, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    found = {question: answer(model, tokenizer, template.ask(question), **options) for question in conversations}
    assert found == conversations

    pytest.importorskip("rwkv")
    prompts = [list(map(int, tokenizer.encode(template.ask(question).prompt))) for question in conversations]
    environment = os.environ | {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", OTHER_READER, str(result.final_path.with_suffix(""))]
    process = subprocess.run(
        program, input=json.dumps(prompts), capture_output=True, text=True, env=environment, timeout=120
    )
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout.splitlines()[-1])
    assert [tokenizer.decode(ids).strip() for ids in answers] == list(conversations.values())
