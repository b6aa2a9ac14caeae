"""A file that was named as weights and is something else is called by its name, and nothing of it is run."""

from __future__ import annotations

import gzip
import json
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.weights_file import fit_state_dict, infer_model_config, load_pth, peek_pth

HEADER = json.dumps({"emb.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}).encode()
BYTES = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "a Git LFS pointer.*git lfs pull",
    b"\n<!DOCTYPE html><html></html>": r"a web page \(HTML\).*/resolve/",
    b'{"error": "Repository not found"}': "JSON, not the weights.*/resolve/",
    struct.pack("<Q", len(HEADER)) + HEADER + bytes(64): r"a safetensors file\. Convert it",
    b"GGUF" + bytes(100): "a GGUF file",
    gzip.compress(b"PK", mtime=0): r"compressed with gzip\. Unpack it",
    b"": r"empty\. Download",
    bytes(5000): "zeros where",
    b"\x93NUMPY" + bytes(9): "a NumPy array",
    b"MMIDIDX\0\0" + bytes(30): "the index of",
}


@pytest.mark.parametrize("read", [load_pth, peek_pth])
@pytest.mark.parametrize(("content", "sentence"), BYTES.items(), ids=[text[:12] for text in BYTES.values()])
def test_what_the_first_bytes_tell(
    tmp_path: Path, content: bytes, sentence: str, read: Callable[[Path], object]
) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.pth: it is {sentence}"):
        read(tmp_path / "x.pth")


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "x")


def _zip(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"x")

    return write


def _npz(path: Path) -> None:
    with open(path, "wb") as handle:
        np.savez(handle, a=np.ones(3))


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (Path.mkdir, "x.pth: a folder"),
        (_tar, "a tar archive"),
        (_npz, "NumPy's .npz"),
        (_zip("model.pth"), "a zip archive with"),
        (_zip("word/document.xml"), "a zip archive of .*'word/document.xml'"),
        (_zip("m/constants.pkl"), "a TorchScript archive.*state_dict"),
    ],
)
def test_what_an_archive_is(tmp_path: Path, write: Callable[[Path], None], sentence: str) -> None:
    write(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=sentence):
        load_pth(tmp_path / "x.pth")


BASE = tiny_model("x070").state_dict()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"state": {}, "param_groups": []}, "state of an optimizer"),
        ({"state_dict": {"a": torch.ones(1)}, "epoch": 1}, "has its weights under 'state_dict'"),
        ({"module": {"a": torch.ones(1)}}, "has its weights under 'module'"),
        ({**BASE, "_strategy": "cuda fp16i8"}, "converted for inference.*rwkv"),
        ({"a": 1}, "'a' is a int, expected a tensor"),
        ({"a": torch.ones(2, dtype=torch.int8)}, "'a' is quantised to torch.int8"),
        ({**BASE, "blocks.0.att.receptance.lora_A": torch.ones(8, 32)}, "a LoRA .*Merge it"),
        ({"base_model.model.x.lora_A.default.weight": torch.ones(8, 32)}, "a LoRA "),
        (
            {**BASE, "blocks.0.att.time_state": torch.ones(2, 16, 16)},
            r"a tuned state.*Leave the tensors \*\.time_state",
        ),
        ({"exp_avg/emb.weight": torch.ones(2)}, "moments of an optimizer"),
        ({"rwkv.blocks.0.attention.key.weight": torch.ones(2)}, "names of.*transformers"),
        ({"model.layers.0.attn.r_proj.weight": torch.ones(2)}, "of an RWKV, or .* unknown"),
        ({"blocks.0.att.time_state": torch.ones(2, 16, 16)}, "a state alone"),
        ({**BASE, "blocks.1.ffn.s_emb.weight": torch.ones(2)}, r"RWKV-7a, which .*\('blocks.1.ffn.s_emb.weight'\)"),
        ({**BASE, "blocks.1.ffn.s_emb.weight": torch.ones(2), "blocks.1.qkv.k1": torch.ones(2)}, "RWKV-7b"),
        ({**BASE, "blocks.1.rosa_qkv.weight": torch.ones(2)}, "an RWKV with ROSA"),
        ({**BASE, "blocks.1.ffn.enn.weight": torch.ones(2)}, "a draft of RWKV-8"),
        ({"format": "rwkv-lora-adapter", "state_dict": {}}, "a LoRA of rwkv-rs/rwkv-lm"),
        ({**BASE, "module.emb.weight": BASE["emb.weight"]}, "weights have 'emb.weight' twice"),
    ],
)
def test_what_the_tensors_are(tmp_path: Path, content: dict[str, object], sentence: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=sentence):
        infer_model_config(load_pth(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    "wrapped",
    [
        *("_orig_mod.{}", "module.{}", "_forward_module.{}", "model.{}", "_forward_module.model._orig_mod.{}"),
        "blocks:blocks._orig_mod",
        "blocks:_fsdp_wrapped_module.blocks._checkpoint_wrapped_module",
    ],
)
def test_what_wrappers_put_before_names_and_into_them_is_taken_off(tmp_path: Path, wrapped: str) -> None:
    old, _, new = wrapped.partition(":")
    names = {name: re.sub(rf"^{old}\b", new, name) if new else wrapped.format(name) for name in BASE}
    torch.save({names[name]: tensor for name, tensor in BASE.items()}, tmp_path / "x.pth")
    for read in (load_pth, peek_pth):
        weights = read(tmp_path / "x.pth")
        assert infer_model_config(weights) == infer_model_config(BASE)
    fitted = fit_state_dict(weights, tiny_model("x070"))
    assert all(torch.equal(fitted[name], BASE[name]) for name in BASE)
