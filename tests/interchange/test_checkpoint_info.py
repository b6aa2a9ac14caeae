"""The inspection functions that scripts written for rwkv-trainer call."""

import pytest
import torch
from tiny_models import VERSIONS, tiny_model

from rwkv_cluster.errors import CheckpointError, ConfigError
from rwkv_cluster.interchange.checkpoint_info import (
    DetectedModelConfig,
    inspect_rwkv_checkpoint,
    load_checkpoint_for_training,
    validate_checkpoint_compatibility,
)
from rwkv_cluster.model.weights_file import save_pth


@pytest.mark.parametrize("model_type", VERSIONS)
def test_inspect_detects_every_version(tmp_path, model_type):
    model = tiny_model(model_type)
    save_pth(tmp_path / "m.pth", model.state_dict())
    info = inspect_rwkv_checkpoint(str(tmp_path / "m.pth"))
    assert info["detected_config"] == {
        "n_layer": 2,
        "n_embd": 32,
        "vocab_size": 50,
        "model_type": model_type,
        "ctx_len": 1024,
        "head_size_a": 16,
    }
    assert info["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert info["keys_sample"] == list(model.state_dict())[:10]
    assert info["checkpoint_path"] == str(tmp_path / "m.pth")
    assert info["file_size_mb"] == pytest.approx((tmp_path / "m.pth").stat().st_size / 2**20)


def test_inspect_says_why_nothing_was_detected(tmp_path):
    save_pth(tmp_path / "m.pth", {"layer.weight": torch.ones(2, 2)})
    info = inspect_rwkv_checkpoint(tmp_path / "m.pth")
    assert "of an RWKV" in info["detection_error"]
    assert "detected_config" not in info


def test_inspect_errors_are_the_expected_built_ins(tmp_path):
    with pytest.raises(FileNotFoundError):
        inspect_rwkv_checkpoint(tmp_path / "absent.pth")
    (tmp_path / "m.pth").write_bytes(b"junk")
    with pytest.raises(RuntimeError, match="not a weights file"):
        inspect_rwkv_checkpoint(tmp_path / "m.pth")


def test_load_with_overrides(tmp_path):
    save_pth(tmp_path / "m.pth", tiny_model("x052").state_dict())
    weights, config = load_checkpoint_for_training(tmp_path / "m.pth", {"ctx_len": 77})
    assert config == DetectedModelConfig(2, 32, 50, "x052", 77, 16)
    assert weights["emb.weight"].shape == (50, 32)
    with pytest.raises(ConfigError, match=r"'n_head'.* n_layer, n_embd"):
        load_checkpoint_for_training(tmp_path / "m.pth", {"n_head": 2})
    save_pth(tmp_path / "m.pth", {"layer.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError):
        load_checkpoint_for_training(tmp_path / "m.pth")


def test_compatibility_names_every_difference():
    detected = DetectedModelConfig(n_layer=2, n_embd=32, vocab_size=50, model_type="x070")
    assert validate_checkpoint_compatibility(detected, detected.to_dict()) == (True, [])
    assert validate_checkpoint_compatibility(detected, {**detected.to_dict(), "ctx_len": 8})[0]
    assert validate_checkpoint_compatibility(detected, {"n_layer": 2, "n_embd": 32, "vocab_size": 50})[0]
    fits, differences = validate_checkpoint_compatibility(detected, {"n_layer": 3, "vocab_size": 51, "n_embd": 32})
    assert not fits
    assert differences == [
        "n_layer differs: checkpoint 2, pipeline 3",
        "vocab_size differs: checkpoint 50, pipeline 51",
    ]
    assert not validate_checkpoint_compatibility(detected, {})[0]
