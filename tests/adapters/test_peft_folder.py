"""Folders of adapters as peft reads them: what is in them by peft's formulas, and peft itself on the exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import adapter_parts, add_trained_adapter, relative_error, some_tokens, tiny_model
from torch import Tensor

from rwkv_cluster.adapters.peft_folder import CONFIG, TENSORS, TrainedAdapter, write_folder
from rwkv_cluster.adapters.table import KINDS
from rwkv_cluster.cli import main
from rwkv_cluster.config import AdapterConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.interchange.layouts import LAYOUTS
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import save_pth


def _adapted(adapter: AdapterConfig, **sizes: int) -> RWKV:
    model = tiny_model("x070", **sizes)
    add_trained_adapter(model, adapter)
    return model


def _trained(model: RWKV, adapter: AdapterConfig) -> TrainedAdapter:
    return TrainedAdapter(adapter, adapter_parts(model), "x070", base="0" * 64, base_name="base.pth")


def _by_peft(weight: Tensor, settings: dict[str, Any], own: dict[str, Tensor]) -> Tensor:
    """The whole matrix as peft's layers compute it, in float64."""
    W = weight.double()
    if settings["peft_type"] == "MISS":
        block = own["miss_block"].double()
        return W + torch.stack([block[i % settings["r"]] for i in range(W.shape[1])], dim=1)
    A, B = own["lora_A.weight"].double(), own["lora_B.weight"].double()
    assert A.shape[0] == settings["r"]
    merged = W + settings["lora_alpha"] / settings["r"] * B @ A
    if settings["use_dora"]:
        merged *= (own["lora_magnitude_vector"].double() / merged.norm(dim=1)).unsqueeze(1)
    return merged


@pytest.mark.parametrize("format_name", ["peft", "peft-fla"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_say_the_same_matrices(kind: str, format_name: str, tmp_path: Path) -> None:
    adapter = AdapterConfig(kind=kind, rank=4)
    model = _adapted(adapter)
    exported = write_folder(_trained(model, adapter), format_name, tmp_path / "a", source_sha256="1")
    assert set(exported.files) == {CONFIG, TENSORS}
    settings = json.loads((tmp_path / "a" / CONFIG).read_text())
    tensors = load_file(tmp_path / "a" / TENSORS)
    with safe_open(tmp_path / "a" / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt", "rwkv_base.sha256": "0" * 64}
    natives = [f"blocks.{layer}.{name}" for layer in (0, 1) for name in
               ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")]  # fmt: skip
    modules = natives
    if format_name == "peft-fla":
        modules = [LAYOUTS["fla"].to_other(f"{name}.weight")[0].removesuffix(".weight") for name in natives]
    assert sorted(settings["target_modules"]) == sorted(modules)
    for native, module in zip(natives, modules, strict=True):
        prefix = f"base_model.model.{module}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        layer: Any = model.get_submodule(native)
        found = _by_peft(layer.weight, settings, own)
        torch.testing.assert_close(found, layer.double().merged(layer.weight), rtol=1e-6, atol=1e-7)
    again = write_folder(_trained(model.float(), adapter), format_name, tmp_path / "a", source_sha256="1")
    assert again.already_there


def test_a_layout_that_does_not_know_the_model_is_refused(tmp_path: Path) -> None:
    trained = TrainedAdapter(AdapterConfig(kind="lora"), {}, "x060", base="", base_name="")
    with pytest.raises(ConfigError, match="peft-fla exists for x070, and the model is x060"):
        write_folder(trained, "peft-fla", tmp_path / "a", source_sha256="1")


@pytest.mark.system
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_our_logits_on_the_exported_folder(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    modeling = pytest.importorskip("rwkv7_hf.modeling_rwkv7")
    adapter = AdapterConfig(kind=kind, rank=4)
    sizes = {"n_embd": 128, "head_size_a": 64}
    save_pth(tmp_path / "base.pth", tiny_model("x070", **sizes).state_dict())
    assert main(["export", str(tmp_path / "base.pth"), "--format", "fla", "--output", str(tmp_path / "base")]) == 0
    model = _adapted(adapter, **sizes)
    write_folder(_trained(model, adapter), "peft-fla", tmp_path / "adapter", source_sha256="1")
    base = modeling.RWKV7ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = some_tokens(2, 20)
    with torch.no_grad():
        logits = model(tokens)
        assert relative_error(tiny_model("x070", **sizes)(tokens), logits) > 1e-3
        assert relative_error(theirs(input_ids=tokens).logits, logits) < 1e-5
