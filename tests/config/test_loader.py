"""The configuration file: what is read, what is refused and in which words; text and Config agree."""

# ruff: noqa: E501 -- one case of a table a line reads better

import json
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from rwkv_cluster.config import AdapterConfig, Config, Section, TokenizerConfig, TrainingConfig
from rwkv_cluster.config.field_types import is_section, iterate_fields
from rwkv_cluster.config.launch import ContainerConfig, LaunchConfig
from rwkv_cluster.config.loader import (
    DEFAULT,
    MAX_FAULTS,
    dump_json,
    dump_yaml,
    field_table,
    load_config,
    parse_config,
    resolve_config,
)
from rwkv_cluster.config.yaml_reader import MAX_BYTES, parse_scalar
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.terminal.plain_text import hidden_character

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "configuration.md"


def parsed(text: str | bytes, overrides: Sequence[str] = ()) -> Config:
    return parse_config(text.encode() if isinstance(text, str) else text, "run.yaml", overrides).config


def fault(text: str | bytes, overrides: Sequence[str] = ()) -> str:
    """The message that refuses `text`; every line of it must be printable and free of jargon."""
    with pytest.raises(ConfigError) as caught:
        parsed(text, overrides)
    message = str(caught.value)
    assert all(line.isprintable() for line in message.split("\n"))
    assert not any(word in message for word in ("pydantic", "http", "Input should", "Value error", "NoneType"))
    return message


def test_a_file_sets_fields_and_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("work_dir: w\nmodel: {n_layer: 2}\ndata:\n  inputs:\n    - a.txt\n  tokenizer: {type: angle}\n")
    config = load_config(path)
    assert (config.work_dir, config.model.n_layer, config.data.inputs) == ("w", 2, ["a.txt"])
    assert config.data.tokenizer.type == "angle"
    assert config.training == Config().training


def test_a_section_with_every_line_commented_out_is_the_default() -> None:
    assert parsed("work_dir: w\nmodel:\n  # n_layer: 3\n").model == Config().model


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("off", "off"), ("12:30", "12:30"), ("1_000", "1_000"), ("2026-01-01", "2026-01-01"),
        ("<<", "<<"), ("=", "="), ("0b11", "0b11"), ("1e3", 1000.0), ("1e-3", 0.001), ("6e-4", 6e-4), (".5", 0.5),
        ("1.", 1.0), ("-0.5E+2", -50.0), ("0o7", 7), ("0x1F", 31), ("010", 10), ("-3", -3), ("+3", 3), ("true", True),
        ("False", False), ("tRUE", "tRUE"), ("null", None), ("~", None), ("", None), (".inf", float("inf")),
        ("e5", "e5"), (".", "."), ("1.2.3", "1.2.3"), ("0o8", "0o8"), ("+0o7", "+0o7"), ("١", "١"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)


