"""The Python face: every use that rwkv-trainer's documentation shows, scaled down, and what it may never do."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rwkv_cluster
from rwkv_cluster import (
    DataConfig,
    GenericTokenizer,
    IntegerTokenizer,
    ModelConfig,
    RWKVTrainingPipeline,
    TrainingConfig,
    create_vocab_file_from_tokens,
)
from rwkv_cluster.cli import main
from rwkv_cluster.config import CheckpointConfig, Config, LoggingConfig
from rwkv_cluster.config.loader import dump_yaml, load_config
from rwkv_cluster.data.binidx import open_tokens
from rwkv_cluster.errors import CheckpointError, ConfigError, DataError
from rwkv_cluster.model.weights_file import load_pth, save_pth

PUBLIC_NAMES = """
    RWKVTrainingPipeline ModelConfig TrainingConfig DataConfig inspect_rwkv_checkpoint load_checkpoint_for_training
    validate_checkpoint_compatibility DetectedModelConfig NumpyToJsonlConverter JsonlToBinIdxConverter DataPipeline
    BaseTokenizer GenericTokenizer AngleTokenizer IntegerTokenizer create_vocab_file_from_tokens
    create_default_vocab_file
""".split()  # noqa: SIM905 -- a list of words reads better

TINY_MODEL = ModelConfig("x070", 1, 32, 16, head_size_a=16)
TINY_TRAINING = TrainingConfig(
    micro_bsz=4, precision="fp32", grad_cp=0, warmup_steps=1, max_steps=2, num_threads=1, lr_init=1e-3
)
DATA = np.arange(400).reshape(20, 20) % 100


def tiny(work_dir: Path, **changes: Any) -> RWKVTrainingPipeline:
    """A pipeline whose run takes a fraction of a second."""
    arguments: dict[str, Any] = {
        "model_config": TINY_MODEL,
        "training_config": TINY_TRAINING,
        "data_config": DataConfig(16, 1, num_workers=1),
    }
    return RWKVTrainingPipeline(work_dir, **{**arguments, **changes})


def write_lines(path: Path, texts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def trained_weights(work_dir: Path, model: ModelConfig) -> Path:
    """A weights file of `model`, as another program might have left it."""
    pipeline = tiny(work_dir, model_config=model)
    pipeline.prepare_data(DATA)
    path = pipeline.initialize_model()
    return path.rename(work_dir / "RWKV-any name-1B5.pth")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished run of integers 0 to 999."""
    work_dir = tmp_path_factory.mktemp("finished") / "work"
    pipeline = tiny(work_dir, tokenizer=IntegerTokenizer(max_value=999))
    pipeline.train(DATA)
    return work_dir


