"""Exports hold the same numbers under each program's names, appear whole or not at all, and replace nothing unasked."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from layout_files import in_layout, write_folder
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_run import losses, tiny_run_config
from torch import Tensor

from rwkv_cluster.commands.exporting import EXPORT_FORMATS
from rwkv_cluster.config import Config
from rwkv_cluster.errors import CheckpointError, ConfigError
from rwkv_cluster.interchange.export import write as exporting
from rwkv_cluster.interchange.export.safetensors_writer import INDEX
from rwkv_cluster.interchange.export.table import FORMATS
from rwkv_cluster.interchange.export.tokenizer_files import CHAT_TEMPLATE
from rwkv_cluster.interchange.export.write import Exported, export
from rwkv_cluster.interchange.layouts import LAYOUTS
from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.tokenizer import GenericTokenizer, world_vocabulary
from rwkv_cluster.tokenizer.world import FILE_NAME
from rwkv_cluster.train.checkpoint.export_source import source_of
from rwkv_cluster.train.run import train

RANKS = {"decay_lora_rank": 8, "a_lora_rank": 24, "v_lora_rank": 16, "gate_lora_rank": 40}
UNUSED = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
FOLDERS = [name for name, format in FORMATS.items() if format.container == "folder"]


@functools.cache
def weights(model_type: str, **changes: Any) -> dict[str, Tensor]:
    """Of two blocks of width 128; x070 with four ranks that differ."""
    ranks = RANKS if model_type == "x070" else {}
    sizes = {"n_embd": 128, "vocab_size": 300, "head_size_a": 64, **ranks, **changes}
    return tiny_model(model_type, **sizes).state_dict()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Writes such weights to MODEL_TYPE.pth."""

    def write(model_type: str = "x070", **changes: Any) -> Path:
        path = tmp_path / f"{model_type}.pth"
        save_pth(path, weights(model_type, **changes))
        return path

    return write


def exported(path: Path, format: str, *, world: bytes | None = None, **options: Any) -> Exported:
    return export(replace(source_of(path), world_vocabulary=world), FORMATS[format], **options)


def native(folder: Path, layout: str) -> dict[str, Tensor]:
    """Tensors of a folder under native names and shapes, by the layout's table."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            own, reshape = LAYOUTS[layout].to_native(name)
            assert own not in found
            swapped = tensor.transpose(-1, -2) if reshape.value == "transpose" else tensor
            found[own] = swapped.reshape(reshape.inward(tuple(tensor.shape)))
    return found


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["fla", "transformers"])
def test_pth_to_folder_and_back_is_the_same_file(layout: str, dtype: str, saved: Callable[..., Path]) -> None:
    path = saved(block0_value_residual=False)
    in_dtype = exported(path, "pth", dtype=dtype, output=path.with_name("wanted.pth")).path
    written = exported(in_dtype, layout)
    assert written.dtype == dtype
    back = native(written.path, layout)
    order = load_pth(in_dtype)
    save_pth(path.with_name("back.pth"), {name: back[name] for name in order})
    assert path.with_name("back.pth").read_bytes() == in_dtype.read_bytes()


@pytest.mark.parametrize("layout", ["fla", "transformers"])
def test_folders_leave_out_what_no_computation_uses(layout: str, saved: Callable[..., Path]) -> None:
    path = saved()
    found, own = native(exported(path, layout).path, layout), load_pth(path)
    assert own.keys() - found.keys() == UNUSED
    assert_same_bits(found, {name: own[name] for name in found})


@pytest.mark.parametrize("model_type", ["x052", "x060", "x070"])
def test_native_files_hold_the_same_bits(model_type: str, saved: Callable[..., Path]) -> None:
    path = saved(model_type)
    written = exported(path, "safetensors")
    assert_same_bits(load_file(written.path), load_pth(path))
    with safe_open(written.path, "pt") as file:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert file.metadata() == {"format": "pt", "source_sha256": digest}
    copy = exported(path, "pth", output=path.with_name("copy.pth"))
    assert copy.path.read_bytes() == path.read_bytes()
    assert copy.files == {"copy.pth": digest}


def swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2)


@pytest.mark.parametrize(
    ("model_type", "renamed"),
    [
        ("x052", {"att.time_faaaa": "att.time_first"}),
        ("x060", {"att.time_maa_w2": "att.time_mix_w2", "ffn.time_maa_r": "ffn.time_mix_r"}),
        ("x070", {"att.w1": "att.w1", "att.x_r": "att.x_r"}),
    ],
)  # fmt: skip
def test_st_has_ai00s_names_shapes_and_type(
    model_type: str, renamed: dict[str, str], saved: Callable[..., Path]
) -> None:
    """Pinned from RWKV-Runner's converter: half precision, and the matrices of LoRAs with their last axes swapped."""
    path = saved(model_type)
    found, own = load_file(exported(path, "st").path), load_pth(path)
    assert len(found) == len(own)
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert not [name for name in found if "maa" in name or "faaaa" in name or name != name.lower()]
    loras = ("w1", "w2", "a1", "a2", "g1", "g2", "v1", "v2")
    for name, other in renamed.items():
        tensor = own[f"blocks.1.{name}"].half()
        wanted = swapped(tensor) if name.endswith(loras) else tensor
        assert torch.equal(found[f"blocks.1.{other}"], wanted), name
    if model_type == "x060":
        assert found["blocks.0.att.time_mix_w2"].shape == (5, 128, 32)
        assert torch.equal(found["blocks.0.att.time_decay_w1"], swapped(own["blocks.0.att.time_decay_w1"].half()))
    if model_type == "x070":
        for name in loras:
            assert torch.equal(found[f"blocks.1.att.{name}"], swapped(own[f"blocks.1.att.{name}"].half())), name