def test_scalars_in_a_file() -> None:
    config = parsed("data: {text_field: no, seed: 0o17}\ntraining: {lr_init: 1e-3, lr_final: 0, beta2: 0.5}\n")
    assert (config.data.text_field, config.data.seed) == ("no", 15)
    assert (config.training.lr_init, config.training.lr_final) == (0.001, 0.0)
    assert type(config.training.lr_final) is float


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  n_layer: six", ("run.yaml:2: model.n_layer", "'six'", ">= 1", "<= 1024")),
        ("model:\n  n_layer: '6'", ("run.yaml:2: model.n_layer", "'6'", "quotes")),
        ("model: {n_layer: 3.0}", ("run.yaml:1: model.n_layer", "3.0", "3")),
        ("model: {n_layer: 3.5}", ("run.yaml:1: model.n_layer", "3.5", ">= 1", "<= 1024")),
        ("model: {n_layer: true}", ("run.yaml:1: model.n_layer", "true", ">= 1", "<= 1024")),
        ("model: {n_layer: null}", ("run.yaml:1: model.n_layer", "null", ">= 1", "<= 1024")),
        ("model:\n  n_layer:\n    - 1", ("run.yaml:2: model.n_layer", "a list", ">= 1", "<= 1024")),
        ("model: {n_layer: {a: 1}}", ("run.yaml:1: model.n_layer", "a section", ">= 1", "<= 1024")),
        ("model: {n_layer: 0}", ("run.yaml:1: model.n_layer", "0", ">= 1", "<= 1024")),
        ("model: {n_layer: 99999999999999999999}", ("run.yaml:1: model.n_layer", "99999999999999999999", "2^63 - 1")),
        ("training:\n\n  beta1: 2", ("run.yaml:3: training.beta1", "2", ">= 0", "< 1")),
        ("training: {lr_init: .nan}", ("run.yaml:1: training.lr_init", ".nan", "finite")),
        ("training: {lr_init: 1e999}", ("run.yaml:1: training.lr_init", "1e999", "finite")),
        ("training: {max_tokens: 1e9}", ("run.yaml:1: training.max_tokens", "1e9", "1000000000")),
        ("training: {max_tokens: 1_000_000}", ("run.yaml:1: training.max_tokens", "'1_000_000'", "1000000")),
        ("training: {max_tokens: 5M}", ("run.yaml:1: training.max_tokens", "'5M'", "5000000")),
        ("checkpoint: {save_interval_s: 10m}", ("run.yaml:1: checkpoint.save_interval_s", "'10m'", "600")),
        ("checkpoint: {save_interval_s: 3 parsecs}", ("run.yaml:1: checkpoint.save_interval_s", "'3 parsecs'", "> 0", "null")),
        ("training: {precision: bf-16}", ("run.yaml:1: training.precision", "'bf-16'", "bf16")),
        ("training: {strategy: dpd}", ("run.yaml:1: training.strategy", "'dpd'", "auto", "deepspeed_stage_3_offload")),
        ("training:\n  strategy: ddp\n  zero_stage: 2", ("run.yaml:2:", "training:", "ddp", "zero_stage", "2")),
        ("training:\n  strategy: deepspeed_stage_1\n  zero_stage: 2", ("run.yaml:2:", "training:", "deepspeed_stage_1", "zero_stage", "2")),
        ("training: {offload_optimizer: true}", ("run.yaml:1:", "training:", "offload_optimizer", "1", "3", "zero_stage")),
        ("training: {offload_parameters: true, zero_stage: 2}", ("run.yaml:1:", "training:", "offload_parameters", "3", "2", "zero_stage", "3")),
        ("training: {precision: fp16, strategy: deepspeed}", ("run.yaml:1:", "training:", "fp16", "ddp", "bf16")),
        ("data: {shuffle: yes}", ("run.yaml:1: data.shuffle", "'yes'", "true")),
        ("data: {shuffle: 0}", ("run.yaml:1: data.shuffle", "0", "false")),
        ("data: {text_field: 5}", ("run.yaml:1: data.text_field", "5", '"5"')),
        ("data: {text_field: true}", ("run.yaml:1: data.text_field", "true", '"true"')),
        ("data: {inputs: a.txt}", ("run.yaml:1: data.inputs", "'a.txt'", "[a.txt]")),
        ("data:\n  inputs:\n    - a\n    - 7", ("run.yaml:4: data.inputs[1]", "7", '"7"')),
        ("work_dir: ''", ("run.yaml:1: work_dir", "''")),
        ("model: 3", ("run.yaml:1: model", "3", "model_type", "block0_value_residual")),
        ("model:\n  n_layers: 3", ("run.yaml:2:", "'n_layers'", "model.n_layer")),
        ("n_layer: 3", ("run.yaml:1:", "'n_layer'", "model.n_layer")),
        ("models:\n  n_layer: 3", ("run.yaml:1:", "'models'", "Nearest: model")),
        ("data:\n  tokenizer:\n    typ: byte", ("run.yaml:3:", "'typ'", "data.tokenizer.type")),
        ("zzz: 3", ("run.yaml:1:", "'zzz'", "work_dir")),
        ("model:\n  n_layer: 2\n  n_embd: 100", ("run.yaml:3:", "model:", "n_embd", "100", "head_size_a", "64", "n_embd", "64", "128", "head_size_a", "100")),
        ("training:\n  global_batch_size: 8\n  accumulate_grad_batches: 2", ("run.yaml:2:", "training:", "global_batch_size", "accumulate_grad_batches")),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place_value_and_remedy(text: str, words: tuple[str, ...]) -> None:
    """Whole sentences are in tests/test_mistakes.py."""
    message = fault(text)
    assert "\n" not in message
    assert re.match(".*".join(map(re.escape, words)), message), message


