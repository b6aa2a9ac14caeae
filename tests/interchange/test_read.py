"""Every layout, in one file or several, gives the same tensors; what is no model's weights is called by its name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layout_files import RANKS, assert_equal, four_ranks, in_layout, write_folder
from safetensors.torch import save_file
from tiny_models import tiny_model

from rwkv_cluster.errors import CheckpointError, MissingCheckpointError
from rwkv_cluster.interchange.layouts import LAYOUTS
from rwkv_cluster.interchange.read import peek_weights, read_weights
from rwkv_cluster.model.weights_file import infer_model_config, save_pth

BASE = four_ranks()
X070 = ["native", *(name for name, layout in LAYOUTS.items() if "x070" in layout.versions)]
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("layout", X070)
@pytest.mark.parametrize("n_files", [1, 3])
def test_every_layout_gives_the_same_tensors(layout: str, n_files: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", in_layout(BASE, layout), n_files=n_files)
    for mapped in (False, True):
        assert_equal(read_weights(folder, mapped=mapped), BASE)
    peeked = peek_weights(folder)
    assert {name: tensor.shape for name, tensor in peeked.tensors.items()} == {n: t.shape for n, t in BASE.items()}
    assert (peeked.layout.name if peeked.layout else "native", len(peeked.files)) == (layout, n_files)
    config = infer_model_config(peeked.tensors)
    assert {name: getattr(config, name) for name in RANKS} == RANKS
    assert (config.n_layer, config.n_embd, config.head_size_a, config.block0_value_residual) == (2, 128, 32, False)


@pytest.mark.parametrize("layout", X070)
def test_every_layout_as_one_file_of_either_kind(layout: str, tmp_path: Path) -> None:
    tensors = in_layout(BASE, layout)
    save_file(tensors, tmp_path / "m.safetensors")
    save_pth(tmp_path / "m.pth", tensors)
    (tmp_path / "bin").mkdir()
    save_pth(tmp_path / "bin/pytorch_model.bin", tensors)
    for name in ("m.safetensors", "m.pth", "bin"):
        assert_equal(read_weights(tmp_path / name), BASE)


@pytest.mark.parametrize(
    ("model_type", "layout"), [("x052", "native"), ("x060", "native"), ("x052", "rwkv-5-hf"), ("x060", "rwkv-6-hf")]
)
def test_the_older_versions(model_type: str, layout: str, tmp_path: Path) -> None:
    weights = tiny_model(model_type).state_dict()
    folder = write_folder(tmp_path / "m", in_layout(weights, layout))
    assert_equal(read_weights(folder), weights)
    assert infer_model_config(peek_weights(folder).tensors).model_type == model_type


def test_shards_in_the_older_format(tmp_path: Path) -> None:
    tensors = in_layout(tiny_model("x060").state_dict(), "rwkv-6-hf")
    names = list(tensors)
    places = {name: f"pytorch_model-{1 + names.index(name) % 2:05d}-of-00002.bin" for name in names}
    for file in set(places.values()):
        save_pth(tmp_path / file, {name: tensors[name] for name in names if places[name] == file})
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_equal(read_weights(tmp_path), tiny_model("x060").state_dict())


def test_an_index_is_named_itself(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", in_layout(BASE, "fla"), n_files=2)
    assert_equal(read_weights(folder / INDEX), BASE)


def test_the_first_name_of_the_embedding_in_the_branch_of_transformers(tmp_path: Path) -> None:
    tensors = in_layout(BASE, "transformers")
    tensors["rwkv7.embeddings.weight"] = tensors.pop("rwkv7.emb.weight")
    assert_equal(read_weights(write_folder(tmp_path / "m", tensors)), BASE)


def test_native_names_behind_a_wrapper_are_native(tmp_path: Path) -> None:
    for number, prefix in enumerate(("model.", "module.", "_forward_module._orig_mod.")):
        folder = write_folder(tmp_path / str(number), {prefix + name: tensor for name, tensor in BASE.items()})
        assert peek_weights(folder).layout is None
        assert_equal(read_weights(folder), BASE)
    wrapped = {f"module.{name}": tensor for name, tensor in in_layout(BASE, "fla").items()}
    assert_equal(read_weights(write_folder(tmp_path / "fla", wrapped)), BASE)


def test_peeking_reads_no_values(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", BASE)
    assert all(tensor.is_meta for tensor in peek_weights(folder).tensors.values())


def without_ln0(layout: str) -> dict[str, torch.Tensor]:
    return in_layout({name: tensor for name, tensor in BASE.items() if ".ln0." not in name}, layout)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (without_ln0("rwkv-rs"), r"\(ln0\) fused .*Use the \.pth"),
        (without_ln0("transformers"), r"\(ln0\) fused"),
        (
            {**in_layout(BASE, "fla"), "model.layers.0.attn.r_proj.lora_A.weight": torch.ones(2, 2)},
            "a LoRA ",
        ),
        ({"base_model.model.model.layers.0.attn.r_proj.lora_A.weight": torch.ones(2, 2)}, "a LoRA "),
        ({**in_layout(BASE, "transformers"), "rwkv7.blocks.1.ffn.s_emb.weight": torch.ones(2)}, "RWKV-7a"),
        (
            {**in_layout(BASE, "fla"), "model.layers.0.attn.x_x": torch.ones(2)},
            "no such model has 'model.layers.0.attn",
        ),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}, "of an RWKV"),
    ],
)
def test_what_the_tensors_of_a_folder_are(tensors: dict[str, torch.Tensor], sentence: str, tmp_path: Path) -> None:
    for read in (read_weights, peek_weights):
        with pytest.raises(CheckpointError, match=sentence):
            read(write_folder(tmp_path / read.__name__, tensors))


def sharded(folder: Path) -> Path:
    return write_folder(folder, in_layout(BASE, "fla"), n_files=2)


def refused(path: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    """The sentence with which both ways of reading refuse."""
    sentences = set()
    for read in (read_weights, peek_weights):
        with pytest.raises(kind) as caught:
            read(path)
        sentences.add(str(caught.value))
    assert len(sentences) == 1
    return sentences.pop()


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    second = folder / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    assert "one of 2 files" in refused(second)
    assert refused(second).endswith(str(folder))
    second.write_bytes(LFS)
    assert refused(folder).startswith(f"{second}: it is a Git LFS pointer")
    second.unlink()
    assert refused(folder, MissingCheckpointError).startswith(f"{folder / INDEX}: it names '{second.name}'")
    save_file({"a": torch.ones(1)}, second)
    assert "which the index" in refused(folder)
    second.write_bytes(content)
    (folder / INDEX).unlink()
    assert f"no {INDEX}" in refused(folder)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    for content, sentence in (
        (LFS, "it is a Git LFS pointer"),
        (b"[]", "it is JSON, not the weights"),
        (b'{"weight_map": {}}', "it is JSON, not the weights"),
        (json.dumps({"weight_map": {"a": "../x.safetensors"}}).encode(), r"refused: it names '../x.safetensors'"),
    ):
        (folder / INDEX).write_bytes(content)
        assert sentence in refused(folder)


def test_folders_without_weights(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    assert "it has nothing" in refused(folder)
    assert f"model.safetensors, {INDEX}, pytorch_model.bin" in refused(folder)
    (folder / "m.gguf").write_bytes(b"GGUF")
    assert "it has 'm.gguf'" in refused(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "(it has adapter_config.json)" in refused(folder)
    (folder / "out").mkdir()
    assert refused(folder).endswith(str(folder / "out/rwkv-final.pth"))


def header_of(content: bytes) -> tuple[int, dict[str, dict[str, object]]]:
    length = int.from_bytes(content[:8], "little")
    return length, json.loads(content[8 : 8 + length])


def with_header(content: bytes, header: object) -> bytes:
    length = int.from_bytes(content[:8], "little")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def test_safetensors_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"emb.weight": torch.ones(4, 4), "head.weight": torch.ones(4, 4, dtype=torch.bfloat16)}, path)
    content = path.read_bytes()
    length, header = header_of(content)
    emb = header["emb.weight"]
    for damaged, sentence in (
        (content[:-1], "its tensors have 96 bytes, and 95 are there"),
        (content + b"\0", "its tensors have 96 bytes, and 97 are there"),
        (content[: length // 2], f"header has {length} bytes"),
        (with_header(content, b"{]"), "header is not JSON"),
        (with_header(content, b'{"a": 1, "a": 2}'), "(a name stands in it twice)"),
        (with_header(content, {"a": 1}), "entry of 'a' lacks"),
        (
            with_header(content, header | {"emb.weight": emb | {"shape": [4, 5]}}),
            "of shape (4, 5) and dtype F32 has 64 bytes",
        ),
        (with_header(content, header | {"emb.weight": emb | {"shape": [-4, -4]}}), "are no sizes"),
        (with_header(content, {"emb.weight": emb | {"data_offsets": [1, 65]}}), "begin at 1, expected 0"),
    ):
        path.write_bytes(damaged)
        assert refused(path).startswith(f"{path}: damaged or truncated: ")
        assert sentence in refused(path)


def test_tensors_that_are_no_floats(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(4, dtype=torch.int8)}, path)
    assert "'a' is quantised to I8" in refused(path)
    save_file({"a": torch.ones(4, dtype=torch.int64)}, path)
    assert "'a' has dtype I64, expected floats: F64, F32, F16, BF16" in refused(path)


@pytest.mark.system
@pytest.mark.parametrize("arguments", [(), ("--low-memory", "--max-shard-size", "300KB")])
def test_the_converter_of_rwkv7_hf(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Its folder, of one file or sharded, gives the bytes of the .pth that it has read."""
    native = tiny_model("x070", n_embd=128, head_size_a=32, **RANKS).state_dict()
    save_pth(tmp_path / "m.pth", native)
    command = [sys.executable, "-m", "rwkv7_hf.converter", "--input", "m.pth", "--output", "hf", "--precision", "fp32"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    weights = peek_weights(tmp_path / "hf")
    assert weights.layout is LAYOUTS["fla"]
    assert (len(weights.files) > 1) == bool(arguments)
    assert_equal(
        read_weights(tmp_path / "hf"),
        {name: tensor for name, tensor in native.items() if not name.startswith("blocks.0.att.v") or "value" in name},
    )
