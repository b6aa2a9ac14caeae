"""The command line as text: results on stdout, one sentence and a fixed exit code for every mistake."""

import json
import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rwkv_cluster import errors
from rwkv_cluster.cli import TOP_LEVEL_FIELDS, main, rank, split_overrides
from rwkv_cluster.commands import COMMANDS
from rwkv_cluster.config import Config, TokenizerConfig
from rwkv_cluster.config.field_types import is_section
from rwkv_cluster.config.loader import load_config, parse_config
from rwkv_cluster.config.recipes import find_config
from rwkv_cluster.config.shipped import PARTS, recipes_in_words, shipped_recipes
from rwkv_cluster.errors import EXIT_CODES, ConfigError, Preempted, RWKVClusterError

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def _single_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put stand-ins in place of the library module that a verb calls, so that no test here loads torch."""

    def put(module: str, **functions: Any) -> None:
        stand_in = types.ModuleType(f"rwkv_cluster.{module}")
        for name, function in functions.items():
            setattr(stand_in, name, function)
        parent, _, name = f"rwkv_cluster.{module}".rpartition(".")
        if parent not in sys.modules:
            package = types.ModuleType(parent)
            package.__path__ = []
            monkeypatch.setitem(sys.modules, parent, package)
        monkeypatch.setitem(sys.modules, f"rwkv_cluster.{module}", stand_in)
        monkeypatch.setattr(sys.modules[parent], name, stand_in, raising=False)

    return put


@pytest.fixture
def run_yaml(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text("work_dir: w\nmodel: {n_layer: 2}\n")
    return "run.yaml"


def test_help_lists_every_verb_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{verb}\s+\w", text, re.MULTILINE) for verb in COMMANDS)
    assert all(re.search(rf"^ +{code} +{meaning}$", text, re.MULTILINE) for code, meaning in EXIT_CODES.items())
    assert "--section.field=value" in text


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: rwkv-cluster {verb} ")
    assert "--json" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"rwkv-cluster \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [["train"], ["bench", "nothing"], ["generate", "w", "--tokens=x"]])
def test_a_malformed_command_line_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "error:" in capsys.readouterr().err


def test_split_overrides() -> None:
    argv = ["train", "--model.n_layer=2", "run.yaml", "--data.inputs", "[a, b]", "--json", "--work_dir=x=y",
            "--training.random_seed", "-1"]  # fmt: skip
    expected = ["model.n_layer=2", "data.inputs=[a, b]", "work_dir=x=y", "training.random_seed=-1"]
    assert split_overrides(argv) == (["train", "run.yaml", "--json"], expected)
    assert split_overrides(["train", "--", "--model.n_layer=2"]) == (["train", "--", "--model.n_layer=2"], [])


def test_top_level_fields_are_those_of_the_configuration() -> None:
    leaves = [name for name, field in Config.model_fields.items() if not is_section(field.annotation)]
    assert list(TOP_LEVEL_FIELDS) == leaves


def test_config_prints_a_file_that_loads_to_the_same(run_yaml: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--model.n_embd", "64", run_yaml, "--data.tokenizer.type=angle"]) == 0
    text = capsys.readouterr().out
    expected = load_config(run_yaml, ["model.n_embd=64", "data.tokenizer.type=angle"])
    assert parse_config(text.encode(), "printed").config == expected
    assert re.search(r"^  n_layer: 2 +# run.yaml:2$", text, re.MULTILINE)
    assert re.search(r"^  n_embd: 64 +# --model.n_embd=64$", text, re.MULTILINE)
    assert re.search(r"^  ctx_len: 1024 +# default$", text, re.MULTILINE)
    assert main(["config", run_yaml, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert Config(**printed["config"]) == load_config(run_yaml)
    assert printed["sources"]["model.n_layer"] == "run.yaml:2"


def test_a_work_dir_stands_for_its_own_file_wherever_it_was_moved(tmp_path: Path) -> None:
    folder = tmp_path / "moved [1]"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "config.yaml").write_text("work_dir: /elsewhere\nmodel: {n_layer: 5}\n")
    config = find_config("moved [1]").resolved.config
    assert (config.work_dir, config.model.n_layer) == ("moved [1]", 5)
    assert find_config("moved [1]", ["work_dir=w"]).resolved.config.work_dir == "w"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: this folder holds no configs/config\.yaml"):
        find_config("empty")


@pytest.mark.parametrize("recipe", ["quickstart.yaml", "lora/2.9b-24gb.yaml"])
@pytest.mark.parametrize("folder", ["", "configs/", "./"])
def test_a_shipped_recipe_is_found_from_any_directory(
    recipe: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", f"{folder}{recipe}"]) == 0
    captured = capsys.readouterr()
    assert "work_dir:" in captured.out
    assert re.fullmatch(rf"{re.escape(folder + recipe)} does not exist.* recipe {re.escape(recipe)} .*\n", captured.err)


def test_a_file_of_ones_own_comes_before_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = "quickstart.yaml"
    (tmp_path / recipe).write_text("work_dir: mine\n")
    found = find_config(recipe)
    assert (found.resolved.config.work_dir, found.notice) == ("mine", "")


@pytest.mark.parametrize("argument", ["none.yaml", "other/{}", "/{}", "configs/deep/{}"])
def test_a_missing_file_lists_the_recipes(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = argument.format("quickstart.yaml")
    assert main(["train", path]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"rwkv-cluster: error: {path}: ")
    assert "no such file" in message
    assert recipes_in_words() in message


def test_recipes_are_told_by_their_folders() -> None:
    words = recipes_in_words()
    assert all(recipe in words for recipe in shipped_recipes() if "/" not in recipe)
    folders = {recipe.partition("/")[0] for recipe in shipped_recipes() if "/" in recipe}
    assert {folder for folder in folders if f"{folder}/" in words} == folders - set(PARTS)


ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RWKVClusterError)]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_its_exit_code_and_no_traceback(
    error: type[RWKVClusterError], run_yaml: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Config) -> None:
        raise error("train.jsonl:7: a clear sentence")

    install("train.run", prepare_data=fail)
    assert main(["prepare", run_yaml]) == error.exit_code
    assert error.exit_code in EXIT_CODES
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "rwkv-cluster: error: train.jsonl:7: a clear sentence\n")


def test_an_error_on_another_rank_names_it(
    run_yaml: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert rank() == 3
    assert main(["train", "none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("rwkv-cluster: rank 3: error: none.yaml")
    assert main(["config", run_yaml]) == 0
    assert capsys.readouterr().out == ""


def test_a_bug_keeps_its_traceback(run_yaml: str, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("train.run", prepare_data=lambda config: 1 // 0)
    assert main(["prepare", run_yaml]) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert "ZeroDivisionError" in message
    assert "a bug in rwkv-cluster" in message.splitlines()[-1]


def test_a_code_that_torchrun_loses_is_said(
    run_yaml: str, install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def preempted(config: Config) -> None:
        raise Preempted("stopped by SIGTERM")

    install("train.run", train=preempted)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    lines = []
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        assert main(["train", run_yaml]) == 75
        lines.append(capsys.readouterr().err.splitlines())
    assert [len(some) for some in lines] == [2, 1]
    assert lines[0][1].startswith("rwkv-cluster: rank 0: torchrun makes exit code 1 of this 75.")


def test_ctrl_c_is_exit_130_without_a_traceback(
    run_yaml: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Config) -> None:
        raise KeyboardInterrupt

    install("train.run", prepare_data=interrupted)
    assert main(["prepare", run_yaml]) == 130
    assert capsys.readouterr().err == "rwkv-cluster: interrupted\n"


def test_log_messages_reach_stderr_once_and_only_during_the_verb(
    run_yaml: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("rwkv_cluster.somewhere")

    def initialize(config: Config, *, force: bool) -> Path:
        logger.info("preparing anew: the input changed")
        return Path("w/out/rwkv-init.pth")

    install("train.run", initialize=initialize)
    for _ in range(2):
        assert main(["init", run_yaml]) == 0
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == (
            "w/out/rwkv-init.pth\n",
            "preparing anew: the input changed\n",
        )
    assert not logging.getLogger("rwkv_cluster").handlers


@pytest.mark.parametrize(("arguments", "force"), [([], False), (["--force"], True)])
def test_init_passes_force(arguments: list[str], force: bool, run_yaml: str, install: Install) -> None:
    calls = []

    def initialize(config: Config, *, force: bool) -> Path:
        calls.append((config.model.n_layer, force))
        return Path("x")

    install("train.run", initialize=initialize)
    assert main(["init", *arguments, run_yaml, "--model.n_layer", "7"]) == 0
    assert calls == [(7, force)]


@dataclass(frozen=True)
class StandInResult:
    step: int = 1200
    total_steps: int = 1200
    tokens_seen: int = 614400
    loss: float | None = 1.5
    val_loss: float | None = None
    work_dir: Path = Path("w")
    final_path: Path = Path("w/out/rwkv-final.pth")
    already_complete: bool = False
    ended_early: bool = False
    sample: str | None = "def f(x):"


def test_train_says_what_was_done_where_it_is_and_what_is_next(
    run_yaml: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("train.run", train=lambda config: StandInResult())
    assert main(["train", run_yaml]) == 0
    text = capsys.readouterr().out
    for part in ("done: step 1,200 of 1,200, 614,400 tokens", "training loss 1.5000", "def f(x):",
                 "w/out/rwkv-final.pth", "rwkv-cluster generate w"):  # fmt: skip
        assert part in text
    assert "validation loss" not in text
    assert main(["train", run_yaml, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["final_path"] == "w/out/rwkv-final.pth"


def test_prepare_counts_tokens(run_yaml: str, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    class Manifest(types.SimpleNamespace):
        def model_dump(self, mode: str) -> dict[str, object]:
            return vars(self)

    install(
        "train.run",
        prepare_data=lambda config: Manifest(
            n_tokens=12345, n_documents=67, dtype="uint16", n_trained=None, packing=None
        ),
    )
    assert main(["prepare", run_yaml]) == 0
    assert capsys.readouterr().out == "12,345 tokens in 67 documents (uint16), in w/data\n"
    assert main(["prepare", run_yaml, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_documents"] == 67


@dataclass(frozen=True)
class StandInEvaluation:
    loss: float
    n_tokens: int
    n_bytes: int | None = None
    perplexity: float = 7.5
    bits_per_byte: float | None = None


@pytest.mark.parametrize("weights", [None, "w/out/rwkv-3.pth"])
def test_eval_reports_the_loss_of_the_weights_that_were_named(
    weights: str | None, run_yaml: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def evaluate_run(config: Config, path: Path | None, state: Path | None) -> StandInEvaluation:
        calls.append(path)
        return StandInEvaluation(2.0, 1000)

    install("train.evaluate", evaluate_run=evaluate_run)
    assert main(["eval", run_yaml, *(["--weights", weights] if weights else [])]) == 0
    assert capsys.readouterr().out == "validation loss 2.0000, perplexity 7.5000, 1,000 tokens\n"
    assert calls == [Path(weights) if weights else None]
    assert main(["eval", run_yaml, "--json"]) == 0
    expected = {"loss": 2.0, "n_tokens": 1000, "n_bytes": None, "perplexity": 7.5, "bits_per_byte": None}
    assert json.loads(capsys.readouterr().out) == expected
    install("train.evaluate", evaluate_run=lambda *_: StandInEvaluation(2.0, 1000, 4000, 7.5, 0.72135))
    assert main(["eval", run_yaml]) == 0
    assert "perplexity 7.5000, 0.7214 bits per byte, 1,000 tokens" in capsys.readouterr().out


def test_generate_passes_its_options(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    def generate_text(source: Path, prompt: str, **options: object) -> str:
        return f"{source}|{prompt}|{options}"

    install("train.sample", generate_text=generate_text)
    arguments = [
        "generate",
        "w",
        "--prompt",
        "a b",
        "--tokens",
        "5",
        "--temperature",
        "0",
        "--top-p",
        "1",
        "--seed",
        "9",
    ]
    assert main(arguments) == 0
    options = {"n_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 9}
    options |= {"tokenizer": None, "adapter": None, "state": None}
    assert capsys.readouterr().out == f"w|a b|{options}\n"
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "a b", "text": f"w|a b|{options}"}


def test_generate_takes_the_tokenizer_of_a_foreign_file(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = []

    def generate_text(source: Path, prompt: str, *, tokenizer: TokenizerConfig, **options: object) -> str:
        chosen.append(tokenizer)
        return ""

    install("train.sample", generate_text=generate_text)
    assert main(["generate", "x.pth", "--tokenizer", "angle"]) == 0
    assert main(["generate", "x.pth", "--vocab-file", "[odd] name.txt"]) == 0
    assert chosen == [TokenizerConfig("angle"), TokenizerConfig("generic", "[odd] name.txt")]
    assert main(["generate", "x.pth", "--tokenizer", "anglo"]) == 2
    assert re.search("tokenizer.*'anglo'.*byte, integer, angle", capsys.readouterr().err)


def test_bench_passes_its_arguments_through(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(
        "bench.wkv",
        run=lambda arguments: {"given": arguments},
        format=lambda result: f"table of {result['given']}",
    )
    assert main(["bench", "wkv", "--threads", "2", "--quick"]) == 0
    assert capsys.readouterr().out == "table of ['--threads', '2', '--quick']\n"
    assert main(["bench", "wkv", "--json", "--threads", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == {"given": ["--threads", "2"]}


def command(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "rwkv_cluster", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


def test_python_m_is_the_command(run_yaml: str) -> None:
    run = command("config", run_yaml)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("work_dir: w")
    assert command("train", "none.yaml").returncode == 2


def test_a_reader_that_leaves_early_is_no_error(run_yaml: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        run = subprocess.run(
            [sys.executable, "-m", "rwkv_cluster", "config", run_yaml],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (run.returncode, run.stderr) == (141, "")


def test_a_terminal_without_unicode_still_shows_every_name(tmp_path: Path) -> None:
    (tmp_path / "é🎉.yaml").write_text("work_dir: 🎉\n")
    run = command("config", "é🎉.yaml", env={"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0
    assert "\\U0001f389" in run.stdout


@pytest.mark.system
def test_nothing_looks_for_garbage_while_torch_is_imported(tmp_path: Path) -> None:
    """Nor later in what that made; and where torch was there before, as in a program of its own, nothing is changed."""
    program = """
