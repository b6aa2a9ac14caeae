"""Weights files: exact round trips, damage and malice refused by name, architecture read back."""

import io
import os
import pickle
import random
import re
import subprocess
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import VERSIONS, tiny_model, tiny_model_config

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.errors import CheckpointError, MissingCheckpointError, RWKVClusterError
from rwkv_cluster.model import weights_file
from rwkv_cluster.model.parameter_shapes import model_dims
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import expected_shapes, fit_state_dict, infer_model_config, load_pth, save_pth


def assert_equal(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name


# --- round trips


@pytest.mark.parametrize("model_type", VERSIONS)
def test_export_and_import_back(tmp_path, model_type):
    model = tiny_model(model_type)
    save_pth(tmp_path / "m.pth", model.state_dict())
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in content.items()} == expected_shapes(model.config)
    loaded = load_pth(tmp_path / "m.pth")
    assert_equal(loaded, model.state_dict())
    other = RWKV(infer_model_config(loaded))
    other.load_state_dict(fit_state_dict(loaded, other))
    assert_equal(other.state_dict(), model.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pth"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_dtype(tmp_path, dtype):
    model = tiny_model("x070")
    save_pth(tmp_path / "m.pth", model.state_dict(), dtype)
    loaded = load_pth(tmp_path / "m.pth")
    assert {tensor.dtype for tensor in loaded.values()} == {dtype}
    fitted = fit_state_dict(loaded, model)
    other = RWKV(model.config)
    other.load_state_dict(fitted)
    assert {tensor.dtype for tensor in other.state_dict().values()} == {torch.float32}
    assert torch.equal(other.emb.weight, model.emb.weight.detach().to(dtype).float())


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    for name in ("rwkv-0.pth", "another-name.pth"):
        save_pth(tmp_path / name, tiny_model("x060").state_dict(), torch.bfloat16)
    assert (tmp_path / "rwkv-0.pth").read_bytes() == (tmp_path / "another-name.pth").read_bytes()


def test_a_view_is_stored_without_its_buffer(tmp_path):
    buffer = torch.zeros(1_000_000)
    save_pth(tmp_path / "m.pth", {"a": buffer[:10], "b": buffer[10:30].view(4, 5).t()})
    assert (tmp_path / "m.pth").stat().st_size < 5000
    assert load_pth(tmp_path / "m.pth")["b"].shape == (5, 4)


def test_parameters_and_ordered_dicts_load(tmp_path):
    torch.save(OrderedDict(a=torch.nn.Parameter(torch.ones(3))), tmp_path / "m.pth")
    assert not load_pth(tmp_path / "m.pth")["a"].requires_grad


def test_not_finite_is_never_written(tmp_path):
    save_pth(tmp_path / "m.pth", {"a": torch.full((9,), 3e38)})  # finite, though its sum is not
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match=r"second .*NaN"):
            save_pth(tmp_path / "n.pth", {"first": torch.ones(2), "second": torch.tensor([1.0, bad])})
    assert not (tmp_path / "n.pth").exists()


def test_an_unwritable_place_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent/m\.pth cannot be written: No such file"):
        save_pth(tmp_path / "absent" / "m.pth", {"a": torch.ones(1)})


# --- damage


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pth") / "whole.pth"
    model = tiny_model("x070", n_embd=16, vocab_size=20)
    save_pth(path, model.state_dict())
    return path


def test_a_flipped_bit_is_found(tmp_path, whole_file):
    """300 flips anywhere: an error, or (in padding and dates of the archive) exactly the same tensors."""
    content, wanted, found = whole_file.read_bytes(), load_pth(whole_file), 0
    choice = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        (tmp_path / "m.pth").write_bytes(damaged)
        try:
            assert_equal(load_pth(tmp_path / "m.pth"), wanted)
        except CheckpointError as error:
            found += str(error).startswith(str(tmp_path / "m.pth"))
    assert found > 200


def test_every_flip_inside_a_tensor_is_found(tmp_path, whole_file):
    content = whole_file.read_bytes()
    with zipfile.ZipFile(whole_file) as archive:
        records = [record for record in archive.infolist() if "/data/" in record.filename]
    for record in records[:40]:
        offset = content.index(record.filename.encode(), record.header_offset) + len(record.filename)
        damaged = bytearray(content)
        padding = int.from_bytes(content[record.header_offset + 28 : record.header_offset + 30], "little")
        damaged[offset + padding + record.file_size // 2] ^= 1
        (tmp_path / "m.pth").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"m\.pth: damaged"):
            load_pth(tmp_path / "m.pth")