def test_every_fault_is_told_at_once() -> None:
    message = fault("model:\n  n_layer: six\n  n_embd: 100\n  vocab_size: 1\nwork: x\n")
    expected = [
        r"run\.yaml:2: model\.n_layer is 'six', .*>= 1 and <= 1024",
        r"run\.yaml:5: .*no field 'work'\. Nearest: work_dir",
        r"run\.yaml:4: model\.vocab_size is 1, .*>= 2 and <= 8388608, or null",
    ]
    for line, pattern in zip(message.splitlines(), expected, strict=True):
        assert re.fullmatch(pattern, line)


def test_a_file_of_nothing_but_faults_is_told_in_a_few_lines() -> None:
    message = fault("\n".join(f"work_dirs{number}: 1" for number in range(49_000)))
    assert len(message.splitlines()) == MAX_FAULTS + 1
    assert message.splitlines()[1] == "run.yaml:2: " + message.splitlines()[0].split(": ", 1)[1].replace("0'", "1'")
    assert len(fault(f"? {'x' * 500_000}\n: 1")) < 300
    assert len(fault(f"model: {{model_type: {'x' * 500_000}, n_layer: {'1_' * 250_000}1}}")) < 600


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"---\n", "no settings"),
        (b"[1, 2]", "expected `name: value` lines, found a list"),
        (b"hello", "expected `name: value` lines, found 'hello'"),
        (
            b"a: !!python/object/apply:os.system [touch canary]",
            "run.yaml:1: the tag .*os.system is not allowed",
        ),
        (b"a: !!python/name:os.system ''", "is not allowed"),
        (b"work_dir: !!str w", "is not allowed"),
        (b"!local {a: 1}", "is not allowed"),
        (b"a: &x [*x]", r"\*x stands for nothing"),
        (b"a: *nowhere", r"\*nowhere stands for nothing"),
        (b"a: *.txt", r":1: \*\.txt begins with \*, .* in quotes: '\*\.txt'"),
        (b"a:\n  - **/*.txt", r":2: \*\*/\*\.txt begins with \*"),
        (b"a: [b, *]", r":1: \* begins with \*"),
        (b"a: %b", r":1: %b begins with %"),
        (b"a: &m {b: 1}\nc:\n  <<: *m", r":3: the merge key << .*YAML 1\.2"),
        (
            b"work_dir: a\nmodel: {}\nwork_dir: b",
            r"run.yaml:3: 'work_dir' .*twice .*run.yaml:1\)",
        ),
        (b"a: 1\n---\nb: 2", "run.yaml:2: a second document"),
        (b"model:\n\tn_layer: 3", "run.yaml:2: .*indented with a tab"),
        (b"model: [", "this is not YAML"),
        (b"model: {n_layer: 3\ndata: {}", "run.yaml:2: this is not YAML"),
        (b"a: 'open", "this is not YAML"),
        (b"? [a]\n: 3", "be a field name"),
        (b"work_dir: w\nx: \xff", "run.yaml:2: byte 15 .0xff. is not UTF-8"),
        ("model: {}".encode("utf-16"), "is not UTF-8"),
        (b"a: 1\nb: \x00", r"run.yaml:2: character '\\x00' is not allowed"),
        (b"a: \x1b[31m", "is not allowed"),
        (b'work_dir: "a\\0b"', "escaped character"),
        (b"a: " + b"9" * 10_000, "too many digits"),
        (b"[" * 100_000, "more than 32 deep"),
        (b"{a: " * 100_000, "more than 32 deep"),
        (b"- " * 100_000, "more than 32 deep"),
        (b"a: " + b"x" * MAX_BYTES, "larger than"),
        (b"a: [" + b"1," * 100_001 + b"]", "more than 100000 values"),
    ],
)
def test_hostile_files_are_refused_with_their_reason(
    content: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=expected) as caught:
        parsed(content)
    assert all(line.isprintable() for line in str(caught.value).split("\n"))
    assert not list(tmp_path.iterdir())


