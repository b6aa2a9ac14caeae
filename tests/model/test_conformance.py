"""Exported weights in the `rwkv` package: same logits, by sequence and token by token, and the same text."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_run
import torch
from tiny_models import some_tokens, tiny_model

from rwkv_cluster.cli import main
from rwkv_cluster.model.generate import generate
from rwkv_cluster.model.weights_file import save_pth
from rwkv_cluster.train.checkpoint.weights import load_model
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir

pytest.importorskip("rwkv")
pytestmark = pytest.mark.system

# one process per family: the package reads its settings when it is imported
PROGRAM = """
import copy, json, sys
import numpy as np
from rwkv.model import RWKV

for name, prompt, n_tokens in json.load(open(sys.argv[1])):
    model = RWKV(model=name, strategy="cpu fp32")
    whole, state = model.forward(prompt, None, full_output=True)
    steps, state = [], None
    for token in prompt:
        logits, state = model.forward([token], state)
        steps.append(logits.numpy().copy())
    text = []
    for _ in range(n_tokens):
        text.append(int(logits.argmax()))
        logits, state = model.forward([text[-1]], state)
    np.savez(name + ".npz", whole=whole.numpy(), steps=np.stack(steps), text=np.array(text))
"""


def _trained(folder, model_type):
    """The .pth that a short run exports."""
    folder.mkdir()
    config = tiny_run.tiny_run_config(
        folder, model={"model_type": model_type}, training={"max_steps": 30, "lr_init": 5e-3, "micro_bsz": 8}
    )
    train(config)
    assert tiny_run.losses(config.work_dir)[-1] < 2.5
    assert main(["export", config.work_dir, "--format", "pth"]) == 0
    return WorkDir(config.work_dir).out / "step-00000030.pth"


@pytest.mark.parametrize("family", [("x052", "x060"), ("x070",)], ids="+".join)
def test_logits_and_text_equal_the_rwkv_package(tmp_path, family):
    cases = []
    for model_type in family:
        shapes = {"": {}, "-wide": {"n_layer": 3, "n_embd": 128, "vocab_size": 300, "head_size_a": 64}}
        if model_type == "x070":
            shapes["-without-v"] = {"block0_value_residual": False, "gate_lora_rank": 40}
        for suffix, changes in shapes.items():
            model = tiny_model(model_type, **changes)
            save_pth(tmp_path / f"{model_type}{suffix}.pth", model.state_dict())
            cases.append((str(tmp_path / f"{model_type}{suffix}"), some_tokens(1, 11)[0].tolist(), 15, model))
        trained = _trained(tmp_path / f"{model_type}-trained", model_type)
        cases.append((str(trained.with_suffix("")), list(b"every morning"), 15, load_model(trained)))
    (tmp_path / "cases.json").write_text(json.dumps([case[:3] for case in cases]))
    flags = {"RWKV_V7_ON": "1" if family == ("x070",) else "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "cases.json")],
        env={**os.environ, **flags},
        check=True,
        timeout=120,
    )
    for name, prompt, n_tokens, model in cases:
        theirs = np.load(f"{name}.npz")
        with torch.no_grad():
            whole = model(torch.tensor([prompt]))[0].numpy()
            steps, state = [], None
            for token in prompt:
                logits, state = model.forward_with_state(torch.tensor([[token]]), state)
                steps.append(logits[0, 0].numpy())
        for ours, wanted in ((whole, theirs["whole"]), (np.stack(steps), theirs["steps"])):
            assert np.abs(ours - wanted).max() / np.abs(wanted).max() < 2e-5, name
        text = generate(model, prompt, n_tokens, temperature=0, stop_token=None)
        assert text == theirs["text"].tolist(), name
        assert len(set(text)) > 1