@pytest.fixture
def copy_of_finished(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_the_public_names_of_rwkv_trainer() -> None:
    assert len(PUBLIC_NAMES) == 17
    for name in PUBLIC_NAMES:
        assert getattr(rwkv_cluster, name).__name__ == name
    assert set(PUBLIC_NAMES) < set(rwkv_cluster.__all__) == set(dir(rwkv_cluster))
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        rwkv_cluster.Pipeline  # noqa: B018


@pytest.mark.system
def test_one_line_in_a_fresh_directory(tmp_path: Path) -> None:
    """The default model (x060, 3 layers, 128 wide, ctx_len 1024, bf16) on this machine's CPU."""
    data = np.arange(4 * 1024).reshape(4, 1024) % 360
    result = RWKVTrainingPipeline(tmp_path / "a" / "work").train(data)
    assert (result.step, result.total_steps) == (1, 1)
    assert result.loss == pytest.approx(np.log(361), abs=0.2)
    config = load_config(tmp_path / "a" / "work" / "configs" / "config.yaml")
    assert (config.model.model_type, config.model.vocab_size, config.training.precision) == ("x060", 361, "bf16")
    weights = load_pth(result.final_path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not torch.equal(weights["head.weight"], load_pth(result.work_dir / "out/rwkv-init.pth")["head.weight"])


def test_arrays(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path / "rows", tokenizer=IntegerTokenizer(max_value=999))
    assert pipeline.model_config.vocab_size == 1001
    assert (pipeline.data_prepared, pipeline.model_initialized) == (False, False)
    assert (pipeline.magic_prime, pipeline.my_exit_tokens, pipeline.data_prefix) == (None, None, None)
    before = DATA.copy()
    info = pipeline.prepare_data(DATA, "train")
    assert np.array_equal(DATA, before)
    assert info == {
        "jsonl_path": tmp_path / "rows/data/train.jsonl",
        "binidx_prefix": tmp_path / "rows/data/train",
        "vocab_path": tmp_path / "rows/data/vocab.txt",
        "num_sequences": 20,
        "total_tokens": 420,
        "magic_prime": 23,
    }
    assert all(Path(f"{info['binidx_prefix']}{suffix}").exists() for suffix in (".bin", ".idx"))
    assert (pipeline.data_prepared, pipeline.magic_prime, pipeline.my_exit_tokens) == (True, 23, 420)
    assert pipeline.data_prefix == info["binidx_prefix"]


def test_a_1_d_array_loses_nothing(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path, tokenizer=IntegerTokenizer(max_value=999))
    info = pipeline.prepare_data(np.arange(100))
    assert (info["num_sequences"], info["total_tokens"]) == (7, 107)
    written = sorted(set(open_tokens(info["binidx_prefix"]).tokens.tolist()))
    assert written == list(range(101))


def test_duplication_is_the_documented_default_of_three(tmp_path: Path) -> None:
    info = tiny(tmp_path, data_config=DataConfig()).prepare_data(DATA)
    assert (info["num_sequences"], info["total_tokens"]) == (60, 1260)


def test_an_npy_file(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", DATA)
    assert tiny(tmp_path / "w").prepare_data_from_file(tmp_path / "d.npy")["total_tokens"] == 420


@pytest.mark.parametrize("name", ["my_data.jsonl", "my_data.txt", "my_data"])
def test_integer_lines_in_a_file_of_any_name(name: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / name, [" ".join(map(str, row)) for row in DATA])
    pipeline = tiny(tmp_path / "w")
    info = pipeline.prepare_data_from_jsonl(str(path), n_epochs=2)
    assert (info["num_sequences"], info["total_tokens"]) == (40, 840)
    assert info["jsonl_path"].read_bytes() == path.read_bytes()
    assert pipeline.train(num_epochs=1).step == 2


def test_text_lines_with_a_vocabulary_file(tmp_path: Path) -> None:
    create_vocab_file_from_tokens(["hello", "world", "foo", "bar", " "], str(tmp_path / "vocab.txt"))
    path = write_lines(tmp_path / "text.jsonl", ["hello world foo bar " * 20] * 3)
    pipeline = tiny(tmp_path / "w")
    with pytest.raises(DataError, match=r"text\.jsonl:1: byte 0: 'hello' is not a number.*generic tokenizer"):
        pipeline.prepare_data_from_jsonl(path)
    pipeline.prepare_data_from_jsonl(path, vocab_file_path=tmp_path / "vocab.txt")
    assert pipeline.train().step == 2
    assert (pipeline.model_config.vocab_size, type(pipeline.tokenizer)) == (6, GenericTokenizer)
    again = RWKVTrainingPipeline(tmp_path / "w")
    assert (again.model_config.vocab_size, again.tokenizer.decode([1, 5, 2])) == (6, "hello world")


def test_the_example_of_a_generic_tokenizer(tmp_path: Path) -> None:
    create_vocab_file_from_tokens(["hello", "world", " ", "!"], tmp_path / "vocab.txt")
    assert GenericTokenizer(tmp_path / "vocab.txt").encode("hello world!") == [1, 3, 2, 4]


class Letters:
    """A user's tokenizer: only what is asked of it."""

    vocab_size = 27

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(token + 96) for token in tokens)


def test_conversations_are_prepared_and_trained_on_their_answers(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number}", "completion": "answer " * 5} for number in range(20)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pipeline = tiny(tmp_path / "w", tokenizer="byte")
    info = pipeline.prepare_data_from_jsonl(tmp_path / "chat.jsonl")
    assert info["num_sequences"] == 20
    assert pipeline.manifest is not None
    assert pipeline.manifest.n_trained == 20 * len(" answer answer answer answer answer0")
    assert pipeline.train().step == 2


def test_a_class_with_encode_decode_and_vocab_size(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "letters.jsonl", ["abcxyz" * 20] * 3)
    pipeline = tiny(tmp_path / "w", tokenizer=Letters(), logging_config=LoggingConfig(sample_tokens=5))
    info = pipeline.prepare_data_from_jsonl(path)
    assert open_tokens(info["binidx_prefix"]).tokens[:6].tolist() == [1, 2, 3, 24, 25, 26]
    result = pipeline.train()
    assert result.step == 2
    assert set(result.sample or "") <= set("abcdefghijklmnopqrstuvwxyz")
    assert tiny(tmp_path / "w", tokenizer=Letters()).train(continue_training=True).already_complete


def test_a_tokenizer_that_cannot_be_made_again_must_be_given_again(tmp_path: Path) -> None:
    create_vocab_file_from_tokens(["a", "b"], tmp_path / "v.txt")
    tiny(tmp_path / "w", tokenizer=GenericTokenizer(tmp_path / "v.txt"))
    (tmp_path / "v.txt").rename(tmp_path / "moved.txt")
    with pytest.raises(ConfigError, match=r"generic, cannot be made again.*v\.txt does not exist.*tokenizer=\.\.\."):
        RWKVTrainingPipeline(tmp_path / "w")
    RWKVTrainingPipeline(tmp_path / "w", tokenizer=GenericTokenizer(tmp_path / "moved.txt"))


def test_a_stored_class_is_not_imported_before_the_caller_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "watched.py").write_text(
        f"from test_pipeline import Letters\nopen({str(tmp_path / 'imported')!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_pipeline", sys.modules[__name__])
    data_config = DataConfig(tokenizer={"type": "watched:Letters"})
    (tmp_path / "w" / "configs").mkdir(parents=True)
    (tmp_path / "w" / "configs" / "config.yaml").write_text(dump_yaml(Config(data=data_config)))
    with pytest.raises(ConfigError, match=r"the tokenizer watched:Letters, whose module would be imported.*tokenizer="):
        RWKVTrainingPipeline(tmp_path / "w")
    assert isinstance(RWKVTrainingPipeline(tmp_path / "w", tokenizer=Letters()).tokenizer, Letters)
    assert not (tmp_path / "imported").exists()
    assert isinstance(RWKVTrainingPipeline(tmp_path / "w", data_config=data_config).tokenizer, Letters)
    assert (tmp_path / "imported").exists()


def test_the_tokenizer_of_data_config_counts(tmp_path: Path) -> None:
    data_config = DataConfig(tokenizer={"type": "byte"})
    assert RWKVTrainingPipeline(tmp_path, data_config=data_config).model_config.vocab_size == 257


def test_an_existing_token_file(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = finished / "data" / "train"
    pipeline = tiny(tmp_path, tokenizer=IntegerTokenizer(999), training_config=TrainingConfig(micro_bsz=1, grad_cp=0))
    pipeline.use_existing_data(str(prefix), magic_prime=2, exit_tokens=33)
    assert (pipeline.data_prefix, pipeline.magic_prime, pipeline.my_exit_tokens) == (prefix, 23, 33)
    assert re.search("magic_prime 2 is not used: .*ctx_len 16 .* 23", caplog.text)
    assert not (tmp_path / "data" / "train.bin").exists()
    assert pipeline.train().step == 3
    for missing in ("Bin", "Idx"):
        shutil.copy(f"{prefix}.bin", tmp_path / "Idx.bin")
        with pytest.raises(FileNotFoundError, match=rf"{missing} file not found: .*{missing}\.{missing.lower()}"):
            pipeline.use_existing_data(tmp_path / missing, 23, 420)


def test_step_by_step_equals_one_call(finished: Path, tmp_path: Path) -> None:
    pipeline = tiny(tmp_path, tokenizer=IntegerTokenizer(max_value=999))
    with pytest.raises(DataError, match="prepared before model initialization"):
        pipeline.initialize_model()
    with pytest.raises(DataError, match=r"call prepare_data\(\) first"):
        pipeline.train()
    pipeline.prepare_data(DATA, "train")
    path = pipeline.initialize_model()
    assert path == tmp_path / "out" / "rwkv-init.pth"
    written = path.read_bytes()
    assert pipeline.initialize_model() == path
    assert path.read_bytes() == written
    pipeline.train()
    assert (tmp_path / "out/rwkv-final.pth").read_bytes() == (finished / "out/rwkv-final.pth").read_bytes()
    pipeline.initialize_model(force=True, random_seed=7)
    assert path.read_bytes() != written


def test_a_random_seed_of_the_configuration_is_kept(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path, training_config=TrainingConfig(random_seed=5))
    pipeline.prepare_data(DATA)
    pipeline.initialize_model()
    assert pipeline.training_config.random_seed == 5


def test_num_epochs_are_passes_and_go_on_in_a_new_object(tmp_path: Path) -> None:
    training = TrainingConfig(micro_bsz=8, precision="fp32", grad_cp=0, num_threads=1)
    pipeline = tiny(tmp_path, training_config=training)
    assert pipeline.train(DATA, num_epochs=1).step == 3  # 23 slots, 8 a step
    names = [path.name for path in pipeline.list_checkpoints()]
    assert names == ["rwkv-init.pth", "rwkv-0.pth", "rwkv-final.pth"]
    again = RWKVTrainingPipeline(tmp_path)
    assert again.train(num_epochs=2, continue_training=True).step == 6


@pytest.mark.system
def test_continuing_in_another_process(copy_of_finished: Path) -> None:
    script = (
        "from rwkv_cluster import RWKVTrainingPipeline\n"
        f"pipeline = RWKVTrainingPipeline({str(copy_of_finished)!r})\n"
        "pipeline.training_config = pipeline.training_config.model_copy(update={'max_steps': 4})\n"
        "result = pipeline.train(continue_training=True)\n"
        "print(result.step, pipeline.tokenizer.max_value, pipeline.model_config.n_embd, pipeline.magic_prime)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "4 999 32 23\n"


def test_a_new_object_reads_the_configuration_and_never_writes_it(copy_of_finished: Path) -> None:
    files = {path: path.read_bytes() for path in (copy_of_finished / "configs").iterdir()}
    assert {path.name for path in files} == {"config.yaml", "config.json"}
    again = RWKVTrainingPipeline(str(copy_of_finished))
    assert again.training_config == TINY_TRAINING
    assert again.model_config == ModelConfig("x070", 1, 32, 16, 1001, 16)
    assert (again.data_config.sequence_length, again.tokenizer.max_value) == (16, 999)
    RWKVTrainingPipeline(
        copy_of_finished, ModelConfig(n_layer=12), TrainingConfig(), DataConfig(), Letters(), "project"
    )
    assert {path: path.read_bytes() for path in (copy_of_finished / "configs").iterdir()} == files


def test_another_model_or_other_data_in_a_used_directory_is_refused(copy_of_finished: Path) -> None:
    files = {path: path.read_bytes() for path in copy_of_finished.rglob("*") if path.is_file()}
    wider = tiny(
        copy_of_finished, tokenizer=IntegerTokenizer(999), model_config=ModelConfig("x070", 2, 32, 16, None, 16)
    )
    with pytest.raises(ConfigError, match=r"model\.n_layer: 1 -> 2.*choose another work_dir"):
        wider.train()
    with pytest.raises(DataError, match="choose another work_dir"):
        tiny(copy_of_finished, tokenizer=IntegerTokenizer(999)).train(DATA + 1)
    for name in (".lock", "data/verified.json"):  # who holds it, and what has been verified
        files.pop(copy_of_finished / name)
    assert {path: path.read_bytes() for path in files} == files


def test_a_directory_of_another_program_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/config.json").write_text('{"model": {"n_layer": 12}}')
    with pytest.raises(ConfigError, match="made by another program"):
        RWKVTrainingPipeline(tmp_path)
    assert (tmp_path / "configs/config.json").read_text() == '{"model": {"n_layer": 12}}'


def test_the_callers_objects_are_told_the_vocabulary_and_nothing_else(tmp_path: Path) -> None:
    model, training, data = ModelConfig("x070", 1, 32, 16, 50, 16), TINY_TRAINING, DataConfig(16, 1)
    before = [section.model_dump() for section in (model, training, data)]
    pipeline = RWKVTrainingPipeline(tmp_path, model, training, data, IntegerTokenizer(99))
    pipeline.train(DATA, num_epochs=1, random_seed=3)
    before[0]["vocab_size"] = 101
    assert [section.model_dump() for section in (model, training, data)] == before
    assert pipeline.model_config is model


def test_settings_are_changed_as_in_rwkv_trainer(tmp_path: Path) -> None:
    model = ModelConfig("x070", 1, 32, 16, head_size_a=16)
    pipeline = tiny(tmp_path, model_config=model)
    pipeline.model_config.ctx_len = 8
    model.n_layer = 2
    pipeline.training_config = dataclasses.replace(pipeline.training_config, max_steps=1)
    pipeline.tokenizer = IntegerTokenizer(max_value=999)
    with pytest.raises(ConfigError, match="ctx_len is 0"):
        pipeline.model_config.ctx_len = 0
    result = pipeline.train(DATA)
    stored = load_config(tmp_path / "configs/config.yaml")
    assert (stored.model.ctx_len, stored.model.n_layer, stored.model.vocab_size, result.step) == (8, 2, 1001, 1)
    again = RWKVTrainingPipeline(tmp_path)
    again.training_config.max_steps = 2
    assert again.train(continue_training=True).step == 2
    assert tiny(tmp_path / "other", model_config=stored.model).model_config.vocab_size == 361


def test_attributes_that_scripts_for_rwkv_trainer_set(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = tiny(tmp_path, training_config=TrainingConfig(micro_bsz=1, grad_cp=0))
    pipeline.data_pipeline = rwkv_cluster.DataPipeline(IntegerTokenizer(999))
    assert (pipeline.tokenizer.max_value, pipeline.model_config.vocab_size) == (999, 1001)
    pipeline.my_exit_tokens = 33
    pipeline.data_prefix = finished / "data" / "train"
    pipeline.magic_prime = 23
    assert "is not used" not in caplog.text
    pipeline.magic_prime = 2
    assert re.search("magic_prime 2 is not used: .*ctx_len 16 .* 23", caplog.text)
    pipeline.data_prepared = True
    assert (pipeline.data_prepared, pipeline.my_exit_tokens, pipeline.magic_prime) == (True, 33, 23)
    with pytest.raises(CheckpointError, match=r"there is no .*rwkv-init\.pth\. Call initialize_model\(\)"):
        pipeline.model_initialized = True
    assert pipeline.train().step == 3
    pipeline.model_initialized = True
    pipeline.data_prepared = False
    assert not pipeline.data_prepared


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"work_dir": None}, "work_dir is None, expected a path"),
        ({"work_dir": "$NOWHERE_AT_ALL/run"}, "NOWHERE_AT_ALL is not set"),
        ({"model_config": {"n_layers": 1}}, r"no field 'n_layers'\. Nearest: n_layer"),
        ({"model_config": 3}, r"model_config is 3, expected a ModelConfig\. Write ModelConfig\(\.\.\.\)"),
        ({"training_config": ModelConfig()}, "training_config is ModelConfig.*expected a TrainingConfig"),
        ({"data_config": "a.jsonl"}, "data_config is 'a.jsonl', expected a DataConfig"),
        ({"tokenizer": IntegerTokenizer}, r"class IntegerTokenizer, expected an object .*Write Integer"),
        ({"tokenizer": "bytes"}, "tokenizer type is 'bytes'. Use one of byte"),
        ({"tokenizer": 5}, "tokenizer int has no encode and no decode and no vocab_size"),
        ({"wandb_project": 5}, "wandb_project is 5"),
    ],
)
def test_arguments_of_the_wrong_type_are_told_in_a_sentence(
    arguments: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        RWKVTrainingPipeline(**{"work_dir": "w", **arguments})


def test_sections_as_mappings_and_tokenizers_by_name(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path, model_config=TINY_MODEL.model_dump(), tokenizer="byte")
    assert (pipeline.model_config.n_embd, pipeline.model_config.vocab_size) == (32, 257)


def test_a_data_config_without_a_tokenizer_leaves_integers(tmp_path: Path) -> None:
    data_config = dataclasses.replace(DataConfig(), sequence_length=5)
    assert RWKVTrainingPipeline(tmp_path, data_config=data_config).model_config.vocab_size == 361


def test_what_rwkv_trainer_raises_as_a_runtime_error(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path, model_config=ModelConfig("x070", 1, 32, 512, head_size_a=16))
    text = write_lines(tmp_path / "text.jsonl", ["words"])
    calls: list[Callable[[], object]] = [
        pipeline.train,
        pipeline.initialize_model,
        lambda: pipeline.train_from_checkpoint("a.pth"),
        lambda: pipeline.prepare_data_from_jsonl(text),
        lambda: pipeline.train(DATA),
    ]
    for call in calls:
        with pytest.raises(RuntimeError) as caught:
            call()
        assert isinstance(caught.value, DataError)


def test_continue_training_never_starts_from_the_beginning(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path)
    pipeline.prepare_data(DATA)
    with pytest.raises(CheckpointError, match=r"has no checkpoint\. Call train\(\) without it"):
        pipeline.train(continue_training=True)


@pytest.mark.parametrize("model_type", ["x052", "x060", "x070"])
def test_training_from_a_weights_file_of_each_version(model_type: str, tmp_path: Path) -> None:
    weights = trained_weights(tmp_path / "source", ModelConfig(model_type, 2, 64, 16, None, 32))
    pipeline = tiny(tmp_path / "w", model_config=ModelConfig(ctx_len=8))
    with pytest.raises(DataError, match="prepared before training"):
        pipeline.train_from_checkpoint(weights)
    pipeline.prepare_data(DATA)
    assert pipeline.train_from_checkpoint(checkpoint_path=str(weights), override_config={"lr_init": 2e-3}).step == 2
    model = pipeline.model_config
    assert (model.model_type, model.n_layer, model.n_embd, model.head_size_a) == (model_type, 2, 64, 32)
    assert (model.ctx_len, pipeline.training_config.lr_init) == (8, 2e-3)
    started = load_pth(tmp_path / "w" / "out" / "rwkv-init.pth")
    assert all(torch.equal(started[name], tensor) for name, tensor in load_pth(weights).items())
    stored = load_config(tmp_path / "w" / "configs" / "config.yaml")
    assert (stored.model, stored.training.init_from) == (model, str(weights))
    weights.unlink()
    assert RWKVTrainingPipeline(tmp_path / "w").train(continue_training=True).already_complete


def test_overriding_what_weights_do_not_say(tmp_path: Path) -> None:
    weights = trained_weights(tmp_path / "source", TINY_MODEL)
    pipeline = tiny(tmp_path / "w")
    pipeline.prepare_data(DATA)
    with pytest.raises(ConfigError, match=r"override_config has 'lr_int'.*Nearest: lr_init"):
        pipeline.train_from_checkpoint(weights, override_config={"lr_int": 1})
    with pytest.raises(CheckpointError, match="cannot start this run"):
        pipeline.train_from_checkpoint(weights, override_config={"n_layer": 2})
    pipeline.train_from_checkpoint(weights, override_config={"ctx_len": 4, "n_layer": 1})
    assert pipeline.model_config.ctx_len == 4


def test_weights_with_more_rows_than_the_tokenizer_needs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = trained_weights(tmp_path / "source", TINY_MODEL)
    logging_config = LoggingConfig(sample_tokens=20)
    pipeline = tiny(tmp_path / "w", tokenizer=IntegerTokenizer(99), logging_config=logging_config)
    pipeline.prepare_data(DATA)
    sample = pipeline.train_from_checkpoint(weights).sample
    assert sample is not None
    assert all(int(word) <= 99 for word in sample.split())
    assert re.search("361 vocabulary rows, .*uses 101", caplog.text)
    assert RWKVTrainingPipeline(tmp_path / "w").train(continue_training=True).already_complete
    grown = tiny(tmp_path / "grown")
    grown.prepare_data(DATA)
    grown.train_from_checkpoint(weights, override_config={"vocab_size": 384, "new_rows": "zero"})
    assert len(load_pth(grown.output_dir / "rwkv-final.pth")["head.weight"]) == 384
    small = tiny(tmp_path / "small", tokenizer=IntegerTokenizer(999))
    small.prepare_data(DATA)
    with pytest.raises(RuntimeError, match=r"Vocab size mismatch: .* has 361 rows, the tokenizer has 1001 ids"):
        small.train_from_checkpoint(weights)
    with pytest.raises(FileNotFoundError, match="Checkpoint not found: nowhere"):
        small.train_from_checkpoint("nowhere")


def test_weights_from_outside_never_give_way_to_an_older_run(finished: Path, copy_of_finished: Path) -> None:
    pipeline = RWKVTrainingPipeline(copy_of_finished)
    with pytest.raises(ConfigError, match=r"training\.init_from: None -> .*rwkv-final\.pth.*another work_dir"):
        pipeline.train_from_checkpoint(finished / "out" / "rwkv-final.pth")


def test_inspect_checkpoint(finished: Path) -> None:
    info = RWKVTrainingPipeline(finished).inspect_checkpoint(finished / "out" / "rwkv-final.pth")
    assert info["detected_config"] == {
        "n_layer": 1,
        "n_embd": 32,
        "vocab_size": 1001,
        "model_type": "x070",
        "ctx_len": 1024,
        "head_size_a": 16,
    }
    assert info["num_parameters"] == sum(t.numel() for t in load_pth(finished / "out/rwkv-final.pth").values())
    assert info["file_size_mb"] > 0


def test_checkpoints_are_listed_in_the_order_of_training(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path)
    assert (pipeline.list_checkpoints(), pipeline.get_latest_checkpoint()) == ([], None)
    for label in ("10", "init", "9", "final", "stray"):
        save_pth(tmp_path / "out" / f"rwkv-{label}.pth", {"x": torch.zeros(1)})
        latest = pipeline.get_latest_checkpoint()
        assert latest is None or latest.name != "rwkv-init.pth"
    names = [path.name for path in pipeline.list_checkpoints()]
    assert names == ["rwkv-init.pth", "rwkv-9.pth", "rwkv-10.pth", "rwkv-final.pth"]
    assert pipeline.get_latest_checkpoint() == tmp_path / "out" / "rwkv-final.pth"
    (tmp_path / "out" / "rwkv-final.pth").unlink()
    assert pipeline.get_latest_checkpoint() == tmp_path / "out" / "rwkv-10.pth"


def test_every_setting_can_be_given_and_is_stored(tmp_path: Path) -> None:
    pipeline = tiny(
        tmp_path,
        checkpoint_config=CheckpointConfig(keep_last=1, save_interval_steps=1),
        logging_config=LoggingConfig(sample_tokens=4),
        wandb_project="p",
    )
    assert load_config(tmp_path / "configs/config.yaml") == pipeline.config
    stored = json.loads((tmp_path / "configs/config.json").read_text())
    assert (stored["model"]["vocab_size"], stored["vocab_size"], stored["wandb_project"]) == (361, 361, "p")
    assert (pipeline.config.logging.wandb_project, pipeline.config.data.tokenizer.type) == ("p", "integer")
    assert RWKVTrainingPipeline(tmp_path).config == pipeline.config


def test_the_command_line_goes_on_where_python_stopped(
    copy_of_finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(copy_of_finished), "--training.max_steps=3"]) == 0
    assert "done: step 3 of 3" in capsys.readouterr().out
    assert main(["generate", str(copy_of_finished), "--prompt", "1 2", "--tokens", "3"]) == 0
    numbers = [int(word) for word in capsys.readouterr().out.split()]
    assert numbers[:2] == [1, 2]
    assert 2 < len(numbers) <= 5
    assert max(numbers) <= 999


