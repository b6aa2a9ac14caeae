"""Config: typed, frozen, checked; the words and defaults that RWKV users know."""

from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from rwkv_cluster.config import Config, DataConfig, ModelConfig, Section, TokenizerConfig, TrainingConfig


def sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation)


def test_positional_order_and_defaults_of_rwkv_trainer() -> None:
    model = ModelConfig("x070", 6, 256, 512, 65536, 32)
    assert model == ModelConfig(
        model_type="x070", n_layer=6, n_embd=256, ctx_len=512, vocab_size=65536, head_size_a=32
    )
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
    with pytest.raises(ValidationError, match="not permitted"):
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
    with pytest.raises(ValidationError, match=advice):
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
    with pytest.raises(ValidationError, match="not both"):
        TrainingConfig(global_batch_size=8, accumulate_grad_batches=2)
    with pytest.raises(ValidationError, match="vocab_file is not set"):
        TokenizerConfig(type="generic")
    with pytest.raises(ValidationError, match="tokenizer type is 'bytes'"):
        TokenizerConfig(type="bytes")
    assert TokenizerConfig(type="my.module:Tokenizer").type == "my.module:Tokenizer"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        TrainingConfig(lr_init=value)
