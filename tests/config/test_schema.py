"""Config: typed, frozen, checked; the words and defaults that RWKV users know."""

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rwkv_cluster.config import Config, DataConfig, ModelConfig, Section, TokenizerConfig, TrainingConfig
from rwkv_cluster.config.field_types import describe_type, iterate_fields
from rwkv_cluster.config.loader import parse_config
from rwkv_cluster.errors import ConfigError


def sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation)


def test_positional_order_and_defaults_of_rwkv_trainer() -> None:
    model = ModelConfig("x070", 6, 256, 512, 65536, 32)
    assert model == ModelConfig(model_type="x070", n_layer=6, n_embd=256, ctx_len=512, vocab_size=65536, head_size_a=32)
    training = TrainingConfig()
    expected = (6e-4, 6e-5, 10, 0.9, 0.99, 1e-18, 0.001, 16, "auto", 1, "bf16")
    names = list(TrainingConfig.model_fields)[: len(expected)]
    assert names[0] == "lr_init"
    assert tuple(getattr(training, name) for name in names) == expected
    assert (DataConfig().sequence_length, DataConfig().n_epochs_duplication) == (1024, 3)
    assert (DataConfig(7, 2).sequence_length, DataConfig(7, 2).n_epochs_duplication) == (7, 2)


def test_too_many_positional_arguments() -> None:
    with pytest.raises(TypeError, match="at most 5 arguments"):
        TokenizerConfig("byte", None, 5, None, None, 6)


@pytest.mark.parametrize("section", list(sections(Config)))
def test_every_field_is_described_and_unknown_ones_are_refused(section: type[Section]) -> None:
    assert section.__doc__
    assert all(field.description for field in section.model_fields.values())
    with pytest.raises(ConfigError, match=rf"{section.__name__}: .*no field 'no_such_field'\. Fields: "):
        section(no_such_field=1)


def instances(section: Section) -> Iterator[Section]:
    yield section
    for _, value in section:
        if isinstance(value, Section):
            yield from instances(value)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_whole_configuration_is_frozen_in_every_part(copied: Callable[[Config], Config]) -> None:
    parts = list(instances(copied(Config())))
    assert len(parts) == len(list(sections(Config)))
    for part in parts:
        name = next(iter(type(part).model_fields))
        with pytest.raises(ConfigError, match=rf"{type(part).__name__}\.{name} belongs to a whole"):
            setattr(part, name, getattr(part, name))


def test_a_section_of_ones_own_is_checked_when_a_field_is_set() -> None:
    model = ModelConfig()
    model.n_layer = 5
    assert (model, model.model_fields_set) == (ModelConfig(n_layer=5), {"n_layer"})
    for name, value in {"n_layer": 0, "n_embd": 100, "n_layers": 2, "model_type": "x080"}.items():
        with pytest.raises(ConfigError, match=r"ModelConfig: |multiple of head_size_a"):
            setattr(model, name, value)
    assert model == ModelConfig(n_layer=5)
    config = Config(model=model)
    model.n_layer = 7
    assert config.model.n_layer == 5
    thawed = config.data.thawed()
    thawed.tokenizer.type = "integer"
    assert (config.data.tokenizer.type, thawed.tokenizer.type) == ("byte", "integer")


def test_sections_are_dataclasses_to_the_dataclasses_module() -> None:
    model = ModelConfig("x070", 2, 64)
    assert dataclasses.replace(model, n_layer=4) == ModelConfig("x070", 4, 64)
    assert ModelConfig(**dataclasses.asdict(model)) == model
    assert Config(**dataclasses.asdict(Config(model=model))) == Config(model=model)
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    assert (fields["n_layer"], fields["vocab_size"]) == (3, None)
    with pytest.raises(ConfigError, match="n_layer is 0"):
        dataclasses.replace(Config().model, n_layer=0)
    with pytest.raises(ConfigError, match="n_layer is 0"):
        model.__replace__(n_layer=0)  # copy.replace of Python 3.13