def test_shards_and_their_index(saved: Callable[..., Path]) -> None:
    path = saved()
    limit = 200_000
    written = exported(path, "fla", shard_bytes=limit)
    files = sorted(written.path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    index = json.loads((written.path / INDEX).read_text())
    sizes = {}
    for file in files:
        tensors = load_file(file)
        sizes[file.name] = sum(tensor.nbytes for tensor in tensors.values())
        assert sizes[file.name] <= limit or len(tensors) == 1
        assert {name for name, shard in index["weight_map"].items() if shard == file.name} == tensors.keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    wanted = {name: tensor for name, tensor in load_pth(path).items() if name not in UNUSED}
    assert_same_bits(native(written.path, "fla"), wanted)
    assert written.files == {
        each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in written.path.iterdir()
    }
    assert written.n_bytes == sum(each.stat().st_size for each in written.path.iterdir())


def config_of(written: Exported) -> dict[str, Any]:
    content = json.loads((written.path / "config.json").read_text())
    assert isinstance(content, dict)
    return content


def test_the_configuration_says_every_size(saved: Callable[..., Path]) -> None:
    config = config_of(exported(saved(), "fla", dtype="bf16"))
    ranks = {"decay_low_rank_dim": 8, "a_low_rank_dim": 24, "v_low_rank_dim": 16, "gate_low_rank_dim": 40}
    sizes = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"head_dim": 64, "num_heads": 2, "value_dim": [128, 128], "norm_eps": 1e-5, "hidden_ratio": 4.0}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}
    kind = {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], "torch_dtype": "bfloat16"}
    assert {**config, **ranks, **sizes, **heads, **ids, **kind} == config
    assert "auto_map" not in config


def test_another_head_size_is_corrected_or_refused(saved: Callable[..., Path], world: bytes) -> None:
    path = saved(head_size_a=32, vocab_size=65536, n_layer=1, n_embd=32)
    written = exported(path, "fla")
    assert config_of(written)["norm_eps"] == 2e-5
    assert any("norm_eps is 2e-05" in note for note in written.notes)
    assert config_of(exported(path, "gguf-folder", world=world))["norm_eps"] == 1e-5
    with pytest.raises(ConfigError, match="the head size is 32"):
        exported(path, "transformers")
    assert not path.with_name("x070-transformers").exists()


