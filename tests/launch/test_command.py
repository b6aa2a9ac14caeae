"""Command: every argument reaches the program as exactly one literal argument, or is refused."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.command import Command

VISIBLE = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")), max_size=12)
SHELL_SYNTAX = st.text(st.sampled_from("ab $`\"'\\|&;<>(){}[]*?~#!=%^-+,.:@/"), max_size=12)
ARGUMENT = st.one_of(VISIBLE, SHELL_SYNTAX)


def shell_words(text: str, shell: str) -> list[str]:
    """The words that `shell` makes of the arguments of `printf '%s\\0' ...` in `text`."""
    output = subprocess.run([shell, "-c", text], capture_output=True, check=True).stdout
    return output.decode().split("\0")[:-1]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ARGUMENT, min_size=1, max_size=30))
@example(
    [
        "",
        "$(touch canary)",
        "`touch canary`",
        "a'b",
        'a"b',
        "\\",
        "-n",
        "--",
        "#SBATCH",
        "%j",
        "~",
        "*",
        "é 🎉",
    ]
)
def test_bash_reads_back_the_same_arguments(arguments: list[str]) -> None:
    command = Command(("printf", "%s\\0", *arguments))
    assert shell_words(command.shell(), "bash") == arguments


def test_sh_reads_back_the_same_arguments() -> None:
    arguments = ["", "a'b", "$HOME", "`id`", "x\\n", "a  b", "!!", "{a,b}", "a;b", "~root", "A=b"]
    assert shell_words(Command(("printf", "%s\\0", *arguments)).shell(), "sh") == arguments


@settings(max_examples=50, deadline=None)
@given(ARGUMENT)
def test_environment_values_arrive_unchanged(value: str) -> None:
    command = Command(("sh", "-c", 'printf "%s\\0" "$RWKV_TEST"'), env={"RWKV_TEST": value})
    assert shell_words(command.shell(), "bash") == [value]


@pytest.mark.parametrize("name", ["plain", "-", "-x", "a b", "$(id)", "quo'te", 'with"double', "~", "#x", "é"])
def test_runs_in_its_directory(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (tmp_path / "elsewhere" / name).mkdir(parents=True)
    environment = os.environ | {"CDPATH": str(tmp_path / "elsewhere")}
    for cwd in (name, str(folder)):
        text = Command(("pwd", "-P"), cwd=cwd).shell()
        run = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.stdout == f"{folder.resolve()}\n"


@pytest.mark.parametrize("program", ["if", "time", "A=b", "a b", "{", "!", "[[", "done", "x$y", "~"])
def test_a_program_named_like_shell_grammar_still_runs(program: str, tmp_path: Path) -> None:
    path = tmp_path / program
    path.write_text('#!/bin/sh\nprintf "%s\\0" "ran" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    text = Command((program, "x y")).shell()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    output = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, check=True).stdout
    assert output == b"ran\0x y\0"


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\u202e", "\udcff"])
@pytest.mark.parametrize("place", ["program", "argument", "value", "cwd"])
def test_control_characters_are_refused_and_the_place_is_named(character: str, place: str) -> None:
    bad = f"a{character}b"
    parts = {
        "program": {"argv": (bad,)},
        "argument": {"argv": ("echo", "x", bad)},
        "value": {"argv": ("echo",), "env": {"NAME": bad}},
        "cwd": {"argv": ("echo",), "cwd": bad},
    }
    where = {"program": "argument 0", "argument": "argument 2", "value": "variable NAME", "cwd": "directory"}
    with pytest.raises(LaunchError, match=where[place]) as caught:
        Command(**parts[place])
    assert str(caught.value).isprintable()
    assert "position 1" in str(caught.value)


@pytest.mark.parametrize("argv", [(), ("",), ("-c", "x"), ("%1",)])
def test_no_program_is_refused(argv: tuple[str, ...]) -> None:
    with pytest.raises(LaunchError, match="names no program"):
        Command(argv)


@pytest.mark.parametrize("name", ["", "A B", "1A", "A-B", "A=B", "A;id", "É", "A\n"])
def test_a_malformed_variable_name_is_refused(name: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(ascii(name)) + ".*environment variable"):
        Command(("echo",), env={name: "x"})


def test_a_string_is_not_an_argv() -> None:
    with pytest.raises(TypeError, match="tuple"):
        Command("echo hello")  # type: ignore[arg-type]


def test_a_command_is_a_value() -> None:
    variables = {"A": "1"}
    command = Command(["echo", "a b"], env=variables, cwd="x")  # type: ignore[arg-type]
    variables["B"] = "2"
    assert command == Command(("echo", "a b"), env={"A": "1"}, cwd="x")
    assert hash(command) == hash(Command(("echo", "a b"), env={"A": "1"}, cwd="x"))
    assert command.shell() == "cd ./x && A=1 echo 'a b'"