def test_rows_of_different_lengths_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data has rows of different lengths.*as JSONL"):
        tiny(tmp_path).prepare_data([[1, 2], [3]])  # type: ignore[arg-type]


def test_missing_files_are_named(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"JSONL file not found: no\.jsonl"):
        pipeline.prepare_data_from_jsonl("no.jsonl")
    with pytest.raises(FileNotFoundError, match=r"Data file not found: no\.npy"):
        pipeline.prepare_data_from_file("no.npy")


TINY_SCRIPT = """
import logging, sys
import numpy as np
from rwkv_cluster import DataConfig, ModelConfig, RWKVTrainingPipeline, TrainingConfig
if __name__ == "__main__":
    exec(sys.argv[2])
    model, data = ModelConfig("x070", 1, 32, 16, head_size_a=16), DataConfig(16, 1, num_workers=1)
    training = TrainingConfig(micro_bsz=4, precision="fp32", grad_cp=0, max_steps=2, num_threads=1)
    RWKVTrainingPipeline(sys.argv[1], model, training, data).train(np.arange(400).reshape(20, 20) % 100)
"""


@pytest.mark.system
@pytest.mark.parametrize(
    ("setup", "n_times"),
    [
        ("pass", 1),
        pytest.param("logging.basicConfig(level=logging.INFO)", 1, marks=pytest.mark.slow),
        ("logging.getLogger('rwkv_cluster').setLevel(logging.WARNING)", 0),
        pytest.param("logging.getLogger('rwkv_cluster').addHandler(logging.NullHandler())", 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_says_on_stderr_what_it_does_unless_logging_is_set_up(setup: str, n_times: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TINY_SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "work"), setup]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr.count("step 2/2: loss")) == ("", n_times)
    assert run.stderr.count("starting: x070") == n_times


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("rwkv_cluster").setLevel(logging.WARNING)
    tiny(tmp_path).train(DATA)
    assert capfd.readouterr().out == ""
