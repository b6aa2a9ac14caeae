"""Files of states: what is written comes back, and the `rwkv` package means the same by them, axes included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import VERSIONS, some_tokens, tiny_model

from rwkv_cluster.errors import CheckpointError, MissingCheckpointError
from rwkv_cluster.interchange.state_file import load_state, write_state
from rwkv_cluster.model.own_state import file_shapes, named_state, own_state
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import load_pth, save_pth

# Runner's way with a state: as it is in the file for RWKV-7; for those before, the package's own, merged into weights
PROGRAM = """
import json, sys
import numpy as np, torch
from rwkv.model import RWKV

for name, tokens in json.load(open(sys.argv[1])):
    model = RWKV(model=name, strategy="cpu fp32")
    state = None
    if "x070" in name:
        state = model.generate_zero_state()
        for key, tensor in torch.load(name + "-state.pth", weights_only=True).items():
            state[int(key.split(".")[1]) * 3 + 1] = tensor
    logits, _ = model.forward(tokens, state, full_output=True)
    np.savez(name + ".npz", logits=logits.numpy())
"""


def some_state(model: RWKV, *, with_shifts: bool = False) -> dict[str, torch.Tensor]:
    """Random, so that no matrix is symmetric."""
    generator = torch.Generator().manual_seed(3)
    shapes = file_shapes(model, with_shifts=with_shifts)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.system
@pytest.mark.parametrize("family", [("x052", "x060"), ("x070",)], ids="+".join)
def test_the_rwkv_package_begins_from_the_same_state(tmp_path: Path, family: tuple[str, ...]) -> None:
    pytest.importorskip("rwkv")
    tokens = some_tokens(1, 11)
    wanted, cases = {}, []
    for model_type in family:
        model = tiny_model(model_type)
        state, name = some_state(model), str(tmp_path / model_type)
        write_state(Path(f"{name}-state.pth"), state)
        save_pth(Path(f"{name}.pth"), model.state_dict() | ({} if model_type == "x070" else state))
        plain = model(tokens)
        load_state(model, Path(f"{name}-state.pth"))
        wanted[name] = model(tokens)[0].detach().numpy()
        assert (plain - model(tokens)).abs().max() > 0.01
        cases.append((name, tokens[0].tolist()))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    flags = {"RWKV_V7_ON": "1" if family == ("x070",) else "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "cases.json")]
    subprocess.run(program, env={**os.environ, **flags}, check=True, timeout=120)
    for name, ours in wanted.items():
        theirs = np.load(f"{name}.npz")["logits"]
        assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 2e-5, name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("with_shifts", [False, True])
def test_what_is_written_comes_back(tmp_path: Path, suffix: str, with_shifts: bool) -> None:
    model, path = tiny_model("x070"), tmp_path / f"state{suffix}"
    state = some_state(model, with_shifts=with_shifts)
    write_state(path, state) if suffix == ".pth" else save_file(state, path)
    load_state(model, path)
    assert all(torch.equal(own_state(model)[name], tensor) for name, tensor in state.items())
    assert own_state(model).keys() == state.keys()


def test_a_state_merged_into_weights_is_found(tmp_path: Path) -> None:
    model, path = tiny_model("x060"), tmp_path / "merged.pth"
    state = some_state(model)
    save_pth(path, model.state_dict() | state)
    load_state(model, path)
    assert all(torch.equal(own_state(model)[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("model_type", VERSIONS)
def test_a_state_is_written_as_files_have_it(tmp_path: Path, model_type: str) -> None:
    """WKV's own state is [key, value] before RWKV-7, the file's never."""
    model = tiny_model(model_type)
    _, state = model.forward_with_state(some_tokens(1, 5))
    write_state(tmp_path / "s.pth", named_state(model, state))
    written = load_pth(tmp_path / "s.pth")["blocks.1.att.time_state"]
    own = state[1].wkv[0].detach()
    assert torch.equal(written, own if model_type == "x070" else own.mT)
    assert not torch.equal(written, written.mT)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_layer": 3}, "it is a state of 3 layers, and the model has 2"),
        ({"n_embd": 64}, r"blocks\.0\.att\.time_state is \(4, 16, 16\), and the model's state \(2, 16, 16\)"),
    ],
)
def test_a_state_of_another_model_is_refused(tmp_path: Path, changes: dict[str, int], sentence: str) -> None:
    write_state(tmp_path / "s.pth", some_state(tiny_model("x070", **changes)))
    with pytest.raises(CheckpointError, match=f"s.pth: {sentence}. Name the model that it was made for"):
        load_state(tiny_model("x070"), tmp_path / "s.pth")


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    model = tiny_model("x070")
    with pytest.raises(MissingCheckpointError):
        load_state(model, tmp_path / "none.pth")
    save_pth(tmp_path / "m.pth", model.state_dict())
    with pytest.raises(CheckpointError, match=r"m\.pth: it has no tensors"):
        load_state(model, tmp_path / "m.pth")
    state = some_state(model)
    state["blocks.1.att.time_state"][0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"nan\.pth: the state is not usable"):
        load_state(model, tmp_path / "nan.pth")
    assert not model.has_own_state
    state = some_state(model, with_shifts=True)
    del state["blocks.0.ffn.shift_state"]
    write_state(tmp_path / "part.pth", state | {"blocks.1.att.time_state": torch.zeros(2, 16, 16)})
    with pytest.raises(CheckpointError, match=r"it has no blocks\.0\.ffn\.shift_state"):
        load_state(model, tmp_path / "part.pth")