import gc, json, sys
from rwkv_cluster.cli import main
ours = lambda: sys.modules.get("rwkv_cluster.interchange.checkpoint_info")
importing = lambda: "torch" in sys.modules and not hasattr(ours(), "inspect_rwkv_checkpoint")
searches = []
gc.callbacks.append(lambda phase, info: searches.append(phase) if importing() else None)
found = []
for _ in range(2):
    searches.clear()
    code = main(["inspect", "none.pth"])
    found.append([code, len(searches), gc.isenabled(), gc.get_freeze_count()])
print(json.dumps(found))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, timeout=100)
    first, again = json.loads(run.stdout)
    assert first[:3] == [4, 0, True]
    assert first[3] > 100_000
    assert again[:3] == first[:3]
    assert 0 < again[3] <= first[3]


@pytest.mark.parametrize(
    ("redirection", "arguments", "code", "said"),
    [
        ("2>&-", "config run.yaml", 0, ""),
        (">&- 2>&- <&-", "config run.yaml", 0, ""),
        ("2>/dev/full", "config run.yaml", 0, ""),
        ("2>&-", "config run.yaml --model.n_layer=x", 2, ""),
        ("2>/dev/full", "config run.yaml --model.n_layer=x", 2, ""),
        (">/dev/full", "config run.yaml", 1, "No space left on device"),
        (">/dev/full", "--version", 1, "No space left on device"),
    ],
)
def test_streams_that_are_closed_or_full(redirection: str, arguments: str, code: int, said: str) -> None:
    Path("run.yaml").write_text("work_dir: w\n")
    command = f"{sys.executable} -m rwkv_cluster {arguments} {redirection}"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert run.returncode == code
    assert said in run.stderr
    assert "Traceback" not in run.stderr
    assert len(run.stderr.splitlines()) == (1 if said else 0)


def test_no_file_takes_the_number_of_a_closed_stream() -> None:
    script = "import os, sys; from rwkv_cluster.cli import main; main(['--version']); print(os.open('a', os.O_CREAT))"
    command = f'{sys.executable} -c "{script}" 2>&- <&-'
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) > 2


@pytest.mark.system
def test_training_needs_neither_matplotlib_nor_a_home_directory(tmp_path: Path) -> None:
    """A notebook's MPLBACKEND ends the import of matplotlib, which Lightning's metrics would load to draw nothing."""
    program = """if 1:
    import sys
    from rwkv_cluster.commands.loading import importing_torch
    with importing_torch():
        import rwkv_cluster.train.run
    print({"matplotlib", "transformers"} & set(sys.modules) or False)
    """
    environment = {"PATH": os.environ["PATH"], "MPLBACKEND": "module://nowhere"}
    run = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, env=environment)
    assert (run.stdout, run.stderr) == ("False\n", "")