def test_truncation_is_found(tmp_path, whole_file):
    content = whole_file.read_bytes()
    for i in range(20):
        (tmp_path / "m.pth").write_bytes(content[: len(content) * i // 20])
        with pytest.raises(CheckpointError, match=r"m\.pth: (damaged or truncated|not a weights file|it is empty)"):
            load_pth(tmp_path / "m.pth")


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(MissingCheckpointError, match="no such weights file"):
        load_pth(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match=": a folder"):
        load_pth(tmp_path)


# --- malice


class Reduce:
    """Pickles into a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(canary):
    command = f"touch {canary}"
    return {
        "posix.system": Reduce(os.system, command),
        "builtins.eval": Reduce(eval, f"__import__('os').system({command!r})"),
        "builtins.getattr": Reduce(getattr, Reduce(__import__, "os"), "system"),
        "subprocess.Popen": Reduce(subprocess.Popen, ["touch", str(canary)]),
        "pickle.loads": {"storage": Reduce(pickle.loads, pickle.dumps(Reduce(os.system, command)))},
    }


def save_unchecked(path, value, **options):
    with open(path, "wb") as handle:
        torch.save(value, handle, **options)


@pytest.mark.parametrize(
    ("name", "written_as"),
    [
        ("posix.system", "posix.system"),
        ("builtins.eval", "__builtin__.eval"),
        ("builtins.getattr", "__builtin__."),  # also __import__, whichever comes first
        ("subprocess.Popen", "commands.Popen|subprocess.Popen"),
        ("pickle.loads", "_?pickle.loads"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_code_is_refused_and_not_run(tmp_path, name, written_as, protocol):
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    value = {"emb.weight": torch.ones(2), "bias": attacks(canary)[name]}
    save_unchecked(path, value, pickle_protocol=protocol)
    written = written_as if protocol == 2 else f"{written_as}|{name}|builtins"
    with pytest.raises(CheckpointError, match=rf"evil\.pth: refused: .* '({written})") as caught:
        load_pth(path)
    assert not canary.exists()
    assert "\n" not in str(caught.value)


def test_torch_load_itself_refuses_what_the_list_lets_through(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_file, "TENSOR_BUILDERS", re.compile(".*"))
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    save_unchecked(path, attacks(canary)["posix.system"])
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused: .*posix\.system"):
        load_pth(path)
    assert not canary.exists()


def test_the_refusal_never_advises_to_switch_the_protection_off(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:  # a valid pickle with an opcode that torch.load lacks
        archive.writestr("archive/data.pkl", b"\x80\x02P0\n.")
        archive.writestr("archive/version", b"3\n")
    with pytest.raises(CheckpointError, match=r"m\.pth: refused: it is not a flat dict of tensors") as caught:
        load_pth(tmp_path / "m.pth")
    assert "weights_only" not in str(caught.value)


def test_the_legacy_format_is_refused(tmp_path):
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    save_unchecked(path, attacks(canary)["posix.system"], _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused: .* before torch 1\.6"):
        load_pth(path)
    path.write_bytes(pickle.dumps(attacks(canary)["posix.system"]))
    with pytest.raises(CheckpointError, match=r"before torch 1\.6"):
        load_pth(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([torch.ones(1)], "holds a list, expected a flat dict"),
        (torch.ones(1), "holds a Tensor, expected a flat dict"),
        ({"model": {"emb.weight": torch.ones(1)}}, "a trainer's checkpoint, which has its weights under 'model'"),
        ({"epoch": 3}, "'epoch' is a int, expected a tensor"),
        ({7: torch.ones(1)}, "has the key 7"),
        ({"step": torch.ones(1, dtype=torch.int64)}, r"'step' has dtype torch\.int64"),
        ({"sparse": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor', where only dense tensors"),
        ({"huge": torch.zeros(1).expand(10**9)}, "'huge' claims more values"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_only_a_flat_dict_of_tensors(tmp_path, value, reason):
    save_unchecked(tmp_path / "m.pth", value)
    with pytest.raises(CheckpointError, match=rf"m\.pth: .*({reason})"):
        load_pth(tmp_path / "m.pth")


def test_compressed_and_doubled_records_are_refused(tmp_path, whole_file):
    with zipfile.ZipFile(whole_file) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records:
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="compressed"):
        load_pth(tmp_path / "m.pth")
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        for name, content in records:
            archive.writestr(name, content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(*records[0])
    with pytest.raises(CheckpointError, match="two records"):
        load_pth(tmp_path / "m.pth")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_header_and_pickle(tmp_path, data):
    """Any bytes for the pickle, under a valid checksum, or over the file's head: tensors or our error."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, buffer)
    path = tmp_path / "fuzz.pth"
    if data.draw(st.booleans()):
        content = bytearray(buffer.getvalue())
        start = data.draw(st.integers(0, 200))
        patch = data.draw(st.binary(min_size=1, max_size=40))
        content[start : start + len(patch)] = patch
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                content = bytearray(source.read(name))
                if name.endswith("data.pkl"):
                    start = data.draw(st.integers(0, len(content)))
                    patch = data.draw(st.binary(max_size=20))
                    content[start : start + len(patch)] = patch
                target.writestr(name, bytes(content))
    found = None
    try:
        loaded = load_pth(path)
        assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.values())
        infer_model_config(loaded)
    except RWKVClusterError as error:
        found = str(error)
    assert found is None or "\n" not in found


# --- architecture from the weights

CONFIGS = [
    {"model_type": "x052"},
    {"model_type": "x052", "dim_att": 16, "dim_ffn": 40},
    {"model_type": "x060", "mix_lora_rank": 8, "decay_lora_rank": 24},
    {"model_type": "x060", "head_size_a": 8, "dim_att": 48},
    {"model_type": "x070"},
    {"model_type": "x070", "n_layer": 1},
    {"model_type": "x070", "n_layer": 1, "block0_value_residual": False},
    {
        "model_type": "x070",
        "decay_lora_rank": 24,
        "a_lora_rank": 40,
        "v_lora_rank": 8,
        "gate_lora_rank": 48,
        "head_size_a": 32,
        "block0_value_residual": False,
    },
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_the_architecture_is_read_back(fields):
    config = tiny_model_config(**fields)
    weights = {f"_forward_module.model.{name}": torch.empty(shape) for name, shape in expected_shapes(config).items()}
    found = infer_model_config(weights)
    assert (found.model_type, found.n_layer, found.n_embd) == (
        config.model_type,
        config.n_layer,
        config.n_embd,
    )
    assert (found.vocab_size, found.head_size_a) == (config.vocab_size, config.head_size_a)
    assert expected_shapes(found) == expected_shapes(config)
    if config.model_type != "x052" and config.n_layer > 1:
        assert model_dims(found).decay_rank == model_dims(config).decay_rank


def weights_of(model_type, **changes):
    return dict(tiny_model(model_type, **changes).state_dict())


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({}, "not those of an RWKV: found no tensors"),
        ({"layer.weight": torch.ones(2)}, r"not those of an RWKV: found layer\.weight"),
        ({"emb.weight": torch.ones(2, 2), "blocks.0.att.time_decay": torch.ones(2)}, r"before 5\.2"),
        ({"blocks.0.att.r_k": torch.ones(2, 2)}, r"look like x070 but have no tensor 'emb\.weight'"),
        (weights_of("x070") | {"blocks.0.att.r_k": torch.ones(32)}, "look like x070 but their shapes do not"),
        (weights_of("x060") | {"emb.weight": torch.ones(5)}, "look like x060 but their shapes do not"),
        (weights_of("x070") | {"blocks.0.ffn.key.weight": torch.ones(7, 32)}, "dim_ffn is 7, but x070"),
        (weights_of("x070") | {"blocks.5.ln1.bias": torch.ones(32)}, "blocks up to 5 but no block 2"),
    ],
)
def test_weights_of_something_else(weights, reason):
    with pytest.raises(CheckpointError, match=reason):
        infer_model_config(weights)