def alias_bomb(leaf: str) -> bytes:
    lines = [f"a0: &a0 {leaf}"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 20)]
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (alias_bomb("x"), "values once its aliases"),
        (alias_bomb("x" * 100_000), "characters once its aliases"),
        (b"\n".join([b"a0: &a0 x", *(b"a%d: &a%d [*a%d]" % (n, n, n - 1) for n in range(1, 40))]), "32 deep"),
    ],
)
def test_alias_bombs_stay_small(content: bytes, expected: str) -> None:
    tracemalloc.start()
    with pytest.raises(ConfigError, match=expected):
        parsed(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


def test_honest_aliases_work_and_faults_are_placed_where_the_alias_stands() -> None:
    config = parsed("data: {inputs: [&x a, *x, b]}\nwork_dir: *x\n")
    assert (config.data.inputs, config.work_dir) == (["a", "a", "b"], "a")
    assert fault("work_dir: &x w\nmodel:\n  n_layer: *x").startswith("run.yaml:3: model.n_layer is 'w'")


def test_a_byte_order_mark_and_windows_line_ends_are_harmless() -> None:
    config = parsed(b"\xef\xbb\xbfwork_dir: w\r\nmodel:\r\n  n_layer: 2\r\n")
    assert (config.work_dir, config.model.n_layer) == ("w", 2)


@pytest.mark.parametrize(
    ("name", "expected"), [("none.yaml", "no such file"), (".", "a folder"), ("a\0b", "cannot be read")]
)
def test_files_that_cannot_be_read(name: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(tmp_path / name)


def test_a_device_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        load_config("/dev/zero")


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("model.n_layer=2", "model.n_layer", 2),
        ("--model.n_layer=2", "model.n_layer", 2),
        ("--work_dir=a b: c # d", "work_dir", "a b: c # d"),
        ("--data.tokenizer.type=angle", "data.tokenizer.type", "angle"),
        ("--data.tokenizer={type: integer, max_value: 7}", "data.tokenizer.max_value", 7),
        ("--data.inputs=[a, 'b, c']", "data.inputs", ["a", "b, c"]),
        ("--training.lr_init=1e-3", "training.lr_init", 0.001),
        ("--training.random_seed=-1", "training.random_seed", -1),
        ("--data.text_field=5", "data.text_field", "5"),
        ("--data.text_field='5'", "data.text_field", "5"),
        ("--data.text_field=a=b", "data.text_field", "a=b"),
        ("--checkpoint.save_interval_s=null", "checkpoint.save_interval_s", None),
        ("--data.shuffle=false", "data.shuffle", False),
    ],
)
def test_overrides_win_over_the_file(override: str, field: str, value: object) -> None:
    resolved = parse_config(b"work_dir: w\nmodel: {n_layer: 5}\n", "run.yaml", [override])
    found: Any = resolved.config
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value
    assert resolved.sources[field].startswith("--")