def test_paths_may_be_path_objects_and_have_their_variables_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert DataConfig(inputs=[Path("a.jsonl"), "~/b", "${SCRATCH}/*.txt"]).inputs == [
        "a.jsonl",
        "/home/me/b",
        "/scratch/*.txt",
    ]
    assert TrainingConfig(init_from=Path("$SCRATCH/a.pth")).init_from == "/scratch/a.pth"
    assert TokenizerConfig("generic", Path("~/v.txt")).vocab_file == "/home/me/v.txt"
    assert Config(work_dir="$SCRATCH/run").work_dir == "/scratch/run"
    assert Config(work_dir="price-$(5) a$").work_dir == "price-$(5) a$"
    for text, words in {
        "$NOWHERE/run": "NOWHERE is not set",
        "a/${EMPTY}/b": "EMPTY is empty",
        "~no-such-user/a": "'~no-such-user/a', .*home directory",
    }.items():
        with pytest.raises(ConfigError, match=words):
            Config(work_dir=text)
        (tmp_path / text).mkdir(parents=True)
        assert Config(work_dir=text).work_dir == text


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"n_embd": 96}, "n_embd 64 or 128"),
        ({"n_embd": 100}, "n_embd 64 or 128"),
        ({"n_embd": 32}, "Use n_embd 64, or"),
        ({"dim_att": 100}, "dim_att 64 or 128"),
        ({"model_type": "x052", "head_size_a": 1}, r"before RWKV-5\.2\. .*2 or more"),
        ({"model_type": "x070", "dim_att": 64}, "Remove dim_att"),
        ({"model_type": "x070", "dim_ffn": 300}, r"4 \* n_embd \(512\)"),
        ({"n_embd": 8, "head_size_a": 8}, "n_embd 8 .*too small .*dim_ffn"),
    ],
)
def test_widths_that_do_not_fit_are_refused_with_what_would(values: dict[str, object], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        ModelConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"n_embd": 96, "head_size_a": 32},
        {"n_embd": 8, "head_size_a": 8, "dim_ffn": 32},
        {"model_type": "x070", "n_embd": 8, "head_size_a": 8},
        {"model_type": "x070", "dim_att": 128, "dim_ffn": 512},
        {"model_type": "x052", "dim_att": 192},
        {"n_layer": 1},
    ],
)
def test_widths_that_fit(values: dict[str, object]) -> None:
    model = ModelConfig(**values)
    assert {name: getattr(model, name) for name in values} == values


def test_rules_between_fields() -> None:
    with pytest.raises(ConfigError, match="not both"):
        TrainingConfig(global_batch_size=8, accumulate_grad_batches=2)
    with pytest.raises(ConfigError, match="vocab_file is not set"):
        TokenizerConfig(type="generic")
    with pytest.raises(ConfigError, match="tokenizer type is 'bytes'"):
        TokenizerConfig(type="bytes")
    assert TokenizerConfig(type="my.module:Tokenizer").type == "my.module:Tokenizer"


SIZES = """
    model.n_layer model.n_embd model.ctx_len model.vocab_size model.head_size_a model.dim_att model.dim_ffn
    model.mix_lora_rank model.decay_lora_rank model.a_lora_rank model.v_lora_rank model.gate_lora_rank
    data.tokenizer.max_value data.n_epochs_duplication data.num_workers training.micro_bsz training.devices
    training.num_threads training.accumulate_grad_batches training.global_batch_size training.ds_bucket_mb
    training.timeout_s guard.hang_timeout_s logging.sample_tokens
""".split()  # noqa: SIM905 -- a list of words reads better


@pytest.mark.parametrize("name", SIZES)
def test_what_takes_memory_or_time_by_its_size_has_a_largest_value(name: str) -> None:
    field = dict(iterate_fields(Config))[name]
    largest = int(re.findall(r"<= (\d+)", describe_type(field))[-1])
    override = f"{name}={largest + 1}"
    with pytest.raises(ConfigError, match=rf"{name} is {largest + 1}, expected .*<= {largest}"):
        parse_config(b"work_dir: w", "run.yaml", [override])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        TrainingConfig(lr_init=value)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        (ModelConfig, {"n_layers": 2}, r"ModelConfig: .*no field 'n_layers'\. Nearest: n_layer"),
        (ModelConfig, {"model_type": "x080"}, r"ModelConfig: model_type is 'x080'\. .*'x052', 'x060' or 'x070'"),
        (TrainingConfig, {"micro_bsz": 0}, r"TrainingConfig: micro_bsz is 0\. .*greater than or equal to 1"),
        (Config, {"model": {"n_layer": 0}}, r"Config: model\.n_layer is 0\. .*greater than or equal to 1"),
    ],
)
def test_a_mistake_in_python_is_one_sentence(section: type[Section], values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert re.fullmatch(words, str(caught.value))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_two_mistakes_are_two_lines_and_twice_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(n_layer=0, ctx_len=0)
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(TypeError, match="model_type twice"):
        ModelConfig("x070", model_type="x060")
