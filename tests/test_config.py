"""Config: typed, frozen, checked; the words and defaults that RWKV users know."""

# ruff: noqa: E501 -- one case of a table a line reads better

import pickle
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from rwkv_cluster.config import Config, DataConfig, ModelConfig, Section, TokenizerConfig, TrainingConfig
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
    expected = (6e-4, 6e-5, 10, 0.9, 0.99, 1e-18, 0.001, 16, 1, 1, "bf16")
    names = list(TrainingConfig.model_fields)[: len(expected)]
    assert names[0] == "lr_init"
    assert tuple(getattr(training, name) for name in names) == expected
    assert (DataConfig().sequence_length, DataConfig().n_epochs_duplication) == (1024, 3)
    assert (DataConfig(7, 2).sequence_length, DataConfig(7, 2).n_epochs_duplication) == (7, 2)


def test_too_many_positional_arguments() -> None:
    with pytest.raises(TypeError, match="at most 3 arguments"):
        TokenizerConfig("byte", None, 5, 6)


@pytest.mark.parametrize("section", list(sections(Config)))
def test_every_field_is_described_and_every_section_frozen(section: type[Section]) -> None:
    assert section.__doc__
    assert all(field.description for field in section.model_fields.values())
    instance = section()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(instance, next(iter(section.model_fields)), 1)
    with pytest.raises(ConfigError, match=rf"{section.__name__}: there is no field 'no_such_field'\. Fields: "):
        section(no_such_field=1)


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"n_embd": 96}, "n_embd 64 or 128"),
        ({"n_embd": 100}, "n_embd 64 or 128"),
        ({"n_embd": 32}, "Use n_embd 64, or"),
        ({"dim_att": 100}, "dim_att 64 or 128"),
        ({"model_type": "x070", "dim_att": 64}, "Remove dim_att"),
        ({"model_type": "x070", "dim_ffn": 300}, r"4 \* n_embd \(512\)"),
        ({"n_embd": 8, "head_size_a": 8}, "too small for the default dim_ffn"),
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        TrainingConfig(lr_init=value)


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        (ModelConfig, {"n_layers": 2}, "ModelConfig: there is no field 'n_layers'. Nearest: n_layer"),
        (ModelConfig, {"model_type": "x080"}, "ModelConfig: model_type is 'x080'. Input should be 'x052', 'x060' or 'x070'"),
        (TrainingConfig, {"micro_bsz": 0}, "TrainingConfig: micro_bsz is 0. Input should be greater than or equal to 1"),
        (Config, {"model": {"n_layer": 0}}, "Config: model.n_layer is 0. Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_a_mistake_in_python_is_one_sentence(section: type[Section], values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert str(caught.value) == sentence
    assert str(pickle.loads(pickle.dumps(caught.value))) == sentence


def test_two_mistakes_are_two_lines_and_twice_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(n_layer=0, ctx_len=0)
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(TypeError, match="model_type twice"):
        ModelConfig("x070", model_type="x060")