@pytest.fixture(scope="module")
def world() -> bytes:
    rwkv = pytest.importorskip("rwkv")
    return world_vocabulary(GenericTokenizer(Path(rwkv.__path__[0]) / FILE_NAME))


def test_the_world_vocabulary_is_exported_with_its_bytes(saved: Callable[..., Path], world: bytes) -> None:
    written = exported(saved(), "fla", world=world)
    assert hashlib.sha256((written.path / FILE_NAME).read_bytes()).hexdigest() == (
        "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"
    )
    tokenizer = json.loads((written.path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "RWKV7Tokenizer"
    assert tokenizer["chat_template"] == (written.path / "chat_template.jinja").read_text()
    assert not written.notes
    with pytest.raises(ConfigError, match=r"300 rows .* 65,530 ids"):
        exported(saved(), "gguf-folder", world=world)


def test_another_vocabulary_is_not_exported(saved: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("1 'a' 1\n")
    source = source_of(saved(), tmp_path / "v.txt")
    assert source.world_vocabulary is source.hub_tokenizer is None
    written = exported(saved(), "fla")
    assert {each.name for each in written.path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
    }
    assert "it has no tokenizer" in written.notes[0]
    with pytest.raises(ConfigError, match="World vocabulary only"):
        exported(saved(), "gguf-folder")


@pytest.mark.parametrize(
    ("messages", "options", "text"),
    [
        (
            [("system", "s\r\n\r\n\r\nt\n"), ("user", "\n q\n\n\nr "), ("assistant", "a\n\nb"), ("user", "u")],
            {"add_generation_prompt": True},
            "System: s\nt\n\nUser: q\nr\n\nAssistant: a\n\nb\n\nUser: u\n\nAssistant:",
        ),
        ([("user", "q")], {"add_generation_prompt": True, "enable_thinking": True}, "User: q\n\nAssistant: <think"),
        (
            [("user", "q")],
            {"add_generation_prompt": True, "enable_thinking": False},
            "User: q\n\nAssistant: <think></think",
        ),
        ([("user", "q"), ("tool", "{1}")], {}, "User: q\n\nUser: Function output:\n{1}"),
    ],
)
def test_a_chat_is_the_text_that_the_models_were_trained_on(
    messages: list[tuple[str, str]], options: dict[str, bool], text: str
) -> None:
    turns = [{"role": role, "content": content} for role, content in messages]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders
    assert environment.from_string(CHAT_TEMPLATE).render(messages=turns, **options) == text


def listing(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("format", ["safetensors", "fla"])
def test_the_same_export_again_writes_nothing(format: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    path = saved()
    first = exported(path, format)
    before = listing(tmp_path)
    again = exported(path, format)
    assert again.already_there
    assert not first.already_there
    assert replace(again, already_there=False) == first
    assert listing(tmp_path) == before


@pytest.mark.parametrize("format", ["safetensors", "fla"])
def test_another_content_is_replaced_only_on_demand(format: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    path = saved()
    first = exported(path, format, dtype="bf16")
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match="exists with another content") as caught:
        exported(path, format)
    assert f"{first.n_bytes:,} bytes, would be replaced" in str(caught.value)
    assert listing(tmp_path) == before
    second = exported(path, format, force=True)
    assert second.files != first.files
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".tmp")] == []


def test_shards_of_an_earlier_export_do_not_stay(saved: Callable[..., Path]) -> None:
    path = saved()
    exported(path, "fla", shard_bytes=200_000)
    written = exported(path, "fla", force=True)
    assert {each.name for each in written.path.iterdir()} == written.files.keys()
    assert INDEX not in written.files


@pytest.mark.parametrize("kind", ["folder of somebody", "file", "link"])
def test_what_is_no_export_is_never_replaced(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    path, output = saved(), tmp_path / "there"
    if kind == "folder of somebody":
        output.mkdir()
        (output / "thesis.tex").write_text("x")
    elif kind == "file":
        output.write_text("x")
    else:
        output.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = os.readlink(output) if kind == "link" else listing(tmp_path)
    for format in ("fla", "safetensors") if kind != "file" else ("fla",):  # a file --force may replace by a file
        with pytest.raises(ConfigError, match=r"no file of an export|no (file|folder) that an export writes"):
            exported(path, format, output=output, force=True)
    assert (os.readlink(output) if kind == "link" else listing(tmp_path)) == before


def test_weights_are_not_replaced_by_their_own_export(saved: Callable[..., Path]) -> None:
    path = saved()
    with pytest.raises(ConfigError, match="is what would be"):
        exported(path, "pth", force=True)


@pytest.mark.parametrize("format", ["pth", "st", "fla"])
@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN or infinite"), (1e6, "too large for torch.float16")]
)
def test_a_value_that_cannot_be_is_refused(
    value: float, message: str, format: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    path = saved()
    source = source_of(path)
    tensors = load_pth(path)
    tensors["ln_out.bias"][3] = value
    with pytest.raises(CheckpointError, match=f"ln_out.bias has a .*{message}"):
        export(replace(source, tensors=tensors), FORMATS[format], dtype="fp16", output=tmp_path / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["x070.pth"]


@pytest.mark.parametrize("format", ["fla", "pth"])
def test_what_killed_exports_have_left_goes_with_the_next(
    format: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Unless another export is at it, or it is of another name."""
    source, output = source_of(saved()), tmp_path / "new[1]"
    left, in_use, other = (
        tmp_path / f".tmp-{name}" for name in ("new[1]-0123abcd", "new[1]-4567cdef", "new1-0123abcd")
    )
    for entry in (left, in_use, other):
        if format == "fla":
            entry.mkdir()
            (entry / "model.safetensors").write_bytes(b"some")
        else:
            entry.write_bytes(b"some")
    descriptor = os.open(in_use, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        export(source, FORMATS[format], output=output)
    finally:
        os.close(descriptor)
    assert {each.name for each in tmp_path.glob(".tmp-*")} == {in_use.name, other.name}


def test_an_export_that_ends_half_way_has_no_name(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = saved()
    source = source_of(path)
    tensors, asked = source.tensors, []

    class Ending:
        def __getitem__(self, name: str, /) -> Tensor:
            asked.append(name)
            if len(asked) == 30:
                assert [each.name for each in tmp_path.iterdir() if not each.name.startswith(".tmp-")] == ["x070.pth"]
                raise KeyboardInterrupt
            return tensors[name]

    for format in ("fla", "safetensors"):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            export(replace(source, tensors=Ending()), FORMATS[format])
        assert len(asked) == 30
        assert [each.name for each in tmp_path.iterdir()] == ["x070.pth"]


def test_one_tensor_is_in_memory_at_a_time(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = source_of(saved())
    alive, most = set[int](), [0]

    class Counting:
        def __getitem__(self, name: str, /) -> Tensor:
            tensor = source.tensors[name].clone()
            number = len(most)
            alive.add(number)
            most.append(len(alive))
            weakref.finalize(tensor.untyped_storage(), alive.discard, number)
            return tensor

    for format in ("safetensors", "st", "fla", "transformers"):
        export(replace(source, tensors=Counting()), FORMATS[format], dtype=FORMATS[format].dtype)
    assert len(most) > 4 * 50
    assert max(most) <= 2  # the next is asked for before the last is let go


def test_weights_of_a_run_and_their_vocabulary_are_found(tmp_path: Path) -> None:
    """A weights file knows its work directory's vocabulary and, unlike the folder, keeps its own dtype."""
    out = tmp_path / "work/out"
    out.mkdir(parents=True)
    (tmp_path / "work/configs").mkdir()
    (tmp_path / "work/configs/config.yaml").write_text("model: {ctx_len: 77}\ntraining: {precision: bf16}\n")
    save_pth(out / "rwkv-final.pth", weights("x070"))
    written = exported(tmp_path / "work", "fla")
    assert written.path == out / "rwkv-final-fla"
    assert config_of(written)["max_position_embeddings"] == 77


@pytest.mark.parametrize("layout", ["fla", "transformers", "transformers-rwkv", "rwkv-rs"])
def test_weights_of_any_layout_are_exported(layout: str, tmp_path: Path) -> None:
    tensors = weights("x070", block0_value_residual=False)
    folder = write_folder(tmp_path / "from elsewhere", in_layout(tensors, layout))
    written = exported(folder, "pth")
    assert written.path == tmp_path / "from elsewhere.pth"
    back = load_pth(written.path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert exported(folder, "fla").path == tmp_path / "from elsewhere-fla"


def test_the_digest_of_several_files_is_that_of_their_digests(saved: Callable[..., Path]) -> None:
    shards = exported(saved(), "fla", shard_bytes=100_000).path
    lines = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(shards.glob("*.safetensors"))
    )
    assert source_of(shards).digest == hashlib.sha256(lines.encode()).hexdigest()


def test_a_tokenizer_of_the_hub_is_exported_with_the_weights(saved: Callable[..., Path], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|end|>": 0, "a": 1}, unk_token="<|end|>"))
    tokenizer.add_special_tokens(["<|end|>"])
    path = saved()
    tokenizer.save(str(path.with_name("tokenizer.json")))
    written = exported(path, "fla")
    assert (written.path / "tokenizer.json").read_bytes() == path.with_name("tokenizer.json").read_bytes()
    assert json.loads((written.path / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
    assert not written.notes


def test_added_tokens_are_exported_with_the_world_vocabulary(world: bytes, tmp_path: Path) -> None:
    (tmp_path / "world.txt").write_bytes(world)
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    (work / "configs").mkdir()
    (work / "configs/config.yaml").write_text(
        f"data: {{tokenizer: {{type: world, vocab_file: {tmp_path}/world.txt, added_tokens: ['<|x|>']}}}}\n"
    )
    save_pth(work / "out/rwkv-final.pth", weights("x070"))
    assert source_of(work).world_vocabulary == world + b"65530 '<|x|>' 5\n"


def test_a_disk_that_is_too_small(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkv_cluster.interchange.export import publish

    monkeypatch.setattr(publish, "free_bytes", lambda folder: 1000)
    with pytest.raises(CheckpointError, match=r"no room for .*x070-fla"):
        exported(saved(), "fla")


@pytest.mark.parametrize("model_type", ["x052", "x060"])
@pytest.mark.parametrize("format", FOLDERS)
def test_formats_of_rwkv_7_alone(format: str, model_type: str, saved: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=f"no program reads {model_type} as {format}"):
        exported(saved(model_type), format)


def test_weights_that_are_no_whole_model(saved: Callable[..., Path]) -> None:
    path = saved()
    tensors = load_pth(path)
    del tensors["blocks.1.ffn.x_k"]
    save_pth(path, tensors)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.x_k is not there"):
        exported(path, "safetensors")


def test_the_command_line_lists_the_formats() -> None:
    assert tuple(FORMATS) == EXPORT_FORMATS
    assert exporting.DTYPES.keys() == {"bf16", "fp16", "fp32"}


@pytest.mark.system
@pytest.mark.parametrize("format", ["fla", "transformers", "safetensors"])
def test_a_run_from_an_export_is_the_run_from_what_was_exported(format: str, tmp_path: Path) -> None:
    """To the bit: exported, read again and trained further; fp32, which no format rounds."""
    first = tiny_run_config(tmp_path, model={"n_embd": 128, "head_size_a": 64}, training={"max_steps": 3})
    train(first)
    source = Path(first.work_dir)
    starts = {"pth": source / "out/rwkv-final.pth", format: exported(source, format).path}
    results = []
    for name, start in starts.items():
        folder = tmp_path / name
        folder.mkdir()
        config = tiny_run_config(folder, training={"max_steps": 6, "init_from": str(start)})
        train(Config(**config.model_dump(exclude={"model"}), model={"ctx_len": 32}))  # the weights say all sizes
        results.append(losses(config.work_dir))
    assert results[0] == results[1]
    assert results[0][0] < 5.5