def test_the_last_override_wins_and_a_mapping_leaves_its_neighbours() -> None:
    text = "data: {tokenizer: {type: integer, max_value: 5}}"
    overrides = ["model.n_layer=2", "model.n_layer=4", "data.tokenizer={max_value: 9}"]
    config = parsed(text, overrides)
    assert config.model.n_layer == 4
    assert (config.data.tokenizer.type, config.data.tokenizer.max_value) == ("integer", 9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.n_layer=six", ("--model.n_layer=six: model.n_layer", "'six'", ">= 1", "<= 1024")),
        ("model.n_layer=0", ("--model.n_layer=0: model.n_layer", "0", ">= 1", "<= 1024")),
        ("--model.n_lay=3", ("--model.n_lay=3:", "'n_lay'", "model.n_layer")),
        ("work_dir=", ("--work_dir=: work_dir", "null")),
        ("model.n_layer", ("model.n_layer:", "--section.field=value")),
        ("model..n_layer=3", ("model..n_layer=3:", "--section.field=value")),
        ("=3", ("=3:", "--section.field=value")),
        ("model.n_layer.deep=3", ("run.yaml:2: model.n_layer", "a section", ">= 1", "<= 1024")),
        ("work_dir=a\x1bb", ("--work_dir=a\\x1bb:", "'\\x1b'")),
        ("work_dir=\udcff", ("--work_dir=\\udcff:", "'\\udcff'")),
        ("model.n_embd=100", ("--model.n_embd=100:", "model:", "n_embd", "100", "head_size_a", "64", "n_embd", "64", "128", "head_size_a", "100")),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named(override: str, words: tuple[str, ...]) -> None:
    """As the command line has it, with the value."""
    message = fault("model:\n  n_layer: 5\n", [override])
    assert "\n" not in message
    assert re.match(".*".join(map(re.escape, words)), message), message


def test_sources_name_line_override_or_default(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("work_dir: w\nmodel:\n  n_layer: 2\n")
    resolved = resolve_config(path, ["model.n_embd=64"])
    assert set(resolved.sources) == {name for name, _ in iterate_fields(Config)}
    assert resolved.sources["work_dir"] == f"{path}:1"
    assert resolved.sources["model.n_layer"] == f"{path}:3"
    assert resolved.sources["model.n_embd"] == "--model.n_embd=64"
    assert resolved.sources["model.ctx_len"] == DEFAULT
    text = dump_yaml(resolved.config, resolved.sources)
    assert any(line.startswith("  n_layer: 2 ") and line.endswith(f"# {path}:3") for line in text.splitlines())
    assert parsed(text) == resolved.config


def test_json_holds_every_field() -> None:
    config = Config(work_dir="w")
    values = json.loads(dump_json(config))
    assert (values.pop("wandb_project"), values.pop("vocab_size")) == (None, config.model.vocab_size)
    assert Config(**values) == config


# without what a path has replaced
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0~$"), max_size=12)
ODD_TEXT = st.sampled_from(
    ["no", "1e-3", "007", "0o7", "12:30", "~", "null", "true", "", " x ", "- a", "a: b", "#", "'", '"', "\\", "\n", "\t",
     "%x", "@a", "`", "*a", "&a", "!t", "|", ">", "\ufeff", "\u2028", "\x85", "\x7f", "🎉", "---", "...", "=", "<<", "?"]
)  # fmt: skip


def bounds(field: FieldInfo, low: Any, high: Any) -> dict[str, Any]:
    for constraint in field.metadata:
        low = max(low, getattr(constraint, "ge", low))
        high = min(high, getattr(constraint, "le", getattr(constraint, "lt", high)))
    return {"min_value": low, "max_value": high}


BOUND_TO_OTHERS = (
    "n_embd",
    "head_size_a",
    "dim_att",
    "dim_ffn",
    "accumulate_grad_batches",
    "train",
    "ema_decay",
    "path",
    "added_tokens",
    "zero_stage",
    "offload_optimizer",
    "offload_parameters",
    "schedule",
    "decay_steps",
    "decay_tokens",
    "decay_shape",
    "lr_points",
)


ABOVE_ZERO = ("save_interval_s", "peak_tflops", "ema_decay")


def field_values(name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values that `field` accepts on its own."""
    if name in ("strategy", "type"):
        return st.sampled_from({"strategy": ["auto", "ddp"], "type": ["byte", "angle", "my.module:Class"]}[name])
    if name == "work_dir":
        return TEXT.filter(bool)
    if name == "optimizer":  # adamw8bit wants another adam_eps than the default
        return st.sampled_from(["adamw", "lion", "muon"])
    if name in BOUND_TO_OTHERS:
        return st.just(field.get_default(call_default_factory=True))
    annotation = field.annotation
    optional = type(None) in get_args(annotation)
    kind = next(part for part in get_args(annotation) if part is not type(None)) if optional else annotation
    if get_origin(kind) is Literal:
        values: st.SearchStrategy[Any] = st.sampled_from(get_args(kind))
    elif get_origin(kind) is list:
        values = st.lists(TEXT | ODD_TEXT, max_size=4)
    elif get_origin(kind) is dict:
        values = st.dictionaries(TEXT | ODD_TEXT, st.floats(0.01, 100.0), max_size=3)
    elif kind is bool:
        values = st.booleans()
    elif kind is int:
        values = st.integers(**bounds(field, -(2**63) + 1, 2**63 - 1))
    elif kind is float:
        limits = bounds(field, 0.0, 1e300)
        values = st.floats(**limits, exclude_max=limits["max_value"] == 1.0, exclude_min=name in ABOVE_ZERO)
    else:
        values = TEXT | ODD_TEXT
    return st.none() | values if optional else values


# Rules bind most fields of this section: see tests/launch. Here is what its types add, mappings of odd text above all.
VISIBLE = (TEXT | ODD_TEXT).filter(lambda text: hidden_character(text) is None)
LAUNCH = st.fixed_dictionaries(
    {},
    optional={
        "target": st.sampled_from(["local", "torchrun", "deepspeed", "sbatch"]),
        "time": st.sampled_from(["90", "12:30", "1-00:00:00"]),
        "env": st.dictionaries(st.sampled_from(["A", "NO", "_1"]), VISIBLE),
        "slurm_parameters": st.dictionaries(
            st.sampled_from(["nice", "reservation"]), st.sampled_from(["100", "x", "0o7"])
        ),
        "setup": st.lists(VISIBLE, max_size=3),
        "container": st.just(ContainerConfig(runtime="pyxis", image="a/b:1", mounts=["/a:/b:ro"])),
    },
).map(lambda values: LaunchConfig(**values))


# What only some types take.
ADDED = st.lists((TEXT | ODD_TEXT).filter(bool), unique=True, max_size=4)
HUB = st.builds(lambda path, added: TokenizerConfig(type="hf", path=path, added_tokens=added), TEXT.filter(bool), ADDED)

PATTERNS = st.lists(TEXT | ODD_TEXT, min_size=1, max_size=4)
ADAPTER = st.builds(AdapterConfig, kind=st.just("state"), token_shifts=st.booleans()) | st.builds(
    AdapterConfig,
    kind=st.sampled_from(["lora", "dora", "pissa"]),
    rank=st.integers(1, 64),
    alpha=st.none() | st.floats(0.5, 64.0),
    dropout=st.floats(0.0, 0.9),
    targets=PATTERNS,
)


def section_values(section: type[Section]) -> st.SearchStrategy[Any]:
    if section is LaunchConfig:
        return LAUNCH
    if section is AdapterConfig:
        return ADAPTER
    if section is TokenizerConfig:
        return fields_of(section) | HUB
    return fields_of(section)


def fields_of(section: type[Section]) -> st.SearchStrategy[Any]:
    """A section with some of its fields, each valid on its own."""
    fields = {
        name: section_values(field.annotation) if is_section(field.annotation) else field_values(name, field)
        for name, field in section.model_fields.items()
    }
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: section(**values))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(section_values(Config))
@example(Config(training=TrainingConfig(train=["blocks.*.ffn.*", "no"])))
def test_yaml_text_loads_to_an_equal_config(config: Config) -> None:
    assert parsed(dump_yaml(config)) == config


YAML_SOUP = st.lists(
    st.sampled_from(
        ["model", "data", "n_layer", "inputs", "tokenizer", "type", "work_dir", ":", ": ", "\n", "  ", "- ", "[", "]", "{",
         "}", ",", "&a ", "*a", "!!str ", "!x ", "'", '"', "#", "|", ">", "1", "-1e3", "true", "null", "\t", "---\n",
         "...", "%YAML 1.1\n", "\\", "\ud7ff", "\x00", "é", "? ", "<<", "?", "@", "`"]
    ),
    max_size=30,
).map("".join)  # fmt: skip


def outcome(content: bytes, overrides: Sequence[str] = ()) -> str:
    """The message of the ConfigError, or nothing for a Config. Any other exception is a failure."""
    try:
        assert isinstance(parsed(content, overrides), Config)
    except ConfigError as error:
        return str(error)
    return ""


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | YAML_SOUP.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"model:\n n_layer: 3")
def test_any_bytes_give_a_config_or_a_config_error(content: bytes) -> None:
    message = outcome(content)
    assert message.startswith("run.yaml") or not message
    assert all(line.isprintable() for line in message.split("\n"))


FIELD_NAMES = st.sampled_from([name for name, _ in iterate_fields(Config)]) | st.text(max_size=8)


@settings(max_examples=100, deadline=None)
@given(FIELD_NAMES, st.text(max_size=12) | YAML_SOUP)
@example("model" + ".x" * 5000, "1")
def test_any_override_gives_a_config_or_a_config_error(name: str, value: str) -> None:
    message = outcome(b"model:\n  n_layer: 2\n", [f"--{name}={value}"])
    assert all(line.isprintable() for line in message.split("\n"))


def test_the_documentation_has_every_field_as_it_is() -> None:
    table = field_table()
    assert all(f"| `{name}` |" in table for name, _ in iterate_fields(Config))
    renew = "renew it with: python -m rwkv_cluster.config.loader > docs/configuration.md"
    assert DOCUMENTATION.read_text() == table, f"docs/configuration.md differs from config.py; {renew}"


def test_a_list_of_mappings_reads_back(tmp_path: Path) -> None:
    sweep = [{"training.random_seed": 1}, {"model.n_layer": 2, "data.inputs": ["a b", "c"]}]
    config = Config(work_dir="w", launch={"target": "slurm", "sweep": sweep})
    assert parse_config(dump_yaml(config).encode(), "x").config == config