def test_differences_are_listed():
    weights = weights_of("x070", n_layer=3)
    weights["emb.weight"] = torch.ones(60, 32)
    with pytest.raises(CheckpointError) as caught:
        fit_state_dict(weights, RWKV(tiny_model_config("x070")))
    message = str(caught.value)
    assert "emb.weight is (60, 32), the model has (50, 32)" in message
    assert "blocks.2.ln1.weight is not part" in message
    assert "more. Set model.*" in message
    weights = weights_of("x060")
    del weights["head.weight"]
    with pytest.raises(CheckpointError, match=r"head\.weight is missing"):
        fit_state_dict(weights, RWKV(tiny_model_config("x060")))


def test_not_finite_is_never_restored():
    weights = weights_of("x052")
    weights["ln_out.bias"][3] = float("nan")
    with pytest.raises(CheckpointError, match=r"ln_out\.bias has a NaN"):
        fit_state_dict(weights, RWKV(tiny_model_config("x052")))


def test_block_0_value_residual_is_optional_both_ways():
    without = RWKV(tiny_model_config("x070", block0_value_residual=False))
    fitted = fit_state_dict(weights_of("x070"), without)
    assert fitted.keys() == without.state_dict().keys()
    full = RWKV(tiny_model_config("x070"))
    full.load_state_dict(fit_state_dict(fitted, full))
    assert all(parameter.isfinite().all() for parameter in full.parameters())
    assert not full.blocks[0].att.v1.any()
    assert full.blocks[0].att.v2.any()


def test_the_default_configuration_needs_no_vocabulary_to_describe_weights():
    assert ModelConfig().vocab_size is None  # infer_model_config always sets it
    assert infer_model_config(weights_of("x060")).vocab_size == 50
