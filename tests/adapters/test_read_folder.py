"""Adapters from folders: the model with one of ours or of peft's in it, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import adapter_parts, add_trained_adapter, relative_error, some_tokens, tiny_model

from rwkv_cluster.adapters.base import fingerprint
from rwkv_cluster.adapters.peft_folder import BASE, CONFIG, TENSORS, TrainedAdapter, write_folder
from rwkv_cluster.adapters.read_folder import merge_folder
from rwkv_cluster.adapters.table import KINDS
from rwkv_cluster.config import AdapterConfig
from rwkv_cluster.errors import CheckpointError, MissingCheckpointError
from rwkv_cluster.model.rwkv import RWKV


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


def _base() -> RWKV:
    """Weights as a run in bf16 begins with them, in fp32."""
    return tiny_model("x070").bfloat16().float()


def _folder(path: Path, kind: str = "lora", format_name: str = "peft") -> RWKV:
    """Write the folder of an adapter with random parts; the model that it makes."""
    adapter = AdapterConfig(kind=kind, rank=4, alpha=None if kind == "miss" else 12.0)
    model = _base()
    base = fingerprint({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    add_trained_adapter(model, adapter)
    trained = TrainedAdapter(adapter, adapter_parts(model), "x070", base=base, base_name="base.pth")
    write_folder(trained, format_name, path, source_sha256="1")
    return model


@pytest.mark.parametrize("format_name", ["peft", "peft-fla"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_that_of_the_adapter(kind: str, format_name: str, tmp_path: Path) -> None:
    tokens = some_tokens(2, 20)
    wanted, model = _folder(tmp_path / "a", kind, format_name)(tokens), _base()
    assert relative_error(model(tokens), wanted) > 1e-3
    merge_folder(model, tmp_path / "a")
    assert relative_error(model(tokens), wanted) < 1e-5


def test_names_of_older_programs_are_read(folder: Path) -> None:
    """`lora_A` without `.weight`, and no fingerprint of a base."""
    tokens = some_tokens(2, 20)
    wanted = _folder(folder)(tokens)
    tensors = load_file(folder / TENSORS)
    save_file({name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}, folder / TENSORS)
    model = _base()
    merge_folder(model, folder)
    assert relative_error(model(tokens), wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_16_bits_has_the_merged_weights_rounded_once(kind: str, dtype: torch.dtype, folder: Path) -> None:
    """The base is known by the tensors of its file: in fp16 those of bf16 have other values."""
    _folder(folder, kind)
    file = {name: 1e-6 * tensor for name, tensor in _base().bfloat16().state_dict().items()}
    tensors, base = load_file(folder / TENSORS), fingerprint(file)
    save_file(tensors, folder / TENSORS, {BASE: base})
    model = _base()
    model.load_state_dict(file)
    in_fp32 = copy.deepcopy(model.to(dtype)).float()
    merge_folder(in_fp32, folder, base=file)
    merge_folder(model, folder, base=file)
    merged = in_fp32.state_dict()
    assert all(torch.equal(tensor, merged[name].to(dtype)) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="trained on other weights"):
        merge_folder(model, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_another_device_than_the_files(kind: str, folder: Path) -> None:
    """Meta stands in for a GPU: torch refuses to compute with tensors of both."""
    _folder(folder, kind)
    tensors = load_file(folder / TENSORS)
    save_file(tensors, folder / TENSORS)  # without the fingerprint of the base, for there are no values
    model = _base().to("meta")
    merge_folder(model, folder)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_other_weights_are_refused_with_both_fingerprints(folder: Path) -> None:
    _folder(folder)
    with pytest.raises(CheckpointError, match=r"trained on other weights: fingerprint [0-9a-f]{64}, these have"):
        merge_folder(tiny_model("x070", noise=0.01), folder)


def _config(**changes: Any) -> Callable[[Path], Any]:
    return lambda path: (path / CONFIG).write_text(json.dumps({**json.loads((path / CONFIG).read_text()), **changes}))


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], Any]:
    return lambda path: save_file(change(load_file(path / TENSORS)), path / TENSORS)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_config(peft_type="IA3"), "peft_type is IA3, expected one of: LORA, MISS"),
        (_config(use_rslora=True), "use_rslora is set, and adapters with it are not read"),
        (_config(init_lora_weights="pissa_niter_4"), "belongs to weights that peft has changed"),
        (_config(r=0), "it is no configuration of an adapter"),
        (lambda path: (path / CONFIG).write_text("[]"), "it is no configuration of an adapter"),
        (_tensors(lambda x: {**x, "head.weight": torch.ones(2)}), "'head.weight' is no part of an adapter"),
        (
            _tensors(lambda x: {name: tensor[:, :-1].clone() for name, tensor in x.items()}),
            "the adapter of .* expected",
        ),
        (_tensors(lambda x: {name: tensor / 0 for name, tensor in x.items()}), "the adapter is not usable"),
    ],
)
def test_what_is_not_understood_is_refused(damage: Callable[[Path], Any], sentence: str, folder: Path) -> None:
    _folder(folder)
    damage(folder)
    model = _base()
    with pytest.raises(CheckpointError, match=sentence):
        merge_folder(model, folder)
    assert fingerprint(model.state_dict()) == fingerprint(_base().state_dict())


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingCheckpointError, match=r"has no adapter_config\.json, so it is no adapter"):
        merge_folder(_base(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(MissingCheckpointError, match=r"file has no adapter_config\.json, so it is no adapter"):
        merge_folder(_base(), tmp_path / "file")
